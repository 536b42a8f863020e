"""Block statistics in Triton: `statistics.py` says in plain torch what is computed.

One program walks over the blocks of a stretch of one head. It takes the means and spreads of a
block from one tile in registers. What needs more reads that tile again, out of the cache: moments a
few rows at a time, groups of successive tokens as eight tiles of every eighth row, between which
groups are plain sums.
"""

# Triton's functions take tensors, pointers and constants under the same names: types say little.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels import block_sparse
from dit_accel.kernels.statistics import BlockStatistics
from dit_accel.kernels.tiles import tile_lengths

BLOCKS = (16, 32, 64, 128)
LEVELS = (2, 4, 8)
MAX_MOMENT_HEAD_SIZE = 128

# A stretch adds its moment up in registers; the sums of stretches then go through memory.
_MOMENT_STRETCH = 2048
_MOMENT_PROGRAMS = 1024


@triton.jit
def _load(
    head, first, end, STEP: tl.constexpr, ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Every ``STEP``-th row from ``first`` on, ``[ROWS, BLOCK_D]``; zeros outside."""
    base, stride_n, stride_d = head
    rows = first + tl.arange(0, ROWS) * STEP
    columns = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride_n + columns[None, :] * stride_d
    return tl.load(pointers, mask=(rows < end)[:, None] & (columns < HEAD_SIZE)[None, :], other=0.0)


@triton.jit
def _store_row(out, row, values, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    tl.store(out + row * HEAD_SIZE + columns, values, mask=columns < HEAD_SIZE)


@triton.jit
def _deltas(x, mean, count, ROWS: tl.constexpr):
    """Tokens minus their mean; 0 where there is no token."""
    return tl.where((tl.arange(0, ROWS) < count)[:, None], x - mean[None, :], 0.0)


@triton.jit
def _store_means(
    out, first_group, total, first, end,
    LEVEL: tl.constexpr, NUMBER: tl.constexpr, GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store group ``NUMBER`` of ``LEVEL`` tokens of each eight, given its sums."""
    eights = tl.arange(0, GROUPS)
    columns = tl.arange(0, BLOCK_D)
    size = tl.minimum(tl.maximum(end - (first + eights * 8 + NUMBER * LEVEL), 1), LEVEL)
    rows = first_group + eights * (8 // LEVEL) + NUMBER
    pointers = out + rows.to(tl.int64)[:, None] * HEAD_SIZE + columns[None, :]
    means = total / size.to(tl.float32)[:, None]
    tl.store(pointers, means.to(out.dtype.element_ty), mask=(columns < HEAD_SIZE)[None, :])


@triton.jit
def _pool(
    out_2, out_4, out_8, block, x, first, end,
    GROUPS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the pooled tokens of a block, of which ``x`` are the rows by their place in eight."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    a, b, c, d = x0 + x1, x2 + x3, x4 + x5, x6 + x7
    if out_2 is not None:
        row = block * GROUPS * 4
        _store_means(out_2, row, a, first, end, 2, 0, GROUPS, HEAD_SIZE, BLOCK_D)
        _store_means(out_2, row, b, first, end, 2, 1, GROUPS, HEAD_SIZE, BLOCK_D)
        _store_means(out_2, row, c, first, end, 2, 2, GROUPS, HEAD_SIZE, BLOCK_D)
        _store_means(out_2, row, d, first, end, 2, 3, GROUPS, HEAD_SIZE, BLOCK_D)
    if out_4 is not None:
        row = block * GROUPS * 2
        _store_means(out_4, row, a + b, first, end, 4, 0, GROUPS, HEAD_SIZE, BLOCK_D)
        _store_means(out_4, row, c + d, first, end, 4, 1, GROUPS, HEAD_SIZE, BLOCK_D)
    if out_8 is not None:
        row = block * GROUPS
        _store_means(out_8, row, a + b + c + d, first, end, 8, 0, GROUPS, HEAD_SIZE, BLOCK_D)


@triton.jit
def _cosines(x, y, last, end):
    """Sum of the cosines of pairs of rows whose later one, ``last``, exists."""
    norms = tl.sqrt(tl.sum(x * x, 1)) * tl.sqrt(tl.sum(y * y, 1))
    cosines = tl.sum(x * y, 1) / tl.where(norms > 0, norms, 1.0)
    return tl.sum(tl.where(last < end, cosines, 0.0), 0)


@triton.jit
def _store_similarity(out, x, first, end, count, GROUPS: tl.constexpr):
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    row = first + tl.arange(0, GROUPS) * 8
    two = _cosines(x0, x1, row + 1, end) + _cosines(x2, x3, row + 3, end)
    two += _cosines(x4, x5, row + 5, end) + _cosines(x6, x7, row + 7, end)
    four = _cosines(x0, x3, row + 3, end) + _cosines(x4, x7, row + 7, end)
    tl.store(out, two / tl.maximum(count // 2, 1))
    tl.store(out + 1, four / tl.maximum(count // 4, 1))
    tl.store(out + 2, _cosines(x0, x7, row + 7, end) / tl.maximum(count // 8, 1))


@triton.jit
def _load_eights(
    head, first, end, GROUPS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The rows of a block by their place in each eight, in float32."""
    x0 = _load(head, first, end, 8, GROUPS, HEAD_SIZE, BLOCK_D).to(tl.float32)
    x1 = _load(head, first + 1, end, 8, GROUPS, HEAD_SIZE, BLOCK_D).to(tl.float32)
    x2 = _load(head, first + 2, end, 8, GROUPS, HEAD_SIZE, BLOCK_D).to(tl.float32)
    x3 = _load(head, first + 3, end, 8, GROUPS, HEAD_SIZE, BLOCK_D).to(tl.float32)
    x4 = _load(head, first + 4, end, 8, GROUPS, HEAD_SIZE, BLOCK_D).to(tl.float32)
    x5 = _load(head, first + 5, end, 8, GROUPS, HEAD_SIZE, BLOCK_D).to(tl.float32)
    x6 = _load(head, first + 6, end, 8, GROUPS, HEAD_SIZE, BLOCK_D).to(tl.float32)
    x7 = _load(head, first + 7, end, 8, GROUPS, HEAD_SIZE, BLOCK_D).to(tl.float32)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _moment(
    keys, values, first, end, k_mean, v_mean, count,
    KEY_BLOCK: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``H_j`` of a block, from a few rows at a time: all would not fit in shared memory.

    Half precision would have to round the deltas, but products of the keys themselves are exact.
    In float32 deltas of v, too: H stays the same, and errors in the mean of k cancel.
    """
    EXACT: tl.constexpr = keys[0].dtype.element_ty != tl.float32
    PIECE: tl.constexpr = min(32, KEY_BLOCK) if EXACT else 16
    h_j = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for piece in range(first, first + KEY_BLOCK, PIECE):
        k = _load(keys, piece, end, 1, PIECE, HEAD_SIZE, BLOCK_D)
        v = _load(values, piece, end, 1, PIECE, HEAD_SIZE, BLOCK_D)
        if not EXACT:
            k = _deltas(k, k_mean, end - piece, PIECE)
            v = _deltas(v, v_mean, end - piece, PIECE)
        h_j = tl.dot(k.T, v, h_j, input_precision="tf32x3")
    if EXACT:
        h_j -= (k_mean * count)[:, None] * v_mean[None, :]
    return h_j


@triton.jit(do_not_specialize=("num_heads", "num_video", "stretch"))
def _block_statistics(
    q_ptr, k_ptr, v_ptr, q_mean, k_mean, v_mean, q_deviation, k_deviation, similarity,
    moment, moment_norm, k_variance, k_2, v_2, k_4, v_4, k_8, v_8,
    num_heads, num_video, stretch,
    q_sb, q_sn, q_sh, q_sd, k_sb, k_sn, k_sh, k_sd, v_sb, v_sn, v_sh, v_sd,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: ``stretch`` tokens of one head. Outputs that are None are not computed."""
    head = tl.program_id(1).to(tl.int64)
    b = head // num_heads
    h = head % num_heads
    start = tl.program_id(0) * stretch
    stop = tl.minimum(start + stretch, num_video)

    queries = (q_ptr + b * q_sb + h * q_sh, q_sn, q_sd)
    first_row = head * tl.cdiv(num_video, QUERY_BLOCK)
    for block in range(start // QUERY_BLOCK, tl.cdiv(stop, QUERY_BLOCK)):
        first = block * QUERY_BLOCK
        count = tl.minimum(num_video - first, QUERY_BLOCK)
        q = _load(queries, first, num_video, 1, QUERY_BLOCK, HEAD_SIZE, BLOCK_D).to(tl.float32)
        mean = tl.sum(q, 0) / count
        _store_row(q_mean, first_row + block, mean, HEAD_SIZE, BLOCK_D)
        if q_deviation is not None:
            deviation = tl.sum(tl.abs(_deltas(q, mean, count, QUERY_BLOCK)), 0) / count
            _store_row(q_deviation, first_row + block, deviation, HEAD_SIZE, BLOCK_D)

    keys = (k_ptr + b * k_sb + h * k_sh, k_sn, k_sd)
    values = (v_ptr + b * v_sb + h * v_sh, v_sn, v_sd)
    first_row = head * tl.cdiv(num_video, KEY_BLOCK)
    GROUPS: tl.constexpr = KEY_BLOCK // 8
    if moment is not None:
        moment_acc = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for block in range(start // KEY_BLOCK, tl.cdiv(stop, KEY_BLOCK)):
        first = block * KEY_BLOCK
        row = first_row + block
        count = tl.minimum(num_video - first, KEY_BLOCK)
        k = _load(keys, first, num_video, 1, KEY_BLOCK, HEAD_SIZE, BLOCK_D).to(tl.float32)
        v = _load(values, first, num_video, 1, KEY_BLOCK, HEAD_SIZE, BLOCK_D).to(tl.float32)
        mean = tl.sum(k, 0) / count
        v_mean_row = tl.sum(v, 0) / count
        _store_row(k_mean, row, mean, HEAD_SIZE, BLOCK_D)
        _store_row(v_mean, row, v_mean_row, HEAD_SIZE, BLOCK_D)
        if k_deviation is not None:
            deviation = tl.sum(tl.abs(_deltas(k, mean, count, KEY_BLOCK)), 0) / count
            _store_row(k_deviation, row, deviation, HEAD_SIZE, BLOCK_D)
        if k_variance is not None:
            delta = _deltas(k, mean, count, KEY_BLOCK)
            tl.store(k_variance + row, tl.sum(tl.sum(delta * delta, 0), 0) / count)
        if moment is not None or moment_norm is not None:
            h_j = _moment(
                keys, values, first, num_video, mean, v_mean_row, count,
                KEY_BLOCK, HEAD_SIZE, BLOCK_D,
            )  # fmt: skip
            if moment is not None:
                moment_acc += h_j
            if moment_norm is not None:
                tl.store(moment_norm + row, tl.sqrt(tl.sum(tl.sum(h_j * h_j, 0), 0)))
        POOLED: tl.constexpr = k_2 is not None or k_4 is not None or k_8 is not None
        if POOLED or similarity is not None:
            x = _load_eights(keys, first, num_video, GROUPS, HEAD_SIZE, BLOCK_D)
            if similarity is not None:
                _store_similarity(similarity + row * 3, x, first, num_video, count, GROUPS)
            _pool(k_2, k_4, k_8, row, x, first, num_video, GROUPS, HEAD_SIZE, BLOCK_D)
        if POOLED:
            x = _load_eights(values, first, num_video, GROUPS, HEAD_SIZE, BLOCK_D)
            _pool(v_2, v_4, v_8, row, x, first, num_video, GROUPS, HEAD_SIZE, BLOCK_D)

    if moment is not None:
        rows = tl.arange(0, BLOCK_D)[:, None]
        columns = tl.arange(0, BLOCK_D)[None, :]
        out = moment + (head * tl.num_programs(0) + tl.program_id(0)) * HEAD_SIZE * HEAD_SIZE
        inside = (rows < HEAD_SIZE) & (columns < HEAD_SIZE)
        tl.store(out + rows * HEAD_SIZE + columns, moment_acc, mask=inside)


def why_unavailable(
    query: Tensor,
    query_block: int,
    key_block: int,
    wanted: frozenset[str],
    pooled_levels: tuple[int, ...],
) -> str | None:
    """Say what keeps the kernel from computing these statistics, or None."""
    if query_block not in BLOCKS or key_block not in BLOCKS:
        return f"it takes blocks of {BLOCKS} tokens, not {query_block} and {key_block}"
    if not set(pooled_levels) <= set(LEVELS):
        return f"it pools at levels {LEVELS}, not {pooled_levels}"
    size = query.shape[-1]
    if wanted & {"moment", "moment_norm"} and size > MAX_MOMENT_HEAD_SIZE:
        return f"it holds moments of head sizes up to {MAX_MOMENT_HEAD_SIZE}, not {size}"
    return block_sparse.why_unavailable(query.device, query.dtype, size)


def fused_block_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    video: int,
    query_block: int,
    key_block: int,
    wanted: frozenset[str],
    pooled_levels: tuple[int, ...],
) -> BlockStatistics:
    """`block_statistics` of the first ``video`` rows, for arguments checked there."""
    batch, _, heads, size = query.shape
    query_blocks, key_blocks = triton.cdiv(video, query_block), triton.cdiv(video, key_block)

    def empty(*shape: int) -> Tensor:
        return query.new_empty(batch, heads, *shape, dtype=torch.float32)

    def if_wanted(name: str, *shape: int) -> Tensor | None:
        return empty(*shape) if name in wanted else None

    query_mean, key_mean, value_mean = (
        empty(blocks, size) for blocks in (query_blocks, key_blocks, key_blocks)
    )
    query_deviation = if_wanted("query_deviation", query_blocks, size)
    key_deviation = if_wanted("key_deviation", key_blocks, size)
    similarity = if_wanted("similarity", key_blocks, 3)
    moment_norm = if_wanted("moment_norm", key_blocks)
    key_variance = if_wanted("key_variance", key_blocks)
    stretch = max(query_block, key_block)
    if "moment" in wanted:
        whole = video * batch * heads // _MOMENT_PROGRAMS
        stretch = min(max(stretch, whole // stretch * stretch), _MOMENT_STRETCH)
    stretches = triton.cdiv(video, stretch)
    moment = if_wanted("moment", stretches, size, size)
    pooled = {
        level: (
            query.new_empty(batch, heads, key_blocks * key_block // level, size),
            query.new_empty(batch, heads, key_blocks * key_block // level, size),
        )
        for level in pooled_levels
    }
    by_level = [tensor for level in LEVELS for tensor in pooled.get(level, (None, None))]
    block_d = max(16, triton.next_power_of_2(size))
    heavy = block_d * max(query_block, key_block) > 8192 or moment is not None
    with torch.cuda.device_of(query):
        _block_statistics[(stretches, batch * heads)](
            query, key, value, query_mean, key_mean, value_mean, query_deviation, key_deviation,
            similarity, moment, moment_norm, key_variance, *by_level,
            heads, video, stretch, *query.stride(), *key.stride(), *value.stride(),
            QUERY_BLOCK=query_block, KEY_BLOCK=key_block, HEAD_SIZE=size, BLOCK_D=block_d,
            num_warps=8 if heavy else 4,
        )  # fmt: skip
    return BlockStatistics(
        query_mean,
        key_mean,
        value_mean,
        tile_lengths(video, query_block, query.device).int(),
        tile_lengths(video, key_block, query.device).int(),
        query_deviation,
        key_deviation,
        similarity,
        None if moment is None else moment.sum(2),
        moment_norm,
        key_variance,
        pooled,
    )
