"""Attention that a pattern gets wrong by construction, or that is not finite: tripped, repaired."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch

from dit_accel import QualityGuard, accelerate_pipeline
from dit_accel.errors import OptionError, QualityWarning
from dit_accel.guard import engine
from dit_accel.operators import TorchOperator

from .conftest import HEADS, Calls, dense, error_of, near, needle

GNA = {"window": (3, 3, 3), "block_size": 16}
STATIC = {
    "gna": GNA,
    "sliding_window": {"window": (0.3, 0.3), "block_size": 16},
    "radial": {"decay": 0.1, "sink": False, "block_size": 16},
}


@pytest.mark.parametrize("method", sorted(STATIC))
def test_a_needle_trips_and_is_repaired(method):
    """One far token carries all the mass of two heads, which no local pattern can see."""
    call = needle((1, 2))
    unguarded = Calls(method, **STATIC[method], guard=False)
    (wrong,) = unguarded.forward([call])
    errors = error_of(wrong, dense(call))
    assert errors[1] > 0.6, "without the guard the output is wrong"
    assert errors[2] > 0.6
    assert unguarded.report.guard is None

    calls = Calls(method, **STATIC[method])
    with pytest.warns(QualityWarning, match="2 heads over max_error=0.6"):
        (output,) = calls.forward([call])
    assert error_of(output, dense(call))[[1, 2]].max() < 1e-5
    assert torch.equal(output[:, :, 0], wrong[:, :, 0]), "other heads stay as they are"
    guard = calls.report.guard
    assert guard.records[0].tripped == guard.records[0].dense == (1, 2)
    assert guard.worst == pytest.approx(float(errors.max()), rel=0.2)
    assert guard.trips == guard.repairs == 2
    text = str(calls.report)
    assert "quality guard: 1 probes, worst error" in text
    assert "2 times a head went over the budget: repaired" in text


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("psa", {"query_block": 32, "key_block": 32}),
        ("pisa", {"block_size": 32}),
        ("rectified", {"block_size": 32}),
        ("gna", {**GNA, "remainder": "pooled"}),
    ],
)
def test_pooled_blocks_are_guarded_too(method, options):
    calls = Calls(method, **options, guard={"max_error": 1e-6, "rows": 252})
    torch.manual_seed(0)
    call = tuple(torch.randn(3, 1, 252, HEADS, 32).unbind())
    (output,) = calls.forward([call])
    torch.testing.assert_close(output, dense(call), rtol=1e-4, atol=1e-5)
    assert calls.report.guard.trips > 0


def test_attention_within_the_budget_is_left_alone():
    call = near()
    (expected,) = Calls(**GNA, guard=False).forward([call])
    calls = Calls(**GNA)
    (output,) = calls.forward([call])
    assert torch.equal(output, expected)
    guard = calls.report.guard
    assert (guard.probes, guard.trips, guard.repairs) == (1, 0, 0)
    assert 0 < guard.worst < 0.05


def test_a_tripped_head_stays_dense_until_it_is_well_under_the_budget():
    """Probed at calls 0, 2 and 4 of layer 0. Between max_error and release it stays as it is."""
    well, bad = near(), needle((1,))
    (between,) = Calls(**GNA, guard=False).forward([well])
    error = float(error_of(between, dense(well))[1])
    # Over half of this budget, so that what is fine for a sparse head does not release a dense one.
    tight = Calls(**GNA, guard=QualityGuard(max_error=1.5 * error, every=2, rows=252))
    for step, call in enumerate([bad, well, well, well, well]):
        tight.forward([call], step)
    assert [record.dense for record in tight.report.guard.records] == [(1,)] * 5

    loose = Calls(**GNA, guard=QualityGuard(max_error=3 * error, every=2, rows=252))
    outputs = [loose.forward([call], i)[0] for i, call in enumerate([bad, well, well, bad, bad])]
    records = {record.step: record for record in loose.report.guard.records}
    assert records[0].tripped == (1,)
    assert records[1].dense == (1,), "not probed, and dense still"
    assert records[2].dense == (), "probed, and well under the budget: sparse again"
    assert 3 not in records, "not probed"
    assert records[4].tripped == (1,), "probed, and over it anew"
    assert torch.equal(outputs[2], between)
    torch.testing.assert_close(outputs[4][:, :, 1], dense(bad)[:, :, 1])
    never = Calls(**GNA, guard=QualityGuard(every=1, release=0))
    for step, call in enumerate([bad, well, well]):
        never.forward([call], step)
    assert [record.dense for record in never.report.guard.records] == [(1,)] * 3


def test_a_layer_goes_dense_as_a_whole_once_most_heads_are_over():
    calls = Calls(**GNA)
    bad = needle((0, 1, 2))
    calls.forward([bad, near()], 0)
    outputs = calls.forward([bad, near()], 1)
    torch.testing.assert_close(outputs[0], dense(bad))
    report = calls.report
    assert report.guard.dense_layers == ((0, "cond"),)
    assert [call.reason for call in report.calls] == [
        "", "", "quality guard: the layer was over the budget", "",
    ]  # fmt: skip
    assert report.calls[0].repaired == 0.75
    assert report.calls[0].density == pytest.approx(0.25 * report.calls[1].density + 0.75)


def test_branches_decide_for_themselves():
    calls = Calls(**GNA)
    calls.forward([needle((1,))], 0, "cond")
    calls.forward([near()], 0, "uncond")
    calls.forward([near()], 1, "uncond")
    calls.forward([near()], 1, "cond")
    records = calls.report.guard.records
    assert [(r.branch, r.step, r.dense) for r in records] == [
        ("cond", 0, (1,)), ("uncond", 0, ()), ("cond", 1, (1,)),
    ]  # fmt: skip


@pytest.mark.parametrize("action", ["layer", "step", "report"])
def test_actions(action):
    calls = Calls(**GNA, guard=QualityGuard(action=action))
    bad = needle((1,))
    first = calls.forward([bad, near()], 0)
    second = calls.forward([near(), near()], 1)
    report = calls.report
    dense_calls = [bool(call.reason) or call.repaired for call in report.calls]
    exact = [torch.allclose(out, dense(near()), atol=1e-5) for out in second]
    if action == "layer":
        assert dense_calls == [1.0, 0.0, True, 0.0]
        assert exact == [True, False]
    elif action == "step":
        assert dense_calls == [0.25, True, True, True]
        assert exact == [True, True]
        assert report.guard.dense_from == 0
    else:
        assert dense_calls == [0.0] * 4
        assert error_of(first[0], dense(bad))[1] > 0.6
        assert report.guard.trips == 1
        assert "none repaired" in str(report)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("every", [1, 1000])
def test_what_is_not_finite_is_repaired_in_every_call(monkeypatch, bad, every):
    """One value of one head is not finite, in a row that no probe looks at."""
    original, broken = TorchOperator.run, []

    def run(self, query, *args, **kwargs):
        output, lse = original(self, query, *args, **kwargs)
        if broken:
            output[0, 100, 2, 3] = bad
        return output, lse

    monkeypatch.setattr(TorchOperator, "run", run)
    calls = Calls(**GNA, guard=QualityGuard(rows=2, every=every))
    calls.forward([near()], 0)
    broken.append(True)
    with pytest.warns(QualityWarning, match="1 heads not finite"):
        (output,) = calls.forward([near()], 1)
    assert output.isfinite().all()
    torch.testing.assert_close(output[:, :, 2], dense(near())[:, :, 2])
    guard = calls.report.guard
    assert guard.records[-1].not_finite == guard.records[-1].dense == (2,)
    assert guard.not_finite == 1
    json.dumps(calls.report.to_dict(), allow_nan=False)


def test_a_new_generation_begins_anew():
    calls = Calls(**GNA)
    first = [calls.forward([needle((1,))], step)[0] for step in range(2)]
    again = [calls.forward([needle((1,))], step, generation=1)[0] for step in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(calls.report.guard.records) == 2
    (output,) = calls.forward([near()], 0, generation=2)
    (expected,) = Calls(**GNA, guard=False).forward([near()])
    assert torch.equal(output, expected)


def test_outside_a_denoising_loop_nothing_is_remembered():
    calls = Calls(**GNA)
    calls.forward([needle((1,))], None)
    (output,) = calls.forward([near()], None)
    (expected,) = Calls(**GNA, guard=False).forward([near()])
    assert torch.equal(output, expected)


def test_no_random_numbers_are_drawn():
    calls = Calls(**GNA)
    call = needle((1,))
    torch.manual_seed(7)
    calls.forward([call])
    after = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(3))


def test_short_sequences_stay_dense_and_unprobed():
    calls = Calls(**GNA, min_tokens=2048)
    calls.forward([needle((1,))])
    assert calls.report.guard.records == ()
    assert "quality guard" not in str(calls.report)


def test_a_guard_with_nothing_to_watch_is_refused():
    pipe = Calls(**GNA).pipe
    with pytest.raises(OptionError, match="no attention method is chosen"):
        accelerate_pipeline(pipe, "first_block_cache", guard=True)


def broken_at_will(monkeypatch) -> list[bool]:
    """Take all calls for a GPU's short ones, that are not finite while the list holds something."""
    original, broken = TorchOperator.run, []

    def run(self, query, *args, **kwargs):
        output, lse = original(self, query, *args, **kwargs)
        if broken:
            output[0, 100, 2, 3] = math.nan
        return output, lse

    monkeypatch.setattr(TorchOperator, "run", run)
    monkeypatch.setattr(engine, "is_short", lambda *_: True)
    return broken


def test_short_calls_of_a_gpu_are_told_a_forward_later_and_then_waited_for(monkeypatch):
    broken = broken_at_will(monkeypatch)
    calls = Calls(**GNA)
    calls.forward([near()], 0)
    broken.append(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QualityWarning)
        (lost,) = calls.forward([near()], 1)
    assert not lost.isfinite().all()
    with pytest.warns(QualityWarning, match="layers 0 to 0.*next generation is repaired"):
        calls.forward([near()], 2)
    with pytest.warns(QualityWarning, match="1 heads not finite"):
        (output,) = calls.forward([near()], 3)
    torch.testing.assert_close(output[:, :, 2], dense(near())[:, :, 2])


@pytest.mark.parametrize("seen_by", ["the last step", "the report", "the next generation"])
def test_nothing_that_is_not_finite_stays_untold(monkeypatch, seen_by):
    broken = broken_at_will(monkeypatch)
    calls = Calls(**GNA)
    calls.forward([near()], 47)
    broken.append(True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", QualityWarning)
        calls.forward([near()], 49 if seen_by == "the last step" else 48)
        if seen_by == "the report":
            _ = calls.report
        elif seen_by == "the next generation":
            broken.clear()
            calls.forward([near()], 0, generation=1)
    assert ["next generation is repaired" in str(one.message) for one in told] == [True]


def test_short_calls_of_a_gpu_are_probed_a_quarter_as_often():
    probed = [call for call in range(40) if QualityGuard().probes(1, call)]
    seldom = [call for call in range(40) if QualityGuard().probes(1, call, seldom=True)]
    assert probed == [0, 3, 7, 11, 15, 19, 23, 27, 31, 35, 39]
    assert seldom == [0, 15, 31]
    assert all(QualityGuard(every=1).probes(1, call, seldom=True) for call in range(40))
