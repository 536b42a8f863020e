"""What methods that choose by their tokens know of blocks that other ring parts hold."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.statistics import BlockStatistics, block_statistics
from dit_accel.kernels.tiles import tile_lengths
from dit_accel.parallel.split import Split

_OF_QUERIES = frozenset({"query_mean", "query_deviation"})
_SUMS = frozenset({"moment"})
_COUNTS = {"query_counts": _OF_QUERIES, "key_counts": frozenset()}


def gathered_statistics(
    local: BlockStatistics, split: Split, sizes: tuple[int, int]
) -> BlockStatistics:
    """Return the statistics of all blocks in the method's order, from each part's own.

    Args:
        local: of the blocks that this part holds, without pooled tokens.
        split: who holds what.
        sizes: tokens per query block and per key block.
    """
    found: dict[str, Any] = {}
    for field in fields(local):
        value = getattr(local, field.name)
        if not isinstance(value, Tensor) or field.name in _COUNTS:
            continue
        if field.name in _SUMS:
            found[field.name] = split.group.ring.all_reduce(value)
            continue
        size = sizes[0] if field.name in _OF_QUERIES else sizes[1]
        found[field.name] = _in_order(value, split, size)
    video = sum(map(len, split.shares.places))
    counts = [tile_lengths(video, size, local.key_mean.device).int() for size in sizes]
    return replace(local, **found, query_counts=counts[0], key_counts=counts[1])


def gathered_tokens(tokens: Tensor, split: Split) -> Tensor:
    """Return all parts' tokens ``[B, N, H, D]`` in the method's order, from this part's."""
    every = split.group.ring.all_gather(tokens)
    return torch.cat([every[part, :, : len(places)] for part, places in _parts(split)], 1)[
        :, _order(split)
    ]


def chunk_statistics(
    whole: BlockStatistics | None,
    split: Split,
    part: int,
    key: Tensor,
    value: Tensor,
    key_block: int,
    pooled_levels: tuple[int, ...],
) -> BlockStatistics:
    """Return the statistics of one part's key blocks, for attention to these alone.

    Args:
        whole: of all blocks; None to make them of the tokens.
        split: who holds what.
        part: which part.
        key: ``[B, N, H, D]``, the part's keys, without padding; ``value`` likewise.
        key_block: tokens per key block.
        pooled_levels: group sizes of the pooled keys and values that are needed.
    """
    made = None
    if pooled_levels or whole is None:
        made = block_statistics(
            key, key, value, query_block=key_block, key_block=key_block, pooled_levels=pooled_levels
        )
    if whole is None:
        return made  # type: ignore[return-value]
    columns = split.shares.blocks(part, key_block)
    total = sum(map(len, split.shares.places))
    # The first order term is the share on centroids times the moment per token, of all tokens.
    moment = None if whole.moment is None else whole.moment * (key.shape[1] / total)
    return BlockStatistics(
        whole.query_mean,
        whole.key_mean[:, :, columns],
        whole.value_mean[:, :, columns],
        whole.query_counts,
        whole.key_counts[columns],
        moment=moment,
        pooled={} if made is None else made.pooled,
    )


def _in_order(values: Tensor, split: Split, size: int) -> Tensor:
    """Gather ``[B, H, K of this part, ...]`` to ``[B, H, K, ...]`` in the method's order."""
    most = math.ceil(max(map(len, split.shares.places)) / size)
    missing = most - values.shape[2]
    if missing:
        shape = (*values.shape[:2], missing, *values.shape[3:])
        values = torch.cat([values, values.new_zeros(shape)], 2)
    every = split.group.ring.all_gather(values)
    blocks = [split.shares.blocks(part, size) for part, _ in _parts(split)]
    dealt = torch.cat([every[part, :, :, : len(own)] for part, own in enumerate(blocks)], 2)
    return dealt[:, :, torch.cat(blocks).argsort()]


def _parts(split: Split) -> list[tuple[int, Tensor]]:
    return list(enumerate(split.shares.places))


def _order(split: Split) -> Tensor:
    return torch.cat(split.shares.places).argsort()
