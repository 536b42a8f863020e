"""HunyuanVideo with GNA at the GNA paper's setting. Needs a GPU."""

import torch
from diffusers import HunyuanVideoPipeline
from diffusers.utils import export_to_video

from dit_accel import accelerate_pipeline, acceleration_report

pipe = HunyuanVideoPipeline.from_pretrained(
    "hunyuanvideo-community/HunyuanVideo", torch_dtype=torch.bfloat16
)
pipe.enable_model_cpu_offload()
pipe.vae.enable_tiling()
pipe = accelerate_pipeline(pipe, method="gna")
video = pipe(
    prompt="A paper boat drifts down a rain gutter, close to the water.",
    height=768,
    width=1280,
    num_frames=117,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "boat.mp4", fps=24)
print(acceleration_report(pipe))
