"""What the dynamic methods know about a block: means, spreads, similarity, pooled tokens.

The functions here are the reference, and what CPUs run; `statistics_triton.py` makes the same from
one reading of query, key and value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.errors import GridMismatchError, OptionError
from dit_accel.kernels.backend import Backend, use_triton
from dit_accel.kernels.tiles import tile_lengths

OPTIONAL = frozenset(
    {"query_deviation", "key_deviation", "similarity", "moment", "moment_norm", "key_variance"}
)
"""Names that ``wanted`` may hold."""

SIMILARITY_GROUPS = (2, 4, 8)


@dataclass(frozen=True, eq=False)
class BlockStatistics:
    """Statistics of the Q query blocks and K key blocks of the video tokens.

    All are float32 (float64 for float64 inputs), except ``pooled``. Ragged last blocks count the
    tokens that they have; text is in none of them.

    Attributes:
        query_mean: ``[B, H, Q, D]``.
        key_mean: ``[B, H, K, D]``.
        value_mean: ``[B, H, K, D]``.
        query_counts: int32 ``[Q]``, tokens per query block.
        key_counts: int32 ``[K]``, tokens per key block.
        query_deviation: ``[B, H, Q, D]``, mean over the block of ``|q - mean q|`` (Rectified
            SpaAttn, gain-aware rectification).
        key_deviation: ``[B, H, K, D]``, likewise.
        similarity: ``[B, H, K, 3]``, for g = 2, 4, 8 the mean cosine of the keys g*m and g*m+g-1 of
            a block, over the pairs of which both tokens exist; 0 where there is none (PSA).
        moment: ``[B, H, D, D]``, sum over blocks of ``H_j = sum_n (k_n - mean k)^T v_n`` (PISA).
        moment_norm: ``[B, H, K]``, Frobenius norm of ``H_j``.
        key_variance: ``[B, H, K]``, mean of ``|k|^2`` minus ``|mean k|^2``.
        pooled: level -> means of every ``level`` successive keys, and values, of a block:
            ``[B, H, K * ceil(key_block / level), D]`` in the input's dtype. Groups of a ragged
            block are means of the tokens they have; those that have none are 0.
    """

    query_mean: Tensor
    key_mean: Tensor
    value_mean: Tensor
    query_counts: Tensor
    key_counts: Tensor
    query_deviation: Tensor | None = None
    key_deviation: Tensor | None = None
    similarity: Tensor | None = None
    moment: Tensor | None = None
    moment_norm: Tensor | None = None
    key_variance: Tensor | None = None
    pooled: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def of_heads(self, index: Tensor) -> BlockStatistics:
        """Return the statistics of some heads; ``index`` is int64 ``[heads]``."""
        shared = ("query_counts", "key_counts", "pooled")
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in shared}
        mine: dict[str, Any] = {
            name: None if x is None else x.index_select(1, index) for name, x in own.items()
        }
        pooled = {
            level: (key.index_select(1, index), value.index_select(1, index))
            for level, (key, value) in self.pooled.items()
        }
        return replace(self, **mine, pooled=pooled)


def block_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_block: int,
    key_block: int,
    text_length: int = 0,
    wanted: frozenset[str] = frozenset(),
    pooled_levels: tuple[int, ...] = (),
    backend: Backend = "auto",
) -> BlockStatistics:
    """Compute the statistics of all blocks of video tokens.

    Args:
        query: ``[B, N, H, D]``, V video rows and then ``text_length`` text rows, which are not
            read; any float dtype.
        key: likewise.
        value: likewise.
        query_block: video tokens per query block; the last may have fewer.
        key_block: video tokens per key block.
        text_length: text rows.
        wanted: which of `OPTIONAL` to compute.
        pooled_levels: group sizes for ``pooled``, at most ``key_block``.
        backend: "torch", "triton", or "auto": Triton for CUDA tensors that its kernel can take
            (float16, bfloat16 or float32; head size up to 256, or 128 with moments; blocks of 16,
            32, 64 or 128 tokens; levels 2, 4 and 8), torch for all others.

    Raises:
        OptionError: if the tensors do not fit together, or for an impossible option.
        GridMismatchError: if ``text_length`` leaves no video token.
        OperatorUnavailableError: if ``backend="triton"`` cannot run here.
    """
    _check(query, key, value, query_block, key_block, text_length, wanted, pooled_levels)
    video = query.shape[1] - text_length

    def why_unavailable() -> str | None:
        from dit_accel.kernels import statistics_triton

        return statistics_triton.why_unavailable(
            query, query_block, key_block, wanted, pooled_levels
        )

    if use_triton(backend, query, why_unavailable):
        from dit_accel.kernels.statistics_triton import fused_block_statistics

        return fused_block_statistics(
            query, key, value, video, query_block, key_block, wanted, pooled_levels
        )

    query, key, value = query[:, :video], key[:, :video], value[:, :video]
    return _statistics(query, key, value, query_block, key_block, wanted, pooled_levels)


def _statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_block: int,
    key_block: int,
    wanted: frozenset[str],
    pooled_levels: tuple[int, ...],
) -> BlockStatistics:
    """`block_statistics` in plain torch, of video rows alone."""
    q, query_counts = _blocks(query, query_block)
    k, key_counts = _blocks(key, key_block)
    v, _ = _blocks(value, key_block)
    query_mean, key_mean, value_mean = (
        _mean(x, n) for x, n in ((q, query_counts), (k, key_counts), (v, key_counts))
    )
    k_delta = _deltas(k, key_mean, key_counts)
    found: dict[str, Tensor] = {}
    if "query_deviation" in wanted:
        found["query_deviation"] = _mean(_deltas(q, query_mean, query_counts).abs(), query_counts)
    if "key_deviation" in wanted:
        found["key_deviation"] = _mean(k_delta.abs(), key_counts)
    if "key_variance" in wanted:
        found["key_variance"] = _mean(k_delta.square(), key_counts).sum(-1)
    if "similarity" in wanted:
        found["similarity"] = torch.stack(
            [_similarity(k, key_counts, group) for group in SIMILARITY_GROUPS], -1
        )
    if "moment_norm" in wanted:
        moments = k_delta.mT @ v
        found["moment_norm"] = moments.flatten(-2).norm(dim=-1)
    if "moment" in wanted:
        found["moment"] = k_delta.flatten(2, 3).mT @ v.flatten(2, 3)
    pooled = {
        level: (
            _pool(k, key_counts, level).to(query.dtype),
            _pool(v, key_counts, level).to(query.dtype),
        )
        for level in pooled_levels
    }
    return BlockStatistics(
        query_mean, key_mean, value_mean, query_counts, key_counts, **found, pooled=pooled
    )


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_block: int,
    key_block: int,
    text_length: int,
    wanted: frozenset[str],
    pooled_levels: tuple[int, ...],
) -> None:
    if query.ndim != 4 or query.shape != key.shape or query.shape != value.shape:
        shapes = [tuple(t.shape) for t in (query, key, value)]
        raise OptionError(f"query, key and value must share one shape [B, N, H, D], not {shapes}.")
    if len({(t.device, t.dtype) for t in (query, key, value)}) > 1:
        raise OptionError("query, key and value must share one device and one dtype.")
    if query_block < 1 or key_block < 1:
        raise OptionError(f"{query_block=} and {key_block=} must be at least 1.")
    if not 0 <= text_length < query.shape[1]:
        raise GridMismatchError(
            f"{text_length=} of {query.shape[1]} tokens leaves no video token; pass the number of "
            "text rows."
        )
    if not wanted <= OPTIONAL:
        raise OptionError(f"wanted={sorted(wanted - OPTIONAL)}: valid are {sorted(OPTIONAL)}.")
    if not all(1 <= level <= key_block for level in pooled_levels):
        raise OptionError(f"{pooled_levels=} must lie between 1 and {key_block=}.")


def _blocks(tokens: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Cut ``[B, V, H, D]`` into ``[B, H, K, block, D]``, zeros at the end, and count the tokens."""
    video = tokens.shape[1]
    exact = tokens.transpose(1, 2).to(torch.promote_types(tokens.dtype, torch.float32))
    padded = F.pad(exact, (0, 0, 0, -video % block))
    return padded.unflatten(2, (-1, block)), tile_lengths(video, block, tokens.device).int()


def _mean(blocks: Tensor, counts: Tensor) -> Tensor:
    return blocks.sum(-2) / counts[:, None]


def _deltas(blocks: Tensor, mean: Tensor, counts: Tensor) -> Tensor:
    """Tokens minus the mean of their block; 0 where there is no token."""
    exists = torch.arange(blocks.shape[-2], device=blocks.device) < counts[:, None]
    return (blocks - mean[..., None, :]) * exists[..., None]


def _similarity(keys: Tensor, counts: Tensor, group: int) -> Tensor:
    """Mean cosine of the first and last token of each whole group of a block, ``[B, H, K]``."""
    last = torch.arange(group - 1, keys.shape[-2], group, device=keys.device)
    cosines = F.normalize(keys[..., last - group + 1, :], dim=-1, eps=1e-30) * F.normalize(
        keys[..., last, :], dim=-1, eps=1e-30
    )
    pairs = last < counts[:, None]
    return (cosines.sum(-1) * pairs).sum(-1) / pairs.sum(-1).clamp(min=1)


def _pool(blocks: Tensor, counts: Tensor, level: int) -> Tensor:
    """Means of every ``level`` tokens of each block, ``[B, H, K * ceil(block / level), D]``."""
    block = blocks.shape[-2]
    groups = F.pad(blocks, (0, 0, 0, -block % level)).unflatten(-2, (-1, level))
    first = torch.arange(0, block, level, device=blocks.device)
    # The last group of a block of which level is no divisor has fewer tokens, too.
    sizes = (counts[:, None] - first).clamp(0, level)
    return (groups.sum(-2) / sizes.clamp(min=1)[..., None]).flatten(2, 3)
