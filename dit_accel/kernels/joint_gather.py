"""Exact, pooled and stand-in blocks under one softmax, in plain torch and at the cost of a kernel.

What `joint_reference.py` defines, with the work of the listed blocks alone: every query block's
keys are gathered, so sparsity pays on a CPU too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.joint_reference import LEVELS, first_order_moment
from dit_accel.kernels.statistics import BlockStatistics, block_statistics

CHUNK = 1 << 21
"""Numbers that one step gathers and scores, at most: small enough for a CPU's caches."""


def gathered_joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    *,
    query_block: int,
    key_block: int,
    text_length: int = 0,
    statistics: BlockStatistics | None = None,
    remainder: bool = False,
    first_order: bool = False,
    row_factor: Tensor | None = None,
    added: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend to every key block at the level asked for; see `joint_reference.joint_attention`.

    Args:
        query: ``[B, N, H, D]``: V video rows, then ``text_length`` text rows; computed in float32
            (float64 for float64 inputs).
        key: likewise; without text it may have another number of tokens.
        value: like ``key``.
        levels: int8 ``[B|1, H|1, Q, K]`` over video blocks: 1 exact, 2, 4 or 8 pooled, 0 left out.
        query_block: video tokens per query block; the last may have fewer.
        key_block: video tokens per key block.
        text_length: text rows.
        statistics: of these tokens and blocks; what is missing there is computed.
        remainder: blocks of level 0 stand there as their centroids.
        first_order: add PISA's first-order term for the remainder.
        row_factor: ``[B, H, Q]``.
        added: ``[B, H, Q, D]``.
        scale: softmax scale; ``D ** -0.5`` if None.
        return_lse: also return the natural-log sum of exponentials ``[B, H, N]``.

    Returns:
        Output ``[B, N, H, D]`` in the dtype of ``query``, and the sum or None.
    """
    batch, total, heads, size = query.shape
    queries, video = total - text_length, key.shape[1] - text_length
    scale = size**-0.5 if scale is None else scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value))
    wanted = levels.expand(batch, heads, -1, -1).flatten(0, 2)  # [B*H*Q, K]
    banks, centroids = _banks(
        (key, value), (k, v), wanted, query_block, key_block, video, statistics, remainder
    )
    blocks = levels.shape[-2]
    rows = F.pad(q[:, :queries], (0, 0, 0, blocks * query_block - queries))
    rows = rows.reshape(batch * heads * blocks, query_block, size)
    text = k[:, video:], v[:, video:]
    out, lse, in_remainder = _video_rows(rows, wanted, banks, centroids, text, scale)
    if centroids is not None and first_order:
        moment = statistics.moment if statistics is not None else None
        if moment is None:
            keys, values = (x[:, :video].to(dtype) for x in (key, value))
            moment = first_order_moment(keys, values, key_block)
        slope = rows.view(batch * heads, -1, size) @ moment.to(dtype).flatten(0, 1)
        out += slope.view_as(out) * in_remainder[..., None] * (scale / video)
    if row_factor is not None:
        out *= row_factor.flatten()[:, None, None]
    if added is not None:
        out += added.flatten(0, 2)[:, None]
    text_out = F.scaled_dot_product_attention(q[:, queries:], k, v, scale=scale)
    out = torch.cat([out.view(batch * heads, -1, size)[:, :queries], text_out], 1)
    out = out.unflatten(0, (batch, heads)).transpose(1, 2).to(query.dtype)
    if not return_lse:
        return out, None
    text_lse = (q[:, queries:] @ k.mT * scale).logsumexp(-1)
    lse = torch.cat([lse.view(batch * heads, -1)[:, :queries], text_lse], 1)
    return out, lse.unflatten(0, (batch, heads))


@dataclass(frozen=True, eq=False)
class _Bank:
    """All key blocks at one level, and which of them each query block wants.

    Attributes:
        keys: ``[B*H, K, G, D]``, G means per block.
        values: likewise.
        log_weights: ``[K, G]``; -inf where a ragged block has no token.
        counts: ``[B*H*Q]``, blocks wanted at this level.
        index: ``[B*H*Q, K]``, the wanted ones first.
    """

    keys: Tensor
    values: Tensor
    log_weights: Tensor
    counts: Tensor
    index: Tensor

    def gather(self, rows: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values ``[rows, M, D]`` and log-weights ``[rows, M]``, -inf where padded."""
        counts = self.counts[rows]
        most = int(counts.max())
        index = self.index[rows, :most]
        padding = torch.arange(most, device=index.device) >= counts[:, None]
        bias = self.log_weights[index].masked_fill(padding[..., None], float("-inf"))
        # Whole blocks as single rows of a matrix: the fastest way to copy them.
        columns, group = self.log_weights.shape
        shape = len(rows), most * group, self.keys.shape[-1]
        block = (head[:, None] * columns + index).flatten()
        keys, values = (
            x.flatten(0, 1).flatten(1).index_select(0, block).view(shape)
            for x in (self.keys, self.values)
        )
        return keys, values, bias.flatten(1)


def _video_rows(
    rows: Tensor,
    wanted: Tensor,
    banks: list[_Bank],
    centroids: _Bank | None,
    text: tuple[Tensor, Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum and the softmax's share on centroids, of each query block's rows.

    Args:
        rows: ``[B*H*Q, query_block, D]``.
        wanted: levels, ``[B*H*Q, K]``.
        banks: one for every level in ``wanted``.
        centroids: stand-ins for level 0, if they are to be seen.
        text: keys and values, ``[B*H, T, D]``.
        scale: softmax scale.
    """
    count, query_block, size = rows.shape
    columns, text_length = wanted.shape[-1], text[0].shape[1]
    blocks = count // text[0].shape[0]
    out, lse = torch.empty_like(rows), rows.new_empty(count, query_block)
    in_remainder = torch.zeros_like(lse)
    # Rows of like length share a chunk, because the shorter ones are padded.
    lengths = sum((bank.counts * bank.keys.shape[-2] for bank in banks), wanted.new_zeros(count))
    order = lengths.argsort(descending=True)
    always = text_length + (columns if centroids is not None else 0)
    start = 0
    while start < count:
        width = int(lengths[order[start]]) + always
        step = max(1, CHUNK // max(1, width * (query_block + 2 * size)))
        chunk = order[start : start + step]
        start += step
        head = chunk // blocks
        parts = [bank.gather(chunk, head) for bank in banks]
        parts.append((text[0][head], text[1][head], rows.new_zeros(len(chunk), text_length)))
        if centroids is not None:
            bias = centroids.log_weights[:, 0].masked_fill(wanted[chunk] != 0, float("-inf"))
            parts.append((centroids.keys[head, :, 0], centroids.values[head, :, 0], bias))
        keys, values, biases = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        out[chunk], lse[chunk], weights = _attend(rows[chunk], keys, values, biases, scale)
        if centroids is not None:
            in_remainder[chunk] = weights[..., -columns:].sum(-1)
    return out, lse, in_remainder


def _banks(
    inputs: tuple[Tensor, Tensor],
    key_value: tuple[Tensor, Tensor],
    wanted: Tensor,
    query_block: int,
    key_block: int,
    video: int,
    statistics: BlockStatistics | None,
    remainder: bool,
) -> tuple[list[_Bank], _Bank | None]:
    """One bank per level that occurs, and the centroids if the remainder stands there as such."""
    used = [level for level in LEVELS if bool((wanted == level).any())]
    pooled = tuple(level for level in used if level > 1)
    missing = statistics is None or not set(pooled) <= set(statistics.pooled)
    if (pooled or remainder) and missing:
        statistics = block_statistics(
            inputs[0],  # nobody asks for the means of queries
            *inputs,
            query_block=query_block,
            key_block=key_block,
            text_length=inputs[0].shape[1] - video,
            pooled_levels=pooled,
        )
    columns = wanted.shape[-1]
    lengths = (video - torch.arange(columns, device=wanted.device) * key_block).clamp(max=key_block)

    def bank(level: int, group: int, key: Tensor, value: Tensor) -> _Bank:
        slots = torch.arange(0, key_block, group, device=wanted.device)
        weights = (lengths[:, None] - slots).clamp(0, group).to(key_value[0].dtype)
        shape = -1, columns, len(slots), key.shape[-1]
        chosen = wanted == level
        index = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        k, v = (x.to(weights.dtype).reshape(shape) for x in (key, value))
        return _Bank(k, v, weights.log(), chosen.sum(-1), index)

    banks = []
    for level in used:
        if level == 1:
            pad = (0, 0, 0, columns * key_block - video)
            banks.append(bank(1, 1, *(F.pad(x[:, :video], pad) for x in key_value)))
        elif statistics is not None:
            banks.append(bank(level, level, *statistics.pooled[level]))
    if not remainder or statistics is None:
        return banks, None
    return banks, bank(0, key_block, statistics.key_mean, statistics.value_mean)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum and weights of ``softmax(scale * query @ key.T + bias)``; 0 for no key."""
    scores = torch.baddbmm(bias[:, None], query, key.mT, alpha=scale)
    peak = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(1)
    peak = peak.masked_fill(peak == float("-inf"), 0)
    weights = scores.sub_(peak).exp_()
    mass = weights.sum(-1, keepdim=True)
    lse = (mass.log() + peak).squeeze(-1)
    weights /= mass.clamp(min=torch.finfo(mass.dtype).tiny)
    return weights @ value, lse, weights
