"""Two parts of one softmax, put together by their log-sums of exponentials."""

from __future__ import annotations

import torch
from torch import Tensor


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
