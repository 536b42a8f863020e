"""Compares sparse forwards with dense ones as they run: what was predicted may be wrong."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.choosing.times import AttentionTimes
from dit_accel.choosing.watching import Ran, Watch
from dit_accel.errors import DitAccelError, SpeedWarning
from dit_accel.presets import DEFAULT

COMPARED = 4
"""Sparse forwards after which the fastest is compared, without the first: in that, kernels may be
compiled, and the guard looks at every layer."""
SLOWER = 1.05
"""How many times as long a sparse forward must take to be called slower: times vary."""


@dataclass
class _Forwards:
    """Forwards of one transformer and layout, in this generation."""

    dense: list[Ran] = field(default_factory=list)
    sparse: list[Ran] = field(default_factory=list)


@dataclass
class Pace(Watch):
    """Says when attention turns out slower than dense, and ends that where nobody asked for it.

    Sparse forwards are compared with the dense ones of the same generation. Where there are none,
    as in published settings that keep layers dense and no steps, one call of each kind is timed.

    Attributes:
        runtime: of the acceleration, without caches.
        binding: whether attention is dense from then on; otherwise it was asked for by name, and a
            warning says what it costs.
    """

    binding: bool
    _seen: dict[tuple[int, TokenLayout], _Forwards] = field(default_factory=dict)
    _reasons: dict[TokenLayout, str] = field(default_factory=dict)
    _timed: set[TokenLayout] = field(default_factory=set)
    _told: set[TokenLayout] = field(default_factory=set)

    def begin(self) -> None:
        """Compare within a generation alone; see `Session.begin`."""
        self._seen.clear()

    def ran(self, forward: Ran) -> None:
        """Keep it, and compare once there are enough."""
        key = forward.transformer, forward.place.layout
        seen = self._seen.setdefault(key, _Forwards())
        if len(seen.sparse) == COMPARED:
            return
        (seen.dense if forward.dense else seen.sparse).append(forward)
        if len(seen.sparse) == COMPARED:
            self._compare(forward, seen)

    def dense_reason(self, call: AttentionCall) -> str | None:
        """Return why calls of this layout had better be dense; None if they may be sparse."""
        return self._reasons.get(call.layout)

    def _compare(self, forward: Ran, seen: _Forwards) -> None:
        what, layout = "forward", forward.place.layout
        if seen.dense:
            sparse_s, dense_s = (_fastest(of) for of in (seen.sparse[1:], seen.dense))
        elif layout not in self._timed:
            self._timed.add(layout)
            what, (sparse_s, dense_s) = "attention call", self._calls(forward)
        else:
            return
        ratio = sparse_s / dense_s
        if forward.split is not None:
            # All ranks must decide alike.
            ratio = forward.split.group.mean(ratio, forward.place.device)
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
                f"{found}, {sparse_s:.3g} s for {dense_s:.3g} s: this method does not pay "
                "here. Longer sequences or a lower density may; method='auto' stays dense where "
                "nothing does."
            )
            self.runtime.recorder.note(text)
            warnings.warn(text, SpeedWarning, stacklevel=2)

    def _calls(self, forward: Ran) -> tuple[float, float]:
        """Return the seconds of a sparse and a dense call, NaN where that is not measured.

        Under 2,048 tokens, where sparse attention is off unless that was changed, it is known that
        nothing pays; and ranks would each measure the whole call.
        """
        unknown = math.nan, math.nan
        if forward.place.layout.video_length < DEFAULT.min_tokens or forward.split is not None:
            return unknown
        guard = self.runtime.guard
        times = AttentionTimes(guard=None if guard is None else guard.options)
        try:
            found = [times.seconds(method, forward.place) for method in (forward.method, None)]
        except (DitAccelError, torch.OutOfMemoryError):
            return unknown
        sparse, dense = (math.nan if seconds is None else seconds for seconds in found)
        return sparse, dense


def _fastest(forwards: list[Ran]) -> float:
    return min(forward.seconds for forward in forwards)
