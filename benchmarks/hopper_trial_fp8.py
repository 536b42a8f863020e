"""Trial loops of the 8-bit kernel for Hopper, not part of the library; see `hopper_trial.py`.

As `dit_accel/kernels/block_sparse_hopper_quantised.py`, with tiles in pairs, and

* the scale of a key tile is loaded with an entry of the list that came a step before: the load of
  the entry and the load of the scale no longer wait for each other within a step;
* ``direct``: output products add up in the tensor cores, with their few bits, as in
  FlashAttention-3; the output is rescaled where a peak, an integer, grew. Without, each step's
  product is added in float32;
* ``turn``, ``poly``: as in `hopper_trial.py`. Not ``early``: ptxas then serialises the products.
"""

# Gluon's functions take tensors, barriers and constants under the same names: types say little.
# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon's lists have no starred items)

from __future__ import annotations

import torch
import triton
from hopper_trial import _KEEP_SUM, Variant, _exp2, _group_barrier, _now, _rescaled
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
    _advance,
    _hide,
    _partial_sum,
    _pass_turn,
    _shrunk_sum,
    _wait_turn,
)
from dit_accel.kernels.block_sparse_hopper_quantised import (
    _SIZES,
    _TO_LARGEST,
    _as_operand,
    _rounded,
    _scores,
    _store,
    _weigh,
    descriptor,
)
from dit_accel.kernels.hopper_steps import ROWS, TILE, key_row, mask_words, program_work
from dit_accel.kernels.quantise import add_mean_key, quantise
from dit_accel.kernels.tiles import TileLists


@gluon.jit
def _copy(descriptors, shared, lists, sizes, length, D: gl.constexpr, STAGES: gl.constexpr):
    """The copying warp: first key tile; then each further one with the value tile before it."""
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
def _softmax(s, peak, factor, POLY: gl.constexpr):
    """As in the library."""
    split = s.reshape([ROWS, TILE // 32, 4, 4, 2])
    top = gl.max(gl.max(gl.max(gl.max(split, 4), 2), 1), 1)
    top = gl.convert_layout(top, factor.type.layout)
    new_peak = gl.maximum(peak, gl.ceil(top * factor))
    x = s * factor[:, None] - (new_peak - _TO_LARGEST)[:, None]
    return _exp2(x, POLY), new_peak, gl.exp2(peak - new_peak)


@gluon.jit
def _product(
    p, v_tile, acc, o_layout: gl.constexpr, D: gl.constexpr, DIRECT: gl.constexpr,
):  # fmt: skip
    if DIRECT:
        operand = _as_operand(p, o_layout)
        part = warpgroup_mma(operand, v_tile.permute([1, 0]), acc, is_async=True)
    else:
        part = _weigh(_as_operand(p, o_layout), v_tile, o_layout, D)
    return part


@gluon.jit
def _step(
    me: gl.constexpr, q, step, state, work, shared, lists, sizes, factors, clocks,
    s_layout: gl.constexpr, o_layout: gl.constexpr, by_word: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, TURN: gl.constexpr, CLOCK: gl.constexpr,
    POLY: gl.constexpr, DIRECT: gl.constexpr, KEPT: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Scores of this step, output product of the last one, softmax of this one."""
    k_smem, v_smem, ready, empty = shared[1], shared[2], shared[4], shared[5]
    acc, total, peak, p, shrink, stage, phase, scale, ahead = state
    q_factor, key_scale = factors
    t0 = _now(CLOCK)
    if MASK:
        words = mask_words(me, step, work, lists, sizes, by_word)
    if TURN > 0:
        _group_barrier()
        _wait_turn(me)
    t1 = _now(CLOCK)
    s = _scores(q, k_smem.index(stage), s_layout)
    if TURN == 3:
        _pass_turn(me)
    t2 = _now(CLOCK)
    part = _product(p, v_smem.index(stage), acc, o_layout, D, DIRECT)
    if TURN == 1:
        _pass_turn(me)
    t3 = _now(CLOCK)
    factor = q_factor * scale
    scale = gl.load(key_scale + ahead // TILE)
    ahead = key_row(step + 2, work, lists, sizes)
    s = warpgroup_mma_wait(1, deps=[s]).to(gl.float32)
    if TURN == 2:
        _pass_turn(me)
    t4 = _now(CLOCK)
    if MASK:
        s = _hide(s, words, by_word, s_layout)
    # A polynomial never gives 0, as hidden keys want it.
    weights, peak, next_shrink = _softmax(s, peak, factor, 0 if MASK else POLY)
    total = _shrunk_sum(total, next_shrink, weights)
    if KEPT:
        total = gl.inline_asm_elementwise(_KEEP_SUM, "=f,f", [total], gl.float32, False, 1)
    t5 = _now(CLOCK)
    # As in `hopper_trial.py`, this wait keeps the one for the product behind the softmax.
    next_stage, next_phase = _advance(stage, phase, STAGES)
    mbarrier.wait(ready.index(next_stage), next_phase)
    part, p = warpgroup_mma_wait(0, deps=[part, p])
    mbarrier.arrive(empty.index(stage), count=1)
    t6 = _now(CLOCK)
    if DIRECT:
        acc = _rescaled(part, next_shrink, o_layout, D, True)
    else:
        acc = acc * shrink[:, None] + part
    p = _rounded(weights, o_layout)
    shrink = gl.convert_layout(next_shrink, gl.SliceLayout(1, o_layout))
    if CLOCK:
        c0, c1, c2, c3, c4, c5, c6, last = clocks
        clocks = (c0 + t1 - t0, c1 + t2 - t1, c2 + t3 - t2, c3 + t4 - t3, c4 + t5 - t4,
                  c5 + t6 - t5, c6 + t0 - last, t6)  # fmt: skip
    return (acc, total, peak, p, shrink, next_stage, next_phase, scale, ahead), clocks


@gluon.jit
def _attend(
    me: gl.constexpr, outputs, channels, factors, clock_ptr, shared, lists, sizes, starts, length,
    D: gl.constexpr, STAGES: gl.constexpr, TURN: gl.constexpr,
    CLOCK: gl.constexpr, POLY: gl.constexpr, DIRECT: gl.constexpr, KEPT: gl.constexpr,
    WITH_LSE: gl.constexpr,
):  # fmt: skip
    """One group of warps: products and softmax of ``ROWS`` query rows."""
    q_smem, k_smem, v_smem, q_ready, ready, empty = shared
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    no_scores = gl.zeros([ROWS, TILE], gl.float32, s_layout)
    by_word: gl.constexpr = no_scores.reshape([ROWS, TILE // 32, 32]).type.layout
    q = q_smem.index(me)
    if TURN > 0 and me == 1:
        _pass_turn(me)
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
        none = gl.to_tensor(0)
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
        weights, peak, shrink = _softmax(s, peak, factor, 0)
        total += _partial_sum(weights)
        p = _rounded(weights, o_layout)
        shrink = gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))
        stage, phase = _advance(stage, phase, STAGES)
        mbarrier.wait(ready.index(stage), phase)

        clocks = (none, none, none, none, none, none, none, _now(CLOCK))
        state = (acc, total, peak, p, shrink, stage, phase, scale, ahead)
        for step in range(1, masked):
            state, clocks = _step(
                me, q, step, state, work, shared, lists, sizes, (q_factor, key_scale), clocks,
                s_layout, o_layout, by_word, D, STAGES, TURN, CLOCK, POLY, DIRECT, KEPT, True,
            )  # fmt: skip
        for step in range(gl.maximum(masked, 1), steps):
            state, clocks = _step(
                me, q, step, state, work, shared, lists, sizes, (q_factor, key_scale), clocks,
                s_layout, o_layout, by_word, D, STAGES, TURN, CLOCK, POLY, DIRECT, KEPT, False,
            )  # fmt: skip
        acc, total, peak, p, shrink, stage, phase, scale, ahead = state

        # The last output product.
        part = _product(p, v_smem.index(stage), acc, o_layout, D, DIRECT)
        part, p = warpgroup_mma_wait(0, deps=[part, p])
        acc = part if DIRECT else acc * shrink[:, None] + part
        if CLOCK:
            for i in gl.static_range(7):
                gl.store(clock_ptr + (gl.program_id(0) * 2 + me) * 8 + i, clocks[i])
            gl.store(clock_ptr + (gl.program_id(0) * 2 + me) * 8 + 7, steps - 1)
    _store(
        acc, gl.sum(total, 1), peak, me, outputs, channels, work, sizes, starts,
        D, o_layout, WITH_LSE,
    )  # fmt: skip
    if TURN > 0 and me == 0:
        # Leave no barrier half full.
        _wait_turn(me)


@gluon.jit(do_not_specialize=_SIZES)
def _trial_forward(
    q_desc, k_desc, v_desc, q_factor, key_scale, v_scale, v_mean, out_ptr, lse_ptr, clock_ptr,
    full_count, full_index, partial_count, partial_index, partial_slot, bits,
    num_heads, num_video, num_text, text_row, length, programs,
    list_sb, list_sh, full_columns, partial_columns, out_video, out_text,
    D: gl.constexpr, STAGES: gl.constexpr, TURN: gl.constexpr,
    CLOCK: gl.constexpr, POLY: gl.constexpr, DIRECT: gl.constexpr, KEPT: gl.constexpr,
    WITH_LSE: gl.constexpr,
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
            (_attend, (0, (out_ptr, lse_ptr), (v_scale, v_mean), (q_factor, key_scale), clock_ptr,
                       shared, lists, sizes, (out_video, out_text), length, D, STAGES, TURN,
                       CLOCK, POLY, DIRECT, KEPT, WITH_LSE)),
            (_attend, (1, (out_ptr, lse_ptr), (v_scale, v_mean), (q_factor, key_scale), clock_ptr,
                       shared, lists, sizes, (out_video, out_text), length, D, STAGES, TURN,
                       CLOCK, POLY, DIRECT, KEPT, WITH_LSE)),
            (_copy, ((q_desc, k_desc, v_desc), shared, lists, sizes, length, D, STAGES)),
        ],
        [4, 1],
        [_GROUP_REGISTERS, _COPY_REGISTERS],
    )  # fmt: skip


def constants(variant: Variant, head_size: int) -> dict[str, object]:
    """The compile-time options of a variant; the other ones mean nothing here."""
    return {
        "D": head_size,
        "STAGES": variant.stages or 4,
        "TURN": ("none", "issued", "scores", "middle").index(variant.turn),
        "CLOCK": variant.clock,
        "POLY": variant.poly,
        "DIRECT": variant.direct,
        "KEPT": variant.kept,
    }


def trial_quantised(
    query: Tensor, key: Tensor, value: Tensor, lists: TileLists, variant: Variant,
    text_length: int = 0, clocks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum, as `hopper_quantised_attention` gives them in "fp8"; text comes last."""
    batch, num_tokens, heads, head_size = query.shape
    num_video, block = lists.num_tokens, lists.block_size
    scale = head_size**-0.5
    made = quantise(
        query, key, value, "fp8", num_video=num_video, text_first=False, key_block=block,
        scale=scale,
    )  # fmt: skip
    out = query.new_empty(query.shape)
    lse = query.new_empty(batch, heads, num_tokens, dtype=torch.float32)
    text_row = triton.cdiv(num_video, block) * block
    programs = (text_row // block + triton.cdiv(text_length, block)) * batch * heads
    list_batch, list_heads, rows = lists.full_count.shape
    with torch.cuda.device_of(query):
        _trial_forward[(programs,)](
            descriptor(made.query, ROWS.value), descriptor(made.key, block),
            descriptor(made.value, head_size, block),
            made.query_factor, made.key_scale, made.value_scale, made.value_mean, out, lse,
            lse if clocks is None else clocks, lists.full_count, lists.full_index,
            lists.partial_count, lists.partial_index, lists.partial_slot,
            lists.bits.view(torch.int32), heads, num_video, text_length, text_row,
            made.query.shape[2], programs,
            list_heads * rows if list_batch > 1 else 0, rows if list_heads > 1 else 0,
            lists.full_index.shape[-1], lists.partial_index.shape[-1], 0, num_video,
            **constants(variant, head_size), WITH_LSE=True, num_warps=4, maxnreg=168,
        )  # fmt: skip
    return out, add_mean_key(lse, query, made, scale)
