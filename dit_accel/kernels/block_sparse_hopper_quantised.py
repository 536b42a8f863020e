"""Block-sparse attention forward in 8 bits for Hopper, in Gluon.

The same result as `block_sparse_quantised.py`, with the jobs and the barriers of
`block_sparse_hopper.py`, which explains them. What differs: tiles are those that `quantise.py` laid
out; weights are rounded to e4m3 where they are, without moving; the groups take no turns; output
products add up in the tensor cores, as in FlashAttention-3. Those have fewer bits than float32 for
8-bit products, which costs under .2 % of the error that 8 bits make (`benchmarks/NOTES.md`).
"""

# Gluon's functions take tensors, barriers and constants under the same names: types say little.
# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon's lists have no starred items)

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.errors import OperatorUnavailableError
from dit_accel.kernels.block_sparse import check_call, empty_lse
from dit_accel.kernels.block_sparse_hopper import (
    _COPY_REGISTERS,
    _GROUP_REGISTERS,
    _NO_PEAK,
    _advance,
    _hide,
    _partial_sum,
    _shrunk_sum,
)
from dit_accel.kernels.hopper_assembly import packed_by_now, rescaled, summed_by_now
from dit_accel.kernels.hopper_steps import ROWS, TILE, key_row, mask_words, program_work
from dit_accel.kernels.precision import why_no_hopper_precision
from dit_accel.kernels.quantise import add_mean_key, quantise
from dit_accel.kernels.tiles import TileLists

# log2(448): weights up to 1 become e4m3 numbers up to the largest. The sum gets the same factor.
_TO_LARGEST = gl.constexpr(8.807354922057604)

_SIZES = (
    "num_heads", "num_video", "num_text", "text_row", "length", "programs",
    "list_sb", "list_sh", "full_columns", "partial_columns", "out_video", "out_text",
)  # fmt: skip


@gluon.jit
def _copy(descriptors, shared, lists, sizes, length, D: gl.constexpr, STAGES: gl.constexpr):
    """The copying warp: queries and a first key tile; then each key tile with a value tile."""
    q_desc, k_desc, v_desc = descriptors
    q_smem, k_smem, v_smem, q_ready, ready, empty = shared
    tile_bytes: gl.constexpr = TILE * D
    work = program_work(gl.program_id(0), lists, sizes)
    b, h, first, steps = work[0], work[1], work[2], work[9]
    head = b * sizes[0] + h
    base = head * length
    mbarrier.expect(q_ready, tile_bytes)
    for me in gl.static_range(2):
        tma.async_copy_global_to_shared(
            q_desc, [base + first + me * ROWS, 0], q_ready, q_smem.index(me)
        )
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    n = key_row(gl.to_tensor(0), work, lists, sizes)
    # The list is read one step ahead: a copy would wait for its entry.
    ahead = key_row(gl.to_tensor(1), work, lists, sizes)
    if steps > 0:
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(ready.index(stage), tile_bytes)
        tma.async_copy_global_to_shared(
            k_desc, [base + n, 0], ready.index(stage), k_smem.index(stage)
        )
        stage, phase = _advance(stage, phase, STAGES)
        for step in range(1, steps + 1):
            v_n = n
            n = ahead
            ahead = key_row(step + 1, work, lists, sizes)
            # After the last step comes its value tile alone.
            more = step < steps
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(ready.index(stage), 2 * tile_bytes, pred=more)
            mbarrier.expect(ready.index(stage), tile_bytes, pred=step == steps)
            tma.async_copy_global_to_shared(
                k_desc, [base + n, 0], ready.index(stage), k_smem.index(stage), pred=more
            )
            tma.async_copy_global_to_shared(
                v_desc, [head * D, v_n], ready.index(stage), v_smem.index(stage)
            )
            stage, phase = _advance(stage, phase, STAGES)


@gluon.jit
def _scores(q, k_tile, s_layout: gl.constexpr):
    kind: gl.constexpr = gl.int32 if k_tile.dtype == gl.int8 else gl.float32
    zero = gl.zeros([ROWS, TILE], kind, s_layout)
    return warpgroup_mma(q, k_tile.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def _weigh(packed, v_tile, acc, o_layout: gl.constexpr):
    """Add what one step gives to the output."""
    p = _as_operand(packed, o_layout)
    return warpgroup_mma(p, v_tile.permute([1, 0]), acc, is_async=True)


@gluon.jit
def _softmax(s, peak, factor):
    """Weights up to 448, the new peak, an integer, and what older weights shrink by."""
    split = s.reshape([ROWS, TILE // 32, 4, 4, 2])
    top = gl.max(gl.max(gl.max(gl.max(split, 4), 2), 1), 1)
    top = gl.convert_layout(top, factor.type.layout)
    new_peak = gl.maximum(peak, gl.ceil(top * factor))
    base = new_peak - _TO_LARGEST
    return gl.exp2(s * factor[:, None] - base[:, None]), new_peak, gl.exp2(peak - new_peak)


@gluon.jit
def _rounded(weights, o_layout: gl.constexpr):
    """Round to e4m3, in the order of `by_lane` of `quantise.py`: no value changes threads.

    int32 ``[ROWS, TILE / 4]``, four weights in each: carried from step to step one by one, they
    would be unpacked and packed.
    """
    split = weights.to(gl.float8e4nv).reshape([ROWS, TILE // 16, 2, 4, 2])
    p = split.permute([0, 1, 3, 2, 4]).reshape([ROWS, TILE])
    p = gl.convert_layout(p, gl.DotOperandLayout(0, o_layout, 4), assert_trivial=True)
    # The four that a thread holds side by side, as one number in each of their places.
    packed = gl.inline_asm_elementwise(
        "mov.b32 $0, $4; mov.b32 $1, $4; mov.b32 $2, $4; mov.b32 $3, $4;", "=r,=r,=r,=r,r",
        [p.reshape([ROWS, TILE // 4, 4])], gl.int32, True, 4,
    )  # fmt: skip
    first, _ = gl.split(packed.reshape([ROWS, TILE // 4, 2, 2]))
    return gl.split(first)[0]


@gluon.jit
def _as_operand(packed, o_layout: gl.constexpr):
    """The weights of `_rounded`, as the product takes them."""
    pairs = gl.join(packed, packed)
    fours = gl.join(pairs, pairs).reshape([ROWS, TILE // 4, 4])
    p = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [fours], gl.float8e4nv, True, 4)
    p = p.reshape([ROWS, TILE])
    return gl.convert_layout(p, gl.DotOperandLayout(0, o_layout, 4), assert_trivial=True)


@gluon.jit
def _step(
    me: gl.constexpr, q, step, state, work, shared, lists, sizes, factors, s_layout: gl.constexpr,
    o_layout: gl.constexpr, by_word: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    EAGER: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Scores of this step, output product of the last one, softmax of this one."""
    k_smem, v_smem, ready, empty = shared[1], shared[2], shared[4], shared[5]
    acc, total, peak, p, stage, phase, scale, ahead = state
    q_factor, key_scale = factors
    if MASK:
        words = mask_words(me, step, work, lists, sizes, by_word)
    s = _scores(q, k_smem.index(stage), s_layout)
    acc = _weigh(p, v_smem.index(stage), acc, o_layout)
    factor = q_factor * scale
    # The scale of the next step by an entry of the list that came a step ago: loading the one
    # needs not wait for loading the other.
    scale = gl.load(key_scale + ahead // TILE)
    ahead = key_row(step + 2, work, lists, sizes)
    s = warpgroup_mma_wait(1, deps=[s]).to(gl.float32)
    if MASK:
        s = _hide(s, words, by_word, s_layout)
    weights, peak, shrink = _softmax(s, peak, factor)
    total = _shrunk_sum(total, shrink, weights)
    if EAGER > 0:
        total = summed_by_now(total)
    if EAGER > 1:
        new_p = packed_by_now(_rounded(weights, o_layout))
    # As in `block_sparse_hopper.py`, this wait keeps the one for the product behind the softmax.
    next_stage, next_phase = _advance(stage, phase, STAGES)
    mbarrier.wait(ready.index(next_stage), next_phase)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(empty.index(stage), count=1)
    acc = rescaled(acc, gl.convert_layout(shrink, gl.SliceLayout(1, o_layout)), D)
    p = new_p if EAGER > 1 else _rounded(weights, o_layout)
    return acc, total, peak, p, next_stage, next_phase, scale, ahead


@gluon.jit
def _store(
    acc, total, peak, me: gl.constexpr, outputs, channels, work, sizes, starts,
    D: gl.constexpr, o_layout: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    """Rows that saw no key have total 0: output 0 and log-sum -inf."""
    out_ptr, lse_ptr = outputs
    v_scale, v_mean = channels
    b, h, first, end, is_text = work[0], work[1], work[2], work[3], work[4]
    num_heads, num_video, num_text, _video, text_row = (
        sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
    )  # fmt: skip
    out_video, out_text = starts
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    total = gl.convert_layout(total, o_rows)
    is_seen = total > 0
    seen = gl.where(is_seen, total, 1.0)
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    channel = (b * num_heads + h) * D + columns
    mean = gl.where(is_seen[:, None], gl.load(v_mean + channel)[None, :], 0.0)
    out = acc * (1.0 / seen)[:, None] * gl.load(v_scale + channel)[None, :] + mean
    rows = first + me * ROWS + gl.arange(0, ROWS, layout=o_rows)
    inside = rows < end
    rows += gl.where(is_text, out_text - text_row, out_video)
    num_rows = (num_video + num_text).to(gl.int64)
    base = (b * num_rows + rows) * num_heads + h
    pointers = out_ptr + (base * D)[:, None] + columns[None, :]
    gl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    if WITH_LSE:
        LN2: gl.constexpr = 0.6931471805599453
        lse = (gl.convert_layout(peak, o_rows) + gl.log2(seen) - _TO_LARGEST) * LN2
        lse = gl.where(is_seen, lse, float("-inf"))
        gl.store(lse_ptr + (b * num_heads + h) * num_rows + rows, lse, mask=inside)


@gluon.jit
def _attend(
    me: gl.constexpr, outputs, channels, factors, shared, lists, sizes, starts, length,
    D: gl.constexpr, STAGES: gl.constexpr, EAGER: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    """One group of warps: products and softmax of ``ROWS`` query rows.

    Long, because the state of a step lives in registers, and all steps need all of it.
    """
    q_smem, k_smem, v_smem, q_ready, ready, empty = shared
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    no_scores = gl.zeros([ROWS, TILE], gl.float32, s_layout)
    by_word: gl.constexpr = no_scores.reshape([ROWS, TILE // 32, 32]).type.layout
    # As in `block_sparse_hopper.py`.
    PER_PASS: gl.constexpr = 2 if EAGER > 1 else 1
    q = q_smem.index(me)
    work = program_work(gl.program_id(0), lists, sizes)
    b, h, first, masked, steps = work[0], work[1], work[2], work[8], work[9]
    head = (b * sizes[0] + h).to(gl.int64)
    q_factor, key_scale = factors
    rows = first + me * ROWS + gl.arange(0, ROWS, layout=s_rows)
    q_factor = gl.load(q_factor + head * length + rows)
    key_scale += head * (length // TILE)
    acc = gl.zeros([ROWS, D], gl.float32, o_layout)
    peak = gl.full([ROWS], _NO_PEAK, gl.float32, s_rows)
    total = _partial_sum(no_scores)
    mbarrier.wait(q_ready, 0)
    if steps > 0:
        # The first step, with no output product to go with it.
        stage = gl.to_tensor(0)
        phase = gl.to_tensor(0)
        words = mask_words(me, gl.to_tensor(0), work, lists, sizes, by_word)
        scale = gl.load(key_scale + key_row(gl.to_tensor(0), work, lists, sizes) // TILE)
        factor = q_factor * scale
        scale = gl.load(key_scale + key_row(gl.to_tensor(1), work, lists, sizes) // TILE)
        ahead = key_row(gl.to_tensor(2), work, lists, sizes)
        mbarrier.wait(ready.index(stage), phase)
        s = _scores(q, k_smem.index(stage), s_layout)
        s = warpgroup_mma_wait(0, deps=[s]).to(gl.float32)
        mbarrier.arrive(empty.index(stage), count=1)
        s = _hide(s, words, by_word, s_layout)
        weights, peak, _shrink = _softmax(s, peak, factor)
        total += _partial_sum(weights)
        p = _rounded(weights, o_layout)
        stage, phase = _advance(stage, phase, STAGES)
        mbarrier.wait(ready.index(stage), phase)

        state = (acc, total, peak, p, stage, phase, scale, ahead)
        for step in range(1, masked):
            state = _step(
                me, q, step, state, work, shared, lists, sizes, (q_factor, key_scale), s_layout,
                o_layout, by_word, D, STAGES, EAGER, True,
            )  # fmt: skip
        start = gl.maximum(masked, 1)
        odd = (steps - start) % PER_PASS
        for step in range(start, start + odd):
            state = _step(
                me, q, step, state, work, shared, lists, sizes, (q_factor, key_scale), s_layout,
                o_layout, by_word, D, STAGES, EAGER, False,
            )  # fmt: skip
        for step in range(start + odd, steps, PER_PASS):
            for half in gl.static_range(PER_PASS):
                state = _step(
                    me, q, step + half, state, work, shared, lists, sizes, (q_factor, key_scale),
                    s_layout, o_layout, by_word, D, STAGES, EAGER, False,
                )  # fmt: skip
        acc, total, peak, p, stage, phase, scale, ahead = state

        # The last output product.
        acc = _weigh(p, v_smem.index(stage), acc, o_layout)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    _store(
        acc, gl.sum(total, 1), peak, me, outputs, channels, work, sizes, starts,
        D, o_layout, WITH_LSE,
    )  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def _hopper_forward(
    q_desc, k_desc, v_desc, q_factor, key_scale, v_scale, v_mean, out_ptr, lse_ptr,
    full_count, full_index, partial_count, partial_index, partial_slot, bits,
    num_heads, num_video, num_text, text_row, length, programs,
    list_sb, list_sh, full_columns, partial_columns, out_video, out_text,
    D: gl.constexpr, STAGES: gl.constexpr, EAGER: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    """Set up the buffers and barriers, and send the warps to their jobs."""
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(
        k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout
    )
    v_smem = gl.allocate_shared_memory(
        v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout
    )
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    mbarrier.init(q_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()

    shared = (q_smem, k_smem, v_smem, q_ready, ready, empty)
    lists = (full_count, full_index, partial_count, partial_index, partial_slot, bits)
    # Rows as `quantise.py` numbers them: the video starts at 0.
    sizes = (num_heads, num_video, num_text, gl.to_tensor(0), text_row, programs,
             list_sb, list_sh, full_columns, partial_columns)  # fmt: skip
    # The tuples are written out: assigned to a name, their constants would become run-time values.
    gl.warp_specialize(
        [
            (_attend, (0, (out_ptr, lse_ptr), (v_scale, v_mean), (q_factor, key_scale), shared,
                       lists, sizes, (out_video, out_text), length, D, STAGES, EAGER, WITH_LSE)),
            (_attend, (1, (out_ptr, lse_ptr), (v_scale, v_mean), (q_factor, key_scale), shared,
                       lists, sizes, (out_video, out_text), length, D, STAGES, EAGER, WITH_LSE)),
            (_copy, ((q_desc, k_desc, v_desc), shared, lists, sizes, length, D, STAGES)),
        ],
        [4, 1],
        [_GROUP_REGISTERS, _COPY_REGISTERS],
    )  # fmt: skip


def hopper_quantised_attention(
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
    stages: int = 4,
    eager: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`quantised_block_sparse_attention`, for fewer calls.

    Args:
        query: as there, with ``D`` 64 or 128; likewise ``key`` and ``value``.
        key: see there.
        value: see there.
        lists: as there, of 128 tokens.
        precision: "fp8" or "int8_fp8".
        text_length: see there.
        text_first: see there.
        scale: see there.
        return_lse: see there.
        stages: buffers for a key and a value tile: 2 to 6, or 12 for head size 64.
        eager: see `HopperConfig`.

    Returns:
        As there.

    Raises:
        OperatorUnavailableError: if the kernel cannot run this call.
        GridMismatchError: as there.
        OptionError: as there.
    """
    scale = check_call(query, key, value, lists, text_length, scale)
    out, lse = _hopper_op(
        query, key, value, lists.full_count, lists.full_index, lists.partial_count,
        lists.partial_index, lists.partial_slot, lists.bits, lists.block_size, lists.num_tokens,
        precision, text_first, scale, stages, eager, return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out


@torch.library.custom_op("dit_accel::quantised_block_sparse_attention_hopper", mutates_args=())
def _hopper_op(
    query: Tensor, key: Tensor, value: Tensor,
    full_count: Tensor, full_index: Tensor,
    partial_count: Tensor, partial_index: Tensor, partial_slot: Tensor, bits: Tensor,
    block_size: int, num_video: int, precision: str, text_first: bool, scale: float, stages: int,
    eager: int, with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the kernels. A custom operator, so that torch.compile traces past it unbroken."""
    batch, num_tokens, heads, head_size = query.shape
    reason = why_no_hopper_precision(precision, query.device, query.dtype, head_size, block_size)
    if reason is not None:
        raise OperatorUnavailableError(f"the Hopper kernel cannot run this call: {reason}.")
    made = quantise(
        query, key, value, precision, num_video=num_video, text_first=text_first,
        key_block=block_size, scale=scale,
    )  # fmt: skip
    out = query.new_empty(query.shape)
    lse = empty_lse(query, with_lse)
    num_text = num_tokens - num_video
    text_row = triton.cdiv(num_video, block_size) * block_size
    programs = (text_row // block_size + triton.cdiv(num_text, block_size)) * batch * heads
    list_batch, list_heads, rows = full_count.shape
    with torch.cuda.device_of(query):
        _hopper_forward[(programs,)](
            descriptor(made.query, ROWS.value), descriptor(made.key, block_size),
            descriptor(made.value, head_size, block_size),
            made.query_factor, made.key_scale, made.value_scale, made.value_mean, out, lse,
            full_count, full_index, partial_count, partial_index, partial_slot,
            bits.view(torch.int32),
            heads, num_video, num_text, text_row, made.query.shape[2], programs,
            list_heads * rows if list_batch > 1 else 0, rows if list_heads > 1 else 0,
            full_index.shape[-1], partial_index.shape[-1],
            num_text if text_first else 0, 0 if text_first else num_video,
            D=head_size, STAGES=stages, EAGER=eager, WITH_LSE=with_lse, num_warps=4, maxnreg=168,
        )  # fmt: skip
    return out, add_mean_key(lse, query, made, scale)


@_hopper_op.register_fake
def _(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    with_lse = bool(rest[-1])
    return query.new_empty(query.shape), empty_lse(query, with_lse)


def descriptor(tensor: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """Let the copy engine read boxes of ``[B, H, rows, columns]`` as of one matrix."""
    matrix = tensor.flatten(0, 2)
    columns = columns or matrix.shape[-1]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=columns, element_bitwidth=8, rank=2)
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)
