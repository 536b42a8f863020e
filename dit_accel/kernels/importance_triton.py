"""Sampled importance in Triton: `importance.py` says in plain torch what is computed.

One sweep over the sampled keys gives each sampled query its log-sum and its best score in every key
block; a second kernel makes weights of them. The best scores go through memory, a few heads at a
time, because computing them again would double the work.
"""

# Triton's functions take tensors, pointers and constants under the same names: types say little.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels import block_sparse

_SCRATCH_BYTES = 1 << 28
_LOG2_E = math.log2(math.e)


@triton.jit
def _load(base, first, end, ROWS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None] * HEAD_SIZE + columns[None, :]
    return tl.load(pointers, mask=(rows < end)[:, None] & (columns < HEAD_SIZE)[None, :], other=0.0)


@triton.jit(do_not_specialize=("num_queries", "num_keys"))
def _best_scores(
    q_ptr, k_ptr, best_ptr, lse_ptr, num_queries, num_keys, scale_log2,
    SAMPLES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK_M`` sampled queries of one head; scores are in base 2."""
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    q = _load(
        q_ptr + head * num_queries * HEAD_SIZE, first, num_queries, BLOCK_M, HEAD_SIZE, BLOCK_D
    )
    keys = k_ptr + head * num_keys * HEAD_SIZE
    columns = tl.arange(0, BLOCK_N)
    BLOCKS: tl.constexpr = BLOCK_N // SAMPLES
    blocks = tl.arange(0, BLOCKS)
    key_blocks = tl.cdiv(num_keys, SAMPLES)
    out = best_ptr + (head * num_queries + rows.to(tl.int64)) * key_blocks
    peak = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for n in range(0, num_keys, BLOCK_N):
        k = _load(keys, n, num_keys, BLOCK_N, HEAD_SIZE, BLOCK_D)
        scores = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2
        scores = tl.where((n + columns < num_keys)[None, :], scores, float("-inf"))
        best = tl.max(scores.reshape(BLOCK_M, BLOCKS, SAMPLES), 2)
        new_peak = tl.maximum(peak, tl.max(best, 1))
        total = total * tl.exp2(peak - new_peak)
        total += tl.sum(tl.exp2(scores - new_peak[:, None]), 1)
        peak = new_peak
        at = n // SAMPLES + blocks
        inside = (rows < num_queries)[:, None] & (at < key_blocks)[None, :]
        tl.store(out[:, None] + at[None, :], best, mask=inside)
    tl.store(lse_ptr + head * num_queries + rows, peak + tl.log2(total), mask=rows < num_queries)


@triton.jit(do_not_specialize=("num_queries", "key_blocks"))
def _largest_weights(
    best_ptr, lse_ptr, out_ptr, num_queries, key_blocks,
    SAMPLES: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one query block of one head and ``BLOCK_K`` key blocks."""
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    rows = block * SAMPLES + tl.arange(0, ROWS)
    ours = (tl.arange(0, ROWS) < SAMPLES) & (rows < num_queries)
    columns = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = head * num_queries + rows
    lse = tl.load(lse_ptr + row, mask=ours, other=0.0)
    inside = ours[:, None] & (columns < key_blocks)[None, :]
    pointers = best_ptr + row[:, None] * key_blocks + columns[None, :]
    best = tl.load(pointers, mask=inside, other=float("-inf"))
    weights = tl.exp2(tl.max(best - lse[:, None], 0))
    out = out_ptr + (head * tl.num_programs(0) + block) * key_blocks + columns
    tl.store(out, weights, mask=columns < key_blocks)


def why_unavailable(query: Tensor, key_samples: int) -> str | None:
    """Say what keeps the kernel from computing this importance, or None."""
    most = 32 if query.dtype == torch.float32 else 128
    if key_samples > most or key_samples & (key_samples - 1):
        return f"it samples a power of two up to {most} keys per block, not {key_samples}"
    return block_sparse.why_unavailable(query.device, query.dtype, query.shape[-1])


def largest_weights(
    queries: Tensor, keys: Tensor, query_samples: int, key_samples: int, scale: float
) -> Tensor:
    """Largest attention weight between the samples of each pair of blocks.

    Args:
        queries: contiguous ``[B, H, samples, D]``, ``query_samples`` for each block but the last.
        keys: likewise.
        query_samples: sampled queries per block.
        key_samples: sampled keys per block.
        scale: positive factor on ``query . key``.

    Returns:
        Float32 ``[B, H, Q, K]``.
    """
    batch, heads, num_queries, size = queries.shape
    num_keys = keys.shape[2]
    blocks = triton.cdiv(num_queries, query_samples), triton.cdiv(num_keys, key_samples)
    queries, keys = queries.flatten(0, 1), keys.flatten(0, 1)
    out = queries.new_empty(batch * heads, *blocks, dtype=torch.float32)
    at_once = max(1, min(batch * heads, _SCRATCH_BYTES // (num_queries * blocks[1] * 4)))
    best = queries.new_empty(at_once, num_queries, blocks[1], dtype=torch.float32)
    lse = queries.new_empty(at_once, num_queries, dtype=torch.float32)
    block_d = max(16, triton.next_power_of_2(size))
    full = queries.dtype == torch.float32
    block_m = 64 if full or block_d > 128 else 128
    block_n = max(key_samples, 32 if full else 64)
    block_k = min(128, max(16, triton.next_power_of_2(blocks[1])))
    with torch.cuda.device_of(queries):
        for first in range(0, batch * heads, at_once):
            now = min(at_once, batch * heads - first)
            _best_scores[(triton.cdiv(num_queries, block_m), now)](
                queries[first:], keys[first:], best, lse, num_queries, num_keys, scale * _LOG2_E,
                SAMPLES=key_samples, BLOCK_M=block_m, BLOCK_N=block_n, HEAD_SIZE=size,
                BLOCK_D=block_d, PRECISION="ieee" if full else "tf32",
                num_warps=8, num_stages=2,
            )  # fmt: skip
            _largest_weights[(blocks[0], now, triton.cdiv(blocks[1], block_k))](
                best, lse, out[first:], num_queries, blocks[1], SAMPLES=query_samples,
                ROWS=triton.next_power_of_2(query_samples), BLOCK_K=block_k,
            )  # fmt: skip
    return out.unflatten(0, (batch, heads))
