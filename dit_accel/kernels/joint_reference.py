"""Exact blocks, pooled blocks and stand-ins under one softmax, in plain torch: read this first.

PSA, PISA, Rectified SpaAttn and the merged remainder of static methods are all this one function of
a level for each pair of a query block and a key block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = (1, 2, 4, 8)
"""Tokens that one pooled key may stand for; level 1 is exact, level 0 leaves a block out."""


def pool(tokens: Tensor, block: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Average every ``group`` successive tokens of each block of ``block``.

    Blocks are cut first, so no group crosses a border, and the last groups of the sequence may be
    short: they are averaged over the tokens that are there.

    Args:
        tokens: ``[B, V, H, D]``.
        block: tokens per block; only the last may have fewer.
        group: tokens per mean; ``block`` gives one centroid per block.

    Returns:
        Means ``[B, M, H, D]``, the tokens each stands for ``[M]``, and its block ``[M]``, int64.
    """
    video = tokens.shape[1]
    index = torch.arange(video, device=tokens.device)
    groups_per_block = -(-block // group)
    group_of_token = index // block * groups_per_block + index % block // group
    count = int(group_of_token[-1]) + 1
    total = tokens.new_zeros(tokens.shape[0], count, *tokens.shape[2:])
    total.index_add_(1, group_of_token, tokens)
    sizes = torch.bincount(group_of_token, minlength=count)
    block_of_group = torch.arange(count, device=tokens.device) // groups_per_block
    kept = sizes > 0
    means = total[:, kept] / sizes[kept].to(tokens.dtype)[:, None, None]
    return means, sizes[kept], block_of_group[kept]


def first_order_moment(key: Tensor, value: Tensor, block: int) -> Tensor:
    """Sum over all blocks of ``sum_n (k_n - mean k)^T v_n``, ``[B, H, D, D]`` (PISA's H)."""
    means, _, _ = pool(key, block, block)
    of_token = torch.arange(key.shape[1], device=key.device) // block
    return torch.einsum("bnhd,bnhe->bhde", key - means[:, of_token], value)


def joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    *,
    query_block: int,
    key_block: int,
    text_length: int = 0,
    remainder: bool = False,
    first_order: bool = False,
    row_factor: Tensor | None = None,
    added: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to every key block at the level asked for, under one softmax.

    Long for its arguments alone: the maths is some thirty lines.

    A pooled key that stands for c tokens weighs ``c * exp(q . mean k)`` and brings the mean of
    their values (PSA: a bias of ``log c``).

    Args:
        query: ``[B, N, H, D]``: V video rows, then ``text_length`` text rows; any float dtype.
        key: likewise.
        value: likewise.
        levels: int ``[B|1, H|1, Q, K]`` over video blocks: 1 exact, 2, 4 or 8 pooled, 0 left out.
            Text keys are exact for every query, text queries attend to all tokens exactly.
        query_block: video tokens per query block; the last may have fewer.
        key_block: video tokens per key block.
        text_length: text rows.
        remainder: a block of level 0 is not dropped, but stands there as one key, its centroid.
        first_order: add ``(share of the remainder / V) * scale * q . H`` with H of
            `first_order_moment` (PISA's hybrid order; in the form that counts ragged blocks right).
        row_factor: ``[B, H, Q]``, multiplies the outputs of a query block's rows at the end.
        added: ``[B, H, Q, D]``, is added to them after that.
        scale: factor on ``query . key``; ``D ** -0.5`` if None.

    Returns:
        Output ``[B, N, H, D]``, and the natural-log sum of exponentials ``[B, H, N]`` of what was
        attended. A row that sees nothing gets output 0 (before ``row_factor`` and ``added``) and
        log-sum -inf.
    """
    batch, total, heads, _ = query.shape
    video = total - text_length
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    of_query = torch.arange(video, device=query.device) // query_block
    wanted = levels.expand(batch, heads, -1, -1)[:, :, of_query]  # [B, H, V, K]

    keys, values, weights, seen = [], [], [], []
    for level in (*LEVELS, 0):
        if level == 0 and not remainder:
            continue
        group = key_block if level == 0 else min(level, key_block)
        k, count, block = pool(key[:, :video], key_block, group)
        v, _, _ = pool(value[:, :video], key_block, group)
        keys.append(k)
        values.append(v)
        weights.append(count)
        seen.append(wanted[..., block] == level)
    text_seen = torch.ones(batch, heads, video, text_length, dtype=torch.bool, device=query.device)
    all_keys = torch.cat([*keys, key[:, video:]], 1)
    all_values = torch.cat([*values, value[:, video:]], 1)
    weight = F.pad(torch.cat(weights), (0, text_length), value=1).to(query.dtype)
    mask = torch.cat([*seen, text_seen], -1)

    rows = query[:, :video]
    scores = torch.einsum("bnhd,bmhd->bhnm", rows, all_keys) * scale + weight.log()
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    share = scores.softmax(-1).masked_fill((lse == float("-inf"))[..., None], 0)
    out = torch.einsum("bhnm,bmhd->bnhd", share, all_values)
    if first_order and remainder:
        left = len(weight) - text_length - len(weights[-1])
        in_remainder = share[..., left : left + len(weights[-1])].sum(-1) / video  # [B, H, V]
        moment = first_order_moment(key[:, :video], value[:, :video], key_block)
        slope = torch.einsum("bnhd,bhde->bnhe", rows, moment) * scale
        out = out + in_remainder.transpose(1, 2)[..., None] * slope
    if row_factor is not None:
        out = out * row_factor[:, :, of_query].transpose(1, 2)[..., None]
    if added is not None:
        out = out + added[:, :, of_query].transpose(1, 2)

    text_scores = torch.einsum("bnhd,bmhd->bhnm", query[:, video:], key) * scale
    text_out = torch.einsum("bhnm,bmhd->bnhd", text_scores.softmax(-1), value)
    text_lse = text_scores.logsumexp(-1)
    return torch.cat([out, text_out], 1), torch.cat([lse, text_lse], -1)
