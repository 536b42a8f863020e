"""Measure clips against dense ones, and how many of the prompts' attributes came out. On a CPU."""

import torch

from dit_accel import accelerate_pipeline, restore_pipeline
from dit_accel.eval.fidelity import fidelity
from dit_accel.models import load_pipeline

STEPS = 8
PROMPTS = ("a large red star on a gray background", "a small blue ring on a black background")
pipe = load_pipeline("tiny-sd3")


def pictures():
    """Return a picture ``[1, 3, H, W]`` for each prompt, from the same noise every time."""
    for seed, prompt in enumerate(PROMPTS):
        noise = torch.Generator().manual_seed(seed)
        arguments = {"height": 256, "width": 256, "num_inference_steps": STEPS}
        yield pipe(prompt, **arguments, generator=noise, output_type="pt").images


dense = list(pictures())
accelerate_pipeline(pipe, "easycache")
for prompt, near, exact in zip(PROMPTS, pictures(), dense, strict=True):
    print(prompt, fidelity(near, exact))
restore_pipeline(pipe)
# Whole suites, with a report: dit-accel eval --model tiny-sd3 --methods easycache -o runs/first
