"""When a cache may be used again: gates, one per transformer and guidance branch.

A gate that knows its answers beforehand is a `StepMask`: nothing is read from the device, and all
ranks agree by construction. The others compare tensors by the relative L1 distance, summed over
the ranks that share a sequence, so that these agree too; that costs one wait for the device per
decision.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from dit_accel.tracking import Moment

T = TypeVar("T")

Reduce = Callable[[Tensor], Tensor]
"""Sums over the ranks that share a sequence; the identity without context parallelism."""


@dataclass
class Look:
    """What a gate may look at when it decides.

    Attributes:
        moment: step, branch, and the schedule's timesteps.
        latent: the transformer's input latent, never sharded.
        residual: what the first blocks added to the video stream, ``[B, N, C]``.
        modulate: makes the first block's normed and modulated input, ``[B, N, C]``.
        arrange: makes the latent by its axes, ``[B, T, H, W, C]``.
        reduce: see `Reduce`.
    """

    moment: Moment
    latent: Tensor
    residual: Tensor | None
    modulate: Callable[[], Tensor]
    arrange: Callable[[], Tensor]
    reduce: Reduce

    @property
    def step(self) -> int:
        """The step, which is known wherever a gate is asked."""
        return self.moment.step or 0

    @cached_property
    def modulated(self) -> Tensor:
        """The first block's normed and modulated input, ``[B, N, C]``."""
        return self.modulate()

    @cached_property
    def volume(self) -> Tensor:
        """The latent by its axes, ``[B, T, H, W, C]``."""
        return self.arrange()

    @property
    def sigma(self) -> float:
        """The share of noise in the latent, as flow-matching schedules define it."""
        times = self.moment.times
        return times[self.step] / 1000 if self.step < len(times) else 0.0


def relative_l1(new: Tensor, old: Tensor | None, reduce: Reduce = lambda sums: sums) -> float:
    """Return mean|new - old| / mean|old| in float32; inf if there is nothing to compare with."""
    if old is None or old.shape != new.shape or old.device != new.device:
        return math.inf
    old32 = old.float()
    sums = torch.stack([(new.float() - old32).abs().sum(), old32.abs().sum()])
    change, size = reduce(sums).tolist()
    return change / size if size > 0 and math.isfinite(change) else math.inf


class Gate(ABC):
    """Decides, step by step, whether a cached residual may stand for the blocks."""

    first_blocks = 0
    """Blocks that run before it decides."""
    value: float | None = None
    """What it last compared with its threshold, for the report."""

    @abstractmethod
    def reusable(self, look: Look) -> bool:
        """Whether this step may reuse; asked only where nothing else forbids it."""

    def settled(self, look: Look, full: bool) -> None:
        """Learn how the step was decided; called on every step."""
        return None

    def finished(self, output: Tensor, full: bool) -> None:
        """Learn the transformer's output."""
        return None

    def skips(self, run: range, step: int) -> bool:
        """Whether a step that reuses does so for this run of blocks."""
        return True

    def keeps(self, run: range, step: int) -> bool:
        """Whether what a run adds at this step may be used later."""
        return True


@dataclass(frozen=True)
class Limits:
    """Steps that run in full whatever a gate says.

    Attributes:
        first: how many at the start; ``last`` at the end.
        max_reuses: reuses in a row after which one does; None for no limit.
    """

    first: int
    last: int
    max_reuses: int | None = None

    def forced(self, step: int, num_steps: int) -> bool:
        """Whether the step is one of the first or last."""
        return step < self.first or step >= num_steps - self.last


class StepMask(Gate):
    """A decision per step, known beforehand: True runs in full."""

    def __init__(self, full: Sequence[bool], values: Sequence[float] | None = None) -> None:
        self.full, self.values = tuple(full), values

    def reusable(self, look: Look) -> bool:
        """See `Gate.reusable`."""
        self.value = self.values[look.step] if self.values is not None else None
        return look.step < len(self.full) and not self.full[look.step]

    def keeps(self, run: range, step: int) -> bool:
        """Whether the next step reuses."""
        return step + 1 < len(self.full) and not self.full[step + 1]


class RunMasks(StepMask):
    """A `StepMask` for each run of blocks; a step is full if all of them say so."""

    def __init__(self, full: Mapping[range, Sequence[bool]]) -> None:
        super().__init__([all(steps) for steps in zip(*full.values(), strict=True)])
        self._by_run = full

    def skips(self, run: range, step: int) -> bool:
        """See `Gate.skips`."""
        return not self._by_run[run][step]

    def keeps(self, run: range, step: int) -> bool:
        """See `Gate.keeps`."""
        mask = self._by_run[run]
        return step + 1 < len(mask) and not mask[step + 1]


class FirstBlocks(Gate):
    """Small change of what the first blocks add, against the last full step.

    Args:
        first_blocks: how many blocks run before the comparison.
        threshold: reuse while the relative L1 distance is less.
        every: compare every so many tokens.
        max_total: reuses in all after which there are no more; None for no limit.
        max_sum: reuse while the distances since the last full step add up to less.
    """

    def __init__(
        self,
        first_blocks: int,
        threshold: float,
        every: int = 1,
        max_total: int | None = None,
        max_sum: float | None = None,
    ) -> None:
        self.first_blocks, self.threshold, self.every = first_blocks, threshold, every
        self.max_total = math.inf if max_total is None else max_total
        self.max_sum = math.inf if max_sum is None else max_sum
        self._total, self._sum = 0, 0.0
        self._last: Tensor | None = None

    def reusable(self, look: Look) -> bool:
        """See `Gate.reusable`."""
        if self._total >= self.max_total:
            return False
        self.value = relative_l1(self._signal(look), self._last, look.reduce)
        self._sum += self.value
        return self.value < self.threshold and self._sum < self.max_sum

    def settled(self, look: Look, full: bool) -> None:
        """Keep the residual of a full step."""
        if full:
            self._last, self._sum = self._signal(look), 0.0
        else:
            self._total += 1

    def _signal(self, look: Look) -> Tensor:
        if look.residual is None:
            raise RuntimeError("the first blocks have not run")
        return look.residual[:, :: self.every]


class Accumulated(Gate):
    """The sum of a distance between successive steps since the last full one, under a threshold."""

    def __init__(
        self,
        signal: Callable[[Look], Tensor],
        threshold: float,
        rescale: Callable[[float], float] = lambda distance: distance,
    ) -> None:
        self.signal, self.threshold, self.rescale = signal, threshold, rescale
        self._sum = 0.0
        self._before: Tensor | None = None
        self._now: tuple[Look, Tensor] | None = None

    def reusable(self, look: Look) -> bool:
        """See `Gate.reusable`."""
        distance = relative_l1(self._signal(look), self._before, look.reduce)
        # A fitted polynomial may be negative where changes are small; caching must end some day.
        self._sum += max(self.rescale(distance), 0.0) if math.isfinite(distance) else math.inf
        self.value = self._sum
        return self._sum < self.threshold

    def settled(self, look: Look, full: bool) -> None:
        """Keep the signal of every step; begin to add anew after a full one."""
        self._before = self._signal(look)
        self._now = None
        if full:
            self._sum = 0.0

    def _signal(self, look: Look) -> Tensor:
        """Make the signal once per step."""
        if self._now is None or self._now[0] is not look:
            self._now = look, self.signal(look)
        return self._now[1]


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """Return the polynomial at ``x``, highest power first."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def mask_from(
    spend: Callable[[int, int], tuple[float, bool]],
    num_steps: int,
    start: int,
    limits: Limits,
) -> StepMask:
    """Play through a schedule whose answers are known beforehand.

    Args:
        spend: called with a step and the number of reuses before it in a row; returns what the
            gate compares at this step, and whether it would reuse.
        num_steps: of the generation.
        start: the first step that is known; it runs in full.
        limits: which steps run in full in any case.
    """
    full, values, reuses = [], [], 0
    for step in range(num_steps):
        value, reuse = 0.0, False
        if step > start and not limits.forced(step, num_steps):
            value, reuse = spend(step, reuses)
        reuse = reuse and (limits.max_reuses is None or reuses < limits.max_reuses)
        reuses = reuses + 1 if reuse else 0
        full.append(not reuse)
        values.append(value)
    return StepMask(full, values)


def nearest(values: Sequence[T], count: int) -> tuple[T, ...]:
    """Return ``count`` values, evenly spread over ``values``, by the nearest index."""
    if count == len(values):
        return tuple(values)
    span = (len(values) - 1) / max(count - 1, 1)
    return tuple(values[round(i * span)] for i in range(count))
