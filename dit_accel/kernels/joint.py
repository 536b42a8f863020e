"""The joint attention of exact blocks, pooled blocks and centroids, in Triton.

`joint_reference.py` says in plain torch what is computed; `block_sparse.py` has the exact step and
explains it. One program computes up to 128 query rows of one head under one online softmax: exact
key tiles on the row's list, a ragged last tile and the text, then for each level the pooled blocks
on its list, packed into full tiles, and last the centroids of all blocks that are left.

Long, because one kernel serves four methods and its calls have many arguments.
"""

# Triton's functions take tensors, pointers and constants under the same names: types say little.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_accel.errors import GridMismatchError, OperatorUnavailableError, OptionError
from dit_accel.kernels.block_sparse import (
    _NO_PEAK,
    _attend,
    _load_rows,
    _resolve_config,
    empty_lse,
    fits_copy_engine,
    why_unavailable,
)
from dit_accel.kernels.joint_reference import LEVELS
from dit_accel.kernels.tiles import check_block_size
from dit_accel.kernels.tuning import KernelConfig, joint_config

if TYPE_CHECKING:
    from dit_accel.kernels.statistics import BlockStatistics

MAX_BLOCK_SIZE = 128

# Sizes that must not make Triton compile again whenever they happen to be 1 or divisible by 16.
_SIZES = (
    "num_heads", "num_queries", "num_video", "num_text", "video_start", "text_start", "list_sb",
    "list_sh",
)  # fmt: skip


@triton.jit(do_not_specialize=["blocks"])
def _list_levels(levels, counts, index, blocks, CHUNK: tl.constexpr):
    """One program: the blocks of one row of ``levels``, those of level 1 first, then 2, 4 and 8."""
    row = tl.program_id(0).to(tl.int64)
    listed = 0
    for power in tl.static_range(4):
        before = listed
        for first in range(0, blocks, CHUNK):
            block = first + tl.arange(0, CHUNK)
            level = tl.load(levels + row * blocks + block, mask=block < blocks, other=0)
            chosen = level == 1 << power
            place = listed + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(index + row * blocks + place, block, mask=chosen)
            listed += tl.sum(chosen.to(tl.int32), 0)
        tl.store(counts + row * 4 + power, listed - before)


@triton.jit
def _load_means(
    head, first, rows, seen,
    ROWS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``rows`` of a head of packed means, zeros where not ``seen``: ``(descriptor, head, base)``.

    With a descriptor ``rows`` must be successive, from ``first`` on, and those that are not
    ``seen`` come as they are.
    """
    desc, h, base = head
    if desc is not None:
        return desc.load([h, first, 0]).reshape(ROWS, BLOCK_D)
    else:
        columns = tl.arange(0, BLOCK_D)
        inside = seen[:, None] & (columns < HEAD_SIZE)[None, :]
        return tl.load(base + rows[:, None] * HEAD_SIZE + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _attend_means(
    q, keys, values, first, rows, tokens, num_video, acc, peak, scale_log2,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over ``rows`` of means of ``tokens`` keys each.

    A mean counts for as many keys as it has tokens: their logarithm is added to the score. Those
    of no token are hidden. All have ``SIZE`` tokens, but for one at the ragged end of the video.
    Returns the new ``acc`` and ``peak``, the factor by which earlier sums shrink, and this step's
    sum.
    """
    ragged = tl.maximum(num_video % SIZE, 1).to(tl.float32)
    bias = tl.where(tokens == SIZE, tl.log2(SIZE * 1.0), tl.log2(ragged))
    bias = tl.where(tokens > 0, bias, float("-inf"))
    k = _load_means(keys, first, rows, tokens > 0, WIDTH, HEAD_SIZE, BLOCK_D)
    scores = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2 + bias[None, :]
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    # Loaded no earlier, so that the scores do not wait for both.
    v = _load_means(values, first, rows, tokens > 0, WIDTH, HEAD_SIZE, BLOCK_D)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_peak, shrink, tl.sum(weights, 1)


@triton.jit
def _attend_level(
    q, keys, values, head, index, listed, num_video, acc, total, peak, scale_log2,
    LEVEL: tl.constexpr, KEY_BLOCK: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All steps over the ``listed`` blocks of one level, several blocks to a step of ``WIDTH``."""
    PER_BLOCK: tl.constexpr = KEY_BLOCK // LEVEL
    base = head * (tl.cdiv(num_video, KEY_BLOCK) * PER_BLOCK * HEAD_SIZE)
    key_head = (None, None, keys + base)
    value_head = (None, None, values + base)
    slots = listed * PER_BLOCK
    for first in tl.range(0, slots, WIDTH, num_stages=STAGES):
        slot = first + tl.arange(0, WIDTH)
        block = tl.load(index + slot // PER_BLOCK, mask=slot < slots, other=0)
        group = slot % PER_BLOCK
        left_in_video = num_video - block * KEY_BLOCK - group * LEVEL
        tokens = tl.where(slot < slots, tl.minimum(left_in_video, LEVEL), 0)
        acc, peak, shrink, mass = _attend_means(
            q, key_head, value_head, None, block * PER_BLOCK + group, tokens, num_video,
            acc, peak, scale_log2, LEVEL, WIDTH, HEAD_SIZE, BLOCK_D, PRECISION,
        )  # fmt: skip
        total = total * shrink + mass
    return acc, total, peak


@triton.jit(do_not_specialize=_SIZES)
def _joint_forward(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, lse_ptr, levels, counts, index,
    k2_ptr, v2_ptr, k4_ptr, v4_ptr, k8_ptr, v8_ptr, mean_k_ptr, mean_v_ptr,
    mean_k_desc, mean_v_desc, moment, factor, added,
    scale_log2, num_heads, num_queries, num_video, num_text, video_start, text_start, list_sb,
    list_sh, q_sb, q_sn, q_sh, q_sd, k_sb, k_sn, k_sh, k_sd, v_sb, v_sn, v_sh, v_sd,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    USE_TMA: tl.constexpr, WITH_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK_M`` query rows of one head.

    Pointers from ``k2_ptr`` to ``added`` are None where nothing of that kind is attended or
    applied, which leaves its code out. There are ``num_queries`` video queries and ``num_video``
    video keys; they differ only where there is no text. Long for the same reason as
    `block_sparse`'s kernel.
    """
    LN2: tl.constexpr = 0.6931471805599453
    # Which rows: text queries first, because they visit every key and take the longest.
    video_tiles = tl.cdiv(num_queries, BLOCK_M)
    text_tiles = tl.cdiv(num_text, BLOCK_M)
    all_heads = tl.num_programs(0) // (video_tiles + text_tiles)
    program = tl.program_id(0)
    is_text = program < text_tiles * all_heads
    program = tl.where(is_text, program, program - text_tiles * all_heads)
    tiles = tl.where(is_text, text_tiles, video_tiles)
    tile = program % tiles
    b = program // tiles // num_heads
    h = program // tiles % num_heads
    b64 = b.to(tl.int64)
    h64 = h.to(tl.int64)
    head = b64 * num_heads + h
    video_end = video_start + num_video
    text_end = text_start + num_text
    first = tl.where(is_text, text_start, video_start) + tile * BLOCK_M
    end = tl.where(is_text, text_end, video_start + num_queries)

    q_base = q_ptr + b64 * q_sb + h64 * q_sh
    q = _load_rows(q_base, first, end, q_sn, q_sd, BLOCK_M, HEAD_SIZE, BLOCK_D, True)
    keys = (k_desc, b, h, k_ptr + b64 * k_sb + h64 * k_sh, k_sn, k_sd)
    values = (v_desc, b, h, v_ptr + b64 * v_sb + h64 * v_sh, v_sn, v_sd)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], _NO_PEAK, tl.float32)

    # Exact tiles. The list is ascending, so a ragged last block can only be its last entry.
    STEPS: tl.constexpr = KEY_BLOCK // BLOCK_N
    blocks = tl.cdiv(num_video, KEY_BLOCK)
    query_tile = tl.where(is_text, 0, tile * BLOCK_M // QUERY_BLOCK)
    row = b64 * list_sb + h64 * list_sh + query_tile
    exact = index + row * blocks
    listed = tl.where(is_text, blocks, tl.load(counts + row * 4))
    last = tl.load(exact + listed - 1, mask=(listed > 0) & (is_text == 0), other=-1)
    last = tl.where(is_text, blocks - 1, last)
    has_ragged = (last == blocks - 1) & (num_video % KEY_BLOCK != 0)
    # The list is read one step ahead: the copies of the next tiles wait for the entry.
    steps = (listed - has_ragged.to(tl.int32)) * STEPS
    read_steps = tl.where(is_text, 0, steps)
    ahead = tl.load(exact, mask=read_steps > 0, other=0)
    for step in tl.range(0, steps, num_stages=STAGES):
        block = tl.where(is_text, step // STEPS, ahead)
        ahead = tl.load(exact + (step + 1) // STEPS, mask=step + 1 < read_steps, other=0)
        n = video_start + block * KEY_BLOCK + step % STEPS * BLOCK_N
        acc, total, peak = _attend(
            q, keys, values, n, video_end, None, acc, total, peak, scale_log2,
            BLOCK_N, HEAD_SIZE, BLOCK_D, "none", USE_TMA, PRECISION,
        )  # fmt: skip

    # A ragged last block and the text, in one loop: each further loop costs the first registers.
    ragged = tl.where(has_ragged, video_start + (blocks - 1) * KEY_BLOCK, video_end)
    ragged_steps = tl.cdiv(video_end - ragged, BLOCK_N)
    for step in tl.range(0, ragged_steps + tl.cdiv(num_text, BLOCK_N), num_stages=STAGES):
        in_text = step >= ragged_steps
        n = tl.where(in_text, text_start - ragged_steps * BLOCK_N, ragged) + step * BLOCK_N
        n_end = tl.where(in_text, text_end, video_end)
        acc, total, peak = _attend(
            q, keys, values, n, n_end, None, acc, total, peak, scale_log2,
            BLOCK_N, HEAD_SIZE, BLOCK_D, "end", USE_TMA, PRECISION,
        )  # fmt: skip

    # Pooled blocks. A text query has seen all keys exactly: for it these lists are empty.
    start2 = tl.load(counts + row * 4)
    start4 = start2 + tl.load(counts + row * 4 + 1)
    start8 = start4 + tl.load(counts + row * 4 + 2)
    end8 = start8 + tl.load(counts + row * 4 + 3)
    if k2_ptr is not None:
        acc, total, peak = _attend_level(
            q, k2_ptr, v2_ptr, head, exact + start2, tl.where(is_text, 0, start4 - start2),
            num_video, acc, total, peak, scale_log2,
            2, KEY_BLOCK, WIDTH, STAGES, HEAD_SIZE, BLOCK_D, PRECISION,
        )  # fmt: skip
    if k4_ptr is not None:
        acc, total, peak = _attend_level(
            q, k4_ptr, v4_ptr, head, exact + start4, tl.where(is_text, 0, start8 - start4),
            num_video, acc, total, peak, scale_log2,
            4, KEY_BLOCK, WIDTH, STAGES, HEAD_SIZE, BLOCK_D, PRECISION,
        )  # fmt: skip
    if k8_ptr is not None:
        acc, total, peak = _attend_level(
            q, k8_ptr, v8_ptr, head, exact + start8, tl.where(is_text, 0, end8 - start8),
            num_video, acc, total, peak, scale_log2,
            8, KEY_BLOCK, WIDTH, STAGES, HEAD_SIZE, BLOCK_D, PRECISION,
        )  # fmt: skip

    if mean_k_ptr is not None:
        # The blocks that are left, each as its centroid, and the softmax mass that falls on them.
        base = head * blocks * HEAD_SIZE
        key_means = (mean_k_desc, head.to(tl.int32), mean_k_ptr + base)
        value_means = (mean_v_desc, head.to(tl.int32), mean_v_ptr + base)
        left = tl.zeros([BLOCK_M], tl.float32)
        for first_block in tl.range(0, tl.where(is_text, 0, blocks), WIDTH, num_stages=STAGES):
            block = first_block + tl.arange(0, WIDTH)
            level = tl.load(levels + row * blocks + block, mask=block < blocks, other=1)
            tokens = tl.minimum(num_video - block * KEY_BLOCK, KEY_BLOCK)
            tokens = tl.where(level == 0, tokens, 0)
            acc, peak, shrink, mass = _attend_means(
                q, key_means, value_means, first_block, block, tokens, num_video,
                acc, peak, scale_log2, KEY_BLOCK, WIDTH, HEAD_SIZE, BLOCK_D, PRECISION,
            )  # fmt: skip
            total = total * shrink + mass
            left = left * shrink + mass

        if moment is not None:
            # First order: (left / V) * scale * q @ H, before the division by `total`. In chunks of
            # the inner dimension, since q and H in float32 would not fit beside each other.
            CHUNK: tl.constexpr = 32 if BLOCK_D > 32 else BLOCK_D
            left = left * (scale_log2 * LN2 / num_video)
            matrix = moment + head * (HEAD_SIZE * HEAD_SIZE)
            query_rows = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
            for d in tl.range(0, tl.where(is_text, 0, HEAD_SIZE), CHUNK, num_stages=1):
                inner = d + tl.arange(0, CHUNK)
                part = tl.load(
                    q_base + query_rows[:, None] * q_sn + inner[None, :] * q_sd,
                    mask=(query_rows < end)[:, None] & (inner < HEAD_SIZE)[None, :],
                    other=0.0,
                )
                slope = _load_rows(
                    matrix, d, HEAD_SIZE, HEAD_SIZE, 1, CHUNK, HEAD_SIZE, BLOCK_D, True
                )
                part = part.to(tl.float32) * left[:, None]
                acc = tl.dot(part, slope, acc, input_precision=PRECISION)

    # Rows that saw no key have total 0: output 0 and log-sum -inf.
    num_rows = (num_queries + num_text).to(tl.int64)
    rows = first + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    query_blocks = tl.cdiv(num_queries, QUERY_BLOCK)
    # Query block 0 stands in for the text, which takes no part in either.
    if factor is not None:
        factor_here = tl.load(factor + head * query_blocks + query_tile)
        out = out * tl.where(is_text, 1.0, factor_here)
    if added is not None:
        pointers = added + (head * query_blocks + query_tile) * HEAD_SIZE + columns
        added_here = tl.load(pointers, mask=columns < HEAD_SIZE, other=0.0)
        out = out + tl.where(is_text, 0.0, added_here)[None, :]
    pointers = ((b64 * num_rows + rows) * num_heads + h)[:, None] * HEAD_SIZE + columns[None, :]
    inside = (rows < end)[:, None] & (columns < HEAD_SIZE)[None, :]
    tl.store(out_ptr + pointers, out.to(out_ptr.dtype.element_ty), mask=inside)
    if WITH_LSE:
        lse = (peak + tl.log2(tl.where(total > 0, total, 1.0))) * LN2
        lse = tl.where(total > 0, lse, float("-inf"))
        tl.store(lse_ptr + head * num_rows + rows, lse, mask=rows < end)


def level_lists(levels: Tensor) -> tuple[Tensor, Tensor]:
    """List the blocks of each level, on the device and without a sync.

    Args:
        levels: int8 ``[B, H, Q, K]``.

    Returns:
        How many blocks have level 1, 2, 4 and 8, int32 ``[B, H, Q, 4]``, and which, int32
        ``[B, H, Q, K]``: those of level 1 in ascending order, then those of level 2, 4 and 8.
        Entries after the last block listed are undefined.
    """
    levels = levels.contiguous()
    counts = levels.new_empty(*levels.shape[:-1], len(LEVELS), dtype=torch.int32)
    index = levels.new_empty(levels.shape, dtype=torch.int32)
    blocks = levels.shape[-1]
    with torch.cuda.device_of(levels):
        _list_levels[(counts.numel() // len(LEVELS),)](levels, counts, index, blocks, CHUNK=1024)
    return counts, index


def joint_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    *,
    query_block: int,
    key_block: int,
    text_length: int = 0,
    text_first: bool = False,
    statistics: BlockStatistics | None = None,
    remainder: bool = False,
    first_order: bool = False,
    row_factor: Tensor | None = None,
    added: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    config: KernelConfig | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to every key block at the level asked for, under one softmax; inference only.

    What `joint_reference.joint_attention` computes (PSA's levels; PISA's zeroth and first
    order; Rectified SpaAttn's rescaled output). Nothing is synchronised, and nothing copied but
    the centroids, which are rounded to the dtype of the keys.

    Args:
        query: ``[B, N, H, D]`` with ``D <= 256``; float16, bfloat16 or float32 (then with
            full-precision products); any strides.
        key: like ``query``; without text it may have another number of tokens.
        value: like ``key``.
        levels: int8 ``[B|1, H|1, Q, K]`` over blocks of the ``V = N - text_length`` video tokens:
            1 exact, 2, 4 or 8 pooled, 0 left out. A pooled level may only occur if ``statistics``
            has its means; on a GPU, which is not waited for, a device assertion fails otherwise.
        query_block: video tokens per query block, a power of two from 16 to 128.
        key_block: video tokens per key block, likewise.
        text_length: text tokens; their keys are exact for every query, and their queries see
            everything. Their rows come after the video rows.
        text_first: whether the text rows come before the video rows instead.
        statistics: the means of ``pooled`` levels, the centroids if ``remainder``, and ``moment``
            if ``first_order``; of the same video tokens and ``key_block``.
        remainder: a block of level 0 is not dropped, but stands there as one key, its centroid.
        first_order: add PISA's first-order term for the remainder; needs ``remainder``.
        row_factor: ``[B, H, Q]``, multiplies the outputs of a query block's rows at the end.
        added: ``[B, H, Q, D]``, is added to them after that.
        scale: positive factor on ``query @ key``; ``D ** -0.5`` when None.
        return_lse: also return the log-sum of exponentials.
        config: tile shape; None takes the one measured for this GPU.

    Returns:
        The output ``[B, N, H, D]`` in the input's dtype, and if asked the natural-log sum of
        exponentials of what was attended, float32 ``[B, H, N]``. A query that sees nothing gets
        output 0 (before ``row_factor`` and ``added``) and log-sum -inf.

    Raises:
        OperatorUnavailableError: if the kernel cannot run on this device, dtype or head size.
        GridMismatchError: if ``levels`` has another number of blocks than the tokens make.
        OptionError: if tensors do not fit together, ``statistics`` lacks something, a block size
            is impossible, or ``scale`` is not positive.
    """
    _check_call(query, key, value, levels, query_block, key_block, text_length)
    _check_per_block("row_factor", row_factor, query, levels, ())
    _check_per_block("added", added, query, levels, query.shape[-1:])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not (math.isfinite(scale) and scale > 0):
        raise OptionError(f"{scale=} must be positive: the kernel takes row maxima before scaling.")
    pooled, centroids, moment = _needed_statistics(
        query, levels, statistics, key_block, remainder, first_order
    )
    out, lse = _joint_op(
        query, key, value, levels, *pooled, *centroids, moment, row_factor, added,
        query_block, key_block, text_length, text_first, scale, return_lse,
        None if config is None else list(astuple(config)),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check_call(
    query: Tensor, key: Tensor, value: Tensor, levels: Tensor,
    query_block: int, key_block: int, text_length: int,
) -> None:  # fmt: skip
    shapes = [tuple(t.shape) for t in (query, key, value)]
    ranks = {len(shape) for shape in shapes}
    if ranks != {4} or key.shape != value.shape or not _fit(query, key, text_length):
        raise OptionError(
            f"query, key and value must share one shape [B, N, H, D], not {shapes}; only without "
            "text may there be more or fewer keys than queries."
        )
    devices = {str(t.device) for t in (query, key, value, levels)}
    if len(devices) > 1 or len({query.dtype, key.dtype, value.dtype}) > 1:
        raise OptionError(
            f"query, key, value and levels must share one device and query, key and value one "
            f"dtype, not {sorted(devices)} and {query.dtype}, {key.dtype}, {value.dtype}."
        )
    for size in (query_block, key_block):
        check_block_size(size)
        if size > MAX_BLOCK_SIZE:
            raise OptionError(f"a block of {size} tokens is too large; take {MAX_BLOCK_SIZE}.")
    batch, num_tokens, heads, _ = query.shape
    video, keys = num_tokens - text_length, key.shape[1] - text_length
    blocks = (-(-video // query_block), -(-keys // key_block))
    if text_length < 0 or video < 1 or keys < 1 or levels.ndim != 4 or levels.shape[2:] != blocks:
        raise GridMismatchError(
            f"{num_tokens} tokens with {text_length=} make {blocks[0]} query blocks of "
            f"{query_block} and {blocks[1]} key blocks of {key_block}, but levels has shape "
            f"{tuple(levels.shape)}; make it for this grid or pass the right text length."
        )
    if levels.dtype != torch.int8:
        raise OptionError(f"levels must be int8, not {levels.dtype}.")
    if levels.shape[0] not in (1, batch) or levels.shape[1] not in (1, heads):
        raise OptionError(
            f"levels of shape {tuple(levels.shape)} fit neither batch {batch} and {heads} heads "
            f"nor 1 in their place."
        )


def _fit(query: Tensor, key: Tensor, text_length: int) -> bool:
    """Whether two tensors differ at most in how many tokens they have, and in that without text."""
    beside = (*query.shape[:1], *query.shape[2:]) == (*key.shape[:1], *key.shape[2:])
    return beside and (text_length == 0 or query.shape == key.shape)


def _check_per_block(
    name: str, tensor: Tensor | None, query: Tensor, levels: Tensor, rest: tuple[int, ...]
) -> None:
    shape = (query.shape[0], query.shape[2], levels.shape[2], *rest)
    if tensor is not None and (tensor.shape != shape or tensor.device != query.device):
        raise OptionError(
            f"{name} must have shape {shape} on {query.device}, not {tuple(tensor.shape)} on "
            f"{tensor.device}."
        )


def _needed_statistics(
    query: Tensor, levels: Tensor, statistics: BlockStatistics | None,
    key_block: int, remainder: bool, first_order: bool,
) -> tuple[list[Tensor | None], list[Tensor | None], Tensor | None]:  # fmt: skip
    """Pick pooled keys and values, centroids and moment; None for what is not needed."""
    if first_order and not remainder:
        raise OptionError("first_order corrects the remainder: it needs remainder=True.")
    if (remainder or first_order) and statistics is None:
        raise OptionError("remainder=True needs statistics; compute them with block_statistics.")
    if first_order and (statistics is None or statistics.moment is None):
        raise OptionError('first_order=True needs statistics with "moment" among the wanted.')
    by_level = {} if statistics is None else statistics.pooled
    batch, _, heads, head_size = query.shape
    blocks = levels.shape[-1]
    pooled: list[Tensor | None] = []
    for level in LEVELS[1:]:
        means = by_level.get(level, (None, None))
        _check_means(f"pooled[{level}]", means, (batch, heads, blocks * key_block // level), query)
        pooled += means
    centroids: list[Tensor | None] = [None, None]
    if remainder and statistics is not None:
        centroids = [statistics.key_mean, statistics.value_mean]
        _check_means("key_mean and value_mean", centroids, (batch, heads, blocks), query)
    moment = statistics.moment if first_order and statistics is not None else None
    _check_means("moment", [moment], (batch, heads, head_size), query)
    return pooled, centroids, moment


def _check_means(
    name: str,
    tensors: Sequence[Tensor | None],
    lead: tuple[int, ...],
    query: Tensor,
) -> None:
    shape = (*lead, query.shape[-1])
    for tensor in tensors:
        if tensor is not None and (tensor.shape != shape or tensor.device != query.device):
            raise OptionError(
                f"statistics have {name} of shape {tuple(tensor.shape)} on {tensor.device}, but "
                f"this call needs {shape} on {query.device}; compute them from the same tensors "
                f"with the same key_block."
            )


@torch.library.custom_op("dit_accel::joint_sparse_attention", mutates_args=())
def _joint_op(
    query: Tensor, key: Tensor, value: Tensor, levels: Tensor,
    key2: Tensor | None, value2: Tensor | None, key4: Tensor | None, value4: Tensor | None,
    key8: Tensor | None, value8: Tensor | None, key_mean: Tensor | None, value_mean: Tensor | None,
    moment: Tensor | None, row_factor: Tensor | None, added: Tensor | None,
    query_block: int, key_block: int, text_length: int, text_first: bool, scale: float,
    with_lse: bool, config: list[int] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the kernels. A custom operator, so that torch.compile traces past it unbroken."""
    batch, num_tokens, heads, head_size = query.shape
    reason = why_unavailable(query.device, query.dtype, head_size)
    if reason is not None:
        raise OperatorUnavailableError(f"the Triton kernel cannot run this call: {reason}.")
    out = query.new_empty(query.shape)
    lse = empty_lse(query, with_lse)
    levels = levels.contiguous()
    counts, index = level_lists(levels)
    pooled = [_packed(t, query.dtype) for t in (key2, value2, key4, value4, key8, value8)]
    _check_levels(levels, pooled)
    centroids = [_packed(t, query.dtype) for t in (key_mean, value_mean)]
    extras = [_packed(t, torch.float32) for t in (moment, row_factor, added)]
    block_d = max(16, triton.next_power_of_2(head_size))
    has_pooled = any(t is not None for t in pooled)
    usual = partial(joint_config, query_block=query_block, pooled=has_pooled)
    cfg = _resolve_config(query, block_d, MAX_BLOCK_SIZE, config, usual)
    block_m, block_n = min(cfg.block_m, query_block), min(cfg.block_n, key_block)
    use_tma = cfg.use_tma and all(
        fits_copy_engine(t, block_d) for t in (key, value, *centroids) if t is not None
    )
    box = [1, block_n, 1, block_d]
    num_queries, num_video = num_tokens - text_length, key.shape[1] - text_length
    tiles = triton.cdiv(num_queries, block_m) + triton.cdiv(text_length, block_m)
    list_batch, list_heads, rows, _ = levels.shape
    descriptors: list[TensorDescriptor | None] = [None, None]
    if use_tma and key_mean is not None:
        descriptors = [
            TensorDescriptor.from_tensor(t.flatten(0, 1), [1, cfg.block_n, block_d])
            for t in centroids
            if t is not None
        ]
    with torch.cuda.device_of(query):
        _joint_forward[(tiles * batch * heads,)](
            query, key, value,
            TensorDescriptor(key, key.shape, key.stride(), box) if use_tma else None,
            TensorDescriptor(value, value.shape, value.stride(), box) if use_tma else None,
            out, lse, levels, counts, index,
            *pooled, *centroids, *descriptors, *extras,
            scale * math.log2(math.e), heads, num_queries, num_video, text_length,
            text_length if text_first else 0, 0 if text_first else num_video,
            list_heads * rows if list_batch > 1 else 0, rows if list_heads > 1 else 0,
            *query.stride(), *key.stride(), *value.stride(),
            QUERY_BLOCK=query_block, KEY_BLOCK=key_block,
            BLOCK_M=block_m, BLOCK_N=block_n, WIDTH=cfg.block_n,
            HEAD_SIZE=head_size, BLOCK_D=block_d, STAGES=cfg.num_stages,
            USE_TMA=use_tma, WITH_LSE=with_lse,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=cfg.num_warps, num_stages=cfg.num_stages,
        )  # fmt: skip
    return out, lse


@_joint_op.register_fake
def _(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    with_lse = bool(rest[-2])
    return query.new_empty(query.shape), empty_lse(query, with_lse)


def _check_levels(levels: Tensor, pooled: list[Tensor | None]) -> None:
    """Refuse levels without pooled keys, whose blocks would be left out and nobody told.

    A GPU is not waited for: there it is an assertion on the device, which ends the program at its
    next synchronisation, as an index out of range does.
    """
    keys = zip(LEVELS[1:], pooled[::2], strict=True)
    served = {0, 1} | {level for level, tensor in keys if tensor is not None}
    remedy = "of which statistics has no pooled keys; add them to pooled_levels (2, 4, 8)."
    if levels.device.type == "cpu":
        missing = {*levels.unique().tolist()} - served
        if missing:
            raise OptionError(f"levels has blocks of level {sorted(missing)}, {remedy}")
    else:
        bits = sum(1 << level for level in served)
        known = (bits >> levels.short() & 1).all()
        torch._assert_async(known, f"levels has blocks of a level not in {served}, {remedy}")


def _packed(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``tensor`` as the kernel reads it: ``dtype``, contiguous; itself where it is so already."""
    return None if tensor is None else tensor.to(dtype).contiguous()
