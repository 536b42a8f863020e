"""Query, key and value in 8 bits, laid out for the kernel: a pass over keys and values for their
means and ranges, and one over all three.

`quantised_reference.py` says what is rounded, and how. Video rows come first and text rows last,
each padded with zeros to whole tiles of 128, heads before rows: the attention kernel then reads
tiles of one tensor without checks, whatever strides the inputs had.
"""

# Triton's functions take tensors, pointers and constants under the same names: types say little.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_sparse import _load_rows

TILE = 128
"""Both segments are padded to whole tiles of so many rows."""

E4M3_MAX = tl.constexpr(448.0)
INT8_MAX = tl.constexpr(127.0)

CHUNK = 512
"""Rows whose sums and ranges one program finds."""

_SIZES = ("num_heads", "num_video", "num_text", "video_start", "text_start")


@dataclass(frozen=True, eq=False)
class Quantised:
    """What the attention kernel reads; ``R`` padded rows.

    Attributes:
        query: int8 or e4m3 ``[B, H, R, D']``, ``D'`` a power of two of at least 16.
        query_factor: float32 ``[B, H, R]``; times a key's scale it turns products into base-2
            logarithms, softmax scale included.
        key: as ``query``, its head's mean taken off.
        key_scale: float32 ``[B, H, R / key_block]``.
        key_block: rows that share a key scale.
        key_mean: float32 ``[B, H, D]``.
        value: e4m3 ``[B, H, D', R]``, rows in the order of `by_lane`, or in the input's dtype
            ``[B, H, R, D']``.
        value_scale: float32 ``[B, H, D]`` by which e4m3 values are multiplied.
        value_mean: float32 ``[B, H, D]`` that is added to them.
    """

    query: Tensor
    query_factor: Tensor
    key: Tensor
    key_scale: Tensor
    key_block: int
    key_mean: Tensor
    value: Tensor
    value_scale: Tensor
    value_mean: Tensor


@triton.jit
def to_e4m3(x, INTERPRETED: tl.constexpr):
    """Round to the nearest e4m3 number; ``|x|`` must not round to more than 448."""
    if INTERPRETED:
        # Triton's interpreter drops carries when it rounds to 8 bits: leave it nothing to round.
        spread = x * (2.0**20 + 1)
        normal = spread - (spread - x)
        tiny = (x + 1.5 * 2.0**14) - 1.5 * 2.0**14
        x = tl.where(tl.abs(x) < 2.0**-6, tiny, normal)
    return x.to(tl.float8e4nv)


@triton.jit
def to_low(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round to int8, halves up, or to e4m3."""
    if dtype == tl.int8:
        return tl.floor(x + 0.5).to(tl.int8)
    else:
        return to_e4m3(x, INTERPRETED)


@triton.jit
def by_lane(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Reorder columns so that weights need not move between threads.

    Of 16 scores in a row, a product leaves columns 2t, 2t + 1, 2t + 8 and 2t + 9 to thread t, and
    the next product wants columns 4t to 4t + 3 of an 8-bit operand from it. Any order of keys will
    do, as long as it is the same for weights and values.
    """
    split = tl.reshape(x, (ROWS, COLUMNS // 16, 2, 4, 2))
    return tl.reshape(tl.permute(split, (0, 1, 3, 2, 4)), (ROWS, COLUMNS))


@triton.jit
def _range_of(
    x_ptr, first, end, stride_n, stride_d,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum, least and most of each channel over rows ``[first, end)``, at most ``CHUNK``."""
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    least = tl.full([ROWS, BLOCK_D], float("inf"), tl.float32)
    most = tl.full([ROWS, BLOCK_D], float("-inf"), tl.float32)
    for start in range(0, CHUNK, ROWS):
        row = first + start
        x = _load_rows(x_ptr, row, end, stride_n, stride_d, ROWS, HEAD_SIZE, BLOCK_D, True)
        x = x.to(tl.float32)
        inside = (row + tl.arange(0, ROWS) < end)[:, None]
        total += x
        least = tl.minimum(least, tl.where(inside, x, float("inf")))
        most = tl.maximum(most, tl.where(inside, x, float("-inf")))
    return tl.sum(total, 0), tl.min(least, 0), tl.max(most, 0)


@triton.jit(do_not_specialize=("num_heads", "num_tokens"))
def _find_ranges(
    k_ptr, v_ptr, found_ptr, num_heads, num_tokens,
    k_sb, k_sn, k_sh, k_sd, v_sb, v_sn, v_sh, v_sd,
    CHUNK: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: float32 ``[4, BLOCK_D]`` of one chunk of a head.

    Sums of keys, and sums, least and most of values.
    """
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // num_heads, bh % num_heads
    first = tl.program_id(0) * CHUNK
    columns = tl.arange(0, BLOCK_D)
    found = found_ptr + (bh * tl.num_programs(0) + tl.program_id(0)) * 4 * BLOCK_D + columns
    k_base = k_ptr + b * k_sb + h * k_sh
    v_base = v_ptr + b * v_sb + h * v_sh
    k_sum, _least, _most = _range_of(
        k_base, first, num_tokens, k_sn, k_sd, CHUNK, 32, HEAD_SIZE, BLOCK_D
    )
    v_sum, least, most = _range_of(
        v_base, first, num_tokens, v_sn, v_sd, CHUNK, 32, HEAD_SIZE, BLOCK_D
    )
    tl.store(found, k_sum)
    tl.store(found + BLOCK_D, v_sum)
    tl.store(found + 2 * BLOCK_D, least)
    tl.store(found + 3 * BLOCK_D, most)


@triton.jit(do_not_specialize=("chunks", "num_tokens"))
def _join_ranges(
    found_ptr, k_mean_ptr, v_mean_ptr, v_scale_ptr, chunks, num_tokens,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: means and scales of one head, from its chunks."""
    bh = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    k_sum = tl.zeros([32, BLOCK_D], tl.float32)
    v_sum = tl.zeros([32, BLOCK_D], tl.float32)
    least = tl.full([32, BLOCK_D], float("inf"), tl.float32)
    most = tl.full([32, BLOCK_D], float("-inf"), tl.float32)
    for start in range(0, chunks, 32):
        chunk = start + tl.arange(0, 32)
        inside = (chunk < chunks)[:, None]
        found = found_ptr + (bh * chunks + chunk)[:, None] * 4 * BLOCK_D + columns[None, :]
        k_sum += tl.load(found, mask=inside, other=0.0)
        v_sum += tl.load(found + BLOCK_D, mask=inside, other=0.0)
        least = tl.minimum(least, tl.load(found + 2 * BLOCK_D, mask=inside, other=float("inf")))
        most = tl.maximum(most, tl.load(found + 3 * BLOCK_D, mask=inside, other=float("-inf")))
    mean = tl.sum(v_sum, 0) / num_tokens
    largest = tl.maximum(tl.max(most, 0) - mean, mean - tl.min(least, 0))
    scale = tl.where(largest > 0, largest / E4M3_MAX, 1.0)
    channel = bh * HEAD_SIZE + columns
    inside = columns < HEAD_SIZE
    tl.store(k_mean_ptr + channel, tl.sum(k_sum, 0) / num_tokens, mask=inside)
    tl.store(v_mean_ptr + channel, mean, mask=inside)
    tl.store(v_scale_ptr + channel, scale, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _quantise(
    q_ptr, k_ptr, v_ptr, k_mean_ptr, v_mean_ptr, v_scale_ptr,
    q_out, q_factor, k_out, k_scale, v_out,
    scale_log2, num_heads, num_video, num_text, video_start, text_start,
    q_sb, q_sn, q_sh, q_sd, k_sb, k_sn, k_sh, k_sd, v_sb, v_sn, v_sh, v_sd,
    ROWS: tl.constexpr, KEY_BLOCK: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program: ``ROWS`` rows of one head of query, key and value."""
    tile = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // num_heads, bh % num_heads
    video_tiles = tl.cdiv(num_video, ROWS)
    is_text = tile >= video_tiles
    in_segment = tl.where(is_text, tile - video_tiles, tile) * ROWS
    first = tl.where(is_text, text_start, video_start) + in_segment
    end = tl.where(is_text, text_start + num_text, video_start + num_video)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inside = (first + rows < end)[:, None] & (columns < HEAD_SIZE)[None, :]
    out_rows = bh * tl.num_programs(0) * ROWS + tile * ROWS + rows
    out = out_rows[:, None] * BLOCK_D + columns[None, :]
    low: tl.constexpr = q_out.dtype.element_ty
    steps = INT8_MAX if low == tl.int8 else E4M3_MAX

    q_base = q_ptr + b * q_sb + h * q_sh
    q = _load_rows(q_base, first, end, q_sn, q_sd, ROWS, HEAD_SIZE, BLOCK_D, True).to(tl.float32)
    peak = tl.max(tl.abs(q), 1)
    scale = tl.where(peak > 0, peak / steps, 1.0)
    tl.store(q_out + out, to_low(q * (1.0 / scale)[:, None], low, INTERPRETED))
    tl.store(q_factor + out_rows, scale * scale_log2)

    k_base = k_ptr + b * k_sb + h * k_sh
    k = _load_rows(k_base, first, end, k_sn, k_sd, ROWS, HEAD_SIZE, BLOCK_D, True).to(tl.float32)
    mean = tl.load(k_mean_ptr + bh * HEAD_SIZE + columns, mask=columns < HEAD_SIZE, other=0.0)
    k = tl.where(inside, k - mean[None, :], 0.0)
    BLOCKS: tl.constexpr = ROWS // KEY_BLOCK
    peaks = tl.max(tl.reshape(tl.max(tl.abs(k), 1), (BLOCKS, KEY_BLOCK)), 1)
    scales = tl.where(peaks > 0, peaks / steps, 1.0)
    of_row = tl.reshape(tl.broadcast_to(scales[:, None], (BLOCKS, KEY_BLOCK)), (ROWS,))
    tl.store(k_out + out, to_low(k * (1.0 / of_row)[:, None], low, INTERPRETED))
    out_blocks = (bh * tl.num_programs(0) + tile) * BLOCKS + tl.arange(0, BLOCKS)
    tl.store(k_scale + out_blocks, scales)

    v_base = v_ptr + b * v_sb + h * v_sh
    v = _load_rows(v_base, first, end, v_sn, v_sd, ROWS, HEAD_SIZE, BLOCK_D, True)
    if v_out.dtype.element_ty == tl.float8e4nv:
        channel = bh * HEAD_SIZE + columns
        mean = tl.load(v_mean_ptr + channel, mask=columns < HEAD_SIZE, other=0.0)
        scale = tl.load(v_scale_ptr + channel, mask=columns < HEAD_SIZE, other=1.0)
        v = tl.where(inside, (v.to(tl.float32) - mean[None, :]) * (1.0 / scale)[None, :], 0.0)
        v = by_lane(tl.trans(to_e4m3(v, INTERPRETED)), BLOCK_D, ROWS)
        channels = bh * BLOCK_D + columns
        row_length = tl.num_programs(0) * ROWS
        tl.store(v_out + channels[:, None] * row_length + tile * ROWS + rows[None, :], v)
    else:
        tl.store(v_out + out, v)


def quantise(
    query: Tensor, key: Tensor, value: Tensor, precision: str, *,
    num_video: int, text_first: bool, key_block: int, scale: float,
) -> Quantised:  # fmt: skip
    """Round ``[B, N, H, D]`` query, key and value to what ``precision`` says.

    Args:
        query: float16 or bfloat16, any strides, like ``key`` and ``value``.
        key: see above.
        value: see above.
        precision: see `quantised_reference`.
        num_video: video rows; the others are text.
        text_first: whether the text rows come before the video rows.
        key_block: video keys that share a scale, a power of two of at most 128; text keys likewise.
        scale: of the softmax.
    """
    batch, num_tokens, heads, head_size = query.shape
    num_text = num_tokens - num_video
    tiles = triton.cdiv(num_video, TILE) + triton.cdiv(num_text, TILE)
    padded = tiles * TILE
    block_d = max(16, triton.next_power_of_2(head_size))
    low = torch.float8_e4m3fn if precision == "fp8" else torch.int8
    narrow_values = precision != "int8"
    lead = (batch, heads)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*lead, *shape, dtype=dtype, device=query.device)

    made = Quantised(
        query=empty(padded, block_d, dtype=low),
        query_factor=empty(padded),
        key=empty(padded, block_d, dtype=low),
        key_scale=empty(padded // key_block),
        key_block=key_block,
        key_mean=empty(head_size),
        value=empty(block_d, padded, dtype=torch.float8_e4m3fn)
        if narrow_values
        else empty(padded, block_d, dtype=value.dtype),
        value_scale=empty(head_size),
        value_mean=empty(head_size),
    )
    chunks = triton.cdiv(num_tokens, CHUNK)
    found = empty(chunks, 4, block_d)
    with torch.cuda.device_of(query):
        _find_ranges[(chunks, batch * heads)](
            key, value, found, heads, num_tokens, *key.stride(), *value.stride(),
            CHUNK=CHUNK, HEAD_SIZE=head_size, BLOCK_D=block_d, num_warps=8,
        )  # fmt: skip
        _join_ranges[(batch * heads,)](
            found, made.key_mean, made.value_mean, made.value_scale, chunks, num_tokens,
            HEAD_SIZE=head_size, BLOCK_D=block_d,
        )  # fmt: skip
        _quantise[(tiles, batch * heads)](
            query, key, value, made.key_mean, made.value_mean, made.value_scale,
            made.query, made.query_factor, made.key, made.key_scale, made.value,
            scale * math.log2(math.e), heads, num_video, num_text,
            num_text if text_first else 0, 0 if text_first else num_video,
            *query.stride(), *key.stride(), *value.stride(),
            ROWS=TILE, KEY_BLOCK=key_block, HEAD_SIZE=head_size, BLOCK_D=block_d,
            INTERPRETED=triton.knobs.runtime.interpret, num_warps=8,
        )  # fmt: skip
    return made


def add_mean_key(lse: Tensor, query: Tensor, made: Quantised, scale: float) -> Tensor:
    """Add to log-sums ``[B, H, N]``, if there are any, what the mean key took from each score."""
    if not lse.numel():
        return lse
    return lse + torch.einsum("bnhd,bhd->bhn", query.float(), made.key_mean) * scale
