"""Dense attention that also gives its log-sums of exponentials, by torch's own kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_with_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attend to all keys.

    Args:
        query: ``[B, N, H, D]``.
        key: ``[B, M, H, D]``; ``value`` likewise.
        scale: of the logits; None for ``D ** -0.5``.

    Returns:
        ``[B, N, H, D]``, and the natural-log LSE ``[B, H, N]``, float32 (float64 for float64).
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type == "cuda" and half:
        capability = torch.cuda.get_device_capability(query.device)
        if capability >= (9, 0) and torch.backends.cuda.cudnn_sdp_enabled():
            out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, 0.0, False, False, scale=scale
            )
        else:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, False, False, scale=scale
            )
    elif query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, scale=scale
        )
    else:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = q.to(wide) @ k.to(wide).mT * factor
        out, lse = (scores.softmax(-1) @ v.to(wide)).to(query.dtype), scores.logsumexp(-1)
    rows = query.shape[1]
    lse = lse.squeeze(-1) if lse.ndim == 4 else lse  # cuDNN adds an axis
    return out.transpose(1, 2), lse[..., :rows]
