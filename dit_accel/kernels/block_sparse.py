"""Block-sparse attention forward in Triton.

One program computes the output of ``block_m`` queries of one head with an online softmax
(FlashAttention-2, Dao 2023, algorithm 1) over the key tiles on its lists. `reference.py` says in
plain torch what is computed.

A query of the video visits, in this order: its full tiles, without any mask; its partial tiles,
whose allowed pairs are read as bits; a ragged last tile and all text keys. A text query visits
everything. Video and text are two segments of rows of the same tensors, so neither order of the two
needs a copy.
"""

# Triton's functions take tensors, pointers and constants under the same names: types say little.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_accel.errors import GridMismatchError, OperatorUnavailableError, OptionError
from dit_accel.kernels.tiles import TileLists, check_block_size
from dit_accel.kernels.tuning import KernelConfig, kernel_config

MAX_HEAD_SIZE = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Stands for "no key seen yet": finite, so that the difference of two peaks is never inf - inf.
_NO_PEAK = tl.constexpr(-1e30)

# Sizes that must not make Triton compile again whenever they happen to be 1 or divisible by 16.
_SIZES = (
    "num_heads", "num_video", "num_text", "video_start", "text_start",
    "list_sb", "list_sh", "full_columns", "partial_columns",
)  # fmt: skip


@triton.jit
def _load_rows(
    base, first, end, stride_n, stride_d,
    ROWS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_END: tl.constexpr,
):  # fmt: skip
    """Rows ``[first, first + ROWS)`` of one head, ``[ROWS, BLOCK_D]``; zeros outside."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    tile = rows[:, None] * stride_n + columns[None, :] * stride_d
    pointers = base + tl.cast(first, tl.int64) * stride_n + tile
    if CHECK_END and HEAD_SIZE != BLOCK_D:
        inside = (first + rows < end)[:, None] & (columns < HEAD_SIZE)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    elif CHECK_END:
        return tl.load(pointers, mask=(first + rows < end)[:, None], other=0.0)
    elif HEAD_SIZE != BLOCK_D:
        return tl.load(pointers, mask=(columns < HEAD_SIZE)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _load_tile(
    head, first, end,
    ROWS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    CHECK_END: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Rows from ``first`` of a head of key or value: ``(descriptor, batch, head, base, strides)``.

    The copy engine puts zeros for rows outside the tensor, not for those from ``end`` on.
    """
    desc, b, h, base, stride_n, stride_d = head
    if USE_TMA:
        return desc.load([b, first, h, 0]).reshape(ROWS, BLOCK_D)
    else:
        return _load_rows(base, first, end, stride_n, stride_d, ROWS, HEAD_SIZE, BLOCK_D, CHECK_END)


@triton.jit
def _attend(
    q, keys, values, first, end, words, acc, total, peak, scale_log2,
    BLOCK_N: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over keys ``[first, first + BLOCK_N)``, in base 2.

    ``peak`` is the row maximum of the scaled scores, ``total`` the sum of ``2 ** (score - peak)``.
    ``MASK`` is "none", "end" (keys from ``end`` on are hidden) or "bits" (of ``words``, one per
    row). Only masked steps may reach past ``end``.
    """
    CHECK: tl.constexpr = MASK != "none"
    k = _load_tile(keys, first, end, BLOCK_N, HEAD_SIZE, BLOCK_D, CHECK, USE_TMA)
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    columns = tl.arange(0, BLOCK_N)
    if MASK == "end":
        scores = tl.where((first + columns < end)[None, :], scores, float("-inf"))
    elif MASK == "bits":
        # Each key's bit goes to the sign, in two shifts: the first is the same for many columns of
        # a thread, the second known when compiling. Far fewer instructions than `>> n & 1`.
        words = words[:, None] << (7 - columns % 8)[None, :]
        allowed = (words << (56 - columns // 8 * 8)[None, :]) < 0
        scores = tl.where(allowed, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    # Loaded no earlier, so that the scores do not wait for both.
    v = _load_tile(values, first, end, BLOCK_N, HEAD_SIZE, BLOCK_D, CHECK, USE_TMA)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit(do_not_specialize=_SIZES)
def _block_sparse_forward(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, lse_ptr,
    full_count, full_index, partial_count, partial_index, partial_slot, bits,
    scale_log2, num_heads, num_video, num_text, video_start, text_start,
    list_sb, list_sh, full_columns, partial_columns,
    q_sb, q_sn, q_sh, q_sd, k_sb, k_sn, k_sh, k_sd, v_sb, v_sn, v_sh, v_sd,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    USE_TMA: tl.constexpr, WITH_LSE: tl.constexpr, PRECISION: tl.constexpr,
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
    b = program // tiles // num_heads
    h = program // tiles % num_heads
    b64 = b.to(tl.int64)
    h64 = h.to(tl.int64)
    video_end = video_start + num_video
    text_end = text_start + num_text
    first = tl.where(is_text, text_start, video_start) + tile * BLOCK_M
    end = tl.where(is_text, text_end, video_end)

    q_base = q_ptr + b64 * q_sb + h64 * q_sh
    q = _load_rows(q_base, first, end, q_sn, q_sd, BLOCK_M, HEAD_SIZE, BLOCK_D, True)
    keys = (k_desc, b, h, k_ptr + b64 * k_sb + h64 * k_sh, k_sn, k_sd)
    values = (v_desc, b, h, v_ptr + b64 * v_sb + h64 * v_sh, v_sn, v_sd)
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
        n = video_start + block * BLOCK + step % STEPS * BLOCK_N
        acc, total, peak = _attend(
            q, keys, values, n, video_end, None, acc, total, peak, scale_log2,
            BLOCK_N, HEAD_SIZE, BLOCK_D, "none", USE_TMA, PRECISION,
        )  # fmt: skip

    # Partial tiles. One word holds a row's bits for a whole step, because BLOCK_N divides 64.
    WORDS: tl.constexpr = (BLOCK + 63) // 64
    partial = row * partial_columns
    word_of_row = (tile * BLOCK_M % BLOCK + tl.arange(0, BLOCK_M)) * WORDS
    listed = tl.where(is_text, 0, tl.load(partial_count + row))
    for step in tl.range(0, listed * STEPS, num_stages=STAGES):
        block = tl.load(partial_index + partial + step // STEPS)
        slot = tl.load(partial_slot + partial + step // STEPS).to(tl.int64)
        offset = step % STEPS * BLOCK_N
        words = tl.load(bits + slot * (BLOCK * WORDS) + offset // 64 + word_of_row) >> offset % 64
        n = video_start + block * BLOCK + offset
        acc, total, peak = _attend(
            q, keys, values, n, video_end, words, acc, total, peak, scale_log2,
            BLOCK_N, HEAD_SIZE, BLOCK_D, "bits", USE_TMA, PRECISION,
        )  # fmt: skip

    # A ragged last tile and the text, in one loop: each further loop costs the first one registers.
    ragged = tl.where(has_ragged, video_start + (blocks - 1) * BLOCK, video_end)
    ragged_steps = tl.cdiv(video_end - ragged, BLOCK_N)
    for step in tl.range(0, ragged_steps + tl.cdiv(num_text, BLOCK_N), num_stages=STAGES):
        in_text = step >= ragged_steps
        n = tl.where(in_text, text_start - ragged_steps * BLOCK_N, ragged) + step * BLOCK_N
        n_end = tl.where(in_text, text_end, video_end)
        acc, total, peak = _attend(
            q, keys, values, n, n_end, None, acc, total, peak, scale_log2,
            BLOCK_N, HEAD_SIZE, BLOCK_D, "end", USE_TMA, PRECISION,
        )  # fmt: skip

    # Rows that saw no key have total 0: output 0 and log-sum -inf.
    num_rows = (num_video + num_text).to(tl.int64)
    rows = first + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    pointers = ((b64 * num_rows + rows) * num_heads + h)[:, None] * HEAD_SIZE + columns[None, :]
    inside = (rows < end)[:, None] & (columns < HEAD_SIZE)[None, :]
    tl.store(out_ptr + pointers, out.to(out_ptr.dtype.element_ty), mask=inside)
    if WITH_LSE:
        LN2: tl.constexpr = 0.6931471805599453
        lse = (peak + tl.log2(tl.where(total > 0, total, 1.0))) * LN2
        lse = tl.where(total > 0, lse, float("-inf"))
        tl.store(lse_ptr + (b64 * num_heads + h) * num_rows + rows, lse, mask=rows < end)


def why_unavailable(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Say why the kernel cannot run such a call, or return None if it can."""
    if dtype not in DTYPES:
        return f"it computes in float16, bfloat16 and float32, not in {dtype}"
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        return f"it takes head sizes up to {MAX_HEAD_SIZE}, not {head_size}"
    if triton.knobs.runtime.interpret:
        if dtype == torch.bfloat16:
            return "Triton's interpreter multiplies the bit patterns of bfloat16, not the numbers"
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs an NVIDIA GPU, and the tensors are on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, and {device} has {capability}"
    return None


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: TileLists,
    *,
    text_length: int = 0,
    text_first: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    config: KernelConfig | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which video queries see only the video keys on ``lists``, and all text keys.

    Text queries see every key. Nothing is copied or synchronised; inference only.

    Args:
        query: ``[B, N, H, D]`` with ``N = lists.num_tokens + text_length`` and ``D <= 256``;
            float16, bfloat16 or float32 (then with full-precision products); any strides.
        key: like ``query``.
        value: like ``query``.
        lists: the tiles to visit, on the same device.
        text_length: text tokens; their rows come after the video rows.
        text_first: whether the text rows come before the video rows instead.
        scale: positive factor on ``query @ key``; ``D ** -0.5`` when None.
        return_lse: also return the log-sum of exponentials.
        config: tile shape; None takes the one measured for this GPU.

    Returns:
        The output ``[B, N, H, D]`` in the input's dtype, and if asked the natural-log sum of
        exponentials of the scaled scores, float32 ``[B, H, N]``. A query without any allowed key
        gets output 0 and log-sum -inf.

    Raises:
        OperatorUnavailableError: if the kernel cannot run on this device, dtype or head size.
        GridMismatchError: if ``N`` is not ``lists.num_tokens + text_length``.
        OptionError: if tensors and lists do not fit together, or ``scale`` is not positive.
    """
    scale = check_call(query, key, value, lists, text_length, scale)
    out, lse = _block_sparse_op(
        query, key, value, lists.full_count, lists.full_index, lists.partial_count,
        lists.partial_index, lists.partial_slot, lists.bits, lists.block_size, lists.num_tokens,
        text_first, scale, return_lse, None if config is None else list(astuple(config)),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: TileLists,
    text_length: int,
    scale: float | None,
) -> float:
    """Raise unless tensors and lists fit together; return the scale to use."""
    if query.ndim != 4 or query.shape != key.shape or query.shape != value.shape:
        shapes = [tuple(t.shape) for t in (query, key, value)]
        raise OptionError(f"query, key and value must share one shape [B, N, H, D], not {shapes}.")
    devices = {str(t.device) for t in (query, key, value, lists.full_count, lists.bits)}
    if len(devices) > 1 or len({query.dtype, key.dtype, value.dtype}) > 1:
        raise OptionError(
            f"query, key, value and lists must share one device and query, key and value one "
            f"dtype, not {sorted(devices)} and {query.dtype}, {key.dtype}, {value.dtype}."
        )
    check_block_size(lists.block_size)
    batch, num_tokens, heads, _ = query.shape
    if num_tokens != lists.num_tokens + text_length or text_length < 0:
        raise GridMismatchError(
            f"got {num_tokens} tokens, but the lists cover {lists.num_tokens} video tokens and "
            f"{text_length=}; build the lists for this grid or pass the right text length."
        )
    if lists.full_count.shape[0] not in (1, batch) or lists.full_count.shape[1] not in (1, heads):
        raise OptionError(
            f"lists of shape {tuple(lists.full_count.shape)} fit neither batch {batch} and "
            f"{heads} heads nor 1 in their place."
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not (math.isfinite(scale) and scale > 0):
        raise OptionError(f"{scale=} must be positive: the kernel takes row maxima before scaling.")
    return scale


@torch.library.custom_op("dit_accel::block_sparse_attention", mutates_args=())
def _block_sparse_op(
    query: Tensor, key: Tensor, value: Tensor,
    full_count: Tensor, full_index: Tensor,
    partial_count: Tensor, partial_index: Tensor, partial_slot: Tensor, bits: Tensor,
    block_size: int, num_video: int, text_first: bool, scale: float, with_lse: bool,
    config: list[int] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the kernel. A custom operator, so that torch.compile traces past it unbroken."""
    batch, num_tokens, heads, head_size = query.shape
    reason = why_unavailable(query.device, query.dtype, head_size)
    if reason is not None:
        raise OperatorUnavailableError(f"the Triton kernel cannot run this call: {reason}.")
    out = query.new_empty(query.shape)
    lse = empty_lse(query, with_lse)
    block_d = max(16, triton.next_power_of_2(head_size))
    cfg = _resolve_config(query, block_d, block_size, config)
    use_tma = cfg.use_tma and all(fits_copy_engine(t, block_d) for t in (key, value))
    box = [1, cfg.block_n, 1, block_d]
    num_text = num_tokens - num_video
    tiles = triton.cdiv(num_video, cfg.block_m) + triton.cdiv(num_text, cfg.block_m)
    list_batch, list_heads, rows = full_count.shape
    with torch.cuda.device_of(query):
        _block_sparse_forward[(tiles * batch * heads,)](
            query, key, value,
            TensorDescriptor(key, key.shape, key.stride(), box) if use_tma else None,
            TensorDescriptor(value, value.shape, value.stride(), box) if use_tma else None,
            out, lse,
            full_count, full_index, partial_count, partial_index, partial_slot, bits,
            scale * math.log2(math.e), heads, num_video, num_text,
            num_text if text_first else 0, 0 if text_first else num_video,
            list_heads * rows if list_batch > 1 else 0, rows if list_heads > 1 else 0,
            full_index.shape[-1], partial_index.shape[-1],
            *query.stride(), *key.stride(), *value.stride(),
            BLOCK=block_size, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n,
            HEAD_SIZE=head_size, BLOCK_D=block_d, STAGES=cfg.num_stages,
            USE_TMA=use_tma, WITH_LSE=with_lse,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=cfg.num_warps, num_stages=cfg.num_stages,
        )  # fmt: skip
    return out, lse


@_block_sparse_op.register_fake
def _(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    with_lse = bool(rest[-2])
    return query.new_empty(query.shape), empty_lse(query, with_lse)


def empty_lse(query: Tensor, with_lse: bool) -> Tensor:
    """Room for the log-sums ``[B, H, N]``, or for none."""
    batch, num_tokens, heads, _ = query.shape
    shape = (batch, heads, num_tokens) if with_lse else (0,)
    return query.new_empty(shape, dtype=torch.float32)


def _resolve_config(
    query: Tensor,
    block_d: int,
    block_size: int,
    config: list[int] | None,
    usual: Callable[[tuple[int, int], int, int], KernelConfig] = kernel_config,
) -> KernelConfig:
    if config is not None:
        block_m, block_n, num_warps, num_stages, use_tma = config
        chosen = KernelConfig(block_m, block_n, num_warps, num_stages, bool(use_tma))
    else:
        # On the CPU only the interpreter runs the kernel, and any configuration will do.
        capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (8, 0)
        chosen = usual(capability, block_d, query.element_size())
    block_m, block_n = min(chosen.block_m, block_size), min(chosen.block_n, block_size, 64)
    return replace(chosen, block_m=block_m, block_n=block_n)


def fits_copy_engine(tensor: Tensor, block_d: int) -> bool:
    """Whether a TMA descriptor can describe ``tensor``: 16-byte base and strides, unit last one."""
    *strides, last = tensor.stride()
    itemsize = tensor.element_size()
    return (
        last == 1
        and tensor.shape[-1] == block_d
        and tensor.data_ptr() % 16 == 0
        and all(stride * itemsize % 16 == 0 and stride > 0 for stride in strides)
    )
