"""Two parts of one softmax, put together by their log-sums of exponentials."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.backend import Backend, use_triton


def merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Merge attention over two disjoint sets of keys.

    Args:
        output: ``[B, N, H, D]`` over the first set; ``other`` over the second.
        lse: natural-log LSE ``[B, H, N]`` of the first; ``other_lse`` of the second. One of them
            may be -inf.

    Returns:
        ``[B, N, H, D]`` in the dtype of ``output``.
    """
    share = torch.sigmoid(lse.float() - other_lse.float()).transpose(1, 2).unsqueeze(-1)
    share = share.nan_to_num(0.5)  # no key in either set
    rest = torch.where(share == 1, 0.0, other.float())
    return (share * output.float() + (1 - share) * rest).to(output.dtype)


def merge_with_lse(
    output: Tensor,
    lse: Tensor,
    other: Tensor,
    other_lse: Tensor,
    dtype: torch.dtype,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys, so that more can be merged.

    Args:
        output: ``[B, N, H, D]`` over the first set; ``other`` over the second, any dtypes.
        lse: natural-log LSE ``[B, H, N]`` of the first; ``other_lse`` of the second. Any of them
            may be -inf.
        dtype: of the output to return.
        backend: "torch", "triton", or "auto": Triton for CUDA tensors.

    Returns:
        ``[B, N, H, D]``, and the LSE of both sets, float32 (float64 for float64).
    """
    if use_triton(backend, output, lambda: None):
        from dit_accel.kernels.merge_triton import merged

        return merged(output, lse, other, other_lse, dtype)
    wide = torch.promote_types(torch.promote_types(output.dtype, other.dtype), torch.float32)
    share = torch.sigmoid(other_lse - lse).nan_to_num(0.0)  # no key in either set
    share = share.to(wide).transpose(1, 2).unsqueeze(-1)
    out = torch.lerp(output.to(wide), other.to(wide), share)
    return out.to(dtype), torch.logaddexp(lse, other_lse)
