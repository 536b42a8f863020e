"""Looking at a forward's output while the next one runs."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.guard.late import LateLook


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [1.0, math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_told_once(value, dtype, device):
    output = torch.ones(1, 63, 16, dtype=dtype, device=device)
    output[0, 40, 3] = value
    look = LateLook()
    assert look.read() == []
    look.ask(output, [2, 3])
    output.fill_(1.0)  # what comes after has no say
    assert look.read() == ([] if math.isfinite(value) else [2, 3])
    assert look.read() == []
