"""Stable Diffusion 3.5 at 1440 x 1440, and the same pipeline dense again. Needs a GPU."""

import torch
from diffusers import StableDiffusion3Pipeline

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline

pipe = StableDiffusion3Pipeline.from_pretrained(
    "stabilityai/stable-diffusion-3.5-large", torch_dtype=torch.bfloat16
)
pipe.enable_model_cpu_offload()


def generate():
    """Return the same picture for the same attention."""
    generator = torch.Generator().manual_seed(0)
    prompt = "A lighthouse in a storm, oil painting."
    return pipe(prompt=prompt, height=1440, width=1440, generator=generator).images[0]


accelerate_pipeline(pipe, method="gna", density=0.5)
generate().save("lighthouse.png")
print(acceleration_report(pipe))
restore_pipeline(pipe)
generate().save("lighthouse.dense.png")
