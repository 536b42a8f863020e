"""EasyCache: a gate that learns on the way how strongly the output follows the input."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_accel.caching.base import check_threshold
from dit_accel.caching.gates import Gate, Look
from dit_accel.caching.stack import Setting, StackCache
from dit_accel.schedule import Steps


@dataclass(frozen=True)
class EasyCache(StackCache):
    """Reuse the whole stack while the output's expected relative change adds up to little.

    Nothing has to be fitted beforehand. The rate of output change per input change is measured at
    each full step; the gate is the paper's, the residual is kept at the stack.

    Args:
        threshold: reuse while the sum of expected relative L1 changes is less.
        first_steps, last_steps, max_reuses, min_steps: see `StackCache`.
    """

    name: ClassVar[str] = "easycache"
    paper: ClassVar[str] = "EasyCache, 2507.02860"
    strength: ClassVar[str] = "threshold"
    strengths: ClassVar[tuple[float, ...]] = (0.05, 0.1, 0.2)

    threshold: float = 0.05
    first_steps: Steps = field(default=0.15, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_threshold("threshold", self.threshold)

    def gate(self, setting: Setting) -> Gate:
        """Measure rates at full steps."""
        return Rate(self.threshold)


class Rate(Gate):
    """Sums up rate x mean|change of the latent| / mean|output| since the last full step."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._sum = 0.0
        self._rate: Tensor | None = None
        self._latent: Tensor | None = None  # of this step
        self._before: Tensor | None = None  # the latent of the step before
        self._output: Tensor | None = None  # of the step before

    def reusable(self, look: Look) -> bool:
        """See `Gate.reusable`."""
        if self._rate is None or self._before is None or self._output is None:
            self._sum = math.inf
        else:
            moved = _mean(look.latent - self._before)
            change = self._rate * moved / _mean(self._output)
            total, ranks = look.reduce(torch.stack([change, torch.ones_like(change)])).tolist()
            self._sum += total / ranks if math.isfinite(total) else math.inf
        self.value = self._sum
        return self._sum < self.threshold

    def settled(self, look: Look, full: bool) -> None:
        """Remember the latent; begin to add anew after a full step."""
        self._latent = look.latent
        if full:
            self._sum = 0.0

    def finished(self, output: Tensor, full: bool) -> None:
        """Measure the rate at a full step."""
        if full and self._output is not None and self._before is not None:
            moved = _mean(self._latent - self._before) if self._latent is not None else None
            self._rate = None if moved is None else _mean(output - self._output) / moved
        self._before, self._output = self._latent, output


def _mean(values: Tensor) -> Tensor:
    return values.float().abs().mean()
