"""Rectified SpaAttn: sparse attention, corrected by what pooled attention says it leaves out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from dit_accel.call import TokenLayout
from dit_accel.errors import OptionError
from dit_accel.grid import Grid, TokenOrder
from dit_accel.kernels.joint_reference import joint_attention
from dit_accel.kernels.selection import cumulative_mask, top_k_mask
from dit_accel.kernels.statistics import BlockStatistics, block_statistics
from dit_accel.methods.base import check_density
from dit_accel.methods.selecting import (
    SelectingMethod,
    check_block,
    check_share,
    mixed_counts,
    named_order,
)
from dit_accel.plan import JointPlan


@dataclass(frozen=True)
class RectifiedSpaAttn(SelectingMethod):
    """Rectified SpaAttn (arXiv 2511.19835).

    Attention between the mean query of a block, the mean keys of all blocks and every text key
    tells which share P of its attention each block would get (isolated-pooling reallocation). The
    blocks with the largest shares are critical, and so are those that touch the query block on the
    grid. Attention over critical blocks and text is then scaled by R, the sum of their shares, and
    the other blocks' mean values are added, each with its share. All rows of a query block have R
    and the added vector in common.

    Unlike the published code, padded text and padded tails are in no mean, shares count the
    tokens that a ragged block has, and ``first_frame`` finds the first frame's tokens where the
    order has put them.

    Attributes:
        density: share of blocks that are critical, neighbours and first frame included, on average
            over the query blocks; replaces ``drop`` and ``cumulative``. None: see those.
        drop: share of key blocks that are dropped by rank. What is computed is more than 1 - drop:
            see ``cumulative`` and ``neighbours``.
        cumulative: the critical blocks' and the text's shares come to at least this.
        block_size: tokens per block, of queries and keys: 16, 32, 64 or 128.
        gain_aware: add only blocks for which ``|mean q . mean k|`` exceeds the estimated error of
            the means, and give the others' shares to the critical ones, as the paper does
            (gain-aware pooling rectification). The test looks at the size of a score and not at
            that of a weight, so that blocks with scores near 0 are never added and strongly
            negative ones are; yet on all four bundled models, at densities .25 and .15, it brings
            generations nearer to dense, by 0.1 to 2.4 dB (`fidelity-*.json`).
        neighbours: whether blocks that touch the query block's tokens, also diagonally, are
            always critical.
        first_frame: whether a video's blocks with tokens of the first frame always see each other.
            In Hilbert order these are many: a quarter of Wan's blocks at 720p and 81 frames.
        order: token order: "hilbert", "raster" or "patches" (8 x 8 tokens).
        refresh_every: see `SelectingMethod`.
    """

    name: ClassVar[str] = "rectified"
    paper: ClassVar[str] = "Rectified SpaAttn, arXiv 2511.19835"

    density: float | None = None
    drop: float = 0.75
    cumulative: float = 0.3
    block_size: int = 128
    gain_aware: bool = True
    neighbours: bool = True
    first_frame: bool = False
    order: str = "hilbert"

    def __post_init__(self) -> None:
        """Check all options."""
        super().__post_init__()
        if self.density is not None:
            check_density(self.density)
        check_share("drop", self.drop, "the share of key blocks to drop")
        check_share("cumulative", self.cumulative, "the least share of attention to keep")
        check_block("block_size", self.block_size)
        for option in ("gain_aware", "neighbours", "first_frame"):
            if not isinstance(getattr(self, option), bool):
                raise OptionError(f"{option}={getattr(self, option)!r} must be True or False.")
        named_order(self.order)

    def token_order(self, grid: Grid) -> TokenOrder:
        """Return the order that the ``order`` option names; see `AttentionMethod.token_order`."""
        return named_order(self.order)

    @property
    def block_sizes(self) -> tuple[int, int]:
        """See `SelectingMethod.block_sizes`."""
        return self.block_size, self.block_size

    def least_share(self, layout: TokenLayout) -> float:
        """What is always critical; see `SelectingMethod.least_share`."""
        return self._shares(layout.grid)[0]

    def choosing_pairs(self, layout: TokenLayout) -> float:
        """Scores of means and text, and what is added; see `SelectingMethod.choosing_pairs`."""
        rows, columns = self.blocks(layout)
        return rows * (columns + layout.text_length / 2)

    @property
    def remedy(self) -> str:
        """See `SelectingMethod.remedy`."""
        floors = [o for o in ("neighbours", "first_frame") if getattr(self, o)]
        return " or ".join(["smaller blocks", *(f"{option}=False" for option in floors)])

    def with_share(self, share: float, layout: TokenLayout) -> Self:
        """See `SelectingMethod.with_share`."""
        return replace(self, density=share)

    def dense_reason(self, layout: TokenLayout) -> str | None:
        """See `SelectingMethod.dense_reason`."""
        if self.density == 1 or (self.density is None and 0 in (self.drop, 1 - self.cumulative)):
            return "every block is critical"
        if self.least_share(layout) == 1:
            return f"every block is always critical on grid {layout.grid}"
        return None

    def wanted(self, layout: TokenLayout) -> frozenset[str]:
        """See `SelectingMethod.wanted`."""
        return frozenset({"query_deviation", "key_deviation"} if self.gain_aware else ())

    def choose(
        self,
        query: Tensor,
        key: Tensor,
        statistics: BlockStatistics,
        layout: TokenLayout,
        order: TokenOrder,
    ) -> Tensor:
        """Take the critical blocks; see `SelectingMethod.select`."""
        shares = pooled_shares(statistics, key[:, layout.video_length :])
        video = shares[..., :-1]
        rows, columns = self.blocks(layout)
        always = self._always(layout.grid, query.device)
        if self.density is not None:
            count = self._count(self.density, layout)
            return mixed_counts(
                lambda k: top_k_mask(video, k, forced=always), count, rows, query.device
            )
        by_rank = int((1 - self.drop) * columns + 1e-6)
        if layout.text_length == 0:
            return cumulative_mask(video, self.cumulative, max(by_rank, 1)) | always
        # Text is kept in any case, so its share counts first, and no block makes way for it.
        text = torch.arange(columns + 1, device=query.device) == columns
        critical = cumulative_mask(shares, self.cumulative, by_rank + 1, forced=text)
        return critical[..., :-1] | always

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, selection: Tensor, layout: TokenLayout
    ) -> Tensor:
        """Scale what is critical, add what is not; see `SelectingMethod.reference`."""
        statistics = block_statistics(
            query,
            key,
            value,
            query_block=self.block_size,
            key_block=self.block_size,
            text_length=layout.text_length,
            wanted=frozenset({"query_deviation", "key_deviation"}),
            backend="torch",
        )
        factor, added = self._rectification(statistics, key, selection, layout.text_length)
        out, _ = joint_attention(
            query,
            key,
            value,
            selection.to(torch.int8),
            query_block=self.block_size,
            key_block=self.block_size,
            text_length=layout.text_length,
            row_factor=factor.to(query.dtype),
            added=added.to(query.dtype),
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
        factor, added = self._rectification(statistics, key, selection, layout.text_length)
        return JointPlan(
            layout,
            order,
            selection.to(torch.int8),
            self.block_size,
            self.block_size,
            row_factor=factor,
            added=added,
        )

    def _rectification(
        self, statistics: BlockStatistics, key: Tensor, critical: Tensor, text_length: int
    ) -> tuple[Tensor, Tensor]:
        """Return R, ``[B, H, Q]``, and the added vector, ``[B, H, Q, D]``."""
        shares = pooled_shares(statistics, key[:, key.shape[1] - text_length :])
        compensated = ~critical.bool()
        if self.gain_aware:
            compensated = compensated & _gain_exceeds_error(statistics)
        in_means = shares[..., :-1].masked_fill(~compensated, 0)
        in_sparse = shares[..., :-1].masked_fill(compensated, 0).sum(-1) + shares[..., -1]
        return in_sparse, in_means @ statistics.value_mean

    def _always(self, grid: Grid, device: torch.device | str) -> Tensor:
        order = self.token_order(grid)
        return _always_critical(
            grid, order, self.block_size, self.neighbours, self.first_frame, torch.device(device)
        )

    def _shares(self, grid: Grid) -> tuple[float, ...]:
        order = self.token_order(grid)
        return _kept_by_count(grid, order, self.block_size, self.neighbours, self.first_frame)

    def _count(self, density: float, layout: TokenLayout) -> float:
        """Critical blocks per query block for which the mean share of blocks is ``density``."""
        shares = self._shares(layout.grid)
        if density < shares[0] - 1e-9:
            raise self._unreachable(density, shares[0], layout)
        fewer = max(k for k, share in enumerate(shares) if share <= density + 1e-9)
        if fewer == len(shares) - 1:
            return float(fewer)
        # Rows with fewer than k blocks that are critical in any case have k; the others more.
        step = shares[fewer + 1] - shares[fewer]
        return fewer + max(density - shares[fewer], 0) / step


def pooled_shares(statistics: BlockStatistics, text_key: Tensor) -> Tensor:
    """Share of attention that each block gets from a mean query (IPAR).

    Args:
        statistics: of the video tokens.
        text_key: ``[B, T, H, D]``, every text key by itself.

    Returns:
        ``[B, H, Q, K + 1]``, rows sum to 1: the key blocks, and the text as a whole (0 without).
    """
    scale = statistics.key_mean.shape[-1] ** -0.5
    query = statistics.query_mean * scale
    # A block weighs as much as the tokens that its mean stands for.
    video = query @ statistics.key_mean.mT + statistics.key_counts.to(query.dtype).log()
    text = query @ text_key.permute(0, 2, 3, 1).to(query.dtype)
    return torch.cat([video, text.logsumexp(-1, keepdim=True)], -1).softmax(-1)


def _gain_exceeds_error(statistics: BlockStatistics) -> Tensor:
    """Where the score of two means is larger than its estimated error (GAPR), ``[B, H, Q, K]``."""
    if statistics.query_deviation is None or statistics.key_deviation is None:
        raise TypeError("gain-aware rectification needs the deviations of queries and keys")
    query, key = statistics.query_mean, statistics.key_mean.mT
    gain = (query @ key).abs()
    error = (statistics.query_deviation @ key).abs()
    error = error + (query @ statistics.key_deviation.mT).abs()
    return gain > error


@lru_cache(maxsize=32)
def _always_critical(
    grid: Grid,
    order: TokenOrder,
    block: int,
    neighbours: bool,
    first_frame: bool,
    device: torch.device,
) -> Tensor:
    """Bool ``[Q, K]``: the pairs of blocks that are critical whatever the tokens are."""
    frames, height, width = grid
    place = order.inverse(grid, device).view(grid)
    of_token = place // block
    blocks = -(-place.numel() // block)
    always = torch.zeros(blocks, blocks, dtype=torch.bool, device=device)
    if neighbours:
        for t, h, w in product((0, 1), (-1, 0, 1), (-1, 0, 1)):
            here = of_token[: frames - t, max(-h, 0) : height - max(h, 0)]
            there = of_token[t:, max(h, 0) : height - max(-h, 0)]
            here = here[..., max(-w, 0) : width - max(w, 0)]
            there = there[..., max(w, 0) : width - max(-w, 0)]
            always[here, there] = True
        always |= always.clone().mT
    if first_frame and frames > 1:
        first = torch.zeros(blocks, dtype=torch.bool, device=device)
        first[of_token[0]] = True
        always |= first[:, None] & first
    return always


@lru_cache(maxsize=32)
def _kept_by_count(
    grid: Grid, order: TokenOrder, block: int, neighbours: bool, first_frame: bool
) -> tuple[float, ...]:
    """Mean share of blocks kept if every row keeps k of them, for k = 1 (at 0, too) to all."""
    device = torch.device("cpu")
    always = _always_critical(grid, order, block, neighbours, first_frame, device)
    forced = always.sum(-1).clamp(min=1)
    counts = torch.arange(len(always) + 1)
    kept = torch.maximum(forced[:, None], counts).double().mean(0) / len(always)
    return tuple(kept.tolist())
