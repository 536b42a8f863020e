"""Compares sparse forwards with dense ones as they run: what was predicted may be wrong."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.choosing.times import AttentionTimes, Place, heads_of
from dit_accel.errors import DitAccelError, SpeedWarning
from dit_accel.methods.base import AttentionMethod
from dit_accel.parallel.split import Split
from dit_accel.presets import DEFAULT
from dit_accel.report import forward_seconds
from dit_accel.session import Forward, Session

if TYPE_CHECKING:
    from dit_accel.runtime import Runtime

COMPARED = 4
"""Sparse forwards after which the fastest is compared, without the first: in that, kernels may be
compiled, and the guard looks at every layer."""
SLOWER = 1.05
"""How many times as long a sparse forward must take to be called slower: times vary."""


@dataclass
class _Forwards:
    """Time marks of the forwards of one transformer and layout, in this generation."""

    dense: list[Any] = field(default_factory=list)
    sparse: list[Any] = field(default_factory=list)


class _Running(NamedTuple):
    """The forward under way: how many calls there were before it, and how it is run."""

    transformer: int
    before: int
    place: Place
    method: AttentionMethod
    split: Split | None


@dataclass
class Pace(Session):
    """Says when attention turns out slower than dense, and ends that where nobody asked for it.

    Sparse forwards are compared with the dense ones of the same generation. Where there are none,
    as in published settings that keep layers dense and no steps, one call of each kind is timed.

    Attributes:
        runtime: of the acceleration, without caches.
        binding: whether attention is dense from then on; otherwise it was asked for by name, and a
            warning says what it costs.
    """

    runtime: Runtime
    binding: bool
    _seen: dict[tuple[int, TokenLayout], _Forwards] = field(default_factory=dict)
    _reasons: dict[TokenLayout, str] = field(default_factory=dict)
    _told: set[TokenLayout] = field(default_factory=set)
    _running: _Running | None = None

    def attach(self, transformer: nn.Module) -> None:
        """Nothing is intercepted."""

    def begin(self) -> None:
        """Compare within a generation alone; see `Session.begin`."""
        self._seen.clear()

    def enter(self, forward: Forward) -> None:
        """Note what runs; see `Session.enter`."""
        running, latents = self.runtime._running, forward.kwargs["hidden_states"]
        if running is not None:
            shape = *heads_of(forward.transformer), len(latents), latents.dtype, latents.device
            self._running = _Running(
                id(forward.transformer),
                len(self.runtime.recorder.calls),
                Place(running.layouts[0], *shape),
                running.method,
                running.split,
            )

    def leave(self, output: Any) -> None:
        """Note how long it took; see `Session.leave`."""
        running, self._running = self._running, None
        recorder = self.runtime.recorder
        if running is None or output is None:
            return
        calls = recorder.calls[running.before :]
        if not calls:
            return
        seen = self._seen.setdefault((running.transformer, running.place.layout), _Forwards())
        dense = all(call.reason for call in calls)
        (seen.dense if dense else seen.sparse).append(recorder.forwards[-1])
        if not dense and len(seen.sparse) == COMPARED:
            self._compare(running, seen)

    def dense_reason(self, call: AttentionCall) -> str | None:
        """Return why calls of this layout had better be dense; None if they may be sparse."""
        return self._reasons.get(call.layout)

    def _compare(self, running: _Running, seen: _Forwards) -> None:
        what, layout = "forward", running.place.layout
        if seen.dense:
            seconds = _fastest(seen.sparse[1:]), _fastest(seen.dense)
        else:
            what, seconds = "attention call", self._calls(running)
        ratio = seconds[0] / seconds[1]
        if running.split is not None:
            # All ranks must decide alike.
            ratio = running.split.group.mean(ratio, running.place.device)
        if math.isnan(ratio) or ratio < SLOWER:
            return
        found = (
            f"a sparse {what} of {layout.video_length} video tokens took {ratio:.2f} times as long "
            "as a dense one"
        )
        if self.binding:
            self._reasons[layout] = found
            self.runtime.recorder.note(f"{found}, so attention is dense from there on")
        elif layout not in self._told:
            self._told.add(layout)
            text = (
                f"{found}, {seconds[0]:.3g} s for {seconds[1]:.3g} s: this method does not pay "
                "here. Longer sequences or a lower density may; method='auto' stays dense where "
                "nothing does."
            )
            self.runtime.recorder.note(text)
            warnings.warn(text, SpeedWarning, stacklevel=2)

    def _calls(self, running: _Running) -> tuple[float, float]:
        """Return the seconds of a sparse and a dense call, NaN where that is not measured.

        Under 2,048 tokens, where sparse attention is off unless that was changed, it is known that
        nothing pays; and ranks would each measure the whole call.
        """
        unknown = math.nan, math.nan
        if running.place.layout.video_length < DEFAULT.min_tokens or running.split is not None:
            return unknown
        guard = self.runtime.guard
        times = AttentionTimes(guard=None if guard is None else guard.options)
        try:
            found = [times.seconds(method, running.place) for method in (running.method, None)]
        except (DitAccelError, torch.OutOfMemoryError):
            return unknown
        sparse, dense = (math.nan if seconds is None else seconds for seconds in found)
        return sparse, dense


def _fastest(forwards: list[Any]) -> float:
    return min(sum(forward_seconds([forward]).values()) for forward in forwards)
