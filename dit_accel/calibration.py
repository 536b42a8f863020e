"""Fits caches to a pipeline: coefficients and ratios for a model, a strength for a wish.

All of it generates a few prompts on the user's own pipeline. Speed is counted in block calls, which
are the same on every machine; error is how far the final latents are from the dense ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dit_accel.acceleration import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.caching.base import Cache
from dit_accel.caching.gates import Gate, Look, relative_l1
from dit_accel.caching.predictors import Predictor, When
from dit_accel.caching.stack import Setting, StackCache
from dit_accel.errors import OptionError
from dit_accel.generation import GenerationRequest, Progress, pipeline_arguments
from dit_accel.pipelines.base import Streams
from dit_accel.registry import method_class

DEGREE = 4
"""Of TeaCache's polynomial."""
BISECTIONS = 4
LADDER = (0.25, 0.5, 1.0, 2.0, 4.0, 16.0)
"""Multiples of a cache's usual strengths that are tried first."""


@dataclass(frozen=True)
class Point:
    """One strength on the curve.

    Attributes:
        strength: value of the cache's strength option.
        speedup: block calls without the cache over block calls with it.
        error: mean|latents - dense latents| / mean|dense latents|, mean over prompts.
    """

    strength: float
    speedup: float
    error: float


@dataclass(frozen=True)
class Calibration:
    """What `calibrate_cache` found.

    Attributes:
        method: name of the cache.
        options: to give to `accelerate_pipeline`, the strength among them.
        chosen: the point that was chosen.
        curve: all points that were tried, weak to strong.
    """

    method: str
    options: dict[str, Any]
    chosen: Point
    curve: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return asdict(self)


def calibrate_cache(
    pipe: Any,
    method: str,
    requests: Sequence[GenerationRequest],
    *,
    target_speedup: float | None = None,
    max_error: float | None = None,
    options: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Choose a cache's strength by a short probe, and leave the pipeline as it is.

    Args:
        pipe: a pipeline of a known family.
        method: name of a cache.
        requests: a few prompts, with few steps and a small size if time is short. More steps
            reuse more, so probe with the number of steps that will be used.
        target_speedup: take the weakest strength that skips this much, in block calls.
        max_error: take the strongest one whose error is at most this. One of the two is needed.
        options: other options of the cache.
        progress: told of every generation.

    Raises:
        OptionError: if not exactly one goal is given, the method is no cache, or no strength
            reaches the goal (the message says how far it goes).
    """
    if (target_speedup is None) == (max_error is None):
        raise OptionError("give one goal: target_speedup=, such as 2, or max_error=, such as 0.1.")
    cls = method_class(method)
    if not issubclass(cls, Cache):
        raise OptionError(f"{method!r} is no cache: calibrate one of list_methods('cache').")
    if not requests:
        raise OptionError("no prompts: give at least one.")
    probe = _Probing(pipe, cls, requests, dict(options or {}), progress)

    def reached(point: Point) -> bool:
        """Whether this is at least as strong as the goal asks for."""
        if target_speedup is not None:
            return point.speedup >= target_speedup
        return point.error > (max_error or 0.0)

    points = [probe.point(value) for value in _ladder(cls)]
    strong = next((i for i, point in enumerate(points) if reached(point)), None)
    if strong is not None and strong > 0 and isinstance(cls.strengths[0], float):
        low, high = points[strong - 1], points[strong]
        for _ in range(BISECTIONS):
            middle = probe.point((low.strength * high.strength) ** 0.5)
            points.append(middle)
            low, high = (low, middle) if reached(middle) else (middle, high)
    curve = tuple(sorted(points, key=lambda point: point.strength))
    fitting = [p for p in curve if reached(p) == (target_speedup is not None)]
    if not fitting:
        best = max(p.speedup for p in curve), min(p.error for p in curve)
        raise OptionError(
            f"{method} does not get there: at most {best[0]:.2f}x, at least an error of "
            f"{best[1]:.3f} on these prompts. Choose another goal or another cache."
        )
    chosen = fitting[0] if target_speedup is not None else fitting[-1]
    found = {**(options or {}), cls.strength: chosen.strength}
    return Calibration(method, found, chosen, curve)


def _ladder(cls: type[Cache]) -> list[float]:
    if isinstance(cls.strengths[0], int):
        return list(range(1, int(cls.strengths[-1]) + 3))
    values = {cls.strengths[1] * factor for factor in LADDER}
    return sorted(value for value in values if value < 1 or cls.strength != "fraction")


class _Probing:
    """Generates the prompts densely once, and with a strength as often as asked."""

    def __init__(
        self,
        pipe: Any,
        cls: type[Cache],
        requests: Sequence[GenerationRequest],
        options: dict[str, Any],
        progress: Progress | None,
    ) -> None:
        self.pipe, self.cls, self.requests, self.options = pipe, cls, requests, options
        self.progress, self.done = progress, 0
        self.dense = [self._latents(request) for request in requests]

    def point(self, strength: float) -> Point:
        """Measure one strength."""
        errors, run, calls = [], 0, 0
        options = {**self.options, self.cls.strength: strength}
        try:
            accelerate_pipeline(self.pipe, self.cls.name, **options)
            for request, dense in zip(self.requests, self.dense, strict=True):
                errors.append(relative_l1(self._latents(request), dense))
                report = acceleration_report(self.pipe)
                calls += report.block_calls
                run += sum(sum(step.ran) for step in report.steps)
        finally:
            restore_pipeline(self.pipe)
        return Point(strength, calls / run, sum(errors) / len(errors))

    def _latents(self, request: GenerationRequest) -> Tensor:
        latents = run_latents(self.pipe, request)
        self.done += 1
        if self.progress is not None:
            rungs = 1 + len(_ladder(self.cls)) + BISECTIONS
            self.progress("generations", self.done, rungs * len(self.requests))
        return latents


def run_latents(pipe: Any, request: GenerationRequest) -> Tensor:
    """Generate a request and return its final latents."""
    pipe.set_progress_bar_config(disable=True)
    output = pipe(
        **pipeline_arguments(pipe, request),
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
    )
    latents: Tensor = output.frames if hasattr(output, "frames") else output.images
    return latents


# ------------------------------------------------------------------- coefficients and ratios


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

    TeaCache wants some 50 prompts, MagCache is content with one.

    Returns:
        Options by method, for `accelerate_pipeline` or a model's ``caching.json``.
    """
    if not requests:
        raise OptionError("no prompts: give at least one.")
    measuring = _Measuring(min_steps=0)
    try:
        accelerate_pipeline(pipe, measuring)
        for index, request in enumerate(requests):
            run_latents(pipe, request)
            if progress is not None:
                progress("prompts", index + 1, len(requests))
    finally:
        restore_pipeline(pipe)
    changes = np.asarray([pair for pair in measuring.changes if np.isfinite(pair).all()])
    coefficients = np.polyfit(changes[:, 0], changes[:, 1], DEGREE)
    options: dict[str, dict[str, Any]] = {
        "teacache": {"coefficients": coefficients.tolist(), "indicator": "modulated"},
        "magcache": {},
    }
    steps = 1 + max(step for _, step in measuring.ratios)
    for branch in {branch for branch, _ in measuring.ratios}:
        name = "uncond_ratios" if branch == "uncond" else "ratios"
        means = (measuring.ratios.get((branch, step), [1.0]) for step in range(steps))
        options["magcache"][name] = [round(sum(m) / len(m), 5) for m in means]
    return options
