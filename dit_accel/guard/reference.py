"""What the quality guard measures, written out."""

from __future__ import annotations

import torch
from torch import Tensor


def probe_error(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    rows: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Return the relative L2 error of an attention output in some query rows, per head.

    ``||output - softmax(scale * query @ key^T) @ value|| / ||softmax(...) @ value||``, both norms
    over the rows and the channels of a head, in float64.

    Args:
        query: ``[B, N, H, D]``, any floating dtype; likewise ``key``, ``value``.
        output: ``[B, N, H, D]``, what is to be judged.
        rows: int64 ``[R]``, the query rows that are compared.
        scale: of the logits; None for ``D ** -0.5``.

    Returns:
        float64 ``[B, H]``: 0 where the output is dense attention's, 1 where it is as wrong as
        zeros would be.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * torch.einsum("bqhd,bkhd->bhqk", query[:, rows].double(), key.double())
    dense = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value.double())
    difference = output[:, rows].double() - dense
    return difference.norm(dim=(1, 3)) / dense.norm(dim=(1, 3))
