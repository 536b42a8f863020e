"""A clip twice as large as its model was trained for. Runs on a CPU, in some minutes."""

import torch
from diffusers.utils import export_to_video

from dit_accel import accelerate_pipeline, acceleration_report
from dit_accel.models import load_pipeline

STEPS = 8
FRAMES = 9
SIZE = 512
pipe = load_pipeline("tiny-wan")
accelerate_pipeline(pipe, "freeswim", native_size=(256, 256), refresh_every=2)
video = pipe(
    "a large red circle moving right on a dark blue background",
    height=SIZE,
    width=SIZE,
    num_frames=FRAMES,
    num_inference_steps=STEPS,
    guidance_scale=3.0,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, "large.mp4", fps=16)
print(acceleration_report(pipe))
