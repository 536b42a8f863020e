"""Sparse forwards that are slower than dense ones are told, or ended."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
from tiny_pipelines import TINY_PIPELINES, run_tiny

from dit_accel import accelerate_pipeline, acceleration_report
from dit_accel.choosing import forecast, pace, watching
from dit_accel.errors import SpeedWarning

STEPS = 8


def run(monkeypatch: pytest.MonkeyPatch, sparse_s: float, **options: Any) -> Any:
    """Generate with forwards of 1 s where all attention is dense, and ``sparse_s`` else."""
    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    monkeypatch.setattr(forecast.Forecast, "_speedup", lambda *args: 2.0)
    settings = {"min_tokens": 0, "density": 0.5, "dense_steps": 2, "dense_layers": 0}
    accelerate_pipeline(pipe, guard=False, **{**settings, **options})

    def seconds(forwards: list[Any]) -> dict[int, float]:
        ((step, _, _),) = forwards
        calls = [call for call in pipe._dit_accel.runtime.recorder.calls if call.step == step]
        return {step: 1.0 if all(call.reason for call in calls) else sparse_s}

    monkeypatch.setattr(watching, "forward_seconds", seconds)
    run_tiny(pipe, {**arguments, "num_inference_steps": STEPS})
    return acceleration_report(pipe)


def test_a_method_by_name_that_does_not_pay_is_warned_of_and_runs_on(monkeypatch):
    with pytest.warns(SpeedWarning, match=r"1\.50 times as long as a dense one") as told:
        report = run(monkeypatch, 1.5, method="gna", block_size=16)
    assert len([w for w in told if w.category is SpeedWarning]) == 1
    assert any("does not pay here" in note for note in report.notes)
    assert {call.step for call in report.calls if not call.reason} == set(range(2, STEPS))


def test_auto_is_dense_from_there_on(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpeedWarning)
        report = run(monkeypatch, 1.5)
    sparse = {call.step for call in report.calls if not call.reason}
    assert sparse
    assert max(sparse) < STEPS - 1
    last = next(call for call in report.calls if call.step == STEPS - 1)
    assert "took 1.50 times as long" in last.reason
    assert any("so attention is dense from there on" in note for note in report.notes)


@pytest.mark.parametrize("by_name", [{"method": "gna", "block_size": 16}, {}])
def test_what_pays_is_left_alone(by_name, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpeedWarning)
        report = run(monkeypatch, 1.04, **by_name)
    assert {call.step for call in report.calls if not call.reason} == set(range(2, STEPS))


@pytest.mark.parametrize(("tokens", "warned"), [(0, True), (2048, False)])
def test_without_dense_steps_calls_are_compared_but_for_short_sequences(
    tokens, warned, monkeypatch
):
    times = {"gna": 3.0, None: 1.0}
    monkeypatch.setattr(pace, "DEFAULT", replace(pace.DEFAULT, min_tokens=tokens))
    monkeypatch.setattr(pace.AttentionTimes, "seconds", lambda self, m, place: times[m and m.name])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        report = run(monkeypatch, 9.0, method="gna", block_size=16, dense_steps=0)
    found = [str(w.message) for w in told if w.category is SpeedWarning]
    assert len(found) == warned
    assert all("a sparse attention call of 252 video tokens took 3.00 times" in w for w in found)
    assert all(not call.reason for call in report.calls)
