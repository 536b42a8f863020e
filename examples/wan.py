"""Wan 2.1 text to video, dense against Radial Attention. Needs a GPU."""

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

from dit_accel import accelerate_pipeline, acceleration_report

pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-14B-Diffusers", torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()
pipe = accelerate_pipeline(pipe, method="radial")
video = pipe(
    prompt="A red fox runs through fresh snow, its tail swaying, low winter sun.",
    height=720,
    width=1280,
    num_frames=81,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "fox.mp4", fps=16)
print(acceleration_report(pipe))
