"""Dual-block cache: First-Block Cache with n blocks in front, m behind, and caps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dit_accel.caching.base import check_count, check_threshold
from dit_accel.caching.gates import FirstBlocks, Gate, StepMask, nearest
from dit_accel.caching.predictors import Predictor, Taylor
from dit_accel.caching.stack import Setting, StackCache
from dit_accel.errors import OptionError
from dit_accel.schedule import Steps


@dataclass(frozen=True)
class DualBlockCache(StackCache):
    """Reuse the middle blocks while what the first ones add has hardly changed.

    The last blocks always run, on the approximated stream, and mend it.

    Args:
        threshold: as in `FirstBlockCache`.
        first_blocks: blocks in front that always run and are compared.
        last_blocks: blocks behind that always run.
        order: 0 keeps the last residual; 1 or 2 extrapolates it (see `TaylorSeer`).
        horizon: steps after which extrapolation stops.
        every: compare every so many tokens only, which is cheaper.
        max_total: reuses of a generation and branch after which there are no more.
        max_sum: reuse only while the distances since the last full step add up to less.
        mask: decide by a string instead, one mark per step: # runs, . reuses, such as
            "########.###..###..##..#...#"; other numbers of steps take the nearest mark.
        first_steps, last_steps, max_reuses, min_steps: see `StackCache`.
    """

    name: ClassVar[str] = "dual_block_cache"
    paper: ClassVar[str] = "DBCache, cache-dit 2025 (FnBm)"
    strength: ClassVar[str] = "threshold"
    strengths: ClassVar[tuple[float, ...]] = (0.04, 0.08, 0.16)

    threshold: float = 0.08
    first_blocks: int = 8
    last_blocks: int = 0
    order: int = 0
    horizon: int = 3
    every: int = 1
    max_total: int | None = None
    max_sum: float | None = None
    mask: str | None = None
    first_steps: Steps = field(default=8, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_threshold("threshold", self.threshold)
        for name, least in (("first_blocks", 1), ("last_blocks", 0), ("order", 0)):
            check_count(name, getattr(self, name), least)
        check_count("horizon", self.horizon, 1)
        check_count("every", self.every, 1)
        if self.max_total is not None:
            check_count("max_total", self.max_total, 0)
        if self.max_sum is not None:
            check_threshold("max_sum", self.max_sum)
        if self.mask is not None and (not self.mask or set(self.mask) - set("#.")):
            raise OptionError(f"mask={self.mask!r}: write # for steps that run, . for the others.")

    def gate(self, setting: Setting) -> Gate:
        """Compare after the first blocks, or follow the mask."""
        if self.mask is not None:
            return StepMask([mark == "#" for mark in nearest(self.mask, setting.num_steps)])
        caps = self.max_total, self.max_sum
        return FirstBlocks(self.first_blocks, self.threshold, self.every, *caps)

    def scope(self, num_blocks: int) -> tuple[range, ...]:
        """Skip what lies between the first and the last blocks."""
        middle = range(self.first_blocks, num_blocks - self.last_blocks)
        return (middle,) if middle else ()

    def predictor(self, setting: Setting) -> Predictor:
        """Keep the last residual, or extrapolate."""
        return Taylor(self.order, self.horizon) if self.order else Predictor()
