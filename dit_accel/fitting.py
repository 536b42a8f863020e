"""Fits what TeaCache and MagCache need to know of a model, on a few generations of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from dit_accel.acceleration import accelerate_pipeline, restore_pipeline
from dit_accel.caching.gates import Gate, Look, relative_l1
from dit_accel.caching.predictors import Predictor, When
from dit_accel.caching.stack import Setting, StackCache
from dit_accel.calibration import calls_for, run_latents
from dit_accel.errors import OptionError
from dit_accel.generation import GenerationRequest, Progress
from dit_accel.pipelines.base import Streams

DEGREE = 4
"""Of TeaCache's polynomial."""


@dataclass(frozen=True)
class _Measuring(StackCache):
    """Reuses nothing; notes what TeaCache's and MagCache's numbers are made of."""

    name: ClassVar[str] = "measuring"

    changes: list[tuple[float, float]] = field(default_factory=list, compare=False)
    ratios: dict[tuple[str, int], list[float]] = field(default_factory=dict, compare=False)

    def gate(self, setting: Setting) -> Gate:
        """Watch the first block's modulated input and the transformer's output."""
        return _Changes(self.changes)

    def predictor(self, setting: Setting) -> Predictor:
        """Watch the stack's residual."""
        return _Sizes(self.ratios, setting.moment.branch)


class _Changes(Gate):
    def __init__(self, changes: list[tuple[float, float]]) -> None:
        self._changes = changes
        self._before: tuple[Tensor, Tensor] | None = None
        self._modulated: Tensor | None = None

    def reusable(self, look: Look) -> bool:
        return False

    def settled(self, look: Look, full: bool) -> None:
        self._modulated = look.modulated

    def finished(self, output: Tensor, full: bool) -> None:
        if self._modulated is not None:
            if self._before is not None:
                change = relative_l1(self._modulated, self._before[0])
                self._changes.append((change, relative_l1(output, self._before[1])))
            self._before = self._modulated, output


class _Sizes(Predictor):
    every_step = True

    def __init__(self, ratios: dict[tuple[str, int], list[float]], branch: str) -> None:
        super().__init__()
        self._ratios, self._branch = ratios, branch

    def update(self, when: When, residual: Streams) -> None:
        size = residual.video.float().norm(dim=-1)
        if self._points:
            before = self._points[0][1].video.float().norm(dim=-1).clamp_min(1e-12)
            ratio = float((size / before).mean())
            self._ratios.setdefault((self._branch, when.step), []).append(ratio)
        super().update(when, residual)


def fit_model(
    pipe: Any, requests: Sequence[GenerationRequest], *, progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """Fit TeaCache's coefficients and MagCache's ratios; leave the pipeline as it is.

    TeaCache wants some 50 prompts, MagCache is content with one. Where two transformers share the
    steps (Wan 2.2), no polynomial serves both, and MagCache's ratios alone are fitted.

    Returns:
        Options by method, for `accelerate_pipeline` or a model's ``caching.json``.
    """
    if not requests:
        raise OptionError("no prompts: give at least one.")
    measuring = _Measuring(min_steps=0)
    try:
        accelerate_pipeline(pipe, measuring)
        for index, call in enumerate(calls_for(pipe, requests)):
            run_latents(pipe, call)
            if progress is not None:
                progress("prompts", index + 1, len(requests))
    finally:
        restore_pipeline(pipe)
    options: dict[str, dict[str, Any]] = {"magcache": {}}
    if getattr(pipe, "transformer_2", None) is None:
        changes = np.asarray([pair for pair in measuring.changes if np.isfinite(pair).all()])
        coefficients = np.polyfit(changes[:, 0], changes[:, 1], DEGREE)
        options["teacache"] = {"coefficients": coefficients.tolist(), "indicator": "modulated"}
    steps = 1 + max(step for _, step in measuring.ratios)
    for branch in {branch for branch, _ in measuring.ratios}:
        name = "uncond_ratios" if branch == "uncond" else "ratios"
        means = (measuring.ratios.get((branch, step), [1.0]) for step in range(steps))
        options["magcache"][name] = [round(sum(m) / len(m), 5) for m in means]
    return options
