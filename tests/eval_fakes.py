"""A run whose samples cost nothing; as a script, one process of it under a launcher.

python -m torch.distributed.run --nproc-per-node 2 tests/eval_fakes.py FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_accel.eval.candidates import Candidate, make_candidates
from dit_accel.eval.runner import EvalRun, run_evaluation
from dit_accel.eval.sampling import Sampled
from dit_accel.eval.share import join_processes
from dit_accel.eval.suites import load_suite
from dit_accel.generation import Batch, GenerationRequest


@dataclass
class FakeSampler:
    """Draws a shade that depends on method, prompt and seed alone.

    Attributes:
        size: frames, channels, height and width of every sample.
        brightness: of all samples.
        failing: labels and prompts that raise instead.
        asked: what was asked for, in order.
    """

    size: tuple[int, int, int, int] = (1, 3, 24, 32)
    brightness: float = 1.0
    failing: set[tuple[str, str]] = field(default_factory=set)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def sample(self, candidate: Candidate, requests: Sequence[GenerationRequest]) -> Sampled:
        self.asked += [(candidate.label, request.prompt) for request in requests]
        for request in requests:
            if (candidate.label, request.prompt) in self.failing:
                raise RuntimeError(f"no {request.prompt} today")
        frames = torch.stack([self._frames(candidate, request) for request in requests])
        speed = {"generate_s": 1.0 + len(candidate.label), "step_s": 0.1, "energy_j": None}
        speed |= {"peak_memory_gib": None, "batch": len(requests), "repeats": 1}
        return Sampled(Batch(frames, frames.mean(1), 2, 2.0, 1.0), speed)

    def _frames(self, candidate: Candidate, request: GenerationRequest) -> torch.Tensor:
        colour = torch.rand((3, 1, 1), generator=torch.Generator().manual_seed(request.seed))
        shaded = colour * torch.linspace(0.5, self.brightness, self.size[-1])
        difference = sum(candidate.label.encode()) % 7 / 50 if not candidate.dense else 0.0
        return (shaded * (1 - difference)).expand(self.size).clone()


def fake_run(**changes: Any) -> EvalRun:
    """Return a run of six prompts, two at a time, with two methods beside dense."""
    settings: dict[str, Any] = {
        "model": "tiny-sd3",
        "suite": load_suite("standard", first=6),  # of no world: reading pictures takes long
        "candidates": make_candidates(["gna", "radial"]),
        "batch": 2,
    }
    return EvalRun(**{**settings, **changes})


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    """Return results without what differs between two runs of the same code: times, and when."""
    kept = {n: v for n, v in results.items() if n not in ("manifest", "sessions")}
    for part in ("summary", "rows"):
        kept[part] = [{n: v for n, v in row.items() if n != "speed"} for row in kept[part]]
    return kept


if __name__ == "__main__":
    share, _ = join_processes("cpu")
    run_evaluation(fake_run(), Path(sys.argv[1]), share=share, sampler=FakeSampler())
