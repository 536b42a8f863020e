"""Tile lists: which key tiles each query tile visits, in the form the kernels read.

The same information as FlexAttention's `BlockMask`, except that the partial tiles' masks are stored
as bits instead of as a function: a kernel then needs no code per mask, and equal tiles (a sliding
window has few different ones) share one pattern.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.errors import GridMismatchError, OptionError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_EMPTY, _PARTIAL, _FULL = 0, 1, 2


@dataclass(frozen=True, eq=False)
class TileLists:
    """Which key tiles each query tile of the video segment visits (video x video only).

    Attributes:
        full_count: int32 ``[B|1, H|1, Q]``; listed tiles of which every pair is allowed.
        full_index: int32 ``[B|1, H|1, Q, K]``; key tiles, ascending, ``full_count`` of them valid.
        partial_count: int32 ``[B|1, H|1, Q]``; listed tiles of which only some pairs are allowed.
        partial_index: int32 ``[B|1, H|1, Q, K]``; as ``full_index``, its own ``K``.
        partial_slot: int32 ``[B|1, H|1, Q, K]``; the row of ``bits`` for that tile.
        bits: int64 ``[P, block_size, ceil(block_size / 64)]``; distinct patterns of allowed pairs:
            bit ``n % 64`` of word ``n // 64`` of row ``m`` is query ``m`` and key ``n``.
        block_size: tokens per tile, a power of two; the Triton kernels need at least 16.
        num_tokens: video tokens; the last tile may be ragged.
    """

    full_count: Tensor
    full_index: Tensor
    partial_count: Tensor
    partial_index: Tensor
    partial_slot: Tensor
    bits: Tensor
    block_size: int
    num_tokens: int

    @property
    def longest(self) -> int:
        """Key tiles that there is room for on a list, full and partial ones together."""
        return self.full_index.shape[-1] + self.partial_index.shape[-1]

    def allowed_pairs(self) -> float:
        """Number of allowed (query, key) pairs, the mean over batch and heads."""
        columns = tile_lengths(self.num_tokens, self.block_size, self.full_index.device)
        full = (columns[self.full_index.long()] * _listed(self.full_count, self.full_index)).sum(-1)
        in_pattern = _count_bits(self.bits)[self.partial_slot.long()]
        partial = (in_pattern * _listed(self.partial_count, self.partial_index)).sum(-1)
        return float((full * columns + partial).sum(-1).double().mean())


def tile_lengths(num_tokens: int, block_size: int, device: torch.device | str) -> Tensor:
    """Return int64 ``[Q]``: the tokens in each tile; only the last may hold fewer."""
    first = torch.arange(0, num_tokens, block_size, device=device)
    return (num_tokens - first).clamp(max=block_size)


def tile_lists_from_block_mask(block_mask: BlockMask, num_tokens: int) -> TileLists:
    """Convert a FlexAttention ``BlockMask`` over ``num_tokens`` video tokens.

    Tiles under ``kv_indices`` are evaluated with ``mask_mod``, a chunk at a time so that memory
    stays bounded; those that turn out full or empty are listed as such.

    Args:
        block_mask: square blocks; ``mask_mod`` is called with int32 index tensors of shapes
            ``[t, 1, 1]`` (batch, head), ``[t, m, 1]`` (query) and ``[t, 1, n]`` (key) and must
            broadcast: elementwise operations and table look-ups do.
        num_tokens: length of both axes.

    Raises:
        OptionError: if the blocks are not square or their size is no power of two.
        GridMismatchError: if the mask covers another number of tokens.
    """
    rows, size = block_mask.BLOCK_SIZE
    if rows != size:
        raise OptionError(f"the kernel needs square blocks, but BLOCK_SIZE={(rows, size)}.")
    check_block_size(size, least=1)
    blocks = math.ceil(num_tokens / size)
    if block_mask.kv_num_blocks.shape[-1] != blocks:
        raise GridMismatchError(
            f"the block mask has {block_mask.kv_num_blocks.shape[-1]} rows of {size} tokens, but "
            f"{num_tokens} video tokens make {blocks}; build it over the video tokens alone."
        )
    states = listed_blocks(block_mask.kv_num_blocks, block_mask.kv_indices, blocks) * _PARTIAL
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = listed_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, blocks)
        states = torch.where(full, _FULL, states)

    tiles = (states == _PARTIAL).nonzero().int()
    # Small chunks stay in a CPU's cache; a GPU wants launches worth their while.
    pairs_per_chunk = 1 << (18 if states.device.type == "cpu" else 25)
    chunks = tiles.split(max(1, pairs_per_chunk // (size * size)))
    evaluate = block_mask.mask_mod
    return _assemble(
        states, tiles, (_evaluate(evaluate, t, size, num_tokens) for t in chunks), size, num_tokens
    )


def tile_lists_from_dense(mask: Tensor, block_size: int) -> TileLists:
    """Convert a bool mask ``[V, V]`` or ``[B|1, H|1, V, V]``; for tests and small grids."""
    check_block_size(block_size, least=1)
    mask = mask if mask.ndim == 4 else mask[None, None]
    batch, heads, num_tokens, _ = mask.shape
    blocks = math.ceil(num_tokens / block_size)
    pad = blocks * block_size - num_tokens
    allowed = F.pad(mask, (0, pad, 0, pad)).reshape(
        batch, heads, blocks, block_size, blocks, block_size
    )
    states = torch.full((batch, heads, blocks, blocks), _PARTIAL, device=mask.device)
    patterns = allowed.transpose(3, 4).reshape(-1, block_size, block_size)
    return _assemble(states, states.nonzero().int(), [patterns], block_size, num_tokens)


def check_block_size(block_size: int, least: int = 16) -> None:
    """Raise `OptionError` unless ``block_size`` is a power of two that a kernel can work with."""
    if block_size < least or block_size & (block_size - 1):
        raise OptionError(
            f"{block_size=} must be a power of two of at least {least}; 128 is fastest."
        )


def _evaluate(mask_mod: Callable[..., Tensor], tiles: Tensor, size: int, num_tokens: int) -> Tensor:
    """Bool ``[t, size, size]``: the allowed pairs of ``tiles``, int32 ``[t, (b, h, q, k)]``."""
    b, h, q, k = tiles[:, :, None, None].unbind(1)
    inside = torch.arange(size, dtype=torch.int32, device=tiles.device)
    query, key = q * size + inside[:, None], k * size + inside
    last = num_tokens - 1
    allowed = mask_mod(b, h, query.clamp(max=last), key.clamp(max=last))
    return allowed & (query <= last) & (key <= last)


def _assemble(
    states: Tensor, tiles: Tensor, patterns: Iterable[Tensor], size: int, num_tokens: int
) -> TileLists:
    """Make the lists from the states of all tiles and the patterns of the partial ones.

    ``tiles`` is int32 ``[t, 4]``, ``patterns`` yields bool ``[chunk, size, size]`` in that order.
    """
    pair_counts: list[Tensor] = []

    def packed() -> Iterator[Tensor]:
        for allowed in patterns:
            pair_counts.append(allowed.sum((1, 2), dtype=torch.int32))
            yield _pack(allowed)

    bits, slots = _distinct(packed(), (size, math.ceil(size / 64)), states.device)
    where = tuple(tiles.long().unbind(1))
    if pair_counts:
        found = torch.cat(pair_counts)
        lengths = tile_lengths(num_tokens, size, states.device)
        possible = lengths[where[2]] * lengths[where[3]]
        state = torch.where(found == possible, _FULL, _PARTIAL)
        states = states.index_put(where, torch.where(found == 0, _EMPTY, state).to(states.dtype))
    slot_of_tile = torch.zeros_like(states, dtype=torch.int32).index_put(where, slots)
    partial_count, partial_index = _ascending_lists(states == _PARTIAL)
    return TileLists(
        *_ascending_lists(states == _FULL),
        partial_count,
        partial_index,
        slot_of_tile.gather(-1, partial_index.long()),
        bits,
        size,
        num_tokens,
    )


def _pack(allowed: Tensor) -> Tensor:
    """Bool ``[t, m, n]`` -> int64 ``[t, m, ceil(n / 64)]``, key ``n`` at bit ``n % 64``."""
    padded = F.pad(allowed, (0, -allowed.shape[-1] % 64)).contiguous()
    # Eight bools are one integer of eight bytes 0 or 1; the product gathers them in its top byte.
    octets = padded.view(torch.int64) * 0x0102040810204080
    return ((octets >> 56) & 0xFF).to(torch.uint8).view(torch.int64)


def _distinct(
    chunks: Iterable[Tensor], shape: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Deduplicate packed patterns: the distinct ones ``[P, *shape]`` and each tile's slot ``[t]``.

    Patterns are told apart by a 64-bit hash: for a million of them the odds of a clash are below
    one in ten million.
    """
    all_keys, kept_keys, kept = [], [], []
    for words in chunks:
        if len(words) == 0:
            continue
        keys = _hash(words)
        unique, first = _first_of_each(keys)
        all_keys.append(keys)
        kept_keys.append(unique)
        kept.append(words[first])
    if not kept:
        # One unused pattern, so that a kernel never gets a null pointer.
        empty = torch.zeros(1, *shape, dtype=torch.int64, device=device)
        return empty, torch.zeros(0, dtype=torch.int32, device=device)
    unique, first = _first_of_each(torch.cat(kept_keys))
    slots = torch.searchsorted(unique, torch.cat(all_keys))
    return torch.cat(kept)[first].contiguous(), slots.int()


def _first_of_each(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ``keys``, ascending, and where each of them occurs first."""
    unique, inverse = torch.unique(keys, return_inverse=True)
    position = torch.arange(len(keys), device=keys.device)
    first = torch.full_like(unique, len(keys)).scatter_reduce_(0, inverse, position, "amin")
    return unique, first


def _hash(words: Tensor) -> Tensor:
    """Int64 ``[t, m, w]`` -> int64 ``[t]``: each word mixed with its place (splitmix64), summed."""
    flat = words.flatten(1)
    mixed = flat + torch.arange(1, flat.shape[1] + 1, device=flat.device) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return (mixed ^ (mixed >> 31)).sum(1)


def _count_bits(bits: Tensor) -> Tensor:
    """Int64 ``[P]``: the allowed pairs of each pattern."""
    x = bits.flatten(1).view(torch.uint8)
    x = x - ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return ((x + (x >> 4)) & 0x0F).sum(1, dtype=torch.int64)


def _ascending_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Bool ``[..., Q, K]`` -> int32 counts ``[..., Q]`` and the chosen columns, ascending."""
    counts = chosen.sum(-1, dtype=torch.int32)
    longest = max(1, int(counts.max()))
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    return counts, order[..., :longest].to(torch.int32).contiguous()


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Bool, of the shape of ``indices``: the entries that count."""
    return torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]


def listed_blocks(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Inverse of `_ascending_lists`: bool ``[..., Q, columns]``."""
    listed = _listed(counts, indices)
    chosen = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool, device=indices.device)
    return chosen.scatter_(-1, torch.where(listed, indices, columns).long(), True)[..., :columns]
