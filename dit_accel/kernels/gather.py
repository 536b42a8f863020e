"""Block-sparse attention in plain torch: gather the visited keys of each query block.

The work is that of the visited blocks alone, so sparsity pays on a CPU too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.tiles import TileLists


@dataclass(frozen=True, eq=False)
class QueryRows:
    """Consecutive query rows that see the same keys.

    Attributes:
        rows: the query rows.
        keys: the key rows that any of them sees: a slice, or int64 indices.
        mask: bool ``[rows, keys]``, or None if all see all.
    """

    rows: slice
    keys: slice | Tensor
    mask: Tensor | None


def gather_rows(lists: TileLists, text_length: int) -> list[list[list[QueryRows]]]:
    """Turn tile lists into key indices once, per batch entry, head (or 1 each) and query tile.

    The text rows that follow the ``lists.num_tokens`` video rows see, and are seen by, all.
    """
    total = lists.num_tokens + text_length
    batches, heads, tiles = lists.full_count.shape
    device = lists.full_count.device
    text = torch.arange(lists.num_tokens, total, device=device)
    seeing_all = [QueryRows(slice(lists.num_tokens, total), slice(0, total), None)]

    def parts(b: int, h: int) -> list[QueryRows]:
        video = _merged([_tile_rows(lists, (b, h, tile), text) for tile in range(tiles)])
        return video + seeing_all if text_length else video

    return [[parts(b, h) for h in range(heads)] for b in range(batches)]


def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Sequence[Sequence[Sequence[QueryRows]]],
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend by the key indices of `gather_rows`.

    Args:
        query: ``[B, N, H, D]``, video rows first and then text rows; likewise ``key``, ``value``.
        table: from `gather_rows`.
        scale: softmax scale; ``D ** -0.5`` if None.
        return_lse: also return the natural-log LSE, float32 ``[B, H, N]``.

    Rows without any key give output 0 and LSE -inf.
    """
    batch, total, num_heads, _ = query.shape
    out = torch.empty_like(query)
    lse = query.new_empty((batch, num_heads, total), dtype=torch.float32) if return_lse else None
    for b, heads in enumerate(table):
        for h, parts in enumerate(heads):
            chosen_b = slice(None) if len(table) == 1 else slice(b, b + 1)
            chosen_h = slice(None) if len(heads) == 1 else slice(h, h + 1)
            q, k, v = (x[chosen_b, :, chosen_h] for x in (query, key, value))
            for part in parts:
                rows = q[:, part.rows].transpose(1, 2)
                # Gathered as whole token rows, all heads at once: the fewest separate copies.
                keys, values = (_take(x, part.keys).transpose(1, 2) for x in (k, v))
                seen = _attend(rows, keys, values, part.mask, scale)
                out[chosen_b, part.rows, chosen_h] = seen.transpose(1, 2)
                if lse is not None:
                    lse[chosen_b, chosen_h, part.rows] = _lse(rows, keys, part.mask, scale)
    return out, lse


def _tile_rows(lists: TileLists, index: tuple[int, int, int], text: Tensor) -> QueryRows:
    size, video = lists.block_size, lists.num_tokens
    first = index[2] * size
    rows = slice(first, min(first + size, video))
    full = lists.full_index[index][: lists.full_count[index]].long()
    partial = lists.partial_index[index][: lists.partial_count[index]].long()
    inside = torch.arange(size, device=full.device)
    keys = (torch.cat([full, partial])[:, None] * size + inside).flatten()
    mask = None
    if len(partial):
        slots = lists.partial_slot[index][: len(partial)].long()
        bits = unpack_bits(lists.bits[slots], size)[:, : rows.stop - first].transpose(0, 1)
        mask = F.pad(bits.flatten(1), (len(full) * size, len(text)), value=True)
    real = keys < video
    if mask is not None:
        mask = mask[:, F.pad(real, (0, len(text)), value=True)]
        mask = None if bool(mask.all()) else mask
    keys = torch.cat([keys[real], text])
    contiguous = len(keys) > 0 and bool((keys.diff() == 1).all())
    if contiguous:
        return QueryRows(rows, slice(int(keys[0]), int(keys[-1]) + 1), mask)
    return QueryRows(rows, keys, mask)


def _merged(parts: list[QueryRows]) -> list[QueryRows]:
    """Join neighbouring rows that see the same keys: fewer and larger products."""
    merged = parts[:1]
    for part in parts[1:]:
        last = merged[-1]
        if part.mask is None and last.mask is None and _same_keys(part.keys, last.keys):
            merged[-1] = QueryRows(slice(last.rows.start, part.rows.stop), last.keys, None)
        else:
            merged.append(part)
    return merged


def _same_keys(a: slice | Tensor, b: slice | Tensor) -> bool:
    if isinstance(a, slice) or isinstance(b, slice):
        return isinstance(a, slice) and isinstance(b, slice) and a == b
    return torch.equal(a, b)


def unpack_bits(bits: Tensor, size: int) -> Tensor:
    """Int64 words ``[..., ceil(size/64)]`` -> bool ``[..., size]``, lowest bit first."""
    shifts = torch.arange(64, device=bits.device)
    return (bits[..., None] >> shifts & 1).bool().flatten(-2)[..., :size]


def _take(tokens: Tensor, keys: slice | Tensor) -> Tensor:
    return tokens[:, keys] if isinstance(keys, slice) else tokens.index_select(1, keys)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    if k.shape[2] == 0:
        return torch.zeros_like(q)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out if mask is None else out.masked_fill(~mask.any(-1)[:, None], 0)


def _lse(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    scores = q.float() @ k.float().transpose(-1, -2)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.logsumexp(-1)
