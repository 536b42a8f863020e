"""Densities per head where two Ulysses ranks share the heads; a ring refuses them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from ranks import run_ranks
from tiny_pipelines import TINY_PIPELINES, run_tiny

from dit_accel import (
    QualityGuard,
    accelerate_pipeline,
    acceleration_report,
    parallelize_pipeline,
    unparallelize_pipeline,
)
from dit_accel.errors import ContextParallelError, OptionError
from dit_accel.parallel.reports import report_of_ranks
from dit_accel.per_head.curves import measure_curves
from dit_accel.per_head.method import PerHead
from dit_accel.registry import resolve_method

pytestmark = pytest.mark.slow
METHODS: dict[str, dict[str, Any]] = {
    "gna": {"block_size": 16},
    "gna pooled": {"block_size": 16, "remainder": "pooled"},
    "psa": {"query_block": 16, "key_block": 16},
    "pisa": {"block_size": 16, "terms": 0},
}
ROWS = ((0.6, 1.0), (1.0, 0.7), (1.0, 1.0), (0.8, 0.6))
"""Of two heads, one per rank: one may be all dense while the other isn't."""


def _compared(family: str, name: str) -> dict[str, Any]:
    """Generate on this rank alone, and on both; the guard must judge the same calls on both."""
    build, arguments = TINY_PIPELINES[family]
    arguments = arguments | {"num_inference_steps": 2}
    pipe, base = build(), resolve_method(name.split()[0], **METHODS[name])
    accelerate_pipeline(pipe, "dense")
    run_tiny(pipe, arguments)
    layers = 1 + max(call.layer for call in acceleration_report(pipe).calls)
    method = PerHead(base, 0.8, tuple(ROWS[layer % 4] for layer in range(layers)))
    options = {"dense_steps": 0, "dense_layers": 0, "min_tokens": 0}
    accelerate_pipeline(pipe, method, **options, guard=QualityGuard(action="report"))
    alone = run_tiny(pipe, arguments)
    before = acceleration_report(pipe)
    parallelize_pipeline(pipe, ulysses=2)
    spread = run_tiny(pipe, arguments)
    after = report_of_ranks(acceleration_report(pipe))
    unparallelize_pipeline(pipe)
    return {
        "difference": float((alone - spread).abs().max()),
        "dense": [[bool(call.reason) for call in report.calls] for report in (before, after)],
        "density": (before.density, after.density),
        "errors": [[e for r in one.guard.records for e in r.errors] for one in (before, after)],
    }


def _refused() -> dict[str, str]:
    build, arguments = TINY_PIPELINES["wan"]
    pipe, base = build(), resolve_method("gna", block_size=16)
    found = {}
    with pytest.raises(OptionError) as error:
        measure_curves(parallelize_pipeline(pipe, ulysses=2), base, [arguments])
    found["measuring"] = str(error.value)
    unparallelize_pipeline(pipe)
    layers = len(pipe.transformer.blocks)
    accelerate_pipeline(pipe, PerHead(base, 0.8, (ROWS[0],) * layers), min_tokens=0, guard=False)
    parallelize_pipeline(pipe, ring=2)
    with pytest.raises(ContextParallelError) as ring:
        run_tiny(pipe, arguments)
    found["ring"] = str(ring.value)
    return found


def _cases() -> dict[str, Any]:
    warnings.simplefilter("ignore")
    found = {f"{family} {name}": _compared(family, name) for family in ("wan", "flux")
             for name in METHODS}  # fmt: skip
    return {"compared": found, "refused": _refused()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each of two ranks found."""
    found = run_ranks(_cases)
    assert not any(isinstance(one, str) for one in found), found
    return found


def test_ranks_give_the_output_of_one(ranks):
    for rank in ranks:
        for name, found in rank["compared"].items():
            assert found["difference"] < 1e-5, name
            before, after = found["dense"]
            assert after == before, name
            assert set(before) == {False, True}, "one layer is dense on both ranks, others on none"
            assert found["errors"][1] == pytest.approx(found["errors"][0], rel=1e-3, abs=1e-5), name
            assert found["density"][1] == pytest.approx(found["density"][0], abs=1e-6), name


def test_measuring_on_ranks_and_rings_are_refused(ranks):
    for rank in ranks:
        assert "before parallelize_pipeline" in rank["refused"]["measuring"]
        assert "ulysses=" in rank["refused"]["ring"]
