"""FLUX.1-dev at 2048 x 2048 with half of the attention. Needs a GPU."""

import torch
from diffusers import FluxPipeline

from dit_accel import accelerate_pipeline, acceleration_report

pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()
pipe = accelerate_pipeline(pipe, method="gna", density=0.5)
image = pipe(
    prompt="A street market at dusk, lanterns, wet cobblestones, film photograph.",
    height=2048,
    width=2048,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("market.png")
print(acceleration_report(pipe))
