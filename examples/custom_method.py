"""A method of your own: each frame sees the frames near it. Runs on a CPU."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dit_accel import accelerate_pipeline, acceleration_report
from dit_accel.methods.base import StaticMethod
from dit_accel.models import load_pipeline
from dit_accel.plan import PARTIAL


@dataclass(frozen=True)
class NearFrames(StaticMethod):
    """Each frame sees the frames that are at most ``reach`` away."""

    name: ClassVar[str] = "near_frames"

    reach: int = 1

    def allowed(self, layout, device="cpu"):
        frame = layout.grid[1] * layout.grid[2]
        return lambda query, key: (query // frame - key // frame).abs() <= self.reach

    def tile_states(self, layout, order, device="cpu"):
        frame = layout.grid[1] * layout.grid[2]
        first = torch.arange(0, layout.video_length, self.block_size, device=device)
        last = (first + self.block_size - 1).clamp(max=layout.video_length - 1)
        gap = first[:, None] // frame - last // frame
        near = torch.maximum(gap, gap.T) <= self.reach
        return near.to(torch.int8) * PARTIAL  # always a safe answer; FULL would spare masks


STEPS = 6
pipe = load_pipeline("tiny-wan")
accelerate_pipeline(pipe, NearFrames(block_size=32), dense_steps=2, min_tokens=0)
size = {"height": 128, "width": 128, "num_frames": 17}
pipe("a large red circle moving right on a black background", **size, num_inference_steps=STEPS)
print(acceleration_report(pipe))
