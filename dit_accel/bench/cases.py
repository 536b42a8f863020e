"""Random attention calls with lists of key tiles, and how wrong an answer to one is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dit_accel.bench.measuring import SEED
from dit_accel.call import TokenLayout
from dit_accel.grid import RASTER
from dit_accel.kernels.reference import masked_attention
from dit_accel.kernels.tiles import TileLists, tile_lengths
from dit_accel.plan import BlockSparsePlan

BLOCK = 128
SAMPLED_ROWS = 64
PATTERNS = 64
Lists = Literal["random", "band", "masked"]
LISTS: tuple[Lists, ...] = ("random", "band", "masked")


@dataclass(frozen=True)
class Case:
    """Random inputs ``[1, tokens, heads, head_size]`` and lists of tiles of 128 tokens.

    Attributes:
        qkv: query, key and value.
        count: int32 ``[1, heads, Q]``, visited key tiles of each query tile.
        index: int32 ``[1, heads, Q, count]``, ascending.
        patterns: bool ``[P, 128, 128]``, masks for tiles whose pairs are partly hidden; None if
            all tiles are whole.
        slots: int32 like ``index``, which pattern a visited tile has; None likewise.
    """

    qkv: tuple[Tensor, Tensor, Tensor]
    count: Tensor
    index: Tensor
    patterns: Tensor | None = None
    slots: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the sequence."""
        return self.qkv[0].shape[1]

    def lists(self) -> TileLists:
        """The lists as our kernels read them."""
        none = torch.zeros_like(self.count)
        no_index = none[..., None]
        if self.patterns is None or self.slots is None:
            bits = torch.zeros(1, BLOCK, BLOCK // 64, dtype=torch.int64, device=none.device)
            return TileLists(
                self.count, self.index, none, no_index, no_index, bits, BLOCK, self.tokens
            )
        shifts = torch.arange(64, device=none.device)
        bits = (self.patterns.unflatten(-1, (-1, 64)).long() << shifts).sum(-1)
        return TileLists(
            none, no_index, self.count, self.index, self.slots, bits, BLOCK, self.tokens
        )

    def block_mask(self) -> BlockMask:
        """The lists as FlexAttention and flash-attn-4 read them; whole tiles only."""
        blocks = self.count.shape[-1]
        listed = F.pad(self.index, (0, blocks - self.index.shape[-1]))
        return BlockMask.from_kv_blocks(
            torch.zeros_like(self.count),
            torch.zeros_like(listed),
            self.count,
            listed,
            BLOCK_SIZE=BLOCK,
            # Compiled kernels take whole tiles from the lists; eager FlexAttention asks this alone.
            mask_mod=None if self.index.is_cuda else self._listed(),
            seq_lengths=(self.tokens, self.tokens),
        )

    def _listed(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Return the lists as a function of (batch, head, query, key)."""
        shape = *self.count.shape, self.count.shape[-1]
        empty = torch.zeros(shape, dtype=torch.bool, device=self.index.device)
        visited = empty.scatter_(-1, self.index.long(), True)
        return lambda b, h, q, k: visited[b, h, q // BLOCK, k // BLOCK]

    @cached_property
    def plan(self) -> BlockSparsePlan:
        """The case as operators take it."""
        plan = BlockSparsePlan(TokenLayout((1, 1, self.tokens)), RASTER, self.block_mask())
        plan.__dict__["tiles"] = self.lists()  # what it would work out from the block mask
        return plan

    def pairs(self) -> int:
        """Pairs of tokens in visited tiles, over all heads; hidden ones cost as much as others."""
        lengths = tile_lengths(self.tokens, BLOCK, self.index.device)
        return int((lengths[self.index.long()].sum(-1) * lengths).sum())

    def sampled_error(self, out: Tensor, dense: bool = False) -> float:
        """Relative error of ``out`` against float64 in some rows of every head."""
        return self.sampled_errors(out, dense)[0]

    def sampled_errors(self, out: Tensor, dense: bool = False) -> tuple[float, float]:
        """Relative errors against float64 in some rows: of ``out``, and of the plain formula.

        Args:
            out: ``[1, tokens, heads, head_size]``.
            dense: whether every pair should have been attended, rather than those on the lists.
        """
        device = self.index.device
        rows = torch.linspace(0, self.tokens - 1, SAMPLED_ROWS, device=device).long()
        difference = plain_difference = norm = 0.0
        for head in range(out.shape[2]):
            query, key, value = (x[:, :, head : head + 1] for x in self.qkv)
            query = query[:, rows]
            if dense:
                mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
            else:
                mask = self._allowed(head, rows)[None, None]
            exact, _ = masked_attention(query.double(), key.double(), value.double(), mask)
            plain, _ = masked_attention(query, key, value, mask)
            difference += float((out[:, rows, head : head + 1] - exact).norm() ** 2)
            plain_difference += float((plain - exact).norm() ** 2)
            norm += float(exact.norm() ** 2)
        return (difference / norm) ** 0.5, (plain_difference / norm) ** 0.5

    def _allowed(self, head: int, rows: Tensor) -> Tensor:
        """Bool ``[rows, tokens]``: the keys that these rows of one head attend."""
        tiles = self.index[0, head, rows // BLOCK].long()
        blocks = self.count.shape[-1]
        allowed = torch.zeros(len(rows), blocks, BLOCK, dtype=torch.bool, device=rows.device)
        shown = torch.ones(*tiles.shape, BLOCK, dtype=torch.bool, device=rows.device)
        if self.patterns is not None and self.slots is not None:
            slots = self.slots[0, head, rows // BLOCK].long()
            shown = self.patterns[slots, (rows % BLOCK)[:, None]]
        allowed.scatter_(1, tiles[..., None].expand_as(shown), shown)
        return allowed.flatten(1)[:, : self.tokens]


def visited_tiles(tokens: int, density: float) -> int:
    """Return how many key tiles each query tile of a case visits."""
    return max(1, round(-(-tokens // BLOCK) * density))


def make_case(
    tokens: int,
    heads: int,
    head_size: int,
    density: float,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    lists: Lists = "random",
) -> Case:
    """Draw a case; the seed is fixed.

    Args:
        tokens: length of the sequence.
        heads: number of heads; lists are drawn for each.
        head_size: channels of a head.
        density: share of the key tiles that each query tile visits.
        device: where the tensors live.
        dtype: of query, key and value.
        lists: "random"; "band", the tiles around each tile, as Radial visits; "masked", random with
            half of the pairs hidden in every tile.
    """
    torch.manual_seed(SEED)
    shape = 3, 1, tokens, heads, head_size
    query, key, value = torch.randn(shape, device=device, dtype=dtype).unbind()
    blocks = -(-tokens // BLOCK)
    visited = visited_tiles(tokens, density)
    if lists == "band":
        first = (torch.arange(blocks, device=device) - visited // 2).clamp(0, blocks - visited)
        index = first[:, None] + torch.arange(visited, device=device)
        index = index.int().expand(1, heads, blocks, visited).contiguous()
    else:
        order = torch.rand(1, heads, blocks, blocks, device=device).argsort(-1)
        index = order[..., :visited].sort(-1).values.int().contiguous()
    count = torch.full((1, heads, blocks), visited, dtype=torch.int32, device=device)
    if lists != "masked":
        return Case((query, key, value), count, index)
    patterns = torch.rand(PATTERNS, BLOCK, BLOCK, device=device) < 0.5
    # A list of one tile must not leave a row without a key.
    patterns[:, :, 0] = True
    # The ragged last tile has its own, which hide what lies beyond the end.
    cut = patterns & (torch.arange(BLOCK, device=device) < tokens - (blocks - 1) * BLOCK)
    patterns = torch.cat([patterns, cut])
    slots = torch.randint(0, PATTERNS, index.shape, dtype=torch.int32, device=device)
    slots += PATTERNS * (index == blocks - 1)
    return Case((query, key, value), count, index, patterns, slots)
