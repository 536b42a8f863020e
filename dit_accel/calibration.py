"""Chooses a cache's strength for a wish, by a short probe on the user's own pipeline.

Speed is counted in block calls, which are the same on every machine; error is how far the final
latents are from those of the pipeline without any acceleration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.acceleration import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.caching.base import Cache
from dit_accel.caching.gates import relative_l1
from dit_accel.composition import MethodChoice, members
from dit_accel.errors import OptionError
from dit_accel.generation import GenerationRequest, Progress, pipeline_arguments
from dit_accel.registry import method_class

TRIES = 6
"""Strengths that are tried for a goal, beside those that are known."""
NEAR = 0.05
"""Share by which a goal may be overshot, or two strengths differ, without another try."""


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
class Goal:
    """What is wished for: one of the two.

    Attributes:
        target_speedup: the weakest strength that skips this much, in block calls.
        max_error: the strongest one whose error is at most this.

    Raises:
        OptionError: if not exactly one is given, or it is no possible number.
    """

    target_speedup: float | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if (self.target_speedup is None) == (self.max_error is None):
            raise OptionError(
                "give one goal: target_speedup=, such as 2, or max_error=, such as 0.1."
            )
        if self.target_speedup is not None and not 1 < self.target_speedup < float("inf"):
            raise OptionError(f"target_speedup={self.target_speedup!r} must be over 1.")
        if self.max_error is not None and not 0 < self.max_error < float("inf"):
            raise OptionError(f"max_error={self.max_error!r} must be over 0.")

    def met(self, weaker: Point | None, stronger: Point | None) -> bool:
        """Whether no strength between two points would serve much better."""
        if weaker and stronger and stronger.strength <= (1 + NEAR) * weaker.strength:
            return True
        if self.target_speedup is not None:
            return stronger is not None and stronger.speedup <= (1 + NEAR) * self.target_speedup
        return weaker is not None and weaker.error >= (1 - NEAR) * (self.max_error or 0.0)

    def reached(self, point: Point) -> bool:
        """Whether a point is at least as strong as the goal asks for."""
        if self.target_speedup is not None:
            return point.speedup >= self.target_speedup
        return point.error > (self.max_error or 0.0)


@dataclass(frozen=True)
class Calibration:
    """What `calibrate_cache` found.

    Attributes:
        method: name of the cache.
        options: of that cache, the strength among them, to give to `accelerate_pipeline`.
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
    method: MethodChoice,
    requests: Sequence[GenerationRequest],
    *,
    target_speedup: float | None = None,
    max_error: float | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Choose a cache's strength by a short probe, and leave the pipeline as it is.

    Args:
        pipe: a pipeline of a known family, not accelerated.
        method: name of a cache, or a list of names with one cache among them: an attention method
            changes what a cache finds.
        requests: a few prompts, with a small size if time is short. More steps reuse more, so
            probe with the number of steps that will be used.
        target_speedup: see `Goal`; or ``max_error``.
        options: other keyword arguments of `accelerate_pipeline`.
        progress: told of every generation.

    Raises:
        OptionError: if not exactly one goal is given, there is no cache among the methods, or no
            strength reaches the goal (the message says how far it goes).
    """
    goal = Goal(target_speedup, max_error)
    probe = CacheProbe(pipe, method, requests, options, progress=progress)
    weaker, stronger = probe.search(goal)
    chosen = stronger if target_speedup is not None else weaker
    if chosen is None:
        fastest = max(point.speedup for point in probe.curve)
        nearest = min(point.error for point in probe.curve)
        raise OptionError(
            f"{probe.cache.name} does not get there: at most {fastest:.2f}x, at least an error of "
            f"{nearest:.3f} on these prompts. Choose another goal or another cache."
        )
    own = {**probe.own_options, probe.cache.strength: chosen.strength}
    return Calibration(probe.cache.name, own, chosen, probe.curve)


class CacheProbe:
    """Generates some prompts densely once, and with a cache's strength as often as asked.

    Args:
        pipe, method, requests, options, progress: see `calibrate_cache`.
        batch: prompts generated at once; they must then differ in prompt and seed alone.
        known: points measured earlier under the same circumstances.
    """

    def __init__(
        self,
        pipe: Any,
        method: MethodChoice,
        requests: Sequence[GenerationRequest],
        options: Mapping[str, Any] | None = None,
        *,
        batch: int = 1,
        known: Sequence[Point] = (),
        progress: Progress | None = None,
    ) -> None:
        if not requests:
            raise OptionError("no prompts: give at least one.")
        self.pipe, self.method = pipe, members(method)
        self.cache = cache_among(self.method)
        self.options = dict(options or {})
        self.own_options = self._own_options()
        self.batches = [requests[at : at + batch] for at in range(0, len(requests), batch)]
        self.progress, self.done = progress, 0
        self._points = {point.strength: point for point in known}
        self._dense: list[Tensor] | None = None

    @property
    def curve(self) -> tuple[Point, ...]:
        """All points so far, weak to strong."""
        return tuple(self._points[strength] for strength in sorted(self._points))

    def search(self, goal: Goal) -> tuple[Point | None, Point | None]:
        """Return the strongest point tried that misses the goal and the weakest that reaches it."""
        for _ in range(TRIES):
            weaker, stronger = self._bracket(goal.reached)
            value = None if goal.met(weaker, stronger) else self._between(weaker, stronger)
            if value is None:
                break
            self.point(value)
        return self._bracket(goal.reached)

    def point(self, strength: float) -> Point:
        """Measure one strength, or recall it."""
        if strength not in self._points:
            self._points[strength] = self._measure(strength)
        return self._points[strength]

    def _bracket(self, reached: Callable[[Point], bool]) -> tuple[Point | None, Point | None]:
        stronger = next((point for point in self.curve if reached(point)), None)
        weaker = [p for p in self.curve if stronger is None or p.strength < stronger.strength]
        return (weaker[-1] if weaker else None), stronger

    def _between(self, weaker: Point | None, stronger: Point | None) -> float | None:
        """Return the next strength to try; None if there is none."""
        most, usual = self.cache.most, self.cache.strengths[1]
        if stronger is None and len(self.curve) > 1 and 1 < self.curve[-2].speedup:
            if self.curve[-1].speedup <= self.curve[-2].speedup:
                return None  # it skips all that it can
        if isinstance(usual, int):
            following = 2 if weaker is None else int(weaker.strength) + 1  # 1 reuses nothing
            return following if stronger is None else None
        if weaker is None:
            return usual if stronger is None else stronger.strength / 4
        if stronger is None:
            above = weaker.strength * 4
            return above if above < most else (weaker.strength + most) / 2
        return float((weaker.strength * stronger.strength) ** 0.5)

    def _own_options(self) -> dict[str, Any]:
        """Return the cache's share of the options, which a calibration repeats."""
        fields = self.cache.__dataclass_fields__
        own = {name: value for name, value in self.options.items() if name in fields}
        return own | dict(self.options.get(self.cache.name, {}))

    def _measure(self, strength: float) -> Point:
        if self._dense is None:
            self._dense = [self._latents(requests) for requests in self.batches]
        name, option = self.cache.name, self.cache.strength
        own = {**self.options.get(name, {}), option: strength}
        given = {k: v for k, v in self.options.items() if k != option} | {name: own}
        errors: list[float] = []
        calls = run = 0
        try:
            accelerate_pipeline(self.pipe, self.method, **given)
            for requests, dense in zip(self.batches, self._dense, strict=True):
                latents = self._latents(requests)
                errors += [relative_l1(*pair) for pair in zip(latents, dense, strict=True)]
                report = acceleration_report(self.pipe)
                calls += report.block_calls
                run += sum(sum(step.ran) for step in report.steps)
        finally:
            restore_pipeline(self.pipe)
        return Point(strength, calls / run if run else 1.0, sum(errors) / len(errors))

    def _latents(self, requests: Sequence[GenerationRequest]) -> Tensor:
        latents = run_latents(self.pipe, requests)
        self.done += 1
        if self.progress is not None:
            self.progress("generations", self.done, (1 + TRIES) * len(self.batches))
        return latents


def cache_among(method: MethodChoice) -> type[Cache]:
    """Return the class of the one cache of a choice, which must be given by name.

    Raises:
        OptionError: if there is none.
    """
    for member in members(method):
        cls = method_class(member) if isinstance(member, str) else None
        if cls is not None and issubclass(cls, Cache):
            return cls
    raise OptionError(
        f"there is no cache among {method!r} whose strength to choose: name one of "
        "list_methods('cache')."
    )


def run_latents(pipe: Any, requests: Sequence[GenerationRequest]) -> Tensor:
    """Generate requests that differ in prompt and seed alone; return the final latents [B, ...]."""
    pipe.set_progress_bar_config(disable=True)
    output = pipe(
        **pipeline_arguments(pipe, requests[0]) | {"prompt": [r.prompt for r in requests]},
        generator=[torch.Generator().manual_seed(request.seed) for request in requests],
        output_type="latent",
    )
    latents: Tensor = output.frames if hasattr(output, "frames") else output.images
    return latents
