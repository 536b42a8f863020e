"""Guidance away from what two attention heads do less of. Runs on a CPU."""

import torch

from dit_accel import accelerate_pipeline, acceleration_report
from dit_accel.models import load_pipeline

STEPS = 12
pipe = load_pipeline("tiny-sd3")
# Pairs of layer and head; `dit-accel headhunt` searches for heads that serve an aim.
accelerate_pipeline(pipe, "softpag", heads=[(4, 0), (4, 1)], strength=0.5, scale=3.0)
image = pipe(
    "a small blue ring on a gray background",
    height=256,
    width=256,
    num_inference_steps=STEPS,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("ring.png")
print(acceleration_report(pipe))
