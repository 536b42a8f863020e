"""Attention in 8 bits, in plain torch and in float64: read this before the kernels for it.

After SageAttention (Zhang et al. 2410.02367) and SageAttention2 (2411.10958). Two things are made
small before they are rounded: the mean key of a head is taken off all its keys, which adds the same
to all scores of a query and so leaves the softmax alone, and the mean value off all values, which
the weights, whose sum is one, give back.

==========  ==================  ===================  =======================
precision   query and key       weights              value
==========  ==================  ===================  =======================
"fp8"       e4m3                e4m3                 e4m3
"int8_fp8"  int8                e4m3                 e4m3
"int8"      int8                the input's dtype    the input's dtype
==========  ==================  ===================  =======================

A query row has its own scale, a block of key rows shares one, a channel of the values has one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

INT8_MAX = 127.0
E4M3_MAX = 448.0
"""The largest number of 4 exponent and 3 mantissa bits; the smallest step is 2 ** -9."""


def quantised_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    precision: str,
    key_blocks: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the allowed pairs, rounded where the kernel rounds.

    Args:
        query: ``[B, N, H, D]``; likewise ``key`` and ``value``.
        key: as above.
        value: as above; for "int8" its dtype is the one that weights are rounded to.
        mask: bool, broadcastable to ``[B, H, N, N]``; True where the pair is allowed.
        precision: a row of the table above.
        key_blocks: int64 ``[N]``, the block of each key row; see `key_blocks`.
        scale: factor on ``query @ key``; ``D ** -0.5`` when None.

    Returns:
        Output ``[B, N, H, D]`` and natural-log sum of exponentials ``[B, H, N]``, both float64. A
        query with no allowed key gets output 0 and log-sum -inf.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = query.double(), key.double(), value.double()
    low = "fp8" if precision == "fp8" else "int8"
    k_mean = k.mean(1, keepdim=True)
    q_low = rounded(q, q.abs().amax(-1, keepdim=True), low)
    k_low = rounded(k - k_mean, _block_peaks(k - k_mean, key_blocks), low)

    # In base 2, relative to the row's maximum, which is rounded up to an integer: moving it is then
    # exact, and what a weight is rounded to does not depend on when its key was seen.
    scores = torch.einsum("bnhd,bmhd->bhnm", q_low, k_low) * scale * math.log2(math.e)
    scores = scores.masked_fill(~mask, float("-inf"))
    peak = scores.amax(-1, keepdim=True).ceil().nan_to_num(neginf=0)
    weights = torch.exp2(scores - peak)
    total = weights.sum(-1, keepdim=True)

    if precision == "int8":
        summed = torch.einsum("bhnm,bmhd->bhnd", weights.to(value.dtype).double(), v)
        out = summed / total.clamp_min(1e-300)
    else:
        v_mean = v.mean(1, keepdim=True)
        v_low = rounded(v - v_mean, (v - v_mean).abs().amax(1, keepdim=True), "fp8")
        summed = torch.einsum("bhnm,bmhd->bhnd", to_e4m3(weights * E4M3_MAX) / E4M3_MAX, v_low)
        out = summed / total.clamp_min(1e-300) + v_mean.transpose(1, 2) * (total > 0)
    lse = (peak + total.log2()) * math.log(2)
    lse = lse + torch.einsum("bnhd,bmhd->bhnm", q, k_mean) * scale
    return out.transpose(1, 2), lse[..., 0]


def rounded(x: Tensor, largest: Tensor, low: str) -> Tensor:
    """Round ``x`` to 8 bits under a scale that makes ``largest`` the largest number there is."""
    steps = INT8_MAX if low == "int8" else E4M3_MAX
    factor = torch.where(largest > 0, largest / steps, 1)
    scaled = x / factor
    return factor * ((scaled + 0.5).floor() if low == "int8" else to_e4m3(scaled))


def to_e4m3(x: Tensor) -> Tensor:
    """The nearest e4m3 number, in the dtype of ``x``; beyond the largest, the largest."""
    low = x.clamp(-E4M3_MAX, E4M3_MAX).float().to(torch.float8_e4m3fn)
    return low.to(x.dtype)


def key_blocks(num_video: int, num_text: int, text_first: bool, block: int) -> Tensor:
    """The block of keys that each row belongs to, int64 ``[N]``: no block mixes video and text."""
    video = torch.arange(num_video) // block
    text = torch.arange(num_text) // block + -(-num_video // block)
    return torch.cat([text, video] if text_first else [video, text])


def _block_peaks(x: Tensor, blocks: Tensor) -> Tensor:
    """Largest magnitude in each row's block, ``[B, N, H, 1]``."""
    rows = x.abs().amax(-1, keepdim=True)
    index = blocks[None, :, None, None].expand_as(rows)
    shape = (x.shape[0], int(blocks.max()) + 1, x.shape[2], 1)
    peaks = torch.zeros(shape, dtype=x.dtype, device=x.device)
    return peaks.scatter_reduce_(1, index, rows, "amax").gather(1, index)


def accuracy(actual: Tensor, exact: Tensor) -> dict[str, float]:
    """Say how far ``actual`` is from ``exact``: relative error in the 2-norm, and cosine."""
    a, e = actual.double().flatten(), exact.double().flatten()
    return {
        "relative_error": float((a - e).norm() / e.norm()),
        "cosine": float(torch.nn.functional.cosine_similarity(a, e, dim=0)),
    }
