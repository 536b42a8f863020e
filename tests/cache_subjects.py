"""Tiny pipelines of the four families, and options under which every cache skips something."""

from __future__ import annotations

from typing import Any

import torch
from tiny_pipelines import TINY_PIPELINES, run_tiny

from dit_accel.report import AccelerationReport

STEPS = 12
GUIDED: dict[str, Any] = {"true_cfg_scale": 3.0, "negative_prompt": "blurry"}
SUBJECTS: dict[str, dict[str, Any]] = {
    "wan": {},
    "wan22": {},
    "hunyuan": GUIDED,
    "flux": GUIDED,
    "sd3": {},
}

ACTIVE: dict[str, dict[str, Any]] = {
    "first_block_cache": {"threshold": 100.0},
    "dual_block_cache": {"threshold": 100.0, "first_blocks": 1, "last_blocks": 1, "first_steps": 2},
    "teacache": {"threshold": 0.3, "coefficients": (1.0, 0.0)},
    "magcache": {"threshold": 0.1, "ratios": (1.0, 0.99) * 6},
    "taylorseer": {},
    "easycache": {"threshold": 0.5},
    "seacache": {"threshold": 1.0},
    "profiling_cache": {"blocks": (0, 1)},
    "pab": {"window": (50.0, 990.0)},
    "unconditional_cache": {"every": 3, "first_steps": 2},
}
"""Options under which each cache skips something on tiny models."""

OFF: dict[str, dict[str, Any]] = {
    **{
        name: ACTIVE[name] | {"threshold": 0.0}
        for name in (
            *("first_block_cache", "dual_block_cache", "teacache", "magcache"),
            *("easycache", "seacache"),
        )
    },
    "taylorseer": {"interval": 1},
    "profiling_cache": {"blocks": (0, 1), "longest": 1, "shortest": 1},
    "pab": {"self_every": 1, "cross_every": 1},
    "unconditional_cache": {"every": 1},
}
"""Options of no strength: everything runs."""


class Subject:
    """A tiny pipeline with guidance on."""

    def __init__(self, name: str) -> None:
        build, arguments = TINY_PIPELINES[name]
        self.name, self.pipe = name, build()
        self.arguments = arguments | SUBJECTS[name]

    def run(self, **overrides: Any) -> torch.Tensor:
        """Generate with the pipeline as it is now."""
        return run_tiny(self.pipe, self.arguments | {"num_inference_steps": STEPS}, **overrides)

    @property
    def session(self) -> Any:
        """The attached cache's working state."""
        return self.pipe._dit_accel.runtime.sessions[0]


def skipped(report: AccelerationReport) -> int:
    """Count what was left out: block calls, and attention calls inside blocks."""
    blocks = sum(not ran for step in report.steps for ran in step.ran)
    return blocks + sum(step.attention_reused for step in report.steps)


def marks(report: AccelerationReport, branch: str) -> str:
    """Return one mark per step of a branch: # in full, . reused."""
    return "".join(
        "." if not all(step.ran) or step.attention_reused else "#"
        for step in report.steps
        if step.branch == branch
    )
