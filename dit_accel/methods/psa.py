"""PSA, Pyramid Sparse Attention: the less a block matters, the coarser it is attended to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import Self

from dit_accel.call import TokenLayout
from dit_accel.errors import OptionError
from dit_accel.grid import Grid, TokenOrder
from dit_accel.kernels.importance import sampled_importance, samples_of
from dit_accel.kernels.joint_reference import LEVELS, joint_attention
from dit_accel.kernels.selection import assign_levels
from dit_accel.kernels.statistics import BlockStatistics
from dit_accel.methods.base import check_density
from dit_accel.methods.selecting import (
    SelectingMethod,
    check_block,
    check_share,
    is_int,
    named_order,
)
from dit_accel.plan import JointPlan

Four = tuple[float, float, float, float]

SPLIT: Four = (0.15, 0.10, 0.20, 0.0)
"""Shares of the blocks at levels 1, 2, 4, 8: the best split of the paper's ablation at 25 %."""


@dataclass(frozen=True)
class PSA(SelectingMethod):
    """Pyramid Sparse Attention (arXiv 2512.04025).

    Key blocks are ranked by importance, the largest attention weight between sampled tokens of the
    two blocks, for each query block. The first are exact, the next are attended to as means of 2,
    4 and 8 successive keys and values, all under one softmax in which a mean weighs as much as the
    tokens it stands for; the last are left out.

    Unlike the published code, importance is a true softmax, samples repeat and take nothing from
    torch's random numbers, the last block is not filled up with copies of its last token, text is
    exact and no part of the ranking, any block size works at every level, and no level has a
    hidden least share; only a row's first block is always exact.

    Attributes:
        density: budget of work, a mean counting as one key, as a share of that on all video pairs;
            replaces ``ends``. Every query block then gets the same: ``SPLIT``, or the split of
            ``ends`` if ``mode="top_k"``, scaled. None: see ``ends``.
        ends: where each level's part of the ranking ends, for levels 1, 2, 4 and 8, as a tuple or
            a mapping from level to end; equal ends leave a level out. With "threshold", an end is
            a share of the row's total importance, so that what is computed depends on the tokens.
        query_block: tokens per query block: 16, 32, 64 or 128.
        key_block: tokens per key block, likewise.
        order: token order: "hilbert", "raster" or "patches" (8 x 8 tokens).
        mode: "threshold", or "top_k": ends are shares of the number of key blocks.
        similarity: least mean cosine between the first and last key of the groups of 2, 4 and 8
            for which a block may be as coarse as that; None allows every level everywhere.
        samples_per_block: tokens of each block, of queries and keys alike, that importance looks
            at; None: an eighth, which costs as much as attention to 1/128 of the keys. The paper
            takes a quarter: 7 % of dense attention's time at 75,600 tokens on an H100 where this is
            2.5 %. At equal density the bundled image models come 0.3 to 1.4 dB nearer to dense with
            an eighth; tiny-wan loses 1.2 dB at density .25 and gains 0.3 at .15.
        refresh_every: see `SelectingMethod`.
    """

    name: ClassVar[str] = "psa"
    paper: ClassVar[str] = "Pyramid Sparse Attention, arXiv 2512.04025"
    reads_tokens: ClassVar[bool] = True

    density: float | None = None
    ends: Four = (0.4, 0.5, 0.6, 0.8)
    query_block: int = 128
    key_block: int = 128
    order: str = "hilbert"
    mode: Literal["threshold", "top_k"] = "threshold"
    similarity: tuple[float, float, float] | None = None
    samples_per_block: int | None = None

    def __post_init__(self) -> None:
        """Check all options."""
        super().__post_init__()
        if self.density is not None:
            check_density(self.density)
        object.__setattr__(self, "ends", _checked_ends(self.ends))
        check_block("query_block", self.query_block)
        check_block("key_block", self.key_block)
        named_order(self.order)
        if self.mode not in ("threshold", "top_k"):
            raise OptionError(f"mode={self.mode!r} must be 'threshold' or 'top_k'.")
        samples = self.samples_per_block
        if samples is not None and (not is_int(samples) or samples < 1):
            raise OptionError(
                f"samples_per_block={samples!r} must be an integer of at least 1, or None for a "
                "eighth of each block."
            )
        if self.similarity is not None:
            if not isinstance(self.similarity, tuple | list) or len(self.similarity) != 3:
                raise OptionError(
                    f"similarity={self.similarity!r}: give three cosines, for levels 2, 4 and 8."
                )
            for cosine in self.similarity:
                check_share("similarity", cosine, "the least mean cosine of a group's keys")
            object.__setattr__(self, "similarity", tuple(self.similarity))
            if self.density is not None:
                raise OptionError(
                    "similarity makes blocks finer by what the tokens are, so that no density can "
                    "be promised: leave similarity or density out."
                )

    def token_order(self, grid: Grid) -> TokenOrder:
        """Return the order that the ``order`` option names; see `AttentionMethod.token_order`."""
        return named_order(self.order)

    @property
    def block_sizes(self) -> tuple[int, int]:
        """See `SelectingMethod.block_sizes`."""
        return self.query_block, self.key_block

    @property
    def pooled_levels(self) -> tuple[int, ...]:
        """See `SelectingMethod.pooled_levels`."""
        parts = zip(LEVELS[1:], self._split()[1:], strict=True)
        return tuple(level for level, part in parts if part > 0 or self.similarity)

    def least_share(self, layout: TokenLayout) -> float:
        """One exact block per row; see `SelectingMethod.least_share`."""
        return 1 / self.blocks(layout)[1]

    def choosing_pairs(self, layout: TokenLayout) -> float:
        """Scores between all samples; see `SelectingMethod.choosing_pairs`."""
        samples = 1.0
        for block in self.block_sizes:
            here = samples_of(block, self.samples_per_block)
            samples *= here / block * layout.video_length
        return samples / 2

    def with_share(self, share: float, layout: TokenLayout) -> Self:
        """Switch to a budget, without ``similarity``; see `SelectingMethod.with_share`."""
        return replace(self, density=share, similarity=None)

    def dense_reason(self, layout: TokenLayout) -> str | None:
        """See `SelectingMethod.dense_reason`."""
        if self.blocks(layout)[1] == 1:
            return "all video tokens are one key block"
        if self.density == 1 or (self.density is None and self.ends[0] == 1):
            return "every key block is exact"
        return None

    def wanted(self, layout: TokenLayout) -> frozenset[str]:
        """See `SelectingMethod.wanted`."""
        return frozenset({"similarity"} if self.similarity else ())

    def choose(
        self,
        query: Tensor,
        key: Tensor,
        statistics: BlockStatistics,
        layout: TokenLayout,
        order: TokenOrder,
    ) -> Tensor:
        """Rank by sampled importance and deal out the levels; see `SelectingMethod.select`."""
        weights = sampled_importance(
            query,
            key,
            query_block=self.query_block,
            key_block=self.key_block,
            text_length=layout.text_length,
            samples_per_block=self.samples_per_block,
        )
        if self.density is not None:
            ends = self._budget(self.density, weights.shape[-1])
            return assign_levels(weights, ends, mode="top_k")
        ends = dict(zip(LEVELS, self.ends, strict=True))
        levels = assign_levels(weights, ends, mode=self.mode)
        if self.similarity is None or statistics.similarity is None:
            return levels
        # The coarsest level that its own cosine allows, even if that of a finer one is too low.
        allowed = levels.new_ones(statistics.similarity.shape[:-1])
        for i, level in enumerate(LEVELS[1:]):
            similar = statistics.similarity[..., i] > self.similarity[i]
            allowed = allowed.masked_fill(similar, level)
        return levels.minimum(allowed[:, :, None])

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, selection: Tensor, layout: TokenLayout
    ) -> Tensor:
        """One softmax over the blocks at their levels; see `SelectingMethod.reference`."""
        out, _ = joint_attention(
            query,
            key,
            value,
            selection,
            query_block=self.query_block,
            key_block=self.key_block,
            text_length=layout.text_length,
        )
        return out

    def joint_plan(
        self,
        key: Tensor,
        selection: Tensor,
        statistics: BlockStatistics,
        layout: TokenLayout,
        order: TokenOrder,
    ) -> JointPlan:
        """See `SelectingMethod.joint_plan`."""
        return JointPlan(layout, order, selection, self.query_block, self.key_block, statistics)

    def _split(self) -> list[float]:
        """Share of the ranking at each level; only the proportions matter under a density."""
        if self.density is not None and self.mode == "threshold":
            return list(SPLIT)
        return [end - start for start, end in zip((0.0, *self.ends), self.ends, strict=False)]

    def _budget(self, density: float, blocks: int) -> dict[int, float]:
        """Return ends, as shares of the rank, whose levels come to ``density``."""
        split = self._split()
        covered = sum(split)
        split = [part / covered for part in split] if covered else [1.0, 0.0, 0.0, 0.0]
        work = sum(part / level for part, level in zip(split, LEVELS, strict=True))
        if density <= work:
            parts = [part * density / work for part in split]
        else:
            # Every block is attended to: what is left of the budget makes blocks exact.
            exact = (density - work) / (1 - work)
            parts = [part * (1 - exact) for part in split]
            parts[0] += exact
        return _whole_blocks(parts, blocks)


def _whole_blocks(parts: list[float], blocks: int) -> dict[int, float]:
    """Round each level's share to whole blocks; coarser levels get what finer ones leave over."""
    ends, end, owed = {}, 0, 0.0
    last = max(i for i, part in enumerate(parts) if part > 0)
    for i, (level, part) in enumerate(zip(LEVELS, parts, strict=True)):
        owed += part * blocks / level  # in exact blocks
        count = 0
        if part > 0:
            count = round(owed * level) if i == last else int(owed * level + 1e-6)
        if i == last and sum(parts) > 1 - 1e-6:
            count = blocks - end
        count = min(max(count, int(level == 1)), blocks - end)
        owed -= count / level
        end += count
        ends[level] = end / blocks
    return ends


def _checked_ends(ends: Four | Mapping[int, float]) -> Four:
    """Return the four ends as a tuple, or raise `OptionError`."""
    if isinstance(ends, Mapping):
        if set(ends) != set(LEVELS):
            raise OptionError(
                f"ends={dict(ends)} must have an end for each of the levels {LEVELS}; repeat the "
                "end of the finer level to leave one out."
            )
        in_order = [ends[level] for level in LEVELS]
    elif not isinstance(ends, tuple | list) or len(ends) != len(LEVELS):
        raise OptionError(
            f"ends={ends!r}: give four, for levels {LEVELS}; repeat the end of the finer level to "
            "leave one out."
        )
    else:
        in_order = list(ends)
    for end in in_order:
        check_share("ends", end, "where each level's part of the ranking ends")
    if in_order != sorted(in_order):
        raise OptionError(
            f"ends={tuple(in_order)} must not fall: each is where a level's part of the ranking "
            "ends and the next begins."
        )
    one, two, four, eight = in_order
    return one, two, four, eight
