"""First-Block Cache: the first block tells whether the others would say something new."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.caching.base import check_threshold
from dit_accel.caching.gates import FirstBlocks, Gate
from dit_accel.caching.stack import Setting, StackCache


@dataclass(frozen=True)
class FirstBlockCache(StackCache):
    """Reuse all blocks but the first while what the first one adds has hardly changed.

    Args:
        threshold: reuse while the relative L1 distance of the first block's residual to that of
            the last full step is less; 0 reuses nothing.
        first_steps, last_steps, max_reuses, min_steps: see `StackCache`.
    """

    name: ClassVar[str] = "first_block_cache"
    paper: ClassVar[str] = "First-Block Cache, ParaAttention 2024 (TeaCache's idea, 2411.19108)"
    strength: ClassVar[str] = "threshold"
    strengths: ClassVar[tuple[float, ...]] = (0.04, 0.08, 0.16)

    threshold: float = 0.08

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_threshold("threshold", self.threshold)

    def gate(self, setting: Setting) -> Gate:
        """Compare after one block."""
        return FirstBlocks(1, self.threshold)

    def scope(self, num_blocks: int) -> tuple[range, ...]:
        """Skip all blocks but the first."""
        return (range(1, num_blocks),) if num_blocks > 1 else ()
