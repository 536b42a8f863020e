"""Trial loops of the kernel for Hopper, not part of the library; `hopper_variants.py` runs them.

`dit_accel/kernels/block_sparse_hopper.py` with things that it hasn't:

* ``poly``: so many of eight exponentials, at most two, are polynomials on the ordinary units, as
  FlashAttention-4 has them on Blackwell: the units for exponentials are the narrowest;
* ``held``: the group's queries stay in registers, so that the tensor cores read only keys from
  shared memory for the scores: a third less of it;
* ``clock``: counts the cycles of each part of a step.
"""

# Gluon's functions take tensors, barriers and constants under the same names: types say little.
# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon's lists have no starred items)

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dit_accel.kernels.block_sparse_hopper import (
    _COPY_REGISTERS,
    _GROUP_REGISTERS,
    _GROWTH,
    _NO_PEAK,
    _SIZES,
    _advance,
    _copy,
    _descriptor,
    _hide,
    _operand,
    _partial_sum,
    _scores,
    _shrunk_sum,
    _store,
)
from dit_accel.kernels.hopper_assembly import (
    group_barrier,
    packed_by_now,
    pass_turn,
    rescaled,
    summed_by_now,
    wait_turn,
)
from dit_accel.kernels.hopper_steps import ROWS, TILE, mask_words, program_work
from dit_accel.kernels.tiles import TileLists
from dit_accel.kernels.tuning import LONG_LIST

PARTS = ("turn", "scores issued", "output issued", "scores done", "softmax", "output done", "rest")
"""Parts of a step whose cycles ``clock`` counts."""


@dataclass(frozen=True)
class Variant:
    """One trial loop; see the top of this file.

    Attributes:
        poly: exponentials out of eight that are polynomials: 0, 1 or 2.
        eager: as in `HopperConfig`.
        held: whether queries stay in registers.
        clock: whether cycles are counted.
    """

    poly: int = 0
    eager: int = 0
    held: bool = False
    clock: bool = False


def _exponentials(poly: int) -> str:
    """PTX for eight exponentials of base 2, ``poly`` of them on the ordinary units.

    2 ** x is 2 ** n, which goes to the exponent, times 2 ** f, f in [-1/2, 1/2], by a polynomial of
    degree 4 (relative error 3e-6). Below -126 it gives 1e-38.
    """
    chosen = set((1, 6)[:poly])
    lines = ["{.reg .f32 x, t, r; .reg .s32 n, m;"]
    for i in range(8):
        if i not in chosen:
            lines.append(f"ex2.approx.ftz.f32 ${i}, ${8 + i};")
            continue
        lines += [
            f"max.f32 x, ${8 + i}, 0fC2FC0000;",  # -126
            "add.rn.f32 t, x, 0f4B400000;",  # 1.5 * 2 ** 23: the integer part in the low bits
            "sub.rn.f32 r, t, 0f4B400000;",
            "sub.rn.f32 x, x, r;",
            f"fma.rn.f32 r, x, {_hexadecimal(POLYNOMIAL[4])}, {_hexadecimal(POLYNOMIAL[3])};",
            f"fma.rn.f32 r, r, x, {_hexadecimal(POLYNOMIAL[2])};",
            f"fma.rn.f32 r, r, x, {_hexadecimal(POLYNOMIAL[1])};",
            f"fma.rn.f32 r, r, x, {_hexadecimal(POLYNOMIAL[0])};",
            "mov.b32 n, t; mov.b32 m, r; shl.b32 n, n, 23; add.s32 m, m, n;",
            f"mov.b32 ${i}, m;",
        ]
    return "\n".join([*lines, "}"])


def _hexadecimal(value: float) -> str:
    bits = torch.tensor(value, dtype=torch.float32).view(torch.int32).item()
    return f"0f{bits & 0xFFFFFFFF:08X}"


def _fitted() -> tuple[float, ...]:
    """Interpolate 2 ** f at Chebyshev's points, close to the best polynomial."""
    k = torch.arange(5, dtype=torch.float64)
    points = torch.cos((2 * k + 1) * math.pi / 10) / 2
    powers = points[:, None] ** k
    return tuple(torch.linalg.solve(powers, 2**points).tolist())


POLYNOMIAL = _fitted()
"""Of 2 ** f for f in [-1/2, 1/2], lowest degree first."""

_EXP_1 = gl.constexpr(_exponentials(1))
_EXP_2 = gl.constexpr(_exponentials(2))
_EXP_REGISTERS = gl.constexpr(",".join(["=f"] * 8 + ["f"] * 8))


@gluon.jit
def _now(CLOCK: gl.constexpr):
    if CLOCK:
        time = gl.inline_asm_elementwise("mov.u32 $0, %clock;", "=r", [], gl.int32, False, 1)
    else:
        time = 0
    return time


@gluon.jit
def _exp2(x, POLY: gl.constexpr):
    if POLY == 0:
        weights = gl.exp2(x)
    elif POLY == 1:
        weights = gl.inline_asm_elementwise(_EXP_1, _EXP_REGISTERS, [x], gl.float32, True, 8)
    else:
        weights = gl.inline_asm_elementwise(_EXP_2, _EXP_REGISTERS, [x], gl.float32, True, 8)
    return weights


@gluon.jit
def _softmax(s, peak, scale_log2, s_layout: gl.constexpr, POLY: gl.constexpr):
    """As in the library."""
    split = s.reshape([ROWS, TILE // 32, 4, 4, 2])
    top = gl.max(gl.max(gl.max(gl.max(split, 4), 2), 1), 1)
    top = gl.convert_layout(top, gl.SliceLayout(1, s_layout)) * scale_log2
    new_peak = gl.where(top > peak + _GROWTH, top, peak)
    return _exp2(s * scale_log2 - new_peak[:, None], POLY), new_peak, gl.exp2(peak - new_peak)


@gluon.jit
def _step(
    me: gl.constexpr, q, step, state, work, shared, lists, sizes, scale_log2, clocks,
    s_layout: gl.constexpr, o_layout: gl.constexpr, by_word: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, TURNS: gl.constexpr, EAGER: gl.constexpr, POLY: gl.constexpr,
    CLOCK: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Scores of this step, output product of the last one, softmax of this one."""
    k_smem, v_smem, ready, empty = shared[1], shared[2], shared[5], shared[6]
    acc, total, peak, p, stage, phase = state
    t0 = _now(CLOCK)
    if MASK:
        words = mask_words(me, step, work, lists, sizes, by_word)
    if TURNS:
        group_barrier()
        wait_turn(me)
    t1 = _now(CLOCK)
    s = _scores(q, k_smem.index(stage), s_layout, D)
    t2 = _now(CLOCK)
    acc = warpgroup_mma(p, v_smem.index(stage).reshape([TILE, D]), acc, is_async=True)
    if TURNS:
        pass_turn(me)
    t3 = _now(CLOCK)
    s = warpgroup_mma_wait(1, deps=[s])
    t4 = _now(CLOCK)
    if MASK:
        s = _hide(s, words, by_word, s_layout)
    # A polynomial never gives 0, as hidden keys want it.
    weights, peak, shrink = _softmax(s, peak, scale_log2, s_layout, 0 if MASK else POLY)
    total = _shrunk_sum(total, shrink, weights)
    if EAGER > 0:
        total = summed_by_now(total)
    if EAGER > 1:
        new_p = packed_by_now(_operand(weights, v_smem.dtype, o_layout))
    t5 = _now(CLOCK)
    next_stage, next_phase = _advance(stage, phase, STAGES)
    mbarrier.wait(ready.index(next_stage), next_phase)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(empty.index(stage), count=1)
    t6 = _now(CLOCK)
    acc = rescaled(acc, gl.convert_layout(shrink, gl.SliceLayout(1, o_layout)), D)
    p = new_p if EAGER > 1 else _operand(weights, v_smem.dtype, o_layout)
    if CLOCK:
        c0, c1, c2, c3, c4, c5, c6, last = clocks
        clocks = (c0 + t1 - t0, c1 + t2 - t1, c2 + t3 - t2, c3 + t4 - t3, c4 + t5 - t4,
                  c5 + t6 - t5, c6 + t0 - last, t6)  # fmt: skip
    return (acc, total, peak, p, next_stage, next_phase), clocks


@gluon.jit
def _attend(
    me: gl.constexpr, out_ptr, lse_ptr, clock_ptr, shared, lists, sizes, scale_log2,
    D: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, EAGER: gl.constexpr,
    POLY: gl.constexpr, HELD: gl.constexpr, CLOCK: gl.constexpr, PERSISTENT: gl.constexpr,
    WITH_LSE: gl.constexpr,
):  # fmt: skip
    """One group of warps: products and softmax of ``ROWS`` query rows.

    Long, because the state of a step lives in registers, and all steps need all of it.
    """
    q_smem, k_smem, v_smem, q_ready, q_empty, ready, empty = shared
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    no_scores = gl.zeros([ROWS, TILE], gl.float32, s_layout)
    by_word: gl.constexpr = no_scores.reshape([ROWS, TILE // 32, 32]).type.layout
    PER_PASS: gl.constexpr = 2 if EAGER > 1 else 1
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    q_phase = gl.to_tensor(0)
    none = gl.to_tensor(0)
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
        if HELD:
            q = q_smem.index(me).reshape([ROWS, D]).load(gl.DotOperandLayout(0, s_layout, 2))
        else:
            q = q_smem.index(me).reshape([ROWS, D])
        if steps > 0:
            # The first step, with no output product to go with it.
            words = mask_words(me, gl.to_tensor(0), work, lists, sizes, by_word)
            mbarrier.wait(ready.index(stage), phase)
            s = _scores(q, k_smem.index(stage), s_layout, D)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(empty.index(stage), count=1)
            s = _hide(s, words, by_word, s_layout)
            weights, peak, _shrink = _softmax(s, peak, scale_log2, s_layout, 0)
            total += _partial_sum(weights)
            p = _operand(weights, v_smem.dtype, o_layout)
            stage, phase = _advance(stage, phase, STAGES)
            mbarrier.wait(ready.index(stage), phase)

            clocks = (none, none, none, none, none, none, none, _now(CLOCK))
            state = (acc, total, peak, p, stage, phase)
            for step in range(1, masked):
                state, clocks = _step(
                    me, q, step, state, work, shared, lists, sizes, scale_log2, clocks, s_layout,
                    o_layout, by_word, D, STAGES, TURNS, EAGER, POLY, CLOCK, True,
                )  # fmt: skip
            acc, total, peak, p, stage, phase = state
            # Two by two, or LLVM would unpack and pack them in each step of the next loop.
            p = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [p], p.dtype, True, 2)
            state = (acc, total, peak, p, stage, phase)
            rest = steps - gl.maximum(masked, 1)
            for step in range(0, rest % PER_PASS):
                state, clocks = _step(
                    me, q, step, state, work, shared, lists, sizes, scale_log2, clocks, s_layout,
                    o_layout, by_word, D, STAGES, TURNS, EAGER, POLY, CLOCK, False,
                )  # fmt: skip
            for step in range(0, rest // PER_PASS):
                for _half in gl.static_range(PER_PASS):
                    state, clocks = _step(
                        me, q, step, state, work, shared, lists, sizes, scale_log2, clocks,
                        s_layout, o_layout, by_word, D, STAGES, TURNS, EAGER, POLY, CLOCK, False,
                    )  # fmt: skip
            acc, total, peak, p, stage, phase = state

            # The last output product.
            acc = warpgroup_mma(p, v_smem.index(stage).reshape([TILE, D]), acc, is_async=True)
            acc, p = warpgroup_mma_wait(0, deps=[acc, p])
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = _advance(stage, phase, STAGES)
            if CLOCK:
                for part in gl.static_range(7):
                    gl.store(clock_ptr + (program * 2 + me) * 8 + part, clocks[part])
                gl.store(clock_ptr + (program * 2 + me) * 8 + 7, steps - 1)
        if PERSISTENT:
            mbarrier.arrive(q_empty, count=1)
        _store(
            acc, gl.sum(total, 1), peak, me, out_ptr, lse_ptr, work, sizes, D, o_layout, WITH_LSE
        )
    if TURNS and me == 0:
        # Leave no barrier half full.
        wait_turn(me)


@gluon.jit(do_not_specialize=_SIZES)
def _trial_forward(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, clock_ptr,
    full_count, full_index, partial_count, partial_index, partial_slot, bits, scale_log2,
    num_heads, num_video, num_text, video_start, text_start, programs,
    list_sb, list_sh, full_columns, partial_columns,
    D: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, EAGER: gl.constexpr,
    POLY: gl.constexpr, HELD: gl.constexpr, CLOCK: gl.constexpr, PERSISTENT: gl.constexpr,
    WITH_LSE: gl.constexpr,
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
            (_attend, (0, out_ptr, lse_ptr, clock_ptr, shared, lists, sizes, scale_log2, D, STAGES,
                       TURNS, EAGER, POLY, HELD, CLOCK, PERSISTENT, WITH_LSE)),
            (_attend, (1, out_ptr, lse_ptr, clock_ptr, shared, lists, sizes, scale_log2, D, STAGES,
                       TURNS, EAGER, POLY, HELD, CLOCK, PERSISTENT, WITH_LSE)),
            (_copy, ((q_desc, k_desc, v_desc), shared, lists, sizes, STAGES, PERSISTENT)),
        ],
        [4, 1],
        [_GROUP_REGISTERS, _COPY_REGISTERS],
    )  # fmt: skip


def constants(variant: Variant, head_size: int) -> dict[str, object]:
    """The compile-time options of a variant."""
    return {
        "D": head_size,
        "STAGES": 3 if head_size == 128 else 6,
        "TURNS": head_size == 128,
        "EAGER": variant.eager,
        "POLY": variant.poly,
        "HELD": variant.held,
        "CLOCK": variant.clock,
    }


def trial_attention(
    query: Tensor, key: Tensor, value: Tensor, lists: TileLists, variant: Variant,
    text_length: int = 0, clocks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum, as `hopper_block_sparse_attention` gives them; text comes last.

    ``clocks``, int32 ``[programs, 2, 8]``, gets the cycles of each part and the steps of a variant
    that counts them.
    """
    batch, num_tokens, heads, head_size = query.shape
    out = query.new_empty(query.shape)
    lse = query.new_empty(batch, heads, num_tokens, dtype=torch.float32)
    num_video = lists.num_tokens
    tiles = triton.cdiv(num_video, lists.block_size) + triton.cdiv(text_length, lists.block_size)
    programs = tiles * batch * heads
    list_batch, list_heads, rows = lists.full_count.shape
    longest = lists.full_index.shape[-1] + lists.partial_index.shape[-1]
    persistent = longest < LONG_LIST and text_length == 0
    grid = programs
    if clocks is None:
        clocks = torch.empty(programs, 2, 8, dtype=torch.int32, device=query.device)
    if persistent:
        grid = min(programs, torch.cuda.get_device_properties(query.device).multi_processor_count)
    with torch.cuda.device_of(query):
        _trial_forward[(grid,)](
            _descriptor(query, ROWS.value), _descriptor(key, lists.block_size),
            _descriptor(value, lists.block_size), out, lse, clocks,
            lists.full_count, lists.full_index, lists.partial_count, lists.partial_index,
            lists.partial_slot, lists.bits.view(torch.int32),
            head_size**-0.5 * math.log2(math.e), heads, num_video, text_length, 0, num_video,
            programs, list_heads * rows if list_batch > 1 else 0, rows if list_heads > 1 else 0,
            lists.full_index.shape[-1], lists.partial_index.shape[-1],
            **constants(variant, head_size), PERSISTENT=persistent, WITH_LSE=True, num_warps=4,
            maxnreg=168,
        )  # fmt: skip
    return out, lse
