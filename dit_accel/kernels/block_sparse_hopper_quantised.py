"""Block-sparse attention forward in 8 bits for Hopper, in Gluon.

The same result as `block_sparse_quantised.py`, with the jobs and the barriers of
`block_sparse_hopper.py`, which explains them. What differs: tiles are those that `quantise.py` laid
out; weights are rounded to e4m3 where they are, without moving; the groups take no turns; output
products add up in the tensor cores, as in FlashAttention-3. Those have fewer bits than float32 for
8-bit products, which costs under .2 % of the error that 8 bits make (`benchmarks/NOTES.md`).

`hopper_quantised_loop.py` has the loop.
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
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.errors import OperatorUnavailableError, OptionError
from dit_accel.kernels.block_sparse import check_call, empty_lse
from dit_accel.kernels.block_sparse_hopper import _COPY_REGISTERS, _GROUP_REGISTERS, _advance
from dit_accel.kernels.hopper_quantised_loop import TO_LARGEST, attend_tile
from dit_accel.kernels.hopper_steps import ROWS, TILE, key_row, program_work
from dit_accel.kernels.precision import why_no_hopper_precision
from dit_accel.kernels.quantise import add_mean_key, quantise
from dit_accel.kernels.tiles import TileLists

_SIZES = (
    "num_heads", "num_video", "num_text", "text_row", "length", "programs",
    "list_sb", "list_sh", "full_columns", "partial_columns", "out_video", "out_text",
)  # fmt: skip


@gluon.jit
def _copy(
    descriptors, shared, lists, sizes, length, D: gl.constexpr, STAGES: gl.constexpr,
    PERSISTENT: gl.constexpr,
):  # fmt: skip
    """The copying warp. A persistent program's runs ahead of the groups by up to a tile: queries
    have two places.
    """
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    q_stage = gl.to_tensor(0)
    q_phase = gl.to_tensor(1)
    if PERSISTENT:
        for program in range(gl.program_id(0), sizes[5], gl.num_programs(0)):
            mbarrier.wait(shared[6].index(q_stage), q_phase)
            stage, phase = _copy_tiles(
                program, descriptors, shared, lists, sizes, length, q_stage, stage, phase, D, STAGES
            )
            q_stage, q_phase = _advance(q_stage, q_phase, 2)
    else:
        _copy_tiles(
            gl.program_id(0), descriptors, shared, lists, sizes, length, 0, stage, phase, D, STAGES
        )


@gluon.jit
def _copy_tiles(
    program, descriptors, shared, lists, sizes, length, q_stage, stage, phase,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Queries and a first key tile; then each key tile with a value tile."""
    q_desc, k_desc, v_desc = descriptors
    q_smem, k_smem, v_smem, q_ready, ready, empty = shared[:6]
    tile_bytes: gl.constexpr = TILE * D
    work = program_work(program, lists, sizes)
    b, h, first, steps = work[0], work[1], work[2], work[9]
    head = b * sizes[0] + h
    base = head * length
    mbarrier.expect(q_ready.index(q_stage), tile_bytes)
    for me in gl.static_range(2):
        tma.async_copy_global_to_shared(
            q_desc, [base + first + me * ROWS, 0], q_ready.index(q_stage),
            q_smem.index(2 * q_stage + me),
        )  # fmt: skip
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
    return stage, phase


@gluon.jit
def _store(
    state, me: gl.constexpr, outputs, channels, work, sizes, starts, D: gl.constexpr,
    WITH_LSE: gl.constexpr,
):  # fmt: skip
    """Rows that saw no key have total 0: output 0 and log-sum -inf."""
    acc, total, peak = state
    out_ptr, lse_ptr = outputs
    v_scale, v_mean = channels
    b, h, first, end, is_text = work[0], work[1], work[2], work[3], work[4]
    num_heads, num_video, num_text, _video, text_row = (
        sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
    )  # fmt: skip
    out_video, out_text = starts
    o_layout: gl.constexpr = acc.type.layout
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    total = gl.convert_layout(gl.sum(total, 1), o_rows)
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
        lse = (gl.convert_layout(peak, o_rows) + gl.log2(seen) - TO_LARGEST) * LN2
        lse = gl.where(is_seen, lse, float("-inf"))
        gl.store(lse_ptr + (b * num_heads + h) * num_rows + rows, lse, mask=inside)


@gluon.jit
def _attend(
    me: gl.constexpr, outputs, channels, factors, shared, lists, sizes, starts, length,
    D: gl.constexpr, STAGES: gl.constexpr, EAGER: gl.constexpr, DEEP: gl.constexpr,
    PERSISTENT: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    """One group of warps: products and softmax of ``ROWS`` query rows of each tile."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 32])
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    q_stage = gl.to_tensor(0)
    q_phase = gl.to_tensor(0)
    work = program_work(gl.program_id(0), lists, sizes)
    q_factor = _row_factors(me, work, sizes, factors, length, s_layout)
    if PERSISTENT:
        for program in range(gl.program_id(0), sizes[5], gl.num_programs(0)):
            state, stage, phase = attend_tile(
                me, q_stage, q_phase, stage, phase, work, q_factor, factors, shared, lists, sizes,
                length, s_layout, D, STAGES, EAGER, DEEP, True,
            )  # fmt: skip
            # What the next tile needs is loaded before this one is stored.
            following = gl.minimum(program + gl.num_programs(0), sizes[5] - 1)
            next_work = program_work(following, lists, sizes)
            q_factor = _row_factors(me, next_work, sizes, factors, length, s_layout)
            _store(state, me, outputs, channels, work, sizes, starts, D, WITH_LSE)
            work = next_work
            q_stage, q_phase = _advance(q_stage, q_phase, 2)
    else:
        state, stage, phase = attend_tile(
            me, 0, 0, stage, phase, work, q_factor, factors, shared, lists, sizes,
            length, s_layout, D, STAGES, EAGER, DEEP, False,
        )  # fmt: skip
        _store(state, me, outputs, channels, work, sizes, starts, D, WITH_LSE)


@gluon.jit
def _row_factors(me: gl.constexpr, work, sizes, factors, length, s_layout: gl.constexpr):
    b, h, first = work[0], work[1], work[2]
    head = (b * sizes[0] + h).to(gl.int64)
    rows = first + me * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    return gl.load(factors[0] + head * length + rows)


@gluon.jit(do_not_specialize=_SIZES)
def _hopper_forward(
    q_desc, k_desc, v_desc, q_factor, key_scale, v_scale, v_mean, out_ptr, lse_ptr,
    full_count, full_index, partial_count, partial_index, partial_slot, bits,
    num_heads, num_video, num_text, text_row, length, programs,
    list_sb, list_sh, full_columns, partial_columns, out_video, out_text,
    D: gl.constexpr, STAGES: gl.constexpr, EAGER: gl.constexpr, DEEP: gl.constexpr,
    PERSISTENT: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    """Set up the buffers and barriers, and send the warps to their jobs."""
    Q_STAGES: gl.constexpr = 2 if PERSISTENT else 1
    q_smem = gl.allocate_shared_memory(
        q_desc.dtype, [2 * Q_STAGES] + q_desc.block_type.shape, q_desc.layout
    )
    k_smem = gl.allocate_shared_memory(
        k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout
    )
    v_smem = gl.allocate_shared_memory(
        v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout
    )
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], barrier)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        if PERSISTENT:
            mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()

    shared = (q_smem, k_smem, v_smem, q_ready, ready, empty, q_empty)
    lists = (full_count, full_index, partial_count, partial_index, partial_slot, bits)
    # Rows as `quantise.py` numbers them: the video starts at 0.
    sizes = (num_heads, num_video, num_text, gl.to_tensor(0), text_row, programs,
             list_sb, list_sh, full_columns, partial_columns)  # fmt: skip
    # The tuples are written out: assigned to a name, their constants would become run-time values.
    gl.warp_specialize(
        [
            (_attend, (0, (out_ptr, lse_ptr), (v_scale, v_mean), (q_factor, key_scale), shared,
                       lists, sizes, (out_video, out_text), length, D, STAGES, EAGER, DEEP,
                       PERSISTENT, WITH_LSE)),
            (_attend, (1, (out_ptr, lse_ptr), (v_scale, v_mean), (q_factor, key_scale), shared,
                       lists, sizes, (out_video, out_text), length, D, STAGES, EAGER, DEEP,
                       PERSISTENT, WITH_LSE)),
            (_copy, ((q_desc, k_desc, v_desc), shared, lists, sizes, length, D, STAGES,
                     PERSISTENT)),
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
    deep: bool = False,
    persistent: bool = False,
    lean: bool = False,
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
        deep: whether both products run under the softmax (`hopper_quantised_loop.py`), which makes
            ``eager`` mean nothing and wants 3 stages at least.
        persistent: see there.
        lean: see `quantise`.

    Returns:
        As there.

    Raises:
        OperatorUnavailableError: if the kernel cannot run this call.
        GridMismatchError: as there.
        OptionError: as there, and for a deep loop with 2 stages.
    """
    if deep and stages < 3:
        raise OptionError(f"stages={stages} is too few with deep=True: take 3 to 6.")
    scale = check_call(query, key, value, lists, text_length, scale)
    out, lse = _hopper_op(
        query, key, value, lists.full_count, lists.full_index, lists.partial_count,
        lists.partial_index, lists.partial_slot, lists.bits, lists.block_size, lists.num_tokens,
        precision, text_first, scale, stages, eager, deep, persistent,
        lean, return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out


@torch.library.custom_op("dit_accel::quantised_block_sparse_attention_hopper", mutates_args=())
def _hopper_op(
    query: Tensor, key: Tensor, value: Tensor,
    full_count: Tensor, full_index: Tensor,
    partial_count: Tensor, partial_index: Tensor, partial_slot: Tensor, bits: Tensor,
    block_size: int, num_video: int, precision: str, text_first: bool, scale: float, stages: int,
    eager: int, deep: bool, persistent: bool, lean: bool, with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the kernels. A custom operator, so that torch.compile traces past it unbroken."""
    batch, num_tokens, heads, head_size = query.shape
    reason = why_no_hopper_precision(precision, query.device, query.dtype, head_size, block_size)
    if reason is not None:
        raise OperatorUnavailableError(f"the Hopper kernel cannot run this call: {reason}.")
    made = quantise(
        query, key, value, precision, num_video=num_video, text_first=text_first,
        key_block=block_size, scale=scale, lean=lean,
    )  # fmt: skip
    out = query.new_empty(query.shape)
    lse = empty_lse(query, with_lse)
    num_text = num_tokens - num_video
    text_row = triton.cdiv(num_video, block_size) * block_size
    programs = (text_row // block_size + triton.cdiv(num_text, block_size)) * batch * heads
    grid = programs
    if persistent:
        grid = min(programs, torch.cuda.get_device_properties(query.device).multi_processor_count)
    list_batch, list_heads, rows = full_count.shape
    with torch.cuda.device_of(query):
        _hopper_forward[(grid,)](
            descriptor(made.query, ROWS.value), descriptor(made.key, block_size),
            descriptor(made.value, head_size, block_size),
            made.query_factor, made.key_scale, made.value_scale, made.value_mean, out, lse,
            full_count, full_index, partial_count, partial_index, partial_slot,
            bits.view(torch.int32),
            heads, num_video, num_text, text_row, made.query.shape[2], programs,
            list_heads * rows if list_batch > 1 else 0, rows if list_heads > 1 else 0,
            full_index.shape[-1], partial_index.shape[-1],
            num_text if text_first else 0, 0 if text_first else num_video,
            D=head_size, STAGES=stages, EAGER=eager, DEEP=deep, PERSISTENT=persistent,
            WITH_LSE=with_lse, num_warps=4, maxnreg=168,
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
