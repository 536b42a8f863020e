"""Two parts of one softmax put together in one pass over memory; see `merge.py`."""

# Triton's functions take tensors, pointers and constants under the same names: types say little.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Rows of all tokens and heads that one program merges."""


@triton.jit(do_not_specialize=["rows", "tokens", "heads"])
def _merge(
    a_ptr, a_lse, b_ptr, b_lse, out_ptr, lse_ptr, rows, tokens, heads,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head, token, batch = row % heads, row // heads % tokens, row // heads // tokens
    at = (batch * heads + head) * tokens + token
    known = row < rows
    x = tl.load(a_lse + at, mask=known, other=0.0).to(tl.float32)
    y = tl.load(b_lse + at, mask=known, other=0.0).to(tl.float32)
    peak = tl.maximum(x, y)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    left, right = tl.exp(x - peak), tl.exp(y - peak)
    total = left + right
    share = tl.where(total > 0, right / tl.where(total > 0, total, 1.0), 0.0)
    columns = tl.arange(0, BLOCK)
    pointers = row[:, None] * SIZE + columns[None, :]
    inside = known[:, None] & (columns < SIZE)[None, :]
    a = tl.load(a_ptr + pointers, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + pointers, mask=inside, other=0.0).to(tl.float32)
    out = a + share[:, None] * (b - a)
    tl.store(out_ptr + pointers, out.to(out_ptr.dtype.element_ty), mask=inside)
    lse = tl.where(total > 0, tl.log(tl.where(total > 0, total, 1.0)) + peak, float("-inf"))
    tl.store(lse_ptr + at, lse, mask=known)


def merged(
    output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Run the kernel; see `merge.merge_with_lse`."""
    batch, tokens, heads, size = output.shape
    output, other = output.contiguous(), other.contiguous()
    lse, other_lse = lse.contiguous(), other_lse.contiguous()
    out = torch.empty_like(output, dtype=dtype)
    out_lse = torch.empty_like(lse, dtype=torch.float32)
    rows = batch * tokens * heads
    with torch.cuda.device_of(output):
        _merge[(triton.cdiv(rows, ROWS),)](
            output, lse, other, other_lse, out, out_lse, rows, tokens, heads,
            SIZE=size, BLOCK=triton.next_power_of_2(size), ROWS=ROWS,
        )  # fmt: skip
    return out, out_lse
