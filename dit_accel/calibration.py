"""Chooses a cache's strength for a wish, by a short probe on the user's own pipeline.

Speed is counted in block calls, which are the same on every machine; error is how far the final
latents are from those of the pipeline without any acceleration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.acceleration import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.caching.base import Cache
from dit_accel.caching.brought import brought_options
from dit_accel.caching.gates import relative_l1
from dit_accel.calibration_file import circumstances, load_points, save_points
from dit_accel.composition import MethodChoice, members
from dit_accel.errors import OptionError
from dit_accel.generation import GenerationRequest, Progress, pipeline_arguments
from dit_accel.models import generation_defaults, world_of
from dit_accel.registry import method_class
from dit_accel.world.worlds import fixed_prompts

PipelineCall = Mapping[str, Any]
"""Keyword arguments of ``pipe(...)``; see `run_latents` for its generator."""

TRIES = 6
"""Strengths that are tried for a goal."""
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

    def lines(self) -> list[str]:
        """Return the curve for people, a line a point."""
        option = method_class(self.method).strength  # type: ignore[attr-defined]
        return [
            f"{option}={point.strength:.4g}: {point.speedup:.2f}x in block calls, error "
            f"{point.error:.4f}{' (chosen)' if point == self.chosen else ''}"
            for point in self.curve
        ]


def calibrate_cache(
    pipe: Any,
    method: MethodChoice,
    calls: Sequence[PipelineCall],
    *,
    target_speedup: float | None = None,
    max_error: float | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Choose a cache's strength by a short probe, and leave the pipeline as it is.

    Points that were measured earlier under the same circumstances are taken from the user's cache
    folder, and new ones are kept there; see `calibration_file`.

    Args:
        pipe: a pipeline of a known family, not accelerated.
        method: name of a cache, or a list of names with one cache among them: an attention method
            changes what a cache finds.
        calls: keyword arguments of ``pipe(...)``, one generation each (see `calls_for`). A few
            prompts do, at a small size if time is short. More steps reuse more, so probe with the
            number of steps that will be used.
        target_speedup: see `Goal`; or ``max_error``.
        options: other keyword arguments of `accelerate_pipeline`.
        progress: told of every generation.

    Raises:
        OptionError: if not exactly one goal is given, there is no cache among the methods, or no
            strength reaches the goal (the message says how far it goes).
    """
    goal = Goal(target_speedup, max_error)
    probe = CacheProbe(pipe, method, calls, options, progress=progress)
    if target_speedup is not None and not probe.cache.skips_blocks:
        raise OptionError(
            f"{probe.cache.name} skips no whole blocks, so no target_speedup can be counted in "
            "block calls: give max_error=."
        )
    brought = brought_options(pipe, probe.cache.name)
    where = circumstances(pipe, method, {**brought, **(options or {})}, calls)
    probe.recall(Point(**row) for row in load_points(where))
    try:
        weaker, stronger = probe.search(goal)
    finally:
        save_points(where, [asdict(point) for point in probe.curve])
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


def calibrate_for(
    pipe: Any,
    method: MethodChoice,
    *,
    probe: PipelineCall | Sequence[PipelineCall] | None,
    target_speedup: float | None,
    max_error: float | None,
    options: Mapping[str, Any],
    progress: Progress | None = None,
) -> Calibration:
    """Choose a cache's strength as `accelerate_pipeline` was asked to.

    Raises:
        OptionError: as `calibrate_cache`; also if the strength is given beside the goal, or there
            is nothing to probe with.
    """
    Goal(target_speedup, max_error)
    cache = cache_among(method)
    if cache.strength in {**options, **options.get(cache.name, {})}:
        raise OptionError(
            f"{cache.strength}= and a goal both say how strong {cache.name} is: leave one out."
        )
    if probe is None:
        calls: Sequence[PipelineCall] = bundled_calls(pipe)
    else:
        calls = [probe] if isinstance(probe, Mapping) else list(probe)
    if not all(isinstance(call, Mapping) for call in calls):
        raise OptionError("probe: give keyword arguments of pipe(...), or a list of these.")
    return calibrate_cache(
        pipe,
        method,
        calls,
        target_speedup=target_speedup,
        max_error=max_error,
        options=options,
        progress=progress,
    )


def bundled_calls(
    pipe: Any, which: Sequence[int] = (0, 32), batch: int | None = None
) -> list[PipelineCall]:
    """Return calls with some of the fixed prompts of a bundled model, with its settings.

    Args:
        pipe: of the model.
        which: numbers of the prompts.
        batch: prompts of a call; None: all.

    Raises:
        OptionError: if it is no bundled model.
    """
    world = world_of(pipe)
    if world is None:
        raise OptionError(
            "say what to try strengths on, at the size and steps that you will use: "
            "probe={'prompt': ['...', '...'], 'num_inference_steps': 30, ...}."
        )
    settings = vars(generation_defaults(pipe.config["_name_or_path"])).copy()
    for name in ("fps", "world"):
        del settings[name]
    entries = fixed_prompts(world)
    requests = [
        GenerationRequest(prompt=entries[at]["prompt"], seed=at, **settings) for at in which
    ]
    return calls_for(pipe, requests, batch or len(requests))


class CacheProbe:
    """Generates some prompts densely once, and with a cache's strength as often as asked.

    Args:
        pipe, method, calls, options, progress: see `calibrate_cache`.
    """

    def __init__(
        self,
        pipe: Any,
        method: MethodChoice,
        calls: Sequence[PipelineCall],
        options: Mapping[str, Any] | None = None,
        *,
        progress: Progress | None = None,
    ) -> None:
        if not calls:
            raise OptionError("nothing to probe with: give at least one prompt.")
        self.pipe, self.method, self.calls = pipe, members(method), list(calls)
        self.cache = cache_among(self.method)
        self.options = dict(options or {})
        self.own_options = self._own_options()
        self.progress, self.done = progress, 0
        self._points: dict[float, Point] = {}
        self._dense: list[Tensor] | None = None

    def recall(self, points: Iterable[Point]) -> None:
        """Take points as measured: from earlier, under the same circumstances."""
        self._points |= {point.strength: point for point in points}

    @property
    def curve(self) -> tuple[Point, ...]:
        """All points so far, weak to strong."""
        return tuple(self._points[strength] for strength in sorted(self._points))

    def search(self, goal: Goal) -> tuple[Point | None, Point | None]:
        """Return the strongest point tried that misses the goal and the weakest that reaches it.

        What is tried follows from this search alone, so that one that is run again finds all its
        points recalled.
        """
        tried: list[Point] = []
        weaker = stronger = None
        while len(tried) < TRIES and not goal.met(weaker, stronger):
            value = self._next(tried, weaker, stronger)
            if value is None:
                break
            tried.append(self.point(value))
            tried.sort(key=lambda point: point.strength)
            stronger = next((point for point in tried if goal.reached(point)), None)
            below = tried if stronger is None else tried[: tried.index(stronger)]
            weaker = below[-1] if below else None
        return weaker, stronger

    def point(self, strength: float) -> Point:
        """Measure one strength, or recall it."""
        if strength not in self._points:
            self._points[strength] = self._measure(strength)
        return self._points[strength]

    def _next(
        self, tried: Sequence[Point], weaker: Point | None, stronger: Point | None
    ) -> float | None:
        """Return the next strength to try; None if there is none."""
        most, usual = self.cache.most, self.cache.strengths[1]
        if stronger is None and len(tried) > 1 and 1 < tried[-1].speedup <= tried[-2].speedup:
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
        name, option = self.cache.name, self.cache.strength
        own = {**self.options.get(name, {}), option: strength}
        given = {k: v for k, v in self.options.items() if k != option} | {name: own}
        errors: list[float] = []
        calls = run = 0
        try:
            accelerate_pipeline(self.pipe, self.method, **given)
            if self._dense is None:  # only now: what can't be attached is refused before a long run
                restore_pipeline(self.pipe)
                self._dense = [self._latents(call) for call in self.calls]
                accelerate_pipeline(self.pipe, self.method, **given)
            for call, dense in zip(self.calls, self._dense, strict=True):
                latents = self._latents(call)
                errors += [relative_l1(*pair) for pair in zip(latents, dense, strict=True)]
                report = acceleration_report(self.pipe)
                calls += report.block_calls
                run += sum(sum(step.ran) for step in report.steps)
        finally:
            restore_pipeline(self.pipe)
        return Point(strength, calls / run if run else 1.0, sum(errors) / len(errors))

    def _latents(self, call: PipelineCall) -> Tensor:
        latents = run_latents(self.pipe, call)
        self.done += 1
        if self.progress is not None:
            self.progress("generations", self.done, (1 + TRIES) * len(self.calls))
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


def calls_for(
    pipe: Any, requests: Sequence[GenerationRequest], batch: int = 1
) -> list[PipelineCall]:
    """Return the calls that generate requests, ``batch`` at once.

    Requests of one batch must differ in prompt and seed alone. The seed gives the same noise on
    every device.
    """
    calls: list[PipelineCall] = []
    for at in range(0, len(requests), batch):
        now = requests[at : at + batch]
        same = pipeline_arguments(pipe, now[0])
        seeds = [request.seed for request in now]
        calls.append(same | {"prompt": [request.prompt for request in now], "generator": seeds})
    return calls


def run_latents(pipe: Any, call: PipelineCall) -> Tensor:
    """Generate, and return the final latents ``[B, ...]``; seeds stand for generators.

    A ``generator`` of the call is a list of seeds, one for each sample; left out, it is seed 0.
    """
    generator = generators(call.get("generator", 0))
    configured = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**configured | {"disable": True})
    try:
        output = pipe(**{**call, "generator": generator, "output_type": "latent"})
    finally:
        pipe.set_progress_bar_config(**configured)
    latents: Tensor = output.frames if hasattr(output, "frames") else output.images
    return latents


def generators(seeds: Any) -> torch.Generator | list[torch.Generator]:
    """Return the generator of a seed, or those of a list of seeds.

    Raises:
        OptionError: if it is neither.
    """
    if isinstance(seeds, int):
        return torch.Generator().manual_seed(seeds)
    if not isinstance(seeds, Sequence) or not all(isinstance(seed, int) for seed in seeds):
        raise OptionError(
            "generator: give seeds in place of generators, for all runs must start alike."
        )
    return [torch.Generator().manual_seed(seed) for seed in seeds]
