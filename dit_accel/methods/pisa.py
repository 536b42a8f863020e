"""PISA, piecewise sparse attention: exact where it matters, a Taylor expansion everywhere else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from dit_accel.call import TokenLayout
from dit_accel.errors import OptionError
from dit_accel.grid import Grid, TokenOrder
from dit_accel.kernels.joint_reference import joint_attention
from dit_accel.kernels.selection import top_k_mask
from dit_accel.kernels.statistics import BlockStatistics
from dit_accel.methods.base import check_density
from dit_accel.methods.selecting import (
    SelectingMethod,
    check_block,
    mixed_counts,
    named_order,
)
from dit_accel.plan import JointPlan

FIRST_ORDER_UP_TO = 0.5
"""Share of exact blocks above which the first-order term is left out."""


@dataclass(frozen=True)
class PISA(SelectingMethod):
    """Piecewise Sparse Attention (arXiv 2602.01077).

    Each query block attends exactly to the key blocks whose mean key is most like its mean query.
    Every other block stands in the same softmax as one key, its centroid, that weighs as much as
    the block has tokens: the zeroth order of a Taylor expansion. The first order adds ``(share of
    the softmax on those blocks / V) * scale * q . H``, where H sums ``(k - mean k)^T v`` over all
    blocks: one matrix per head instead of one per block.

    Unlike the published code, text is exact and outside every statistic, a ragged last block
    counts with the tokens it has, and the share in the first-order term follows the running
    maximum (the code forgets to rescale it).

    Attributes:
        density: share of key blocks that are exact, on average over the query blocks, each of
            which has at least one. The centroids add 1 / block_size of the work: `at_density`
            counts them, and text, too.
        block_size: tokens per block, of queries and keys: 16, 32, 64 or 128.
        terms: 1 adds the first-order term, as published, 0 leaves it out; None: 1 for videos, 0
            for images. One H for all blocks is a guess: at density .25 it brings tiny-wan 7.6 dB
            nearer to dense and takes 1.8, 2.6 and 6.4 dB from tiny-hunyuan, tiny-sd3 and
            tiny-flux. Above half the blocks it is left out in any case: it is a poor guess for the
            few that remain.
        covariance_weighted: whether a block's score also counts how much its values vary with its
            keys, which is what the zeroth order misses: ``log(|H_j| + 1e-5)`` is added to it,
            ``|H_j|`` the Frobenius norm as in the published code (the paper's, of H_j minus the
            mean matrix, would need every H_j kept or computed twice). None does so for images
            alone, as the paper does.
        order: token order: "raster", "hilbert" or "patches" (8 x 8 tokens). None is "hilbert".
            Published are patches for images and raster for videos; at density .25 Hilbert order
            brings tiny-wan 8.6 and tiny-hunyuan 5.8 dB nearer to dense, and images are within a dB.
        refresh_every: see `SelectingMethod`.
    """

    name: ClassVar[str] = "pisa"
    paper: ClassVar[str] = "Piecewise Sparse Attention, arXiv 2602.01077"

    density: float = 0.15
    block_size: int = 64
    terms: int | None = None
    covariance_weighted: bool | None = None
    order: str | None = None

    def __post_init__(self) -> None:
        """Check all options."""
        super().__post_init__()
        check_density(self.density)
        check_block("block_size", self.block_size)
        if self.terms not in (None, 0, 1) or isinstance(self.terms, bool):
            raise OptionError(
                f"terms={self.terms!r} must be 0 or 1, the order of the expansion, or None."
            )
        if self.covariance_weighted not in (None, True, False):
            raise OptionError(
                f"covariance_weighted={self.covariance_weighted!r} must be None, True or False."
            )
        if self.order is not None:
            named_order(self.order)

    def token_order(self, grid: Grid) -> TokenOrder:
        """Return the order that the ``order`` option names; see `AttentionMethod.token_order`."""
        return named_order(self.order or "hilbert")

    @property
    def block_sizes(self) -> tuple[int, int]:
        """See `SelectingMethod.block_sizes`."""
        return self.block_size, self.block_size

    def least_share(self, layout: TokenLayout) -> float:
        """One exact block per row and the centroids; see `SelectingMethod.least_share`."""
        blocks, sweep = self.blocks(layout)[1], self._sweep(layout)
        return 1 / blocks * (1 - sweep) + sweep

    def with_share(self, share: float, layout: TokenLayout) -> Self:
        """See `SelectingMethod.with_share`."""
        if share == 1:
            return replace(self, density=1)
        least, sweep = 1 / self.blocks(layout)[1], self._sweep(layout)
        return replace(self, density=max((share - sweep) / (1 - sweep), least))

    def dense_reason(self, layout: TokenLayout) -> str | None:
        """See `SelectingMethod.dense_reason`."""
        blocks = self.blocks(layout)[1]
        if self._count(blocks) < blocks:
            return None
        return f"density {self.density} keeps all {blocks} key blocks"

    def wanted(self, layout: TokenLayout) -> frozenset[str]:
        """See `SelectingMethod.wanted`."""
        moment = {"moment"} if self._first_order(layout) else set()
        return frozenset(moment | ({"moment_norm"} if self._weighted(layout) else set()))

    def choose(
        self,
        query: Tensor,
        key: Tensor,
        statistics: BlockStatistics,
        layout: TokenLayout,
        order: TokenOrder,
    ) -> Tensor:
        """Keep the blocks with the best scores; see `SelectingMethod.select`."""
        scores = statistics.query_mean @ statistics.key_mean.mT * query.shape[-1] ** -0.5
        if statistics.moment_norm is not None and self._weighted(layout):
            scores = scores + (statistics.moment_norm + 1e-5).log()[:, :, None]
        rows, columns = self.blocks(layout)
        return mixed_counts(
            lambda k: top_k_mask(scores, k), self._count(columns), rows, scores.device
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, selection: Tensor, layout: TokenLayout
    ) -> Tensor:
        """One softmax over exact blocks and centroids; see `SelectingMethod.reference`."""
        out, _ = joint_attention(
            query,
            key,
            value,
            selection.to(torch.int8),
            query_block=self.block_size,
            key_block=self.block_size,
            text_length=layout.text_length,
            remainder=True,
            first_order=self._first_order(layout),
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
        return JointPlan(
            layout,
            order,
            selection.to(torch.int8),
            self.block_size,
            self.block_size,
            statistics,
            remainder=True,
            first_order=self._first_order(layout),
        )

    def _count(self, blocks: int) -> float:
        """Exact key blocks per query block, on average."""
        return max(1.0, self.density * blocks)

    def _first_order(self, layout: TokenLayout) -> bool:
        terms = int(layout.grid[0] > 1) if self.terms is None else self.terms
        blocks = self.blocks(layout)[1]
        return terms == 1 and self._count(blocks) <= FIRST_ORDER_UP_TO * blocks

    def _weighted(self, layout: TokenLayout) -> bool:
        if self.covariance_weighted is None:
            return layout.grid[0] == 1
        return self.covariance_weighted

    def _sweep(self, layout: TokenLayout) -> float:
        """Share of the video's pairs that attending to every centroid costs."""
        return self.blocks(layout)[1] / layout.video_length
