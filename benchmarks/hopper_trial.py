"""Trial loops of the kernel for Hopper, not part of the library; `hopper_variants.py` runs them.

The jobs, lists and masks of `dit_accel/kernels/block_sparse_hopper.py`, with a leaner step:

* the key tile of a step and the value tile of the step before arrive together, under one barrier,
  and are released together: one wait and one release for a step, not two of each;
* the output is rescaled only where a row's peak grew by more than 2 ** 8, by a branch of the warp;
  weights may then be larger than 1, up to 256, and the sum and log-sum say the same as before;
* ``poly``: so many of eight exponentials, at most two, are polynomials on the ordinary units, as
  FlashAttention-4 has them on Blackwell: the units for exponentials are the narrowest;
* ``turn``: when the other group may issue its products: "issued" (once this one's are), "scores"
  (once this one's scores are done, under its output product), "middle" (once this one has issued
  its scores) or "none";
* ``early``: weights are packed before the wait for the output product, two steps to a pass of the
  loop, so that no register has to be moved;
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
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dit_accel.kernels.block_sparse_hopper import (
    _COPY_REGISTERS,
    _GROUP_REGISTERS,
    _NO_PEAK,
    _SIZES,
    _advance,
    _descriptor,
    _hide,
    _partial_sum,
    _pass_turn,
    _scores,
    _shrunk_sum,
    _store,
    _wait_turn,
)
from dit_accel.kernels.hopper_steps import ROWS, TILE, key_row, mask_words, program_work
from dit_accel.kernels.tiles import TileLists
from dit_accel.kernels.tuning import LONG_LIST

PARTS = ("turn", "scores issued", "output issued", "scores done", "softmax", "output done", "rest")
"""Parts of a step whose cycles ``clock`` counts."""

# The same under its names in Triton 3.6 and later.
_group_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# Growth of a peak, as a power of 2, from which the output is rescaled.
_GROWTH = gl.constexpr(8.0)


@dataclass(frozen=True)
class Variant:
    """One trial loop; see the top of this file.

    Attributes:
        stages: buffers for pairs of a key and a value tile; 0 takes as many as fit.
        turn: "issued", "scores", "middle" or "none".
        growth: whether the output is rescaled only where a peak grew much.
        poly: exponentials out of eight that are polynomials: 0, 1 or 2.
        early: whether weights are packed early.
        clock: whether cycles are counted.
        direct: in 8 bits alone: whether the tensor cores add up over steps, in their few bits.
    """

    stages: int = 0
    turn: str = "issued"
    growth: bool = True
    poly: int = 0
    early: bool = False
    clock: bool = False
    direct: bool = False
    kept: bool = False
    held: bool = False


def _rescaling(values: int) -> str:
    """PTX that multiplies an accumulator's registers, unless no row of the warp needs it.

    A thread holds two rows, two values of each in turn. Outputs and inputs are the same registers.
    """
    low, high = f"${2 * values}", f"${2 * values + 2}"
    lines = [
        "{.reg .pred p, q;",
        f"setp.neu.f32 p, {low}, 0f3F800000;",
        f"setp.neu.f32 q, {high}, 0f3F800000;",
        "or.pred p, p, q;",
        "vote.sync.any.pred p, p, 0xffffffff;",
        "@!p bra.uni KEEP;",
    ]
    lines += [f"mul.f32 ${i}, ${i}, {low if i % 4 < 2 else high};" for i in range(values)]
    return "\n".join([*lines, "KEEP: }"])


def _rescaling_constraints(values: int) -> str:
    return ",".join(["=f"] * values + [str(i) for i in range(values)] + ["f"] * values)


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

def _kept_weights() -> str:
    """PTX that reads the signs of 32 pairs of weights, which are never set, and lets them be."""
    lines = ["{.reg .pred p; .reg .b32 x, a; or.b32 x, $0, $1;"]
    lines += [f"lop3.b32 x, x, ${i}, ${i + 1}, 0xfe;" for i in range(2, 32, 2)]
    return "\n".join([*lines, "and.b32 x, x, 0x80008000; setp.ne.u32 p, x, 0; mov.b32 a, 0; @p st.shared.b32 [a], x;}"])


_KEEP_SUM = gl.constexpr(
    "{.reg .pred p; .reg .b32 a; mov.b32 a, 0; setp.lt.f32 p, $1, 0f00000000; @p st.shared.f32 [a], $1; mov.f32 $0, $1;}"
)
_KEEP_WEIGHTS = gl.constexpr(_kept_weights())
_KEEP_WEIGHTS_REGISTERS = gl.constexpr(",".join(["=r"] * 32 + [str(i) for i in range(32)]))
_RESCALE_64 = gl.constexpr(_rescaling(64))
_RESCALE_64_REGISTERS = gl.constexpr(_rescaling_constraints(64))
_RESCALE_32 = gl.constexpr(_rescaling(32))
_RESCALE_32_REGISTERS = gl.constexpr(_rescaling_constraints(32))
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
def _copy(descriptors, shared, lists, sizes, STAGES: gl.constexpr, PERSISTENT: gl.constexpr):
    """The copying warp: first key tile; then each further one with the value tile before it."""
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
def _exp2(x, POLY: gl.constexpr):
    if POLY == 0:
        weights = gl.exp2(x)
    elif POLY == 1:
        weights = gl.inline_asm_elementwise(_EXP_1, _EXP_REGISTERS, [x], gl.float32, True, 8)
    else:
        weights = gl.inline_asm_elementwise(_EXP_2, _EXP_REGISTERS, [x], gl.float32, True, 8)
    return weights


@gluon.jit
def _softmax(
    s, peak, scale_log2, s_layout: gl.constexpr, GROWTH: gl.constexpr, POLY: gl.constexpr,
):  # fmt: skip
    """Weights ``2 ** (score - peak)``, the new peak, and what older weights shrink by."""
    split = s.reshape([ROWS, TILE // 32, 4, 4, 2])
    top = gl.max(gl.max(gl.max(gl.max(split, 4), 2), 1), 1)
    top = gl.convert_layout(top, gl.SliceLayout(1, s_layout)) * scale_log2
    new_peak = gl.where(top > peak + _GROWTH, top, peak) if GROWTH else gl.maximum(peak, top)
    return _exp2(s * scale_log2 - new_peak[:, None], POLY), new_peak, gl.exp2(peak - new_peak)


@gluon.jit
def _rescaled(acc, shrink, o_layout: gl.constexpr, D: gl.constexpr, GROWTH: gl.constexpr):
    factor = gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
    if not GROWTH:
        out = acc * factor
    elif D == 128:
        out = gl.inline_asm_elementwise(
            _RESCALE_64, _RESCALE_64_REGISTERS, [acc, factor], gl.float32, False, 64
        )
    else:
        out = gl.inline_asm_elementwise(
            _RESCALE_32, _RESCALE_32_REGISTERS, [acc, factor], gl.float32, False, 32
        )
    return out


@gluon.jit
def _step(
    me: gl.constexpr, q, step, state, work, shared, lists, sizes, scale_log2, clocks,
    s_layout: gl.constexpr, o_layout: gl.constexpr, by_word: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, TURN: gl.constexpr, GROWTH: gl.constexpr, POLY: gl.constexpr,
    EARLY: gl.constexpr, KEPT: gl.constexpr, CLOCK: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Scores of this step, output product of the last one, softmax of this one."""
    k_smem, v_smem, ready, empty = shared[1], shared[2], shared[5], shared[6]
    acc, total, peak, p, stage, phase = state
    t0 = _now(CLOCK)
    if MASK:
        words = mask_words(me, step, work, lists, sizes, by_word)
    if TURN > 0:
        # Triton wants a barrier of the group before the products: not between turn and products.
        _group_barrier()
        _wait_turn(me)
    t1 = _now(CLOCK)
    s = _scores(q, k_smem.index(stage), s_layout, D)
    if TURN == 3:
        _pass_turn(me)
    t2 = _now(CLOCK)
    acc = warpgroup_mma(p, v_smem.index(stage).reshape([TILE, D]), acc, is_async=True)
    if TURN == 1:
        _pass_turn(me)
    t3 = _now(CLOCK)
    s = warpgroup_mma_wait(1, deps=[s])
    if TURN == 2:
        _pass_turn(me)
    t4 = _now(CLOCK)
    if MASK:
        s = _hide(s, words, by_word, s_layout)
    # A polynomial never gives 0, as hidden keys want it.
    weights, peak, shrink = _softmax(s, peak, scale_log2, s_layout, GROWTH, 0 if MASK else POLY)
    total = _shrunk_sum(total, shrink, weights)
    if KEPT:
        total = gl.inline_asm_elementwise(_KEEP_SUM, "=f,f", [total], gl.float32, False, 1)
    if EARLY:
        new_p = gl.convert_layout(weights.to(v_smem.dtype), gl.DotOperandLayout(0, o_layout, 2))
        if KEPT:
            new_p = gl.inline_asm_elementwise(
                _KEEP_WEIGHTS, _KEEP_WEIGHTS_REGISTERS, [new_p], v_smem.dtype, False, 64
            )
    t5 = _now(CLOCK)
    # The wait for the next pair stands here, because ptxas moves the one for the product above
    # the exponentials unless a branch is between them. After the last step comes a value tile.
    next_stage, next_phase = _advance(stage, phase, STAGES)
    mbarrier.wait(ready.index(next_stage), next_phase)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(empty.index(stage), count=1)
    t6 = _now(CLOCK)
    acc = _rescaled(acc, shrink, o_layout, D, GROWTH)
    if EARLY:
        p = new_p
    else:
        p = gl.convert_layout(weights.to(v_smem.dtype), gl.DotOperandLayout(0, o_layout, 2))
    if CLOCK:
        c0, c1, c2, c3, c4, c5, c6, last = clocks
        clocks = (c0 + t1 - t0, c1 + t2 - t1, c2 + t3 - t2, c3 + t4 - t3, c4 + t5 - t4,
                  c5 + t6 - t5, c6 + t0 - last, t6)  # fmt: skip
    return (acc, total, peak, p, next_stage, next_phase), clocks


@gluon.jit
def _attend(
    me: gl.constexpr, out_ptr, lse_ptr, clock_ptr, shared, lists, sizes, scale_log2,
    D: gl.constexpr, STAGES: gl.constexpr, TURN: gl.constexpr, GROWTH: gl.constexpr,
    POLY: gl.constexpr, EARLY: gl.constexpr, KEPT: gl.constexpr, HELD: gl.constexpr,
    CLOCK: gl.constexpr, PERSISTENT: gl.constexpr,
    WITH_LSE: gl.constexpr,
):  # fmt: skip
    """One group of warps: products and softmax of ``ROWS`` query rows."""
    q_smem, k_smem, v_smem, q_ready, q_empty, ready, empty = shared
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    no_scores = gl.zeros([ROWS, TILE], gl.float32, s_layout)
    by_word: gl.constexpr = no_scores.reshape([ROWS, TILE // 32, 32]).type.layout
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    q_phase = gl.to_tensor(0)
    none = gl.to_tensor(0)
    if TURN > 0 and me == 1:
        _pass_turn(me)
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
            weights, peak, _none = _softmax(s, peak, scale_log2, s_layout, GROWTH, 0)
            total += _partial_sum(weights)
            p = gl.convert_layout(weights.to(v_smem.dtype), gl.DotOperandLayout(0, o_layout, 2))
            stage, phase = _advance(stage, phase, STAGES)
            mbarrier.wait(ready.index(stage), phase)

            clocks = (none, none, none, none, none, none, none, _now(CLOCK))
            state = (acc, total, peak, p, stage, phase)
            for step in range(1, masked):
                state, clocks = _step(
                    me, q, step, state, work, shared, lists, sizes, scale_log2, clocks, s_layout,
                    o_layout, by_word, D, STAGES, TURN, GROWTH, POLY, EARLY, KEPT, CLOCK, True,
                )  # fmt: skip
            acc, total, peak, p, stage, phase = state
            # Two by two, or LLVM would unpack and pack them in each step of the next loop.
            p = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [p], p.dtype, True, 2)
            state = (acc, total, peak, p, stage, phase)
            UNROLL: gl.constexpr = 2 if EARLY else 1
            rest = steps - gl.maximum(masked, 1)
            if EARLY:
                for step in range(0, rest % 2):
                    state, clocks = _step(
                        me, q, step, state, work, shared, lists, sizes, scale_log2, clocks,
                        s_layout, o_layout, by_word, D, STAGES, TURN, GROWTH, POLY, EARLY, KEPT, CLOCK,
                        False,
                    )  # fmt: skip
            for step in range(0, rest // UNROLL):
                for _half in gl.static_range(UNROLL):
                    state, clocks = _step(
                        me, q, step, state, work, shared, lists, sizes, scale_log2, clocks,
                        s_layout, o_layout, by_word, D, STAGES, TURN, GROWTH, POLY, EARLY, KEPT, CLOCK,
                        False,
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
    if TURN > 0 and me == 0:
        # Leave no barrier half full.
        _wait_turn(me)


@gluon.jit(do_not_specialize=_SIZES)
def _trial_forward(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, clock_ptr,
    full_count, full_index, partial_count, partial_index, partial_slot, bits, scale_log2,
    num_heads, num_video, num_text, video_start, text_start, programs,
    list_sb, list_sh, full_columns, partial_columns,
    D: gl.constexpr, STAGES: gl.constexpr, TURN: gl.constexpr, GROWTH: gl.constexpr,
    POLY: gl.constexpr, EARLY: gl.constexpr, KEPT: gl.constexpr, HELD: gl.constexpr,
    CLOCK: gl.constexpr, PERSISTENT: gl.constexpr,
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
                       TURN, GROWTH, POLY, EARLY, KEPT, HELD, CLOCK, PERSISTENT, WITH_LSE)),
            (_attend, (1, out_ptr, lse_ptr, clock_ptr, shared, lists, sizes, scale_log2, D, STAGES,
                       TURN, GROWTH, POLY, EARLY, KEPT, HELD, CLOCK, PERSISTENT, WITH_LSE)),
            (_copy, ((q_desc, k_desc, v_desc), shared, lists, sizes, STAGES, PERSISTENT)),
        ],
        [4, 1],
        [_GROUP_REGISTERS, _COPY_REGISTERS],
    )  # fmt: skip


def constants(variant: Variant, head_size: int) -> dict[str, object]:
    """The compile-time options of a variant."""
    return {
        "D": head_size,
        "STAGES": variant.stages or (3 if head_size == 128 else 6),
        "TURN": ("none", "issued", "scores", "middle").index(variant.turn),
        "GROWTH": variant.growth,
        "POLY": variant.poly,
        "EARLY": variant.early,
        "KEPT": variant.kept,
        "HELD": variant.held,
        "CLOCK": variant.clock,
    }


def trial_attention(
    query: Tensor, key: Tensor, value: Tensor, lists: TileLists, variant: Variant,
    text_length: int = 0, clocks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum, as `hopper_block_sparse_attention` gives them; text comes last.

    ``clocks``, int32 ``[programs, 2, 8]``, gets the cycles of each part and the steps.
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
    if persistent:
        grid = min(programs, torch.cuda.get_device_properties(query.device).multi_processor_count)
    with torch.cuda.device_of(query):
        _trial_forward[(grid,)](
            _descriptor(query, ROWS.value), _descriptor(key, lists.block_size),
            _descriptor(value, lists.block_size), out, lse, lse if clocks is None else clocks,
            lists.full_count, lists.full_index, lists.partial_count, lists.partial_index,
            lists.partial_slot, lists.bits.view(torch.int32),
            head_size**-0.5 * math.log2(math.e), heads, num_video, text_length, 0, num_video,
            programs, list_heads * rows if list_batch > 1 else 0, rows if list_heads > 1 else 0,
            lists.full_index.shape[-1], lists.partial_index.shape[-1],
            **constants(variant, head_size), PERSISTENT=persistent, WITH_LSE=True, num_warps=4,
            maxnreg=168,
        )  # fmt: skip
    return out, lse
