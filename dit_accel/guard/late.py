"""Whether outputs that nobody waited for were finite: asked at the end of a forward, read later."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel import compat


@dataclass
class LateLook:
    """Sums of sparse outputs, looked at one forward after they were made.

    By then the device has long known the answer, so the host waits for nothing.
    """

    _sums: list[Tensor] = field(default_factory=list)
    _layers: list[int] = field(default_factory=list)
    _asked: tuple[Tensor, torch.cuda.Event | None, list[int]] | None = None

    def add(self, total: Tensor, layer: int) -> None:
        """Take the sum of a call's output, a float32 scalar, of the forward that is running."""
        self._sums.append(total)
        self._layers.append(layer)

    def ask(self, parallel_config: Any) -> None:
        """Start to fetch what was added; the ranks that share a sequence ask together.

        What was asked for before must have been read.
        """
        sums, layers = self._sums, self._layers
        self._sums, self._layers = [], []
        if not sums:
            return
        total = compat.sum_over_sequence(parallel_config, torch.stack(sums).sum())
        fetched = total.to("cpu", non_blocking=True)  # into pinned memory, where that exists
        event = torch.cuda.Event() if total.is_cuda else None
        if event is not None:
            event.record()
        self._asked = fetched, event, layers

    def read(self) -> list[int]:
        """Return the layers of the forward asked for if one of them was not finite, else none."""
        asked, self._asked = self._asked, None
        if asked is None:
            return []
        fetched, event, layers = asked
        if event is not None:
            event.synchronize()
        return [] if math.isfinite(fetched.item()) else layers
