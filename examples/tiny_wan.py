"""The bundled model, on any machine and without a network: a video in seconds."""

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

from dit_accel import accelerate_pipeline, acceleration_report
from dit_accel.models import model_folder

pipe = WanPipeline.from_pretrained(model_folder("tiny-wan"), torch_dtype=torch.float32)
pipe = accelerate_pipeline(pipe, method="radial")
video = pipe(
    prompt="a large red circle moving right on a blue background",
    num_inference_steps=16,
    guidance_scale=4.0,
    height=256,
    width=256,
    num_frames=33,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "circle.mp4", fps=16)
print(acceleration_report(pipe))
