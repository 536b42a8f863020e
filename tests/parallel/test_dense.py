"""Dense attention with its LSE, also of as few queries as a text or a probe of the guard has."""

from __future__ import annotations

import pytest
import torch

from dit_accel.parallel.dense import dense_with_lse

ON = [
    pytest.param("cpu", torch.float64, 1e-12, id="cpu-fp64"),
    pytest.param("cpu", torch.float32, 1e-5, id="cpu-fp32"),
    pytest.param("cuda", torch.float32, 1e-5, id="fp32", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, 2e-2, id="bf16", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("rows", [1, 7, 64, 200])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("device", "dtype", "tolerance"), ON)
def test_output_and_lse_are_those_of_the_formula(device, dtype, tolerance, scale, rows):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 1000, 4, 64, device=device).to(dtype).unbind()
    query = query[:, torch.arange(rows, device=device) * 5]
    output, lse = dense_with_lse(query, key, value, scale)
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * (scale or 64**-0.5)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value.double())
    assert output.dtype == dtype
    assert output.shape == query.shape
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=tolerance, atol=tolerance)
