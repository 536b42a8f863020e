"""Selection in Triton, without sorting: `selection.py` says in plain torch what is chosen.

A row's scores sit in registers, as integers that order like the floats. Where the chosen part of
the ranking ends is then found bit by bit: the largest integer such that taking all from it upwards
would be too much. What is above is chosen; of what ties with it, the first by index.
"""

# Triton's functions take tensors, pointers and constants under the same names: types say little.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels import block_sparse
from dit_accel.kernels.selection import SHARE_BITS, WEIGHT_BITS, share_units

MAX_COLUMNS = 8192

_WEIGHT_ONE = tl.constexpr(2.0**WEIGHT_BITS)
_SHARE_BITS = tl.constexpr(SHARE_BITS)
_LOW_BITS = tl.constexpr(2**SHARE_BITS - 1)
_LARGEST_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _ordered(x):
    """Floats as uint32 that compare in the same way, none of them 0."""
    x = tl.where(x == 0, 0.0, x)  # -0.0 and 0.0 are one score
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _prefix(
    ordered, candidate, units, forced_count, forced_units, total, count, share,
    USE_SHARE: tl.constexpr, CROSSING: tl.constexpr,
):  # fmt: skip
    """Bool: the candidates whose rank is at most ``count`` or whose running sum is in the share."""
    if USE_SHARE:
        low = total & _LOW_BITS
        limit = (total >> _SHARE_BITS) * share + (low * share >> _SHARE_BITS)
    end = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        trial = end | bit
        taken = ordered >= trial
        too_much = forced_count + tl.sum(taken.to(tl.int32), 0) > count
        if USE_SHARE:
            too_much &= forced_units + tl.sum(tl.where(taken, units, 0), 0) > limit
        end = tl.where(too_much, trial, end)
        bit = bit >> 1

    above = ordered > end
    tied = (ordered == end) & candidate
    of_tied = count - forced_count - tl.sum(above.to(tl.int32), 0)
    if USE_SHARE:
        room = limit - forced_units - tl.sum(tl.where(above, units, 0), 0)
        each = tl.maximum(tl.max(tl.where(tied, units, 0), 0), 1)
        in_room = tl.where(room >= 0, tl.maximum(room, 0) // each + (1 if CROSSING else 0), 0)
        of_tied = tl.maximum(of_tied.to(tl.int64), in_room)
    return above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= of_tied))


@triton.jit(
    do_not_specialize=(
        "count_0", "count_1", "count_2", "count_3", "share_0", "share_1", "share_2", "share_3",
        "num_heads", "num_rows", "columns",
    )
)  # fmt: skip
def _select_prefixes(
    scores_ptr, forced_ptr, out_ptr, num_heads, num_rows, columns,
    count_0, count_1, count_2, count_3, share_0, share_1, share_2, share_3,
    s_sb, s_sh, s_sq, s_sk, f_sb, f_sh, f_sq, f_sk,
    LEVEL_0: tl.constexpr, LEVEL_1: tl.constexpr, LEVEL_2: tl.constexpr, LEVEL_3: tl.constexpr,
    USE_SHARE: tl.constexpr, CROSSING: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one row. Parts lie inside each other; the first has the last word."""
    row = tl.program_id(0).to(tl.int64)
    b = row // num_rows // num_heads
    h = row // num_rows % num_heads
    q = row % num_rows
    index = tl.arange(0, BLOCK_K)
    inside = index < columns
    score = tl.load(
        scores_ptr + b * s_sb + h * s_sh + q * s_sq + index.to(tl.int64) * s_sk,
        mask=inside, other=float("nan"),
    ).to(tl.float32)  # fmt: skip
    allowed = score > float("-inf")
    hopeless = tl.max(allowed.to(tl.int32), 0) == 0
    candidate = allowed | (hopeless & (score == score))

    units = None
    total = None
    forced_units = None
    if USE_SHARE:
        weight = tl.where(candidate & (score > 0), score, 0.0)
        weight = tl.minimum(weight, _LARGEST_FLOAT)
        peak = tl.max(weight, 0)
        # Rounded like torch's division: the units must not depend on who computes them.
        ratio = tl.div_rn(weight, tl.where(peak > 0, peak, 1.0) + tl.zeros_like(weight))
        ratio = tl.where(peak > 0, ratio, candidate.to(tl.float32))
        units = (ratio * _WEIGHT_ONE).to(tl.int64)
        total = tl.sum(units, 0)
        forced_units = tl.sum(tl.zeros_like(units), 0)
    forced_count = 0
    forced = index < 0
    if forced_ptr is not None:
        at = forced_ptr + b * f_sb + h * f_sh + q * f_sq + index.to(tl.int64) * f_sk
        forced = tl.load(at, mask=inside, other=0) != 0
        forced_count = tl.sum(forced.to(tl.int32), 0)
        candidate &= ~forced
        if USE_SHARE:
            forced_units = tl.sum(tl.where(forced, units, 0), 0)
    ordered = tl.where(candidate, _ordered(score), 0)

    level = tl.zeros([BLOCK_K], tl.int8)
    if LEVEL_3 != 0:
        kept = _prefix(
            ordered, candidate, units, forced_count, forced_units, total, count_3, share_3,
            USE_SHARE, CROSSING,
        )  # fmt: skip
        level = tl.where(kept, LEVEL_3, level)
    if LEVEL_2 != 0:
        kept = _prefix(
            ordered, candidate, units, forced_count, forced_units, total, count_2, share_2,
            USE_SHARE, CROSSING,
        )  # fmt: skip
        level = tl.where(kept, LEVEL_2, level)
    if LEVEL_1 != 0:
        kept = _prefix(
            ordered, candidate, units, forced_count, forced_units, total, count_1, share_1,
            USE_SHARE, CROSSING,
        )  # fmt: skip
        level = tl.where(kept, LEVEL_1, level)
    kept = _prefix(
        ordered, candidate, units, forced_count, forced_units, total, count_0, share_0,
        USE_SHARE, CROSSING,
    )  # fmt: skip
    level = tl.where(kept | forced, LEVEL_0, level)
    tl.store(out_ptr + row * columns + index, level.to(tl.int8), mask=inside)


def why_unavailable(scores: Tensor) -> str | None:
    """Say what keeps the kernel from choosing by these scores, or None."""
    if scores.ndim != 4:
        return f"it takes scores [B, H, Q, K], not {scores.ndim} dimensions"
    if scores.shape[-1] > MAX_COLUMNS:
        return f"it holds a row of at most {MAX_COLUMNS} blocks, not {scores.shape[-1]}"
    if scores.dtype not in block_sparse.DTYPES:
        return f"it ranks float16, bfloat16 and float32, not {scores.dtype}"
    return block_sparse.why_unavailable(scores.device, torch.float32, 64)


def select_prefix(
    scores: Tensor,
    forced: Tensor | None,
    *,
    counts: Sequence[int],
    shares: Sequence[float] = (),
    levels: Sequence[int] = (1,),
    crossing: bool = False,
) -> Tensor:
    """Mark the first parts of each row's ranking, each with its level; 0 is what is in none.

    Args:
        scores: ``[B, H, Q, K]``.
        forced: bool, broadcastable to ``scores``, in the first part always.
        counts: how many each part holds at least, ascending; up to four.
        shares: the share of the row's sum that each holds at least; empty if counts alone decide.
        levels: what to mark each with.
        crossing: a part holds also the block with which its sum crosses its share.

    Returns:
        Int8, of the shape of ``scores``.
    """
    batch, heads, rows, columns = scores.shape
    out = torch.empty_like(scores, dtype=torch.int8, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    spare = 4 - len(levels)
    units = [share_units(share) for share in shares] or [0] * len(levels)
    always = None if forced is None else forced.expand_as(scores)
    block_k = max(16, triton.next_power_of_2(columns))
    with torch.cuda.device_of(scores):
        _select_prefixes[(batch * heads * rows,)](
            scores, always, out, heads, rows, columns,
            *counts, *[0] * spare, *units, *[0] * spare,
            *scores.stride(), *((0,) * 4 if always is None else always.stride()),
            *levels, *[0] * spare,
            USE_SHARE=len(shares) > 0, CROSSING=crossing, BLOCK_K=block_k,
            num_warps=1 if block_k <= 1024 else block_k // 512,
        )  # fmt: skip
    return out
