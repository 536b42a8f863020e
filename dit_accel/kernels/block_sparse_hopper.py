"""Block-sparse attention forward for Hopper, in Gluon: warps with different jobs.

The same result as `block_sparse.py`, and the same kinds of keys. Gluon is Triton's lower-level
language, in which the order of copies, products and waits is written out (FlashAttention-3, Shah
et al. 2024, is the model). One program owns a tile of 128 queries of one head:

* one warp copies the listed key and value tiles into a ring of buffers in shared memory. A buffer
  holds the key tile of one step and the value tile of the step before, which are needed together;
* two groups of four warps take 64 query rows each. A group issues the scores of its next step
  before the output product of the last one, so that the tensor cores work under its softmax, and
  the two groups may take turns at issuing, so that one's softmax runs under the other's products;
* the output is rescaled only where a row's peak grew by more than 2 ** 8 (as FlashAttention-4 does
  on Blackwell): weights may be up to 256, and their sum and log-sum say the same.

Steps with a mask come first, in a loop of their own; `hopper_steps.py` says which they are.
`hopper_assembly.py` has what Gluon can't say.

Buffers are handed over by mbarriers: ``ready`` by the copy engine, ``empty`` by the two groups.
"""

# Gluon's functions take tensors, barriers and constants under the same names: types say little.
# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon's lists have no starred items)

from __future__ import annotations

import math
from dataclasses import astuple

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
from dit_accel.kernels.backend import why_no_hopper_kernel
from dit_accel.kernels.block_sparse import check_call, empty_lse, fits_copy_engine
from dit_accel.kernels.hopper_assembly import (
    group_barrier,
    packed_by_now,
    pass_turn,
    rescaled,
    summed_by_now,
    wait_turn,
)
from dit_accel.kernels.hopper_steps import ROWS, TILE, key_row, mask_words, program_work
from dit_accel.kernels.tiles import TileLists
from dit_accel.kernels.tuning import HopperConfig, hopper_config

# Stands for "no key seen yet": finite, so that the difference of two peaks is never inf - inf.
_NO_PEAK = gl.constexpr(-1e30)

# Growth of a peak, as a power of 2, from which the output is rescaled. float16 weights have room.
_GROWTH = gl.constexpr(8.0)

# Registers per thread of the second group and of the copying warp, out of 12 warps of at most 168;
# the first group gets what is left, also 240.
_GROUP_REGISTERS = gl.constexpr(240)
_COPY_REGISTERS = gl.constexpr(24)

# Sizes that must not make Gluon compile again whenever they happen to be 1 or divisible by 16.
_SIZES = (
    "num_heads", "num_video", "num_text", "video_start", "text_start", "programs",
    "list_sb", "list_sh", "full_columns", "partial_columns",
)  # fmt: skip


@gluon.jit
def _advance(stage, phase, STAGES: gl.constexpr):
    """The next buffer of the ring; the phase flips when it starts over."""
    wrapped = stage + 1 == STAGES
    return gl.where(wrapped, 0, stage + 1), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _copy(descriptors, shared, lists, sizes, STAGES: gl.constexpr, PERSISTENT: gl.constexpr):
    """The copying warp: queries and a first key tile; then each key tile with a value tile."""
    q_desc, k_desc, v_desc = descriptors
    q_smem, k_smem, v_smem, q_ready, q_empty, ready, empty = shared
    q_bytes: gl.constexpr = 2 * q_desc.block_type.nbytes
    tile_bytes: gl.constexpr = k_desc.block_type.nbytes
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    q_phase = gl.to_tensor(1)
    for program in range(gl.program_id(0), sizes[5], gl.num_programs(0)):
        work = program_work(program, lists, sizes)
        b, h, first, steps = work[0], work[1], work[2], work[9]
        if PERSISTENT:
            mbarrier.wait(q_empty, q_phase)
            q_phase ^= 1
        mbarrier.expect(q_ready, q_bytes)
        for me in gl.static_range(2):
            tma.async_copy_global_to_shared(
                q_desc, [b, first + me * ROWS, h, 0], q_ready, q_smem.index(me)
            )
        n = key_row(gl.to_tensor(0), work, lists, sizes)
        # The list is read one step ahead: a copy would wait for its entry.
        ahead = key_row(gl.to_tensor(1), work, lists, sizes)
        if steps > 0:
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(ready.index(stage), tile_bytes)
            tma.async_copy_global_to_shared(
                k_desc, [b, n, h, 0], ready.index(stage), k_smem.index(stage)
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
                    k_desc, [b, n, h, 0], ready.index(stage), k_smem.index(stage), pred=more
                )
                tma.async_copy_global_to_shared(
                    v_desc, [b, v_n, h, 0], ready.index(stage), v_smem.index(stage)
                )
                stage, phase = _advance(stage, phase, STAGES)


@gluon.jit
def _scores(q, k_tile, s_layout: gl.constexpr, D: gl.constexpr):
    keys = k_tile.reshape([TILE, D]).permute([1, 0])
    zero = gl.zeros([ROWS, TILE], gl.float32, s_layout)
    return warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)


@gluon.jit
def _hide(s, words, by_word: gl.constexpr, s_layout: gl.constexpr):
    """Scores of keys whose bit is 0 become -inf."""
    split = s.reshape([ROWS, TILE // 32, 32])
    bit = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, by_word)))
    # Each bit goes to the sign of its byte, which `prmt` copies to all of a register: two
    # instructions for a score, and none of the few predicates.
    shifted = words[:, :, None] << (7 - bit % 8)[None, None, :]
    byte = (0x8888 + 0x1111 * (bit // 8))[None, None, :]
    split = gl.inline_asm_elementwise(
        "{.reg .b32 m; prmt.b32 m, $2, 0, $3; lop3.b32 $0, $1, m, 0xff800000, 0xe2;}",
        "=f,f,r,r", [split, shifted, byte], gl.float32, True, 1,
    )  # fmt: skip
    return gl.convert_layout(split.reshape([ROWS, TILE]), s_layout)


@gluon.jit
def _partial_sum(p):
    """Row sums over what each thread holds, as a tree: a chain of 32 additions is a long wait.

    ``[ROWS, 4]``: the four lanes of a row are added once, at the end.
    """
    split = p.reshape([ROWS, TILE // 32, 4, 4, 2])
    return gl.sum(gl.sum(gl.sum(split, 4), 2), 1)


@gluon.jit
def _softmax(s, peak, scale_log2, s_layout: gl.constexpr):
    """Weights ``2 ** (score - peak)``, the new peak, and what older weights shrink by."""
    split = s.reshape([ROWS, TILE // 32, 4, 4, 2])
    top = gl.max(gl.max(gl.max(gl.max(split, 4), 2), 1), 1)
    top = gl.convert_layout(top, gl.SliceLayout(1, s_layout)) * scale_log2
    new_peak = gl.where(top > peak + _GROWTH, top, peak)
    return gl.exp2(s * scale_log2 - new_peak[:, None]), new_peak, gl.exp2(peak - new_peak)


@gluon.jit
def _shrunk_sum(total, shrink, weights):
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))
    return total * shrink[:, None] + _partial_sum(weights)


@gluon.jit
def _step(
    me: gl.constexpr, q, step, state, work, shared, lists, sizes, scale_log2,
    s_layout: gl.constexpr, o_layout: gl.constexpr, by_word: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, TURNS: gl.constexpr, EAGER: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Scores of this step, output product of the last one, softmax of this one."""
    k_smem, v_smem, ready, empty = shared[1], shared[2], shared[5], shared[6]
    acc, total, peak, p, stage, phase = state
    if MASK:
        words = mask_words(me, step, work, lists, sizes, by_word)
    if TURNS:
        # Triton wants a barrier of the group before the products: not between turn and products.
        group_barrier()
        wait_turn(me)
    s = _scores(q, k_smem.index(stage), s_layout, D)
    acc = warpgroup_mma(p, v_smem.index(stage).reshape([TILE, D]), acc, is_async=True)
    if TURNS:
        pass_turn(me)
    s = warpgroup_mma_wait(1, deps=[s])
    if MASK:
        s = _hide(s, words, by_word, s_layout)
    weights, peak, shrink = _softmax(s, peak, scale_log2, s_layout)
    total = _shrunk_sum(total, shrink, weights)
    if EAGER > 0:
        total = summed_by_now(total)
    if EAGER > 1:
        new_p = packed_by_now(_operand(weights, v_smem.dtype, o_layout))
    # The wait for the next tiles stands here, because ptxas moves the one for the product above
    # the exponentials unless a branch is between them. After the last step comes a value tile.
    next_stage, next_phase = _advance(stage, phase, STAGES)
    mbarrier.wait(ready.index(next_stage), next_phase)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(empty.index(stage), count=1)
    acc = rescaled(acc, gl.convert_layout(shrink, gl.SliceLayout(1, o_layout)), D)
    p = new_p if EAGER > 1 else _operand(weights, v_smem.dtype, o_layout)
    return acc, total, peak, p, next_stage, next_phase


@gluon.jit
def _operand(weights, dtype: gl.constexpr, o_layout: gl.constexpr):
    """Rounded weights, as the output product takes them."""
    return gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, o_layout, 2))


@gluon.jit
def _store(
    acc, total, peak, me: gl.constexpr, out_ptr, lse_ptr, work, sizes,
    D: gl.constexpr, o_layout: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    """Rows that saw no key have total 0: output 0 and log-sum -inf."""
    b, h, first, end = work[0], work[1], work[2], work[3]
    num_heads, num_video, num_text = sizes[0], sizes[1], sizes[2]
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    total = gl.convert_layout(total, o_rows)
    seen = gl.where(total > 0, total, 1.0)
    rows = first + me * ROWS + gl.arange(0, ROWS, layout=o_rows)
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    num_rows = (num_video + num_text).to(gl.int64)
    base = (b * num_rows + rows) * num_heads + h
    out = (acc * (1.0 / seen)[:, None]).to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + (base * D)[:, None] + columns[None, :], out, mask=(rows < end)[:, None])
    if WITH_LSE:
        LN2: gl.constexpr = 0.6931471805599453
        lse = (gl.convert_layout(peak, o_rows) + gl.log2(seen)) * LN2
        lse = gl.where(total > 0, lse, float("-inf"))
        gl.store(lse_ptr + (b * num_heads + h) * num_rows + rows, lse, mask=rows < end)


@gluon.jit
def _attend(
    me: gl.constexpr, out_ptr, lse_ptr, shared, lists, sizes, scale_log2,
    D: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, EAGER: gl.constexpr,
    PERSISTENT: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    """One group of warps: products and softmax of ``ROWS`` query rows.

    Long, because the state of a step lives in registers, and all steps need all of it.
    """
    q_smem, k_smem, v_smem, q_ready, q_empty, ready, empty = shared
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    no_scores = gl.zeros([ROWS, TILE], gl.float32, s_layout)
    by_word: gl.constexpr = no_scores.reshape([ROWS, TILE // 32, 32]).type.layout
    # Early packing costs a move of each register, unless a pass of the loop has two steps.
    PER_PASS: gl.constexpr = 2 if EAGER > 1 else 1
    q = q_smem.index(me).reshape([ROWS, D])
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    q_phase = gl.to_tensor(0)
    if TURNS and me == 1:
        pass_turn(me)
    for program in range(gl.program_id(0), sizes[5], gl.num_programs(0)):
        work = program_work(program, lists, sizes)
        masked, steps = work[8], work[9]
        acc = gl.zeros([ROWS, D], gl.float32, o_layout)
        peak = gl.full([ROWS], _NO_PEAK, gl.float32, gl.SliceLayout(1, s_layout))
        total = _partial_sum(no_scores)
        mbarrier.wait(q_ready, q_phase)
        q_phase ^= 1
        if steps > 0:
            # The first step, with no output product to go with it.
            words = mask_words(me, gl.to_tensor(0), work, lists, sizes, by_word)
            mbarrier.wait(ready.index(stage), phase)
            s = _scores(q, k_smem.index(stage), s_layout, D)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(empty.index(stage), count=1)
            s = _hide(s, words, by_word, s_layout)
            weights, peak, _shrink = _softmax(s, peak, scale_log2, s_layout)
            total += _partial_sum(weights)
            p = _operand(weights, v_smem.dtype, o_layout)
            stage, phase = _advance(stage, phase, STAGES)
            mbarrier.wait(ready.index(stage), phase)

            state = (acc, total, peak, p, stage, phase)
            for step in range(1, masked):
                state = _step(
                    me, q, step, state, work, shared, lists, sizes, scale_log2, s_layout,
                    o_layout, by_word, D, STAGES, TURNS, EAGER, True,
                )  # fmt: skip
            acc, total, peak, p, stage, phase = state
            # Two by two, or LLVM would unpack and pack them in each step of the next loop.
            p = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [p], p.dtype, True, 2)
            state = (acc, total, peak, p, stage, phase)
            rest = steps - gl.maximum(masked, 1)
            for step in range(0, rest % PER_PASS):
                state = _step(
                    me, q, step, state, work, shared, lists, sizes, scale_log2, s_layout,
                    o_layout, by_word, D, STAGES, TURNS, EAGER, False,
                )  # fmt: skip
            for step in range(0, rest // PER_PASS):
                for _half in gl.static_range(PER_PASS):
                    state = _step(
                        me, q, step, state, work, shared, lists, sizes, scale_log2, s_layout,
                        o_layout, by_word, D, STAGES, TURNS, EAGER, False,
                    )  # fmt: skip
            acc, total, peak, p, stage, phase = state

            # The last output product.
            acc = warpgroup_mma(p, v_smem.index(stage).reshape([TILE, D]), acc, is_async=True)
            acc, p = warpgroup_mma_wait(0, deps=[acc, p])
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = _advance(stage, phase, STAGES)
        if PERSISTENT:
            mbarrier.arrive(q_empty, count=1)
        _store(
            acc, gl.sum(total, 1), peak, me, out_ptr, lse_ptr, work, sizes, D, o_layout, WITH_LSE
        )
    if TURNS and me == 0:
        # Leave no barrier half full.
        wait_turn(me)


@gluon.jit(do_not_specialize=_SIZES)
def _hopper_forward(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr,
    full_count, full_index, partial_count, partial_index, partial_slot, bits, scale_log2,
    num_heads, num_video, num_text, video_start, text_start, programs,
    list_sb, list_sh, full_columns, partial_columns,
    D: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, EAGER: gl.constexpr,
    PERSISTENT: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    """Set up the buffers and barriers, and send the warps to their jobs."""
    dtype: gl.constexpr = k_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()

    shared = (q_smem, k_smem, v_smem, q_ready, q_empty, ready, empty)
    lists = (full_count, full_index, partial_count, partial_index, partial_slot, bits)
    sizes = (num_heads, num_video, num_text, video_start, text_start, programs,
             list_sb, list_sh, full_columns, partial_columns)  # fmt: skip
    # The tuples are written out: assigned to a name, their constants would become run-time values.
    gl.warp_specialize(
        [
            (_attend, (0, out_ptr, lse_ptr, shared, lists, sizes, scale_log2,
                       D, STAGES, TURNS, EAGER, PERSISTENT, WITH_LSE)),
            (_attend, (1, out_ptr, lse_ptr, shared, lists, sizes, scale_log2,
                       D, STAGES, TURNS, EAGER, PERSISTENT, WITH_LSE)),
            (_copy, ((q_desc, k_desc, v_desc), shared, lists, sizes, STAGES, PERSISTENT)),
        ],
        [4, 1],
        [_GROUP_REGISTERS, _COPY_REGISTERS],
    )  # fmt: skip


def hopper_block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: TileLists,
    *,
    text_length: int = 0,
    text_first: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    config: HopperConfig | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which video queries see only the video keys on ``lists``, and all text keys.

    The same as `block_sparse_attention` of `block_sparse.py`, faster and for fewer calls: Hopper,
    head sizes 64 and 128, half precision, tiles of 128 tokens. Nothing is synchronised; a tensor is
    copied only if its strides are beyond the copy engine (no multiples of 16 bytes).

    Args:
        query: ``[B, N, H, D]`` with ``N = lists.num_tokens + text_length`` and ``D`` 64 or 128;
            float16 or bfloat16.
        key: like ``query``.
        value: like ``query``.
        lists: the tiles to visit, on the same device, of 128 tokens.
        text_length: text tokens; their rows come after the video rows.
        text_first: whether the text rows come before the video rows instead.
        scale: positive factor on ``query @ key``; ``D ** -0.5`` when None.
        return_lse: also return the log-sum of exponentials.
        config: None takes what was measured best.

    Returns:
        The output ``[B, N, H, D]`` in the input's dtype, and if asked the natural-log sum of
        exponentials of the scaled scores, float32 ``[B, H, N]``. A query without any allowed key
        gets output 0 and log-sum -inf.

    Raises:
        OperatorUnavailableError: if the kernel cannot run this call.
        GridMismatchError: if ``N`` is not ``lists.num_tokens + text_length``.
        OptionError: if tensors and lists do not fit together, or ``scale`` is not positive.
    """
    scale = check_call(query, key, value, lists, text_length, scale)
    out, lse = _hopper_op(
        query, key, value, lists.full_count, lists.full_index, lists.partial_count,
        lists.partial_index, lists.partial_slot, lists.bits, lists.block_size, lists.num_tokens,
        text_first, scale, return_lse, None if config is None else list(astuple(config)),
    )  # fmt: skip
    return (out, lse) if return_lse else out


@torch.library.custom_op("dit_accel::block_sparse_attention_hopper", mutates_args=())
def _hopper_op(
    query: Tensor, key: Tensor, value: Tensor,
    full_count: Tensor, full_index: Tensor,
    partial_count: Tensor, partial_index: Tensor, partial_slot: Tensor, bits: Tensor,
    block_size: int, num_video: int, text_first: bool, scale: float, with_lse: bool,
    config: list[int] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the kernel. A custom operator, so that torch.compile traces past it unbroken."""
    batch, num_tokens, heads, head_size = query.shape
    reason = why_no_hopper_kernel(query.device, query.dtype, head_size, block_size)
    if reason is not None:
        raise OperatorUnavailableError(f"the Hopper kernel cannot run this call: {reason}.")
    out = query.new_empty(query.shape)
    lse = empty_lse(query, with_lse)
    num_text = num_tokens - num_video
    tiles = triton.cdiv(num_video, block_size) + triton.cdiv(num_text, block_size)
    programs = tiles * batch * heads
    list_batch, list_heads, rows = full_count.shape
    longest = full_index.shape[-1] + partial_index.shape[-1]  # as `TileLists.longest`
    cfg = HopperConfig(*config) if config else hopper_config(head_size, longest, num_text > 0)
    grid = programs
    if cfg.persistent:
        grid = min(programs, torch.cuda.get_device_properties(query.device).multi_processor_count)
    with torch.cuda.device_of(query):
        _hopper_forward[(grid,)](
            _descriptor(query, ROWS.value), _descriptor(key, block_size),
            _descriptor(value, block_size), out, lse, full_count, full_index, partial_count,
            partial_index, partial_slot, bits.view(torch.int32), scale * math.log2(math.e),
            heads, num_video, num_text,
            num_text if text_first else 0, 0 if text_first else num_video, programs,
            list_heads * rows if list_batch > 1 else 0, rows if list_heads > 1 else 0,
            full_index.shape[-1], partial_index.shape[-1],
            D=head_size, STAGES=cfg.stages, TURNS=bool(cfg.turns), EAGER=cfg.eager,
            PERSISTENT=bool(cfg.persistent), WITH_LSE=with_lse, num_warps=4, maxnreg=168,
        )  # fmt: skip
    return out, lse


@_hopper_op.register_fake
def _(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    with_lse = bool(rest[-2])
    return query.new_empty(query.shape), empty_lse(query, with_lse)


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Let the copy engine read ``rows`` rows of one head at a time."""
    head_size = tensor.shape[-1]
    if not fits_copy_engine(tensor, head_size):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor.from_tensor(tensor, [1, rows, 1, head_size], layout)
