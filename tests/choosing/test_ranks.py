"""Ranks that share a sequence decide alike whether attention stays dense."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from ranks import run_ranks
from tiny_pipelines import TINY_PIPELINES, run_tiny

from dit_accel import accelerate_pipeline, acceleration_report, parallelize_pipeline
from dit_accel.choosing import forecast, watching

pytestmark = pytest.mark.slow
STEPS = 8


def _dense_calls(told: tuple[float, float], sparse_s: tuple[float, float]) -> list[bool]:
    """Generate where the ranks foretell and measure differently; say which calls were dense."""
    build, arguments = TINY_PIPELINES["wan"]
    pipe, rank = build(), dist.get_rank()
    options = {"min_tokens": 0, "density": 0.5, "dense_steps": 2, "guard": False}
    accelerate_pipeline(pipe, **options)
    parallelize_pipeline(pipe, ulysses=2)

    def seconds(forwards: list[Any]) -> dict[int, float]:
        ((step, _, _),) = forwards
        calls = [call for call in pipe._dit_accel.runtime.recorder.calls if call.step == step]
        return {step: 1.0 if all(call.reason for call in calls) else sparse_s[rank]}

    with (
        patch.object(forecast.Forecast, "_speedup", lambda *args: told[rank]),
        patch.object(watching, "forward_seconds", seconds),
    ):
        run_tiny(pipe, {**arguments, "num_inference_steps": STEPS})
    return [bool(call.reason) for call in acceleration_report(pipe).calls]


def _cases() -> dict[str, list[bool]]:
    return {
        "foretold on the whole to pay": _dense_calls((1.0, 1.3), (0.5, 0.5)),
        "foretold on the whole not to": _dense_calls((1.0, 1.06), (0.5, 0.5)),
        "unknown to one": _dense_calls((1.0, float("nan")), (0.5, 0.5)),
        "slower on the whole": _dense_calls((2.0, 2.0), (1.2, 1.0)),
    }


def test_both_ranks_run_the_same_calls_densely():
    first, second = run_ranks(_cases)
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    assert first == second
    assert not all(first["foretold on the whole to pay"])
    assert all(first["foretold on the whole not to"])
    assert not all(first["unknown to one"])
    slower = first["slower on the whole"]
    assert not all(slower)
    assert slower[-1]
