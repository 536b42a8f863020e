"""Block-sparse attention forward in 8 bits, in Triton.

The loops of `block_sparse.py` over the tiles that `quantise.py` rounded and laid out;
`quantised_reference.py` says in plain torch what is computed. Rows are numbered as laid out there:
the video from 0, the text from the next whole tile on.
"""

# Triton's functions take tensors, pointers and constants under the same names: types say little.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import astuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_accel.errors import OperatorUnavailableError
from dit_accel.kernels.block_sparse import _NO_PEAK, check_call, empty_lse
from dit_accel.kernels.precision import why_no_precision
from dit_accel.kernels.quantise import (
    TILE,
    Quantised,
    add_mean_key,
    by_lane,
    quantise,
    to_e4m3,
)
from dit_accel.kernels.tiles import TileLists
from dit_accel.kernels.tuning import KernelConfig, quantised_config

# log2(448): weights up to 1 become e4m3 numbers up to the largest. The sum gets the same factor.
_TO_LARGEST = tl.constexpr(8.807354922057604)

# Sizes that must not make Triton compile again whenever they happen to be 1 or divisible by 16.
_SIZES = (
    "num_heads", "num_video", "num_text", "video_start", "text_start",
    "list_sb", "list_sh", "full_columns", "partial_columns",
)  # fmt: skip


@triton.jit
def _load_keys(keys, row, ROWS: tl.constexpr, D: tl.constexpr, USE_TMA: tl.constexpr):
    """Keys, or 16-bit values, ``[ROWS, D]`` from ``row`` of ``(descriptor, pointer, head, R)``."""
    desc, pointer, bh, length = keys
    if USE_TMA:
        return desc.load([(bh * length + row).to(tl.int32), 0])
    else:
        rows = bh * length + row + tl.arange(0, ROWS)
        return tl.load(pointer + rows[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit
def _load_channels(values, row, ROWS: tl.constexpr, D: tl.constexpr, USE_TMA: tl.constexpr):
    """8-bit values, ``[D, ROWS]`` from ``row``."""
    desc, pointer, bh, length = values
    if USE_TMA:
        return desc.load([(bh * D).to(tl.int32), row])
    else:
        channels = bh * D + tl.arange(0, D)
        return tl.load(pointer + channels[:, None] * length + row + tl.arange(0, ROWS)[None, :])


@triton.jit
def _attend(
    q, q_factor, keys, key_scale, values, row, visible, words, acc, total, peak,
    BLOCK_N: tl.constexpr, KEY_BLOCK: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr,
    USE_TMA: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over keys ``[row, row + BLOCK_N)``, in base 2.

    ``peak`` is the row maximum so far, rounded up to an integer. ``MASK`` is "none", "end" (only
    the first ``visible`` keys count) or "bits" (of ``words``: two for each query, 64 keys each).
    """
    scale = tl.load(key_scale + row // KEY_BLOCK)
    k = _load_keys(keys, row, BLOCK_N, D, USE_TMA)
    scores = tl.dot(q, k.T).to(tl.float32)
    columns = tl.arange(0, BLOCK_N)
    if MASK == "end":
        scores = tl.where((columns < visible)[None, :], scores, float("-inf"))
    elif MASK == "bits":
        # As in `block_sparse.py`: each key's bit goes to the sign.
        low, high = words
        word = tl.where((columns < 64)[None, :], low[:, None], high[:, None])
        word = word << (7 - columns % 8)[None, :]
        allowed = (word << (56 - columns % 64 // 8 * 8)[None, :]) < 0
        scores = tl.where(allowed, scores, float("-inf"))
    factor = q_factor * scale
    new_peak = tl.maximum(peak, tl.ceil(tl.max(scores, 1) * factor))
    shrink = tl.exp2(peak - new_peak)
    narrow: tl.constexpr = values[1].dtype.element_ty == tl.float8e4nv
    base = new_peak - _TO_LARGEST if narrow else new_peak
    weights = tl.exp2(scores * factor[:, None] - base[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    if narrow:
        v = _load_channels(values, row, BLOCK_N, D, USE_TMA)
        p = by_lane(to_e4m3(weights, INTERPRETED), weights.shape[0], BLOCK_N)
        # Hopper adds up 8-bit products with few bits: what a step gives is added in float32.
        acc += tl.dot(p, v.T)
    else:
        v = _load_keys(values, row, BLOCK_N, D, USE_TMA)
        acc = tl.dot(weights.to(v.dtype), v, acc)
    return acc, total, new_peak


@triton.jit(do_not_specialize=_SIZES)
def _quantised_forward(
    q_ptr, q_factor_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, v_mean_ptr, k_desc, v_desc,
    out_ptr, lse_ptr,
    full_count, full_index, partial_count, partial_index, partial_slot, bits,
    num_heads, num_video, num_text, video_start, text_start,
    list_sb, list_sh, full_columns, partial_columns,
    ROWS: tl.constexpr, KEY_BLOCK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    USE_TMA: tl.constexpr, WITH_LSE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK_M`` query rows of one head.

    Long, because the kinds of keys share one state that lives in registers: the arguments of a
    helper for each would be as long as its loop.
    """
    # Which rows: text queries first, because they visit every key and take the longest.
    video_tiles = tl.cdiv(num_video, BLOCK_M)
    text_tiles = tl.cdiv(num_text, BLOCK_M)
    all_heads = tl.num_programs(0) // (video_tiles + text_tiles)
    program = tl.program_id(0)
    is_text = program < text_tiles * all_heads
    program = tl.where(is_text, program, program - text_tiles * all_heads)
    tiles = tl.where(is_text, text_tiles, video_tiles)
    tile = program % tiles
    bh = (program // tiles).to(tl.int64)
    b64, h64 = bh // num_heads, bh % num_heads
    text_row = tl.cdiv(num_video, ROWS) * ROWS
    length = text_row + tl.cdiv(num_text, ROWS) * ROWS
    q_row = tl.where(is_text, text_row, 0) + tile * BLOCK_M

    q_factor = tl.load(q_factor_ptr + bh * length + q_row + tl.arange(0, BLOCK_M))
    q = _load_keys((None, q_ptr, bh, length), q_row, BLOCK_M, BLOCK_D, False)
    keys = (k_desc, k_ptr, bh, length)
    values = (v_desc, v_ptr, bh, length)
    key_scale = k_scale_ptr + bh * (length // KEY_BLOCK)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], _NO_PEAK, tl.float32)

    # Full tiles. The list is ascending, so a ragged last tile can only be its last entry.
    STEPS: tl.constexpr = BLOCK // BLOCK_N
    blocks = tl.cdiv(num_video, BLOCK)
    row = tl.where(is_text, 0, b64 * list_sb + h64 * list_sh + tile * BLOCK_M // BLOCK)
    full = full_index + row * full_columns
    listed = tl.where(is_text, blocks, tl.load(full_count + row))
    last = tl.load(full + listed - 1, mask=(listed > 0) & (is_text == 0), other=-1)
    last = tl.where(is_text, blocks - 1, last)
    has_ragged = (last == blocks - 1) & (num_video % BLOCK != 0)
    # The list is read one step ahead: the copies of the next tiles wait for the entry.
    steps = (listed - has_ragged.to(tl.int32)) * STEPS
    read_steps = tl.where(is_text, 0, steps)
    ahead = tl.load(full, mask=read_steps > 0, other=0)
    for step in tl.range(0, steps, num_stages=STAGES):
        block = tl.where(is_text, step // STEPS, ahead)
        ahead = tl.load(full + (step + 1) // STEPS, mask=step + 1 < read_steps, other=0)
        n = block * BLOCK + step % STEPS * BLOCK_N
        acc, total, peak = _attend(
            q, q_factor, keys, key_scale, values, n, 0, None, acc, total, peak,
            BLOCK_N, KEY_BLOCK, BLOCK_D, "none", USE_TMA, INTERPRETED,
        )  # fmt: skip

    # Partial tiles. Two words hold a row's bits for a whole step.
    WORDS: tl.constexpr = (BLOCK + 63) // 64
    partial = row * partial_columns
    word_of_row = (tile * BLOCK_M % BLOCK + tl.arange(0, BLOCK_M)) * WORDS
    listed = tl.where(is_text, 0, tl.load(partial_count + row))
    for step in tl.range(0, listed * STEPS, num_stages=STAGES):
        block = tl.load(partial_index + partial + step // STEPS)
        slot = tl.load(partial_slot + partial + step // STEPS).to(tl.int64)
        offset = step % STEPS * BLOCK_N
        pattern = bits + slot * (BLOCK * WORDS) + offset // 64 + word_of_row
        low = tl.load(pattern) >> offset % 64
        high = tl.load(pattern + 1) if BLOCK_N > 64 else low
        acc, total, peak = _attend(
            q, q_factor, keys, key_scale, values, block * BLOCK + offset, 0, (low, high),
            acc, total, peak,
            BLOCK_N, KEY_BLOCK, BLOCK_D, "bits", USE_TMA, INTERPRETED,
        )  # fmt: skip

    # A ragged last tile and the text, in one loop: each further loop costs the first one registers.
    ragged = tl.where(has_ragged, (blocks - 1) * BLOCK, num_video)
    ragged_steps = tl.cdiv(num_video - ragged, BLOCK_N)
    for step in tl.range(0, ragged_steps + tl.cdiv(num_text, BLOCK_N), num_stages=STAGES):
        in_text = step >= ragged_steps
        n = tl.where(in_text, text_row - ragged_steps * BLOCK_N, ragged) + step * BLOCK_N
        visible = tl.where(in_text, text_row + num_text, num_video) - n
        acc, total, peak = _attend(
            q, q_factor, keys, key_scale, values, n, visible, None, acc, total, peak,
            BLOCK_N, KEY_BLOCK, BLOCK_D, "end", USE_TMA, INTERPRETED,
        )  # fmt: skip

    # Rows that saw no key have total 0: output 0 and log-sum -inf.
    columns = tl.arange(0, BLOCK_D)
    seen = total > 0
    out = acc / tl.where(seen, total, 1.0)[:, None]
    narrow: tl.constexpr = v_ptr.dtype.element_ty == tl.float8e4nv
    if narrow:
        channel = bh * HEAD_SIZE + columns
        scale = tl.load(v_scale_ptr + channel, mask=columns < HEAD_SIZE, other=0.0)
        mean = tl.load(v_mean_ptr + channel, mask=columns < HEAD_SIZE, other=0.0)
        out = out * scale[None, :] + tl.where(seen[:, None], mean[None, :], 0.0)
    num_rows = (num_video + num_text).to(tl.int64)
    in_segment = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.where(is_text, text_start, video_start) + in_segment
    inside = in_segment < tl.where(is_text, num_text, num_video)
    pointers = ((b64 * num_rows + rows) * num_heads + h64)[:, None] * HEAD_SIZE + columns[None, :]
    mask = inside[:, None] & (columns < HEAD_SIZE)[None, :]
    tl.store(out_ptr + pointers, out.to(out_ptr.dtype.element_ty), mask=mask)
    if WITH_LSE:
        LN2: tl.constexpr = 0.6931471805599453
        lse = peak + tl.log2(tl.where(seen, total, 1.0))
        if narrow:
            lse = lse - _TO_LARGEST
        lse = tl.where(seen, lse * LN2, float("-inf"))
        tl.store(lse_ptr + bh * num_rows + rows, lse, mask=inside)


def quantised_block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: TileLists,
    precision: str,
    *,
    text_length: int = 0,
    text_first: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    config: KernelConfig | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`block_sparse_attention` of `block_sparse.py`, with 8-bit products; for inference.

    Extra memory: half a byte to a byte for each byte of query, key and value. Nothing is
    synchronised.

    Args:
        query: ``[B, N, H, D]`` with ``N = lists.num_tokens + text_length`` and ``D <= 256``;
            float16 or bfloat16; any strides.
        key: like ``query``.
        value: like ``query``.
        lists: the tiles to visit, on the same device, of at least 32 tokens.
        precision: "fp8", "int8_fp8" or "int8"; see `quantised_reference.py`.
        text_length: text tokens; their rows come after the video rows.
        text_first: whether the text rows come before the video rows instead.
        scale: positive factor on ``query @ key``; ``D ** -0.5`` when None.
        return_lse: also return the log-sum of exponentials.
        config: tile shape; None takes the one chosen for this GPU.

    Returns:
        The output ``[B, N, H, D]`` in the input's dtype, and if asked the natural-log sum of
        exponentials of the scaled scores, float32 ``[B, H, N]``. A query without any allowed key
        gets output 0 and log-sum -inf.

    Raises:
        OperatorUnavailableError: if the kernel cannot run on this device, dtype, head size or
            block size.
        GridMismatchError: if ``N`` is not ``lists.num_tokens + text_length``.
        OptionError: if tensors and lists do not fit together, ``scale`` is not positive, or there
            is no such precision.
    """
    scale = check_call(query, key, value, lists, text_length, scale)
    out, lse = _quantised_op(
        query, key, value, lists.full_count, lists.full_index, lists.partial_count,
        lists.partial_index, lists.partial_slot, lists.bits, lists.block_size, lists.num_tokens,
        precision, text_first, scale, return_lse, None if config is None else list(astuple(config)),
    )  # fmt: skip
    return (out, lse) if return_lse else out


@torch.library.custom_op("dit_accel::quantised_block_sparse_attention", mutates_args=())
def _quantised_op(
    query: Tensor, key: Tensor, value: Tensor,
    full_count: Tensor, full_index: Tensor,
    partial_count: Tensor, partial_index: Tensor, partial_slot: Tensor, bits: Tensor,
    block_size: int, num_video: int, precision: str, text_first: bool, scale: float,
    with_lse: bool, config: list[int] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the kernels. A custom operator, so that torch.compile traces past it unbroken."""
    batch, num_tokens, heads, head_size = query.shape
    reason = why_no_precision(precision, query.device, query.dtype, head_size, block_size)
    if reason is not None:
        raise OperatorUnavailableError(f"precision {precision!r} cannot run here: {reason}.")
    made = quantise(
        query, key, value, precision, num_video=num_video, text_first=text_first,
        key_block=min(block_size, TILE), scale=scale,
    )  # fmt: skip
    out = query.new_empty(query.shape)
    lse = empty_lse(query, with_lse)
    block_d = made.query.shape[-1]
    cfg = _resolve_config(query, block_d, block_size, precision, config)
    num_text = num_tokens - num_video
    tiles = triton.cdiv(num_video, cfg.block_m) + triton.cdiv(num_text, cfg.block_m)
    list_batch, list_heads, rows = full_count.shape
    with torch.cuda.device_of(query):
        _quantised_forward[(tiles * batch * heads,)](
            made.query, made.query_factor, made.key, made.key_scale,
            made.value, made.value_scale, made.value_mean,
            *(descriptors(made, cfg.block_n) if cfg.use_tma else (None, None)),
            out, lse, full_count, full_index, partial_count, partial_index, partial_slot, bits,
            heads, num_video, num_text,
            num_text if text_first else 0, 0 if text_first else num_video,
            list_heads * rows if list_batch > 1 else 0, rows if list_heads > 1 else 0,
            full_index.shape[-1], partial_index.shape[-1],
            ROWS=TILE, KEY_BLOCK=made.key_block, BLOCK=block_size,
            BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, HEAD_SIZE=head_size, BLOCK_D=block_d,
            STAGES=cfg.num_stages, USE_TMA=cfg.use_tma, WITH_LSE=with_lse,
            INTERPRETED=triton.knobs.runtime.interpret,
            num_warps=cfg.num_warps, num_stages=cfg.num_stages,
        )  # fmt: skip
    return out, add_mean_key(lse, query, made, scale)


@_quantised_op.register_fake
def _(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    with_lse = bool(rest[-2])
    return query.new_empty(query.shape), empty_lse(query, with_lse)


def descriptors(made: Quantised, block_n: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Let the copy engine read ``block_n`` rows of keys and of values at a time."""
    key, value = made.key.flatten(0, 2), made.value.flatten(0, 2)
    block_d = made.key.shape[-1]
    box = [block_d, block_n] if value.element_size() == 1 else [block_n, block_d]
    return (
        TensorDescriptor.from_tensor(key, [block_n, block_d]),
        TensorDescriptor.from_tensor(value, box),
    )


def _resolve_config(
    query: Tensor, block_d: int, block_size: int, precision: str, config: list[int] | None
) -> KernelConfig:
    if config is not None:
        block_m, block_n, num_warps, num_stages, use_tma = config
        chosen = KernelConfig(block_m, block_n, num_warps, num_stages, bool(use_tma))
    else:
        # On the CPU only the interpreter runs the kernel, and any configuration will do.
        capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (8, 0)
        chosen = quantised_config(capability, block_d, precision)
    return chosen.cut_to(block_size)
