"""What perturbation guidance computes, written out; the rest of this package is tested against it.

Works in any float type; the attention map is made, so it is for small sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor


def perturbed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    strength: Tensor,
    *,
    perturbation: str = "identity",
    rows: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return attention whose map ``A`` is mixed per head: ``(1 - u) A + u P`` (2506.10978).

    Args:
        query: ``[B, N, H, D]``; ``key`` and ``value`` likewise.
        key: see ``query``.
        value: see ``query``.
        strength: ``u`` per head, ``[H]``, in [0, 1].
        perturbation: what ``P`` is. "identity": every token attends to itself alone. "uniform":
            to all alike. "query_mean": all as the mean of the perturbed queries would.
        rows: bool ``[N]``, the queries that are perturbed; None for all.
        scale: of the logits; None for ``D ** -0.5``.
    """
    length = query.shape[1]
    rows = torch.ones(length, dtype=torch.bool) if rows is None else rows
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * factor
    attention = logits.softmax(-1)
    if perturbation == "identity":
        target = torch.eye(length, dtype=query.dtype).expand_as(attention)
    elif perturbation == "uniform":
        target = torch.full_like(attention, 1 / length)
    else:
        target = logits[:, :, rows].mean(2, keepdim=True).softmax(-1).expand_as(attention)
    share = strength[:, None, None] * rows[:, None]
    return torch.einsum("bhqk,bkhd->bqhd", (1 - share) * attention + share * target, value)


def guided(
    cond: Tensor, perturbed: Tensor, scale: float, uncond: Tensor | None = None, cfg: float = 1.0
) -> Tensor:
    """Return the prediction that a step uses, with classifier-free guidance or without."""
    plain = cond if uncond is None else uncond + cfg * (cond - uncond)
    return plain + scale * (cond - perturbed)
