"""Watches the dense forwards of a generation, and says whether the sparse ones will pay.

Sizes are only known when a transformer runs, so that this is decided there: in the first
generation, once the dense first steps have shown what a forward takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.choosing.budget import WORTHWHILE
from dit_accel.choosing.cost import CostModel, Workload
from dit_accel.choosing.pace import Pace
from dit_accel.choosing.times import AttentionTimes, Place
from dit_accel.choosing.watching import Ran, Watch
from dit_accel.errors import DitAccelError, OptionError
from dit_accel.parallel.split import Split
from dit_accel.session import Forward, Session

if TYPE_CHECKING:
    from dit_accel.choosing.automatic import Settled
    from dit_accel.kinds import Method
    from dit_accel.runtime import Runtime


@dataclass
class Forecast(Watch):
    """Predicts the speed-up of an acceleration without caches, layout by layout.

    Attributes:
        runtime: of the acceleration.
        times: what attention calls take.
        binding: whether attention stays dense where it would not pay; otherwise it is only said.
    """

    times: AttentionTimes
    binding: bool

    def __post_init__(self) -> None:
        """Begin without any knowledge."""
        self._dense_s: dict[Place, float] = {}
        self._reasons: dict[TokenLayout, str | None] = {}
        self._settled: set[TokenLayout] = set()  # for the generation under way
        self._layers = self._begun = 0

    def attach(self, transformer: nn.Module) -> None:
        """Count the attention layers."""
        self._layers = len(self.runtime.family.attention_layers(transformer))

    def begin(self) -> None:
        """Let the second generation decide anew: the first was slowed down by compiling."""
        self._begun += 1
        if self.binding and self._begun <= 2:
            self._settled.clear()

    def ran(self, forward: Ran) -> None:
        """After a dense forward, decide about the next ones."""
        place = forward.place
        if place.layout in self._settled:
            return
        if not forward.dense:
            self._settled.add(place.layout)
            return
        spent = forward.seconds
        self._dense_s[place] = min(spent, self._dense_s.get(place, spent))
        self._decide(place, forward.split)

    def dense_reason(self, call: AttentionCall) -> str | None:
        """Return why calls of this layout had better be dense; None if they may be sparse."""
        return self._reasons.get(call.layout) if self.binding else None

    def _decide(self, place: Place, split: Split | None) -> None:
        runtime = self.runtime
        if place.layout.video_length < runtime.schedule.min_tokens:
            return
        told = self._speedup(place, 1 if split is None else split.group.ranks)
        if split is not None:
            # All ranks must decide alike: where one can't tell, none does.
            told = split.group.mean(math.nan if told is None else told, place.device)
        if told is None or math.isnan(told):
            return
        self._tell(place, told)

    def _speedup(self, place: Place, ranks: int) -> float | None:
        """Return the speed-up of a forward past the dense steps; None if nothing can be said."""
        runtime, method = self.runtime, self.runtime.method
        if method is None:
            return None
        try:
            density = runtime.density
            if density is not None and density < 1:
                method = method.at_density(density, place.layout)
            self.times.guard = None if runtime.guard is None else runtime.guard.options
            work = Workload(place, self._layers)
            # Each rank does its share of a forward, attention's included.
            model = CostModel(work, self._dense_s[place] * ranks, self.times)
            layers = self._layers - len(runtime.schedule.layers)
            return model.speedup(method, layers=layers)
        except (DitAccelError, torch.OutOfMemoryError):
            return None  # the forward will say what is wrong; without room nothing is measured

    def _tell(self, place: Place, told: float) -> None:
        what = f"{place.layout.video_length} video tokens"
        source = ", ".join(self.times.sources)
        slow = told < WORTHWHILE
        self._reasons[place.layout] = (
            f"predicted {told:.2f}x a forward, under {WORTHWHILE}x" if slow else None
        )
        verdict = f"predicted at {what}: {told:.2f}x a forward past the dense steps ({source})"
        if slow and self.binding:
            verdict += f"; under {WORTHWHILE}x, so attention stays dense"
        elif slow:
            verdict += ": not expected to be faster here, but it was asked for by name"
        notes = self.runtime.recorder.notes
        notes[:] = [note for note in notes if not note.startswith(f"predicted at {what}:")]
        notes.append(verdict)


@dataclass
class Expected(Session):
    """Refuses generations of another size or number of steps than was calibrated for.

    Attributes:
        runtime: of the acceleration.
        source: the calibration, for the message.
        grid: video tokens as (T, H, W).
        steps: denoising steps.
    """

    runtime: Runtime
    source: str
    grid: tuple[int, ...]
    steps: int
    _checked: bool = False

    def attach(self, transformer: nn.Module) -> None:
        """Nothing is intercepted."""

    def begin(self) -> None:
        """Check this generation, too."""
        self._checked = False

    def enter(self, forward: Forward) -> None:
        """Check the first forward; see `Session.enter`."""
        if self._checked:
            return
        self._checked = True
        found = self.runtime.family.read_inputs(forward.transformer, dict(forward.kwargs))
        grid, steps = found.layouts[0].grid, forward.moment.num_steps
        if tuple(grid) != self.grid or steps not in (None, self.steps):
            raise OptionError(
                f"{self.source} was made for a token grid of {self.grid} and {self.steps} steps, "
                f"but this generation has {tuple(grid)} and {steps}: use those, or calibrate for "
                "these (probe=... with this size and number of steps)."
            )


def watch(
    runtime: Runtime, methods: Mapping[str, Method], *, binding: bool, settled: Settled | None
) -> None:
    """Add to an acceleration's sessions those that watch over speed and size.

    Args:
        runtime: of the acceleration; its sessions have been made.
        methods: by kind.
        binding: whether attention is to stay dense where it does not pay.
        settled: what a budget was settled to, if there was one.
    """
    sessions = list(runtime.sessions)
    sparse = runtime.method is not None and runtime.method.name != "dense"
    if sparse and settled is None and set(methods) == {"attention"} and not runtime.precision:
        forecast = Forecast(runtime, AttentionTimes(measuring=binding), binding)
        pace = Pace(runtime, binding)
        runtime.schedule = replace(
            runtime.schedule,
            worth=lambda call: forecast.dense_reason(call) or pace.dense_reason(call),
        )
        sessions += [forecast, pace]
    if settled is not None and settled.grid is not None and settled.steps is not None:
        sessions.append(Expected(runtime, settled.source, settled.grid, settled.steps))
    runtime.sessions = tuple(sessions)
