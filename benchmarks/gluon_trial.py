"""Trial of block-sparse attention loops in Gluon on Hopper, beside our Triton kernel and cuDNN.

    python benchmarks/gluon_trial.py                      # every variant, correctness then speed
    python benchmarks/gluon_trial.py --only ws_pp_tree --set STAGES=3 LATE=true
    python benchmarks/gluon_trial.py --list

Each variant runs in a process of its own with a timeout, because a wrong barrier hangs the GPU.
One JSON line per variant: `errors` (relative to float64, beside the plain formula's own in
bfloat16), then `tflops` on attended pairs by case, "tokens/head size/density".

Keys for --set (values in JSON): STAGES 2, 3 or (head size 64) 4; PINGPONG 0 none, 1 by mbarrier, 2
by hardware barrier; LAZY 0 row sums across lanes in each step, 1 once at the end, 2 also maxima and
sums as trees; OVERLAP next scores before this softmax; LATE rescale under the product of the
scores; NAMED buffers released by hardware barriers; PERSISTENT one program per SM; REGS and
PRODUCER_REGS registers of the second consumer and of the loading warp.
"""

# Gluon functions take tensors, barriers and constants under the same names.
# mypy: ignore-errors
# ruff: noqa: E501, RUF005, RUF059

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
import triton
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_NO_PEAK = gl.constexpr(-1e30)
_SIZES = ("num_heads", "num_tokens", "tiles", "programs", "list_sb", "list_sh", "columns")


@gluon.jit
def _place(program, tiles, num_heads, full_count, full_index, list_sb, list_sh, columns):
    """Query tile, batch, head, list pointer and length of one program."""
    tile = program % tiles
    b = program // tiles // num_heads
    h = program // tiles % num_heads
    row = b.to(gl.int64) * list_sb + h.to(gl.int64) * list_sh + tile
    return tile, b, h, full_index + row * columns, gl.load(full_count + row)


@gluon.jit
def _listed(entries, count, step):
    """The list is visited last entry first: only that can be the ragged tile, which needs a mask."""
    return gl.load(entries + count - 1 - step, mask=step < count, other=0)


@gluon.jit
def _key_of_step(entries, count, step, BLOCK: gl.constexpr, BLOCK_N: gl.constexpr):
    STEPS: gl.constexpr = BLOCK // BLOCK_N
    block = _listed(entries, count, step // STEPS)
    return block * BLOCK + (STEPS - 1 - step % STEPS) * BLOCK_N


@gluon.jit
def _bar_arrive(barrier):
    """Two consumers (256 threads) and the loading warp meet at a hardware barrier."""
    gl.inline_asm_elementwise(
        "bar.arrive $1, 288; mov.u32 $0, 0;", "=r,r", [barrier], gl.int32, False, 1
    )


@gluon.jit
def _bar_sync(barrier):
    gl.inline_asm_elementwise(
        "bar.sync $1, 288; mov.u32 $0, 0;", "=r,r", [barrier], gl.int32, False, 1
    )


@gluon.jit
def _release(empty, stage, first_bar: gl.constexpr, NAMED: gl.constexpr):
    """A consumer has read a buffer."""
    if NAMED:
        _bar_arrive(stage + first_bar)
    else:
        mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def _await_release(empty, stage, phase, more, fresh, first_bar: gl.constexpr, NAMED: gl.constexpr):
    """The loading warp waits until a buffer has been read; ``fresh`` ones never were filled."""
    if NAMED:
        if more & (fresh == 0):
            _bar_sync(stage + first_bar)
    else:
        mbarrier.wait(empty.index(stage), phase, pred=more)


@gluon.jit
def _turn(PINGPONG: gl.constexpr, turns, me, phase, THREADS: gl.constexpr):
    """Wait until the other warp group has issued its products."""
    if PINGPONG == 1:
        mbarrier.wait(turns.index(me), phase)
    elif PINGPONG == 2:
        if me == 0:
            gl.inline_asm_elementwise(
                "bar.sync 8, 256; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1
            )
        else:
            gl.inline_asm_elementwise(
                "bar.sync 9, 256; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1
            )


@gluon.jit
def _pass_turn(PINGPONG: gl.constexpr, turns, me):
    if PINGPONG == 1:
        mbarrier.arrive(turns.index(1 - me), count=1)
    elif PINGPONG == 2:
        if me == 0:
            gl.inline_asm_elementwise(
                "bar.arrive 9, 256; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1
            )
        else:
            gl.inline_asm_elementwise(
                "bar.arrive 8, 256; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1
            )


@gluon.jit
def _row_sum(p, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, LAZY: gl.constexpr):
    if LAZY == 2:
        # As a tree, because a chain of 32 additions is a long wait.
        split = p.reshape([ROWS, BLOCK_N // 32, 4, 4, 2])
        return gl.sum(gl.sum(gl.sum(split, 4), 2), 1)
    elif LAZY == 1:
        # Only over what each thread holds; the four lanes of a row are added once at the end.
        split = p.reshape([ROWS, BLOCK_N // 8, 4, 2])
        return gl.sum(gl.sum(split, 3), 1)
    else:
        return gl.sum(p, 1)


@gluon.jit
def _row_max(
    s, peak, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, LAZY: gl.constexpr, s_layout: gl.constexpr
):
    if LAZY == 2:
        split = s.reshape([ROWS, BLOCK_N // 32, 4, 4, 2])
        top = gl.max(gl.max(gl.max(gl.max(split, 4), 2), 1), 1)
        return gl.convert_layout(top, gl.SliceLayout(1, s_layout))
    else:
        return gl.max(s, 1)


@gluon.jit
def _kept(shrink, total, LAZY: gl.constexpr):
    """``shrink`` in the layout of the row sums."""
    if LAZY != 0:
        return gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None]
    else:
        return shrink


@gluon.jit
def _softmax(
    s, peak, scale_log2, first, end,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, MASK: gl.constexpr, LAZY: gl.constexpr,
    s_layout: gl.constexpr,
):  # fmt: skip
    if MASK:
        n = first + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
        s = gl.where((n < end)[None, :], s, float("-inf"))
    new_peak = gl.maximum(peak, _row_max(s, peak, ROWS, BLOCK_N, LAZY, s_layout) * scale_log2)
    p = gl.exp2(s * scale_log2 - new_peak[:, None])
    shrink = gl.exp2(peak - new_peak)
    return p, new_peak, shrink


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, shared, globals_,
    PARTS: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, NAMED: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """The loading warp: tiles of key and value by the lists, into a ring."""
    q_smem, k_smem, v_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, turns = shared
    out_ptr, lse_ptr, full_count, full_index, scale_log2, sizes = globals_
    num_heads, num_tokens, tiles, programs, list_sb, list_sh, columns = sizes
    STEPS: gl.constexpr = BLOCK // BLOCK_N
    k_bytes: gl.constexpr = k_desc.block_type.nbytes
    q_bytes: gl.constexpr = PARTS * q_desc.block_type.nbytes
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    q_phase = gl.to_tensor(1)
    fills = gl.to_tensor(0)
    for program in range(gl.program_id(0), programs, gl.num_programs(0)):
        tile, b, h, entries, count = _place(
            program, tiles, num_heads, full_count, full_index, list_sb, list_sh, columns
        )
        if PERSISTENT and NAMED:
            if program >= gl.num_programs(0):
                _bar_sync(gl.to_tensor(15))
        elif PERSISTENT:
            mbarrier.wait(q_empty, q_phase)
            q_phase ^= 1
        mbarrier.expect(q_ready, q_bytes)
        for part in gl.static_range(PARTS):
            tma.async_copy_global_to_shared(
                q_desc, [b, tile * BLOCK + part * ROWS, h, 0], q_ready, q_smem.index(part)
            )
        # In the order in which they are needed: the next key tile before this value tile.
        steps = count * STEPS
        n = _key_of_step(entries, count, 0, BLOCK, BLOCK_N)
        ahead = _key_of_step(entries, count, 1, BLOCK, BLOCK_N)
        if steps > 0:
            _await_release(k_empty, stage, phase, True, fills < STAGES, 4, NAMED)
            mbarrier.expect(k_ready.index(stage), k_bytes)
            tma.async_copy_global_to_shared(
                k_desc, [b, n, h, 0], k_ready.index(stage), k_smem.index(stage)
            )
        for step in range(0, steps):
            v_stage = stage
            v_phase = phase
            v_n = n
            stage += 1
            wrapped = stage == STAGES
            stage = gl.where(wrapped, 0, stage)
            phase = gl.where(wrapped, phase ^ 1, phase)
            n = ahead
            ahead = _key_of_step(entries, count, step + 2, BLOCK, BLOCK_N)
            more = step + 1 < steps
            fresh_v = fills < STAGES
            fills += 1
            _await_release(k_empty, stage, phase, more, fills < STAGES, 4, NAMED)
            mbarrier.expect(k_ready.index(stage), k_bytes, pred=more)
            tma.async_copy_global_to_shared(
                k_desc, [b, n, h, 0], k_ready.index(stage), k_smem.index(stage), pred=more
            )
            _await_release(v_empty, v_stage, v_phase, True, fresh_v, 10, NAMED)
            mbarrier.expect(v_ready.index(v_stage), k_bytes)
            tma.async_copy_global_to_shared(
                v_desc, [b, v_n, h, 0], v_ready.index(v_stage), v_smem.index(v_stage)
            )
    if NAMED:
        # Leave no barrier half full.
        for i in gl.static_range(STAGES):
            left = (stage + i) % STAGES
            if (fills >= STAGES) | (left < fills):
                _bar_sync(left + 4)
                _bar_sync(left + 10)
        if PERSISTENT:
            _bar_sync(gl.to_tensor(15))


@gluon.jit
def _scores(q, k_tile, s_layout: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr):
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    return warpgroup_mma(q, k_tile.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def _store(
    acc, total, peak, out_ptr, lse_ptr, b, h, first, num_heads, num_tokens,
    ROWS: gl.constexpr, D: gl.constexpr, o_layout: gl.constexpr, dtype: gl.constexpr,
    WITH_LSE: gl.constexpr,
):  # fmt: skip
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    total = gl.convert_layout(total, o_rows)
    peak = gl.convert_layout(peak, o_rows)
    seen = gl.where(total > 0, total, 1.0)
    out = acc * (1.0 / seen)[:, None]
    rows = first + gl.arange(0, ROWS, layout=o_rows)
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    base = (b.to(gl.int64) * num_tokens + rows) * num_heads + h
    pointers = out_ptr + (base * D)[:, None] + cols[None, :]
    gl.store(pointers, out.to(dtype), mask=(rows < num_tokens)[:, None])
    if WITH_LSE:
        lse = (peak + gl.log2(seen)) * 0.6931471805599453
        lse = gl.where(total > 0, lse, float("-inf"))
        where = (b.to(gl.int64) * num_heads + h) * num_tokens + rows
        gl.store(lse_ptr + where, lse, mask=rows < num_tokens)


@gluon.jit
def _consume(
    me: gl.constexpr, shared, globals_,
    ROWS: gl.constexpr, WARPS: gl.constexpr, BLOCK: gl.constexpr, BLOCK_N: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, PINGPONG: gl.constexpr, LAZY: gl.constexpr,
    OVERLAP: gl.constexpr, LATE: gl.constexpr, NAMED: gl.constexpr, PERSISTENT: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    """``ROWS`` query rows: products and softmax."""
    q_smem, k_smem, v_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, turns = shared
    out_ptr, lse_ptr, full_count, full_index, scale_log2, sizes = globals_
    num_heads, num_tokens, tiles, programs, list_sb, list_sh, columns = sizes
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    STEPS: gl.constexpr = BLOCK // BLOCK_N
    dtype: gl.constexpr = v_smem.dtype
    q = q_smem.index(me).reshape([ROWS, D])
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    q_phase = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    if PINGPONG == 2 and me == 1:
        _pass_turn(PINGPONG, turns, me)
    for program in range(gl.program_id(0), programs, gl.num_programs(0)):
        tile, b, h, entries, count = _place(
            program, tiles, num_heads, full_count, full_index, list_sb, list_sh, columns
        )
        acc = gl.zeros([ROWS, D], gl.float32, o_layout)
        peak = gl.full([ROWS], _NO_PEAK, gl.float32, s_rows)
        total = _row_sum(gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout), ROWS, BLOCK_N, LAZY)
        mbarrier.wait(q_ready, q_phase)
        q_phase ^= 1
        steps = count * STEPS
        if steps > 0:
            # The first step, the only one with a mask.
            mbarrier.wait(k_ready.index(stage), phase)
            first = gl.load(entries + count - 1) * BLOCK + (STEPS - 1) * BLOCK_N
            s = _scores(q, k_smem.index(stage).reshape([BLOCK_N, D]), s_layout, ROWS, BLOCK_N)
            s = warpgroup_mma_wait(0, deps=[s])
            _release(k_empty, stage, 4, NAMED)
            p32, peak, shrink = _softmax(
                s, peak, scale_log2, first, num_tokens, ROWS, BLOCK_N, True, LAZY, s_layout
            )
            total += _row_sum(p32, ROWS, BLOCK_N, LAZY)
            p = gl.convert_layout(p32.to(dtype), p_layout)
            lost = gl.convert_layout(shrink, o_rows)
            if OVERLAP:
                next_stage = gl.where(stage + 1 == STAGES, 0, stage + 1)
                next_phase = gl.where(stage + 1 == STAGES, phase ^ 1, phase)
                mbarrier.wait(k_ready.index(next_stage), next_phase, pred=steps > 1)
            for step in range(1, steps):
                v_stage = stage
                v_phase = phase
                stage += 1
                wrapped = stage == STAGES
                stage = gl.where(wrapped, 0, stage)
                phase = gl.where(wrapped, phase ^ 1, phase)
                if not OVERLAP:
                    mbarrier.wait(k_ready.index(stage), phase)
                if PINGPONG != 0:
                    _turn(PINGPONG, turns, me, turn, 256)
                    turn ^= 1
                k_tile = k_smem.index(stage).reshape([BLOCK_N, D])
                v_tile = v_smem.index(v_stage).reshape([BLOCK_N, D])
                if OVERLAP:
                    s = _scores(q, k_tile, s_layout, ROWS, BLOCK_N)
                    mbarrier.wait(v_ready.index(v_stage), v_phase)
                    if LATE:
                        # Under the product of the scores, again held there by a branch.
                        acc = acc * lost[:, None]
                    acc = warpgroup_mma(p, v_tile, acc, is_async=True)
                    if PINGPONG != 0:
                        _pass_turn(PINGPONG, turns, me)
                    s = warpgroup_mma_wait(1, deps=[s])
                    _release(k_empty, stage, 4, NAMED)
                    if NAMED and PERSISTENT:
                        if step + 1 == steps:
                            _bar_arrive(gl.to_tensor(15))
                    elif PERSISTENT:
                        mbarrier.arrive(q_empty, count=1, pred=step + 1 == steps)
                    p32, peak, shrink = _softmax(
                        s, peak, scale_log2, 0, 0, ROWS, BLOCK_N, False, LAZY, s_layout
                    )
                    lost = gl.convert_layout(shrink, o_rows)
                    total = total * _kept(shrink, total, LAZY) + _row_sum(p32, ROWS, BLOCK_N, LAZY)
                    # The wait for the next key tile stands here, because ptxas moves the one for
                    # the product above the exponentials unless a branch is between them.
                    next_stage = gl.where(stage + 1 == STAGES, 0, stage + 1)
                    next_phase = gl.where(stage + 1 == STAGES, phase ^ 1, phase)
                    mbarrier.wait(k_ready.index(next_stage), next_phase, pred=step + 1 < steps)
                    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
                    _release(v_empty, v_stage, 10, NAMED)
                else:
                    mbarrier.wait(v_ready.index(v_stage), v_phase)
                    acc = warpgroup_mma(p, v_tile, acc, is_async=True)
                    s = _scores(q, k_tile, s_layout, ROWS, BLOCK_N)
                    if PINGPONG != 0:
                        _pass_turn(PINGPONG, turns, me)
                    acc, p, s = warpgroup_mma_wait(0, deps=[acc, p, s])
                    _release(v_empty, v_stage, 10, NAMED)
                    _release(k_empty, stage, 4, NAMED)
                    p32, peak, shrink = _softmax(
                        s, peak, scale_log2, 0, 0, ROWS, BLOCK_N, False, LAZY, s_layout
                    )
                    lost = gl.convert_layout(shrink, o_rows)
                    total = total * _kept(shrink, total, LAZY) + _row_sum(p32, ROWS, BLOCK_N, LAZY)
                if not LATE:
                    acc = acc * lost[:, None]
                p = gl.convert_layout(p32.to(dtype), p_layout)
            mbarrier.wait(v_ready.index(stage), phase)
            if LATE:
                # Written otherwise than in the loop: LLVM merges the two and moves them up.
                acc = gl.inline_asm_elementwise(
                    "mul.f32 $0, $1, $2;", "=f,f,f", [acc, lost[:, None]], gl.float32, True, 1
                )
            acc = warpgroup_mma(p, v_smem.index(stage).reshape([BLOCK_N, D]), acc, is_async=True)
            acc, p = warpgroup_mma_wait(0, deps=[acc, p])
            _release(v_empty, stage, 10, NAMED)
            stage += 1
            wrapped = stage == STAGES
            stage = gl.where(wrapped, 0, stage)
            phase = gl.where(wrapped, phase ^ 1, phase)
        # With more steps, overlapped, it was released in the loop: the last scores were there.
        if PERSISTENT and NAMED:
            if (steps <= 1) | (not OVERLAP):
                _bar_arrive(gl.to_tensor(15))
        elif PERSISTENT:
            mbarrier.arrive(q_empty, count=1, pred=(steps <= 1) | (not OVERLAP))
        if LAZY != 0:
            total = gl.sum(total, 1)
        _store(
            acc, total, peak, out_ptr, lse_ptr, b, h, tile * BLOCK + me * ROWS,
            num_heads, num_tokens, ROWS, D, o_layout, dtype, WITH_LSE,
        )  # fmt: skip
    if PINGPONG == 2 and me == 0:
        _turn(PINGPONG, turns, me, turn, 256)


@gluon.jit(do_not_specialize=_SIZES)
def _specialised(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, full_count, full_index, scale_log2,
    num_heads, num_tokens, tiles, programs, list_sb, list_sh, columns,
    BLOCK: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr, PINGPONG: gl.constexpr, LAZY: gl.constexpr, OVERLAP: gl.constexpr,
    LATE: gl.constexpr, NAMED: gl.constexpr, PERSISTENT: gl.constexpr, WITH_LSE: gl.constexpr, REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """One loading warp and either two consumers of 4 warps or one of 8."""
    ROWS: gl.constexpr = BLOCK // PARTS
    WARPS: gl.constexpr = 8 // PARTS
    dtype: gl.constexpr = k_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [PARTS] + q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_empty, count=PARTS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=PARTS)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=PARTS)
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    fence_async_shared()
    if PINGPONG == 1:
        mbarrier.arrive(turns.index(0), count=1)

    shared = (
        q_smem, k_smem, v_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, turns,
    )  # fmt: skip
    sizes = (num_heads, num_tokens, tiles, programs, list_sb, list_sh, columns)
    globals_ = (out_ptr, lse_ptr, full_count, full_index, scale_log2, sizes)
    # The tuples are written out: assigned to a name, their constants would become run-time values.
    if PARTS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, shared, globals_, ROWS, WARPS, BLOCK, BLOCK_N, D, STAGES,
                            PINGPONG, LAZY, OVERLAP, LATE, NAMED,
                            PERSISTENT, WITH_LSE)),
                (_consume, (1, shared, globals_, ROWS, WARPS, BLOCK, BLOCK_N, D, STAGES,
                            PINGPONG, LAZY, OVERLAP, LATE, NAMED,
                            PERSISTENT, WITH_LSE)),
                (_produce, (q_desc, k_desc, v_desc, shared, globals_, PARTS, ROWS, BLOCK,
                            BLOCK_N, STAGES, NAMED, PERSISTENT)),
            ],
            [4, 1],
            [REGS, PRODUCER_REGS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (0, shared, globals_, ROWS, WARPS, BLOCK, BLOCK_N, D, STAGES,
                            PINGPONG, LAZY, OVERLAP, LATE, NAMED,
                            PERSISTENT, WITH_LSE)),
                (_produce, (q_desc, k_desc, v_desc, shared, globals_, PARTS, ROWS, BLOCK,
                            BLOCK_N, STAGES, NAMED, PERSISTENT)),
            ],
            [1],
            [PRODUCER_REGS],
        )  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def _simple(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, full_count, full_index, scale_log2,
    num_heads, num_tokens, tiles, programs, list_sb, list_sh, columns,
    BLOCK: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr, WITH_LSE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """No specialised warps: every program loads its own tiles, one step ahead."""
    ROWS: gl.constexpr = BLOCK
    STEPS: gl.constexpr = BLOCK // BLOCK_N
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = k_desc.dtype
    tile_bytes: gl.constexpr = k_desc.block_type.nbytes
    q_smem = gl.allocate_shared_memory(dtype, q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [1], bar)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(q_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    tile, b, h, entries, count = _place(
        gl.program_id(0), tiles, num_heads, full_count, full_index, list_sb, list_sh, columns
    )
    steps = count * STEPS
    mbarrier.expect(q_ready, q_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, [b, tile * BLOCK, h, 0], q_ready, q_smem)
    for i in gl.static_range(STAGES):
        n = _key_of_step(entries, count, i, BLOCK, BLOCK_N)
        mbarrier.expect(k_ready.index(i), tile_bytes, pred=i < steps)
        tma.async_copy_global_to_shared(
            k_desc, [b, n, h, 0], k_ready.index(i), k_smem.index(i), pred=i < steps
        )
        mbarrier.expect(v_ready.index(i), tile_bytes, pred=i < steps)
        tma.async_copy_global_to_shared(
            v_desc, [b, n, h, 0], v_ready.index(i), v_smem.index(i), pred=i < steps
        )
    acc = gl.zeros([ROWS, D], gl.float32, o_layout)
    peak = gl.full([ROWS], _NO_PEAK, gl.float32, s_rows)
    total = gl.zeros([ROWS], gl.float32, s_rows)
    q = q_smem.reshape([ROWS, D])
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    mbarrier.wait(q_ready, 0)
    for step in range(0, steps):
        k_tile = k_smem.index(stage)
        v_tile = v_smem.index(stage)
        ahead = _key_of_step(entries, count, step + STAGES, BLOCK, BLOCK_N)
        more = step + STAGES < steps
        mbarrier.wait(k_ready.index(stage), phase)
        s = _scores(q, k_tile.reshape([BLOCK_N, D]), s_layout, ROWS, BLOCK_N)
        s = warpgroup_mma_wait(0, deps=[s])
        gl.thread_barrier()
        mbarrier.expect(k_ready.index(stage), tile_bytes, pred=more)
        tma.async_copy_global_to_shared(
            k_desc, [b, ahead, h, 0], k_ready.index(stage), k_tile, pred=more
        )
        n = _key_of_step(entries, count, step, BLOCK, BLOCK_N)
        if step < STEPS:
            keys = n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
            s = gl.where((keys < num_tokens)[None, :], s, float("-inf"))
        p32, peak, shrink = _softmax(s, peak, scale_log2, 0, 0, ROWS, BLOCK_N, False, 0, s_layout)
        total = total * shrink + gl.sum(p32, 1)
        acc = acc * gl.convert_layout(shrink, o_rows)[:, None]
        p = gl.convert_layout(p32.to(dtype), p_layout)
        mbarrier.wait(v_ready.index(stage), phase)
        acc = warpgroup_mma(p, v_tile.reshape([BLOCK_N, D]), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        gl.thread_barrier()
        mbarrier.expect(v_ready.index(stage), tile_bytes, pred=more)
        tma.async_copy_global_to_shared(
            v_desc, [b, ahead, h, 0], v_ready.index(stage), v_tile, pred=more
        )
        stage += 1
        wrapped = stage == STAGES
        stage = gl.where(wrapped, 0, stage)
        phase = gl.where(wrapped, phase ^ 1, phase)
    _store(
        acc, total, peak, out_ptr, lse_ptr, b, h, tile * BLOCK, num_heads, num_tokens,
        ROWS, D, o_layout, dtype, WITH_LSE,
    )  # fmt: skip


SIMPLE = {"kernel": "simple", "BLOCK_N": 64, "STAGES": 2, "WARPS": 4}
WS = {
    "kernel": "ws", "BLOCK_N": 128, "STAGES": 2, "PARTS": 2, "PINGPONG": 0, "LAZY": 1,
    "OVERLAP": True, "LATE": False, "NAMED": False, "PERSISTENT": False, "REGS": 240,
    "PRODUCER_REGS": 24,
}  # fmt: skip
# From simple and safe to ambitious.
VARIANTS = {
    "baseline": {"kernel": "none"},
    "simple": SIMPLE,
    "ws": WS | {"LAZY": 0},
    "ws_tree": WS | {"LAZY": 2},
    "ws_pp_tree": WS | {"LAZY": 2, "PINGPONG": 2},
    "ws_pp_tree_late": WS | {"LAZY": 2, "PINGPONG": 2, "LATE": True},
    "ws_tree_late_named": WS | {"LAZY": 2, "LATE": True, "NAMED": True},
    "ws_pp_tree_late_named": WS | {"LAZY": 2, "PINGPONG": 2, "LATE": True, "NAMED": True},
    "ws_persistent": WS | {"LAZY": 2, "PINGPONG": 2, "LATE": True, "PERSISTENT": True},
    "ws_stages3": WS | {"LAZY": 2, "PINGPONG": 2, "LATE": True, "STAGES": 3},
    "ws_all": WS
    | {"LAZY": 2, "PINGPONG": 2, "LATE": True, "NAMED": True, "PERSISTENT": True, "STAGES": 3},
    "ws_pp_late_named": WS | {"PINGPONG": 2, "LATE": True, "NAMED": True},
    "ws_serial_pp": WS | {"LAZY": 2, "PINGPONG": 2, "OVERLAP": False},
    "ws_pp_mbar": WS | {"PINGPONG": 1},
    "simple8": SIMPLE | {"BLOCK_N": 128, "WARPS": 8},
    "ws8": WS | {"PARTS": 1, "LAZY": 0},
}
BLOCK = 128


def attend(q, k, v, count, index, settings, with_lse=True):
    """Run one variant: ``[B, N, H, D]``, int32 lists ``[B|1, H|1, Q]`` and ``[.., Q, K]``."""
    settings = dict(settings)
    kind = settings.pop("kernel")
    persistent = settings.get("PERSISTENT", False)
    batch, tokens, heads, size = q.shape
    out = torch.empty_like(q)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    tiles = triton.cdiv(tokens, BLOCK)
    programs = tiles * batch * heads
    list_batch, list_heads, rows, columns = index.shape
    block_n = settings["BLOCK_N"]
    if kind == "ws" and block_n != BLOCK:
        raise ValueError("ws masks one step only: BLOCK_N must be 128")
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    q_rows = BLOCK // settings.get("PARTS", 1)
    args = (
        TensorDescriptor.from_tensor(q, [1, q_rows, 1, size], layout),
        TensorDescriptor.from_tensor(k, [1, block_n, 1, size], layout),
        TensorDescriptor.from_tensor(v, [1, block_n, 1, size], layout),
        out, lse, count, index, size**-0.5 * math.log2(math.e), heads, tokens, tiles, programs,
        list_heads * rows if list_batch > 1 else 0, rows if list_heads > 1 else 0, columns,
    )  # fmt: skip
    constants = settings | {"BLOCK": BLOCK, "D": size, "WITH_LSE": with_lse}
    if kind == "simple":
        _simple[(programs,)](*args, **constants, OVERLAP=False, num_warps=settings["WARPS"])
    else:
        sms = torch.cuda.get_device_properties(q.device).multi_processor_count
        grid = min(programs, sms) if persistent else programs
        warps = 8 // settings["PARTS"]
        _specialised[(grid,)](*args, **constants, num_warps=warps, maxnreg=168)
    return out, lse


def random_lists(heads, tokens, density, empty=False):
    """Each query tile of each head visits its own random tiles, ascending."""
    tiles = triton.cdiv(tokens, BLOCK)
    chosen = max(1, round(density * tiles))
    order = torch.rand(1, heads, tiles, tiles, device="cuda").argsort(-1)[..., :chosen]
    index = order.sort(-1).values.int().contiguous()
    count = torch.full((1, heads, tiles), chosen, dtype=torch.int32, device="cuda")
    if empty:
        count[:, :, 1] = 0
        count[:, :, 2] = 1
    return count, index


def listed_mask(count, index, tokens):
    tiles = count.shape[-1]
    valid = torch.arange(index.shape[-1], device="cuda") < count[..., None]
    columns = torch.where(valid, index, tiles).long()
    mask = torch.zeros(*count.shape, tiles + 1, dtype=torch.bool, device="cuda")
    mask = mask.scatter_(-1, columns, True)[..., :tiles]
    mask = mask.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)
    return mask[..., :tokens, :tokens]


def formula(q, k, v, mask):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.double().logsumexp(-1)
    weights = torch.softmax(scores, -1).nan_to_num(0)
    return (weights @ v).transpose(1, 2), lse


def correctness(settings):
    """Relative errors against float64; ``plain`` is the formula in bfloat16."""
    rows = []
    for size, tokens, density in ((128, 384, 1.0), (128, 1480, 0.4), (64, 1480, 0.4)):
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, tokens, 3, size, device="cuda").bfloat16() for _ in range(3))
        count, index = random_lists(3, tokens, density, empty=tokens > 1000)
        mask = listed_mask(count, index, tokens)
        exact, exact_lse = formula(q.double(), k.double(), v.double(), mask)
        plain, _ = formula(q, k, v, mask)
        out, lse = attend(q, k, v, count, index, settings)
        seen = exact_lse.isfinite()
        again, _ = attend(q, k, v, count, index, settings)
        rows.append(
            {
                "head_size": size,
                "tokens": tokens,
                "error": float((out.double() - exact).norm() / exact.norm()),
                "plain": float((plain.double() - exact).norm() / exact.norm()),
                "lse": float((lse[seen].double() - exact_lse[seen]).abs().max()),
                "empty_right": bool((lse[~seen] == float("-inf")).all()),
                "repeats": bool(torch.equal(out, again)),
            }
        )
    right = all(
        r["error"] <= 2 * r["plain"] and r["lse"] < 1e-2 and r["empty_right"] and r["repeats"]
        for r in rows
    )
    return right, rows


def median_ms(run, repeats=5, warmup=2):
    for _ in range(warmup):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in events)[repeats // 2]


def speed(settings, quick):
    """TFLOP/s on attended pairs: this variant, our Triton kernel, cuDNN dense, side by side."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from dit_accel.kernels.block_sparse import block_sparse_attention
    from dit_accel.kernels.tiles import TileLists

    heads = 8
    none = settings["kernel"] == "none"
    for tokens, size in ((75_600, 128), (32_760, 128), (75_600, 64), (32_760, 64)):
        if quick and (tokens, size) != (75_600, 128):
            continue
        q, k, v = (
            torch.randn(1, tokens, heads, size, device="cuda", dtype=torch.bfloat16)
            for _ in range(3)
        )
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]

        def dense(heads_first=heads_first):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(*heads_first)

        dense_rate = 4 * heads * tokens**2 * size / median_ms(dense, 3, 1) / 1e9
        for density in (1.0, 0.25, 0.1):
            torch.manual_seed(1)
            count, index = random_lists(heads, tokens, density)
            tiles = count.shape[-1]
            lengths = (tokens - torch.arange(tiles, device="cuda") * BLOCK).clamp(max=BLOCK)
            pairs = int((lengths[index.long()].sum(-1) * lengths).sum())
            zero = torch.zeros_like(count)
            bits = torch.zeros(1, BLOCK, BLOCK // 64, dtype=torch.int64, device="cuda")
            lists = TileLists(
                count, index, zero, zero[..., None], zero[..., None], bits, BLOCK, tokens
            )

            def ours(lists=lists, q=q, k=k, v=v):
                return block_sparse_attention(q, k, v, lists)

            def variant(count=count, index=index, q=q, k=k, v=v):
                return attend(q, k, v, count, index, settings)[0]

            rates = {"triton": 4 * pairs * size / median_ms(ours) / 1e9, "cudnn": dense_rate}
            if not none:
                rates["this"] = 4 * pairs * size / median_ms(variant) / 1e9
                a, b = variant(), ours()
                rates["differs"] = float((a - b).float().norm() / b.float().norm())
                rates["of_cudnn"] = rates["this"] / dense_rate
                rates["of_triton"] = rates["this"] / rates["triton"]
            case = f"{tokens}/{size}/{density}"
            yield case, {key: round(x, 4 if x < 10 else 1) for key, x in rates.items()}


def run_one(name, settings, quick):
    """In the child process: print one JSON line for each thing that is known."""
    result = {"variant": name, "settings": settings, "gpu": torch.cuda.get_device_name()}
    try:
        if settings["kernel"] != "none":
            result["right"], result["errors"] = correctness(settings)
            print("PART " + json.dumps(result), flush=True)
        result["tflops"] = {}
        for case, rates in speed(settings, quick):
            result["tflops"][case] = rates
            print("PART " + json.dumps(result), flush=True)
    except Exception:
        result["failed"] = traceback.format_exc()[-1500:]
        print("PART " + json.dumps(result), flush=True)


def main():
    """Run the chosen variants, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="changes")
    parser.add_argument("--quick", action="store_true", help="75,600 tokens, head size 128 only")
    parser.add_argument("--timeout", type=float, default=40)
    parser.add_argument("--total", type=float, default=235, help="seconds for everything")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        print(json.dumps(VARIANTS, indent=1))
        return
    if args.child:
        child = json.loads(args.child)
        run_one(child["name"], child["settings"], args.quick)
        return
    changes = {key: json.loads(value) for key, value in (c.split("=") for c in args.changes)}
    started = time.time()
    for name in args.only:
        own = VARIANTS[name]
        settings = own | {key: value for key, value in changes.items() if key in own}
        left = args.total - (time.time() - started)
        if left < 10:
            print(json.dumps({"variant": name, "failed": "no time left"}), flush=True)
            continue
        began = time.time()
        child = json.dumps({"name": name, "settings": settings})
        command = [sys.executable, __file__, "--child", child] + ["--quick"] * args.quick
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        late = False
        try:
            output, errors = process.communicate(timeout=min(args.timeout, left))
        except subprocess.TimeoutExpired:
            late = True
            process.kill()
            output, errors = process.communicate()
        parts = [line[5:] for line in output.splitlines() if line.startswith("PART ")]
        result = json.loads(parts[-1]) if parts else {"variant": name, "settings": settings}
        if late:
            result["failed"] = "timed out"
        elif process.returncode:
            result["failed"] = f"exit {process.returncode}"
        if late or process.returncode or not parts:
            result["stderr"] = errors[-1500:]
        result["seconds"] = round(time.time() - began, 1)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
