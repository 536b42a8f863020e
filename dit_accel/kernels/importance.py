"""Importance of key blocks by attention between sampled tokens (PSA)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.errors import GridMismatchError, OptionError
from dit_accel.kernels.backend import Backend, use_triton


def sampled_importance(
    query: Tensor,
    key: Tensor,
    *,
    query_block: int,
    key_block: int,
    text_length: int = 0,
    samples_per_block: int | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Weigh each key block by the largest attention weight between sampled tokens.

    The weights are a true softmax over all sampled video keys; text is not among them. Samples lie
    evenly spaced from the first token of each block on, so results repeat and torch's random
    numbers stay untouched. Memory is bounded by doing a few query blocks at a time.

    Args:
        query: ``[B, N, H, D]``, video rows and then ``text_length`` text rows, which are not read;
            any float dtype.
        key: likewise.
        query_block: video tokens per query block; the last may have fewer.
        key_block: video tokens per key block.
        text_length: text rows.
        samples_per_block: tokens sampled from a whole block, of query and key alike; None takes a
            eighth of each.
        scale: positive factor on ``query . key``; ``D ** -0.5`` if None.
        backend: "torch", "triton", or "auto": Triton for CUDA tensors that its kernel can take
            (float16, bfloat16 or float32; head size up to 256; a power of two of sampled keys per
            block, at most 128, in float32 32), torch for all others.

    Returns:
        ``[B, H, Q, K]``, rows sum to 1; float32, or float64 for float64 inputs.

    Raises:
        OptionError: if the tensors do not fit together, or a number is not positive.
        GridMismatchError: if ``text_length`` leaves no video token.
        OperatorUnavailableError: if ``backend="triton"`` cannot run here.
    """
    if query.ndim != 4 or query.shape != key.shape:
        raise OptionError(
            f"query and key must share one shape [B, N, H, D], not {tuple(query.shape)} and "
            f"{tuple(key.shape)}."
        )
    if min(query_block, key_block) < 1 or (samples_per_block is not None and samples_per_block < 1):
        raise OptionError(
            f"{query_block=}, {key_block=} and {samples_per_block=} must be at least 1."
        )
    video = query.shape[1] - text_length
    if text_length < 0 or video < 1:
        raise GridMismatchError(f"{text_length=} of {query.shape[1]} tokens leaves no video token.")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise OptionError(f"{scale=} must be positive.")
    queries, query_samples = _sample(query[:, :video], query_block, samples_per_block)
    keys, key_samples = _sample(key[:, :video], key_block, samples_per_block)

    def why_unavailable() -> str | None:
        from dit_accel.kernels import importance_triton

        return importance_triton.why_unavailable(queries, key_samples)

    if use_triton(backend, queries, why_unavailable):
        from dit_accel.kernels.importance_triton import largest_weights

        weights = largest_weights(queries, keys, query_samples, key_samples, scale)
    else:
        weights = _largest_weights(queries, keys, query_samples, key_samples, scale)
    return weights / weights.sum(-1, keepdim=True)


def _largest_weights(
    queries: Tensor, keys: Tensor, query_samples: int, key_samples: int, scale: float
) -> Tensor:
    """Largest attention weight between the samples of each pair of blocks, ``[B, H, Q, K]``."""
    exact = torch.promote_types(queries.dtype, torch.float32)
    queries, keys = queries.to(exact), keys.to(exact)
    # Small chunks stay in a CPU's cache; a GPU wants launches worth their while.
    pairs = 1 << (20 if queries.device.type == "cpu" else 26)
    row_of_blocks = queries.shape[0] * queries.shape[1] * query_samples * keys.shape[-2]
    chunk = query_samples * max(1, pairs // row_of_blocks)
    parts = []
    for rows in queries.split(chunk, dim=-2):
        scores = rows @ keys.mT * scale
        total = scores.logsumexp(-1, keepdim=True)
        best = _block_maxima(scores, key_samples) - total
        parts.append(_block_maxima(best.mT, query_samples).mT.exp())
    return torch.cat(parts, -2)


def samples_of(block: int, asked: int | None) -> int:
    """Return how many tokens of a whole block are sampled: as asked, or an eighth."""
    return max(1, block // 8) if asked is None else min(asked, block)


def _sample(tokens: Tensor, block: int, samples: int | None) -> tuple[Tensor, int]:
    """Evenly spaced tokens of all blocks, ``[B, H, samples, D]``, and their number per block."""
    samples = samples_of(block, samples)
    device = tokens.device
    offsets = torch.arange(samples, device=device) * block // samples
    first = torch.arange(0, tokens.shape[1], block, device=device)
    in_last = (tokens.shape[1] - 1) % block + 1
    # Only the last block lacks tokens, so that what is missing is at the end of the list.
    count = (len(first) - 1) * samples - (-in_last * samples // block)
    index = (first[:, None] + offsets).flatten()[:count]
    return tokens[:, index].transpose(1, 2).contiguous(), samples


def _block_maxima(scores: Tensor, samples: int) -> Tensor:
    """Maxima of every ``samples`` columns; the last group may be short."""
    padded = F.pad(scores, (0, -scores.shape[-1] % samples), value=float("-inf"))
    return padded.unflatten(-1, (-1, samples)).amax(-1)
