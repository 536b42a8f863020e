"""A cache as strong as an error allows: strengths are tried out first. Runs on a CPU."""

import torch

from dit_accel import accelerate_pipeline, acceleration_report
from dit_accel.models import load_pipeline

STEPS = 12
call = {"prompt": "a large red star on a gray background", "num_inference_steps": STEPS}
call |= {"height": 128, "width": 128}

pipe = load_pipeline("tiny-sd3")
accelerate_pipeline(pipe, "easycache", max_error=0.1, probe=call)
image = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
image.save("star.png")
print(acceleration_report(pipe))  # the strengths tried, and which blocks ran in which step
