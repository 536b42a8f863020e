"""Two methods beside dense, from the same noise: how near and how fast. Runs on a CPU."""

import time

import torch

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.eval.fidelity import psnr
from dit_accel.models import load_pipeline

STEPS = 8
pipe = load_pipeline("tiny-flux")


def generate():
    """Return the same picture for the same attention, and the seconds it took."""
    began = time.perf_counter()
    noise = torch.Generator().manual_seed(0)
    prompt = "two red stars above a small blue ring on a gray background"
    arguments = {"height": 256, "width": 256, "num_inference_steps": STEPS, "output_type": "pt"}
    image = pipe(prompt, **arguments, generator=noise).images
    return image, time.perf_counter() - began


dense, seconds = generate()
print(f"dense: {seconds:.1f} s")
for method in ("gna", "pisa"):
    accelerate_pipeline(pipe, method, density=0.6, min_tokens=0, block_size=32)
    image, seconds = generate()
    density = acceleration_report(pipe).density
    print(f"{method}: {seconds:.1f} s, density {density:.2f}, {psnr(image, dense):.1f} dB to dense")
restore_pipeline(pipe)
