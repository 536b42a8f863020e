"""What a method decides for one attention call, in a form that any operator can run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.call import TokenLayout
from dit_accel.grid import RASTER, TokenOrder
from dit_accel.kernels.gather import QueryRows, gather_rows
from dit_accel.kernels.joint_reference import LEVELS
from dit_accel.kernels.tiles import (
    TileLists,
    listed_blocks,
    tile_lengths,
    tile_lists_from_block_mask,
)

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from dit_accel.kernels.statistics import BlockStatistics

EMPTY, PARTIAL, FULL = 0, 1, 2
"""States of a pair of blocks: no pair of tokens is allowed, some are, all are."""

TokenPredicate = Callable[[Tensor, Tensor], Tensor]
"""``(query index, key index) -> bool``, elementwise with broadcasting; raster video indices."""


@dataclass(frozen=True)
class DensePlan:
    """Attend to everything.

    Attributes:
        reason: why, for the report.
        order: the order in which the video tokens arrive.
    """

    reason: str
    order: TokenOrder = RASTER


@dataclass(frozen=True, eq=False)
class BlockSparsePlan:
    """Exact attention over a list of blocks per query block.

    Attributes:
        layout: the call's tokens. Text keys are visible to every query and text queries see
            everything, so only the video x video part is listed.
        order: the order of the video tokens that block indices refer to.
        video_mask: FlexAttention `BlockMask` over the ``V = T*H*W`` video tokens in ``order``;
            ``kv_indices`` are partly allowed blocks, ``full_kv_indices`` wholly allowed ones.
    """

    layout: TokenLayout
    order: TokenOrder
    video_mask: BlockMask

    @cached_property
    def tiles(self) -> TileLists:
        """The same lists with the partial blocks' masks as bits, for kernels without callbacks."""
        return tile_lists_from_block_mask(self.video_mask, self.layout.video_length)

    @cached_property
    def key_rows(self) -> list[list[list[QueryRows]]]:
        """The same lists as key indices per query tile, video first, for plain torch."""
        return gather_rows(self.tiles, self.layout.text_length)

    @property
    def block_lists(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Counts and indices of the partial blocks, and of the full ones."""
        mask = self.video_mask
        if mask.full_kv_num_blocks is None or mask.full_kv_indices is None:
            raise TypeError("a plan's BlockMask must list its full blocks apart")
        return (mask.kv_num_blocks, mask.kv_indices), (
            mask.full_kv_num_blocks,
            mask.full_kv_indices,
        )

    @cached_property
    def block_mask(self) -> BlockMask:
        """`BlockMask` over video and then text tokens, as FlexAttention and others take it."""
        return with_text(self.video_mask, self.layout)

    @cached_property
    def block_density(self) -> float:
        """Share of all (query, key) pairs that lie in visited blocks: what a kernel computes."""
        visited = (dense_block_states(self.video_mask) != EMPTY).flatten(0, 1)
        size, video = self.video_mask.BLOCK_SIZE[0], self.layout.video_length
        pairs = [visited_pairs(one, size, video) for one in visited]
        return self._share(sum(pairs) / len(pairs))

    @cached_property
    def density(self) -> float:
        """Share of all (query, key) pairs, text included, that are attended."""
        return self._share(self.tiles.allowed_pairs())

    @cached_property
    def has_whole_blocks_only(self) -> bool:
        """Whether no block is partly masked, the ragged last one aside."""
        return int(self.video_mask.kv_num_blocks.sum()) == 0

    def _share(self, video_pairs: float) -> float:
        total, video = self.layout.num_tokens, self.layout.video_length
        return (video_pairs + total * total - video * video) / (total * total)


@dataclass(frozen=True, eq=False)
class JointPlan:
    """Exact blocks, pooled blocks and stand-ins under one softmax, chosen anew for every call.

    `dit_accel.kernels.joint_reference.joint_attention` says what is computed.

    Attributes:
        layout: the call's tokens; text keys are exact for all, text queries see everything.
        order: the order of the video tokens that block indices refer to.
        levels: int8 ``[B|1, H|1, Q, K]``: 1 exact, 2, 4 or 8 keys to a mean, 0 not listed.
        query_block: video tokens per query block.
        key_block: video tokens per key block.
        statistics: of the blocks; must hold what the levels and the remainder need. None if the
            levels are 0 and 1 alone: operators then make what a remainder needs.
        remainder: whether a block of level 0 stands there as its centroid, or is dropped.
        first_order: whether PISA's first-order term is added for the remainder.
        row_factor: ``[B, H, Q]`` on the outputs of a query block, or None.
        added: ``[B, H, Q, D]`` added to them after that, or None.
        choosing_pairs: what making this plan cost, per batch entry and head, in (query, key) pairs;
            a score that no value follows is half a pair.
    """

    layout: TokenLayout
    order: TokenOrder
    levels: Tensor
    query_block: int
    key_block: int
    statistics: BlockStatistics | None = None
    remainder: bool = False
    first_order: bool = False
    row_factor: Tensor | None = None
    added: Tensor | None = None
    choosing_pairs: float = 0.0

    @cached_property
    def computed_share(self) -> Tensor:
        """`density` as a 0-d tensor on the device, so that nobody waits for it."""
        video, text = self.layout.video_length, self.layout.text_length
        device = self.levels.device
        queries = tile_lengths(video, self.query_block, device).double()
        keys = tile_lengths(video, self.key_block, device).double()
        cost = torch.full_like(keys, float(self.remainder))
        costs = cost.expand(self.levels.shape)
        for level in LEVELS:
            costs = torch.where(self.levels == level, (keys / level).ceil(), costs)
        pairs = (costs.sum(-1) * queries).sum(-1).mean() + self.choosing_pairs
        return (pairs + 2 * video * text + text * text) / (video + text) ** 2

    @property
    def density(self) -> float:
        """Share of all (query, key) pairs computed, text and choosing included.

        A pooled key counts as one. What grows only linearly with the tokens is not counted: means,
        and the products with PISA's moment, which are as much as one key per dimension of a head.
        """
        return float(self.computed_share)

    block_density = density


@dataclass(frozen=True, eq=False)
class PastJointPlan:
    """What a report keeps of a `JointPlan`, whose tensors are as large as the attention's own."""

    computed_share: Tensor

    @property
    def density(self) -> float:
        """See `JointPlan.density`."""
        return float(self.computed_share)

    block_density = density


AttentionPlan = DensePlan | BlockSparsePlan | JointPlan


def block_mask_from_states(
    states: Tensor, block_size: int, num_tokens: int, predicate: Callable[..., Tensor]
) -> BlockMask:
    """Make a `BlockMask` from the state of each pair of blocks.

    Args:
        states: int8 ``[Q, K]`` or ``[B, H, Q, K]`` of `EMPTY`, `PARTIAL` and `FULL`.
        block_size: tokens per block.
        num_tokens: length of the sequence, so that the last block may be ragged.
        predicate: ``mask_mod(batch, head, query, key) -> bool`` for the partial blocks.
    """
    from torch.nn.attention.flex_attention import BlockMask

    states = states if states.ndim == 4 else states[None, None]
    partial, full = states == PARTIAL, states == FULL
    kv, full_kv = _ascending_lists(partial), _ascending_lists(full)
    q, full_q = _ascending_lists(partial.mT), _ascending_lists(full.mT)
    # Not `from_kv_blocks`: it makes the lists by key with vmap, which can't run inside a compiled
    # graph's operators, where the first call of a compiled pipeline is planned.
    return BlockMask(
        seq_lengths=(num_tokens, num_tokens),
        kv_num_blocks=kv[0],
        kv_indices=kv[1],
        full_kv_num_blocks=full_kv[0],
        full_kv_indices=full_kv[1],
        q_num_blocks=q[0],
        q_indices=q[1],
        full_q_num_blocks=full_q[0],
        full_q_indices=full_q[1],
        BLOCK_SIZE=(block_size, block_size),
        mask_mod=predicate,
    )


def dense_block_states(mask: BlockMask) -> Tensor:
    """Return int8 ``[B, H, Q, K]`` with the state of each pair of blocks of ``mask``."""
    columns = math.ceil(mask.seq_lengths[1] / mask.BLOCK_SIZE[1])
    partial = listed_blocks(mask.kv_num_blocks, mask.kv_indices, columns)
    states = partial.to(torch.int8) * PARTIAL
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        full = listed_blocks(mask.full_kv_num_blocks, mask.full_kv_indices, columns)
        states = states + full.to(torch.int8) * FULL
    return states


def with_text(video_mask: BlockMask, layout: TokenLayout) -> BlockMask:
    """Extend a video ``BlockMask`` by text tokens that see, and are seen by, everything."""
    if layout.text_length == 0:
        return video_mask
    size, video, total = video_mask.BLOCK_SIZE[0], layout.video_length, layout.num_tokens
    old = dense_block_states(video_mask)
    blocks = math.ceil(total / size)
    states = old.new_full((*old.shape[:2], blocks, blocks), FULL)
    kept = old.shape[-1]
    states[..., :kept, :kept] = old
    if video % size:
        # The block in which video ends and text begins: some of its pairs are always allowed.
        edge = kept - 1
        states[..., edge, :kept] = states[..., edge, :kept].clamp(min=PARTIAL)
        states[..., :kept, edge] = states[..., :kept, edge].clamp(min=PARTIAL)
    video_mod = video_mask.mask_mod

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inside = video_mod(b, h, q.clamp(max=video - 1), k.clamp(max=video - 1))
        return inside | (q >= video) | (k >= video)

    return block_mask_from_states(states, size, total, mask_mod)


def visited_pairs(visited: Tensor, block_size: int, num_tokens: int) -> float:
    """Count the token pairs in the visited pairs of blocks, bool ``[Q, K]``."""
    sizes = torch.full((len(visited),), block_size, dtype=torch.float64, device=visited.device)
    sizes[-1] = num_tokens - block_size * (len(visited) - 1)
    return float(sizes @ visited.double() @ sizes)


def _ascending_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Bool ``[..., Q, K]`` -> int32 counts ``[..., Q]`` and indices, the chosen ones first."""
    indices = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), indices.to(torch.int32)
