"""The loop of the 8-bit kernel for Hopper: what a group of warps does with one query tile.

There are two. In the first a step issues its scores and the output product of the last step, waits
for the scores, and has the product under its softmax. In the deep one a step issues the scores of
the next step, whose place is not the one it reads, so that both products run under its softmax.
"""

# Gluon's functions take tensors, barriers and constants under the same names: types say little.
# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dit_accel.kernels.block_sparse_hopper import (
    _NO_PEAK,
    _advance,
    _hide,
    _partial_sum,
    _shrunk_sum,
)
from dit_accel.kernels.hopper_assembly import packed_by_now, rescaled, summed_by_now
from dit_accel.kernels.hopper_steps import ROWS, TILE, key_row, mask_words, unmasked_row

# log2(448): weights up to 1 become e4m3 numbers up to the largest. The sum gets the same factor.
TO_LARGEST = gl.constexpr(8.807354922057604)


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
def _new_peak(s, peak, factor):
    split = s.reshape([ROWS, TILE // 32, 4, 4, 2])
    top = gl.max(gl.max(gl.max(gl.max(split, 4), 2), 1), 1)
    top = gl.convert_layout(top, factor.type.layout)
    return gl.maximum(peak, gl.ceil(top * factor))


@gluon.jit
def _weights(s, peak, factor):
    base = peak - TO_LARGEST
    return gl.exp2(s * factor[:, None] - base[:, None])


@gluon.jit
def _softmax(s, peak, factor):
    """Weights up to 448, the new peak, an integer, and what older weights shrink by."""
    new_peak = _new_peak(s, peak, factor)
    return _weights(s, new_peak, factor), new_peak, gl.exp2(peak - new_peak)


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
def _deep_step(
    me: gl.constexpr, q, step, state, work, shared, lists, sizes, factors, s_layout: gl.constexpr,
    o_layout: gl.constexpr, by_word: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    MASK: gl.constexpr,
):  # fmt: skip
    """Output product of the last step and scores of the next one; softmax of this one.

    ``before`` is the buffer of the last step's values, ``stage`` that of the next step's keys.
    """
    k_smem, v_smem, ready, empty = shared[1], shared[2], shared[4], shared[5]
    s, acc, total, peak, p, before, stage, phase, scale, ahead = state
    q_factor, key_scale = factors
    if MASK:
        words = mask_words(me, step, work, lists, sizes, by_word)
    acc = _weigh(p, v_smem.index(before), acc, o_layout)
    # The last step has no next one: its product is of old keys, and nobody reads it.
    next_s = _scores(q, k_smem.index(stage), s_layout)
    factor = q_factor * scale
    scale = gl.load(key_scale + ahead // TILE)
    if MASK:
        ahead = key_row(step + 2, work, lists, sizes)
    else:
        ahead = unmasked_row(step + 2, work, lists, sizes)
    s = s.to(gl.float32)
    if MASK:
        s = _hide(s, words, by_word, s_layout)
    old_peak = peak
    peak = _new_peak(s, peak, factor)
    shrink = gl.exp2(old_peak - peak)
    if not MASK:
        # The maxima stay before the next wait: the mark needs them, and this wait for a buffer that
        # is full already is the branch over which ptxas moves no other.
        shrink = summed_by_now(shrink)
        mbarrier.wait(ready.index(stage), phase)
    # The product has run under the maxima; ptxas has too few registers while its weights live.
    acc, p = warpgroup_mma_wait(1, deps=[acc, p])
    weights = _weights(s, peak, factor)
    total = _shrunk_sum(total, shrink, weights)
    if not MASK:
        total = summed_by_now(total)
    next_stage, next_phase = _await_next(step, work, ready, stage, phase, STAGES)
    next_s, acc, p = warpgroup_mma_wait(0, deps=[next_s, acc, p])
    mbarrier.arrive(empty.index(before), count=1)
    acc = rescaled(acc, gl.convert_layout(shrink, gl.SliceLayout(1, o_layout)), D)
    p = _rounded(weights, o_layout)
    return next_s, acc, total, peak, p, stage, next_stage, next_phase, scale, ahead


@gluon.jit
def _await_next(step, work, ready, stage, phase, STAGES: gl.constexpr):
    """The next buffer, once it is full; from the last step on there is none to wait for."""
    next_stage, next_phase = _advance(stage, phase, STAGES)
    more = step + 1 < work[9]
    # The buffer at hand is full, and stays so until this group gives it back.
    mbarrier.wait(ready.index(gl.where(more, next_stage, stage)), gl.where(more, next_phase, phase))
    return next_stage, next_phase


@gluon.jit
def _deep_loop(
    me: gl.constexpr, q, acc, total, peak, stage, phase, work, q_factor, key_scale, shared, lists,
    sizes, s_layout: gl.constexpr, o_layout: gl.constexpr, by_word: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """All steps of a tile, of which there must be one.

    Two to a pass, as scores alternate between two places: no register is moved.
    """
    k_smem, v_smem, ready, empty = shared[1], shared[2], shared[4], shared[5]
    masked, steps = work[8], work[9]
    first = gl.to_tensor(0)
    words = mask_words(me, first, work, lists, sizes, by_word)
    factor = q_factor * gl.load(key_scale + key_row(first, work, lists, sizes) // TILE)
    scale = gl.load(key_scale + key_row(gl.to_tensor(1), work, lists, sizes) // TILE)
    ahead = key_row(gl.to_tensor(2), work, lists, sizes)
    # The first step, with no output product to go with it.
    mbarrier.wait(ready.index(stage), phase)
    s = _scores(q, k_smem.index(stage), s_layout)
    s = warpgroup_mma_wait(0, deps=[s]).to(gl.float32)
    mbarrier.arrive(empty.index(stage), count=1)
    before, phase = _advance(stage, phase, STAGES)
    mbarrier.wait(ready.index(before), phase)
    next_s = _scores(q, k_smem.index(before), s_layout)
    s = _hide(s, words, by_word, s_layout)
    weights, peak, _shrink = _softmax(s, peak, factor)
    total += _partial_sum(weights)
    next_s = warpgroup_mma_wait(0, deps=[next_s])
    p = _rounded(weights, o_layout)
    stage, phase = _await_next(first, work, ready, before, phase, STAGES)

    state = (next_s, acc, total, peak, p, before, stage, phase, scale, ahead)
    for step in range(1, masked):
        state = _deep_step(
            me, q, step, state, work, shared, lists, sizes, (q_factor, key_scale), s_layout,
            o_layout, by_word, D, STAGES, True,
        )  # fmt: skip
    start = gl.maximum(masked, 1)
    odd = (steps - start) % 2
    for step in range(start, start + odd):
        state = _deep_step(
            me, q, step, state, work, shared, lists, sizes, (q_factor, key_scale), s_layout,
            o_layout, by_word, D, STAGES, False,
        )  # fmt: skip
    for step in range(start + odd, steps, 2):
        for half in gl.static_range(2):
            state = _deep_step(
                me, q, step + half, state, work, shared, lists, sizes, (q_factor, key_scale),
                s_layout, o_layout, by_word, D, STAGES, False,
            )  # fmt: skip
    next_s, acc, total, peak, p, before, stage, phase, scale, ahead = state

    # The last output product.
    acc = _weigh(p, v_smem.index(before), acc, o_layout)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    return acc, total, peak, before, stage, phase


@gluon.jit
def attend_tile(
    me: gl.constexpr, q_stage, q_phase, stage, phase, work, q_factor, factors, shared, lists, sizes,
    length, s_layout: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, EAGER: gl.constexpr,
    DEEP: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """One tile, up to its output, sums and peaks.

    Long, because the state of a step lives in registers, and all steps need all of it.
    """
    q_smem, k_smem, v_smem, q_ready, ready, empty, q_empty = shared
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    no_scores = gl.zeros([ROWS, TILE], gl.float32, s_layout)
    by_word: gl.constexpr = no_scores.reshape([ROWS, TILE // 32, 32]).type.layout
    # As in `block_sparse_hopper.py`.
    PER_PASS: gl.constexpr = 2 if EAGER > 1 else 1
    q = q_smem.index(2 * q_stage + me)
    b, h, masked, steps = work[0], work[1], work[8], work[9]
    key_scale = factors[1] + (b * sizes[0] + h).to(gl.int64) * (length // TILE)
    acc = gl.zeros([ROWS, D], gl.float32, o_layout)
    peak = gl.full([ROWS], _NO_PEAK, gl.float32, gl.SliceLayout(1, s_layout))
    total = _partial_sum(no_scores)
    mbarrier.wait(q_ready.index(q_stage), q_phase)
    if DEEP:
        if steps > 0:
            acc, total, peak, before, stage, phase = _deep_loop(
                me, q, acc, total, peak, stage, phase, work, q_factor, key_scale, shared, lists,
                sizes, s_layout, o_layout, by_word, D, STAGES,
            )  # fmt: skip
            if PERSISTENT:
                mbarrier.arrive(empty.index(before), count=1)
    elif steps > 0:
        # The first step, with no output product to go with it.
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
        if PERSISTENT:
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = _advance(stage, phase, STAGES)
    if PERSISTENT:
        mbarrier.arrive(q_empty.index(q_stage), count=1)
    return (acc, total, peak), stage, phase
