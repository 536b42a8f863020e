"""Compares sparse forwards with dense ones as they run: what was predicted may be wrong."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.errors import SpeedWarning
from dit_accel.parallel.split import Split
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


@dataclass
class Pace(Session):
    """Says when attention turns out slower than dense, and ends that where nobody asked for it.

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
    _running: tuple[tuple[int, TokenLayout], int, Split | None] | None = None
    _device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def attach(self, transformer: nn.Module) -> None:
        """Nothing is intercepted."""

    def begin(self) -> None:
        """Compare within a generation alone; see `Session.begin`."""
        self._seen.clear()

    def enter(self, forward: Forward) -> None:
        """Note what runs; see `Session.enter`."""
        running = self.runtime._running
        if running is not None:
            key = id(forward.transformer), running.layouts[0]
            self._running = key, len(self.runtime.recorder.calls), running.split
            self._device = forward.kwargs["hidden_states"].device

    def leave(self, output: Any) -> None:
        """Note how long it took; see `Session.leave`."""
        running, self._running = self._running, None
        recorder = self.runtime.recorder
        if running is None or output is None:
            return
        key, first, split = running
        calls = recorder.calls[first:]
        if not calls:
            return
        seen = self._seen.setdefault(key, _Forwards())
        dense = all(call.reason for call in calls)
        (seen.dense if dense else seen.sparse).append(recorder.forwards[-1])
        if not dense and len(seen.sparse) == COMPARED and seen.dense:
            self._compare(key[1], seen, split)

    def dense_reason(self, call: AttentionCall) -> str | None:
        """Return why calls of this layout had better be dense; None if they may be sparse."""
        return self._reasons.get(call.layout)

    def _compare(self, layout: TokenLayout, seen: _Forwards, split: Split | None) -> None:
        dense_s, sparse_s = _fastest(seen.dense), _fastest(seen.sparse[1:])
        ratio = sparse_s / dense_s
        if split is not None:
            ratio = split.group.mean(ratio, self._device)  # all ranks must decide alike
        if ratio < SLOWER:
            return
        found = (
            f"a sparse forward of {layout.video_length} video tokens took {ratio:.2f} times as "
            "long as a dense one"
        )
        if self.binding:
            self._reasons[layout] = found
            self.runtime.recorder.note(f"{found}, so attention is dense from there on")
            return
        if layout in self._told:
            return
        self._told.add(layout)
        text = (
            f"{found}, {sparse_s:.3g} s for {dense_s:.3g} s: this method does not pay here. Longer "
            "sequences or a lower density may; method='auto' stays dense where nothing does."
        )
        self.runtime.recorder.note(text)
        warnings.warn(text, SpeedWarning, stacklevel=2)


def _fastest(forwards: list[Any]) -> float:
    return min(sum(forward_seconds([forward]).values()) for forward in forwards)
