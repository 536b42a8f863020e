"""Merging parts of a softmax: both versions against float64, and against attention at once."""

from __future__ import annotations

import pytest
import torch

from dit_accel.kernels.merge import merge_with_lse
from dit_accel.kernels.reference import masked_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_parts_make_the_whole(backend, dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 37, 3, 24, dtype=torch.float64)
    mask = torch.rand(2, 3, 37, 37) < 0.4
    mask[0, 0, :4, :20] = False  # rows that see nothing of the first part
    mask[0, 0, 2:8, 20:] = False  # and nothing of the second
    seen = mask.any(-1)
    whole, whole_lse = masked_attention(q, k, v, mask)
    parts = []
    for part in (slice(0, 20), slice(20, 37)):
        out, lse = masked_attention(q, k[:, part], v[:, part], mask[..., part])
        parts += [out.to(DEVICE, dtype), lse.to(DEVICE, torch.float32)]
    out, lse = merge_with_lse(*parts, torch.float32, backend)
    rows = seen.transpose(1, 2)
    bound = 4 * torch.finfo(dtype).eps
    assert (out.cpu()[rows] - whole[rows]).abs().max() < bound * whole.abs().max()
    assert (lse.cpu()[seen] - whole_lse[seen]).abs().max() < 1e-5
    assert (out.cpu()[~rows] == 0).all()
    assert (lse.cpu()[~seen] == -torch.inf).all()
    assert merge_with_lse(*parts, dtype, backend)[0].dtype == dtype
