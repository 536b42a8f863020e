"""The guard under diffusers' Ulysses context parallelism, over two CPU processes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from ranks import run_ranks

from dit_accel import QualityGuard
from dit_accel.parallel.reports import merged

from .conftest import Calls, near, needle

GNA = {"window": (1.0, 0.4, 0.4), "block_size": 16, "dense_steps": 0, "min_tokens": 0}


def _decisions(pipe: Any) -> list[tuple[Any, ...]]:
    from dit_accel import acceleration_report

    report = acceleration_report(pipe)
    shares = [(call.step, call.layer, call.reason, call.repaired) for call in report.calls]
    return [(r.step, r.layer, r.tripped, r.dense) for r in report.guard.records] + shares


def _generate() -> dict[str, Any]:
    from diffusers import ContextParallelConfig
    from tiny_pipelines import TINY_PIPELINES, run_tiny

    from dit_accel import accelerate_pipeline, acceleration_report

    warnings.simplefilter("ignore")
    build, arguments = TINY_PIPELINES["wan"]
    arguments = arguments | {"max_sequence_length": 32}  # older diffusers split the text too
    pipe = build()
    accelerate_pipeline(pipe, "gna", **GNA, guard=QualityGuard(action="report", every=2))
    run_tiny(pipe, arguments)
    errors = sorted(e for r in acceleration_report(pipe).guard.records for e in r.errors)
    # Between two errors, so that rounding does not decide, and one rank's head trips alone.
    middle = len(errors) // 2
    amid = (errors[middle - 1] + errors[middle]) / 2
    accelerate_pipeline(pipe, "gna", **GNA, guard=QualityGuard(max_error=amid, every=2))
    alone = run_tiny(pipe, arguments)
    expected = _decisions(pipe)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    shared = run_tiny(pipe, arguments)
    found = {
        "expected": expected,
        "decided": _decisions(pipe),
        "error": float((shared - alone).abs().max()),
    }
    return found


@pytest.mark.slow
def test_two_ranks_decide_alike_for_all_heads():
    """Each rank attends with one of the two heads, and knows of both."""
    found = run_ranks(_generate)
    for result in found:
        assert not isinstance(result, str), result
        assert result["decided"] == result["expected"]
        assert result["error"] < 1e-5
    tripped = [row[2] for row in found[0]["expected"] if isinstance(row[2], tuple)]
    assert (0,) in tripped or (1,) in tripped, "a head of one rank alone"


def test_a_merged_report_holds_what_the_guards_of_both_passes_found():
    """Under CFG parallelism both ranks ran the first step, and then each a pass of its own."""
    reports = []
    for branch, call in (("cond", needle((1,))), ("uncond", needle((0, 1, 2)))):
        calls = Calls(window=(3, 3, 3), block_size=16, guard=QualityGuard(every=1))
        for first in ("cond", "uncond"):
            calls.forward([near()], 0, first)
        for step in (1, 2):
            calls.forward([call], step, branch)
        reports.append(calls.report)
    report = merged(reports)
    assert [(r.branch, r.step, r.dense) for r in report.guard.records] == [
        ("cond", 0, ()), ("uncond", 0, ()), ("cond", 1, (1,)), ("cond", 2, (1,)),
        ("uncond", 1, (0, 1, 2)),
    ]  # fmt: skip
    assert report.guard.dense_layers == ((0, "uncond"),)
    assert report.guard.repairs == round(sum(call.repaired for call in report.calls) * 4)
