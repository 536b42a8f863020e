"""What the kernels for Hopper say in PTX, because Gluon has no words for it.

Turns of the two groups of warps; multiplying registers only where that changes them; and marks
before which ptxas must have computed something. It moves sums and roundings to where they are
needed, past a wait, although they could run under the exponentials before it.
"""

# Gluon's functions take tensors, barriers and constants under the same names: types say little.
# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# The same under its names in Triton 3.6 and later.
group_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""A barrier of the four warps of a group."""


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


def _weights_mark(registers: int, signs: int) -> str:
    """PTX that needs the signs of packed weights, none of which is set, and changes nothing.

    The store never runs. It can't be left out or moved, unlike what leads to nothing.
    """
    lines = ["{.reg .pred p; .reg .b32 x, a; or.b32 x, $0, $1;"]
    lines += [f"lop3.b32 x, x, ${i}, ${i + 1}, 0xfe;" for i in range(2, registers, 2)]
    lines += [f"and.b32 x, x, 0x{signs:08x}; setp.ne.u32 p, x, 0; mov.b32 a, 0;"]
    return "\n".join([*lines, "@p st.shared.b32 [a], x;}"])


def _same_registers(registers: int) -> str:
    return ",".join(["=r"] * registers + [str(i) for i in range(registers)])


_RESCALE_64 = gl.constexpr(_rescaling(64))
_RESCALE_64_REGISTERS = gl.constexpr(_rescaling_constraints(64))
_RESCALE_32 = gl.constexpr(_rescaling(32))
_RESCALE_32_REGISTERS = gl.constexpr(_rescaling_constraints(32))
_MARK_SUM = gl.constexpr(
    "{.reg .pred p; .reg .b32 a; setp.lt.f32 p, $1, 0f00000000; mov.b32 a, 0; "
    "@p st.shared.f32 [a], $1; mov.f32 $0, $1;}"
)
_MARK_WEIGHTS = gl.constexpr(_weights_mark(32, 0x80008000))
_MARK_WEIGHTS_REGISTERS = gl.constexpr(_same_registers(32))
_MARK_FOURS = gl.constexpr(_weights_mark(16, 0x80808080))
_MARK_FOURS_REGISTERS = gl.constexpr(_same_registers(16))


@gluon.jit
def wait_turn(me: gl.constexpr):
    """Wait until the other group has issued its products. Hardware barriers 8 and 9 are free."""
    if me == 0:
        gl.inline_asm_elementwise("bar.sync 8, 256; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.sync 9, 256; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)


@gluon.jit
def pass_turn(me: gl.constexpr):
    """Let the other group issue its products."""
    if me == 0:
        gl.inline_asm_elementwise("bar.arrive 9, 256; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.arrive 8, 256; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)


@gluon.jit
def rescaled(acc, shrink, D: gl.constexpr):
    """``acc`` times ``shrink`` of its row; a warp whose rows shrink by 1 skips that."""
    factor = shrink[:, None]
    if D == 128:
        out = gl.inline_asm_elementwise(
            _RESCALE_64, _RESCALE_64_REGISTERS, [acc, factor], gl.float32, False, 64
        )
    else:
        out = gl.inline_asm_elementwise(
            _RESCALE_32, _RESCALE_32_REGISTERS, [acc, factor], gl.float32, False, 32
        )
    return out


@gluon.jit
def summed_by_now(total):
    """``total``, sums of weights, not added up any later than here."""
    return gl.inline_asm_elementwise(_MARK_SUM, "=f,f", [total], gl.float32, False, 1)


@gluon.jit
def packed_by_now(p):
    """64 x 128 weights, of 16 bits or four in an int32, not rounded any later than here."""
    if p.dtype == gl.int32:
        marked = gl.inline_asm_elementwise(
            _MARK_FOURS, _MARK_FOURS_REGISTERS, [p], gl.int32, False, 16
        )
    else:
        marked = gl.inline_asm_elementwise(
            _MARK_WEIGHTS, _MARK_WEIGHTS_REGISTERS, [p], p.dtype, False, 64
        )
    return marked
