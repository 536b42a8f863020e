"""The guard in a ring, alone and with Ulysses: it decides as on one rank, and repairs alike."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_pipelines import TINY_PIPELINES, run_tiny
from torch import Tensor

from dit_accel import (
    QualityGuard,
    accelerate_pipeline,
    acceleration_report,
    compat,
    parallelize_pipeline,
    unparallelize_pipeline,
)
from dit_accel.guard import engine
from dit_accel.operators import TorchOperator
from dit_accel.parallel.reports import report_of_ranks
from dit_accel.parallel.split import Split
from dit_accel.tracking import Moment

from .conftest import GRID, LAYERS, QKV, Calls, dense, error_of, near, needle

pytestmark = pytest.mark.slow
ROUNDING = 1e-5
GNA: dict[str, Any] = {"window": (3, 3, 3), "block_size": 16}
"""Of 252 tokens, 16 blocks, the last of them ragged: the parts hold 128 tokens and 124."""

METHODS: dict[str, dict[str, Any]] = {
    "gna": {"window": (1.0, 0.4, 0.4), "block_size": 16},  # lists
    "psa": {"query_block": 32, "key_block": 16},  # pooled blocks
}


class RankCalls(Calls):
    """Runs chosen attention calls over all ranks."""

    def __init__(self, split: dict[str, int], method: str = "gna", **options: Any) -> None:
        super().__init__(method, **options)
        parallelize_pipeline(self.pipe, **split)

    def forward(
        self, calls: list[QKV], step: int | None = 0, branch: str = "cond", generation: int = 0
    ) -> list[Tensor]:
        """Attend in one forward, a layer after the other; return whole outputs."""
        transformer, runtime = self.pipe.transformer, self.runtime
        hidden = torch.zeros(1, 16, GRID[0], 2 * GRID[1], 2 * GRID[2])
        config = compat.parallel_config(transformer)
        with runtime.tracker.hold(Moment(step, 50, branch, generation)):
            runtime.enter(transformer, {"hidden_states": hidden}, LAYERS, config)
        split = runtime._running.split
        outputs = [
            gathered(runtime.attend(*dealt(qkv, split), None, None, torch.tensor(layer)), split)
            for layer, qkv in enumerate(calls)
        ]
        runtime.leave((sum(outputs),))
        return outputs

    @property
    def report(self) -> Any:
        """Of all ranks."""
        return report_of_ranks(super().report)


def dealt(qkv: QKV, split: Split) -> list[Tensor]:
    """Return this rank's share of whole tensors."""
    group, gather = split.group, split.shares.gather
    return [x.index_select(1, gather).chunk(group.ranks, 1)[group.rank] for x in qkv]


def gathered(output: Tensor, split: Split) -> Tensor:
    """Undo `dealt`."""
    every = [torch.empty_like(output) for _ in range(split.group.ranks)]
    dist.all_gather(every, output.contiguous())
    return torch.cat(every, 1).index_select(1, split.shares.scatter)


def decisions(report: Any) -> list[tuple[Any, ...]]:
    """What the guard did, errors aside."""
    records = [(r.step, r.layer, r.not_finite, r.tripped, r.dense) for r in report.guard.records]
    calls = [(call.step, call.layer, call.reason, call.repaired) for call in report.calls]
    return [*records, *calls, report.guard.dense_layers, report.guard.dense_from]


def errors(report: Any) -> list[float]:
    """All errors that were measured."""
    return [error for record in report.guard.records for error in record.errors]


def both_ways(split: dict[str, int], steps: Sequence[list[QKV]], **options: Any) -> dict[str, Any]:
    """Run the calls of some steps on this rank alone, and over all."""
    alone, ranks = Calls(**GNA, **options), RankCalls(split, **GNA, **options)
    expected = [out for step, calls in enumerate(steps) for out in alone.forward(calls, step)]
    outputs = [out for step, calls in enumerate(steps) for out in ranks.forward(calls, step)]
    again = [
        out for step, calls in enumerate(steps) for out in ranks.forward(calls, step, generation=1)
    ]
    return {
        "decided": (decisions(alone.report), decisions(ranks.report)),
        "errors": (errors(alone.report), errors(ranks.report)),
        "difference": max(map(difference, outputs, expected)),
        "again": all(map(torch.equal, outputs, again)),
        "trips": ranks.report.guard.trips,
    }


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def needles(split: dict[str, int]) -> dict[str, Any]:
    """One far token carries all the mass of two heads; without the guard, and with it."""
    call = needle((1, 2))
    (wrong,) = RankCalls(split, **GNA, guard=False).forward([call])
    (output,) = RankCalls(split, **GNA).forward([call])
    return both_ways(split, [[call]]) | {
        "unguarded": error_of(wrong, dense(call)).tolist(),
        "guarded": error_of(output, dense(call)).tolist(),
        "others": difference(output[:, :, [0, 3]], wrong[:, :, [0, 3]]),
    }


def actions(split: dict[str, int]) -> dict[str, Any]:
    """Heads that trip, are released and trip again; layers and steps that go dense."""
    bad, well = needle((1,)), near()
    guard = partial(QualityGuard, every=2, rows=252)
    turns = [[bad], [well], [well], [bad], [bad]]
    layers = [[bad, well], [well, bad], [well, well]]
    return {
        "released": both_ways(split, turns, guard=guard()),
        "layer": both_ways(split, layers, guard=guard(action="layer")),
        "step": both_ways(split, layers, guard=guard(action="step")),
        "report": both_ways(split, layers, guard=guard(action="report")),
        "most heads": both_ways(split, [[needle((0, 1, 2))], [well]]),
        "all heads": both_ways(split, [[needle((0, 1, 2, 3))]]),
        "few rows": both_ways(split, layers, guard=QualityGuard(rows=1)),
    }


def not_finite(split: dict[str, int], short: bool) -> dict[str, Any]:
    """From the second step on one rank writes NaN, in a row that no probe looks at."""
    original, original_short, step = TorchOperator.run, engine.is_short, 0

    def run(self: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, lse = original(self, query, *args, **kwargs)
        if step and dist.get_rank() == 1:
            output[0, 100, 1, 3] = math.nan
        return output, lse

    TorchOperator.run = run  # type: ignore[method-assign]
    engine.is_short = lambda *_: short
    try:
        calls, outputs = RankCalls(split, **GNA, guard=QualityGuard(rows=2, every=1000)), []
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for step in range(4):
                outputs += calls.forward([near()], step)
    finally:
        TorchOperator.run = original  # type: ignore[method-assign]
        engine.is_short = original_short
    head = 1 + 2 * (split.get("ulysses", 1) > 1)  # its second
    expected = dense(near())[:, :, head]
    return {
        "head": head,
        "right": [difference(out[:, :, head], expected) < ROUNDING for out in outputs],
        "told late": [str(one.message) for one in told if "seen only then" in str(one.message)],
        "records": [(r.step, r.not_finite, r.dense) for r in calls.report.guard.records],
    }


def generations(split: dict[str, int]) -> dict[str, Any]:
    """Whole generations, whose text is part of the sequence, or of an odd length."""
    found = {}
    for family, changes in (("wan", {"num_frames": 9}), ("hunyuan", {}), ("flux", {}), ("sd3", {})):
        build, arguments = TINY_PIPELINES[family]
        arguments = arguments | changes | {"num_inference_steps": 2}
        pipe = build()
        for method, options in METHODS.items():
            found[f"{family} {method}"] = generated(split, pipe, arguments, method, options)
    return found


def generated(
    split: dict[str, int], pipe: Any, arguments: Any, method: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Generate by one rank and by all, with a budget between two errors."""
    options = options | {"dense_steps": 0, "dense_layers": 0, "min_tokens": 0}
    accelerate_pipeline(pipe, method, **options, guard=QualityGuard(action="report", every=2))
    run_tiny(pipe, arguments)
    measured = sorted(errors(acceleration_report(pipe)))
    middle = len(measured) // 2
    amid = (measured[middle - 1] + measured[middle]) / 2
    accelerate_pipeline(pipe, method, **options, guard=QualityGuard(max_error=amid, every=2))
    alone = run_tiny(pipe, arguments)
    expected = acceleration_report(pipe)
    parallelize_pipeline(pipe, **split)
    spread = run_tiny(pipe, arguments)
    report = report_of_ranks(acceleration_report(pipe))
    again = run_tiny(pipe, arguments)
    unparallelize_pipeline(pipe)
    return {
        "decided": (decisions(expected), decisions(report)),
        "errors": (errors(expected), errors(report)),
        "difference": difference(alone, spread),
        "again": torch.equal(spread, again),
        "trips": report.guard.trips,
        "density": (expected.density, report.density),
    }


def on_ranks(split: dict[str, int]) -> dict[str, Any]:
    """All cases."""
    warnings.simplefilter("ignore")
    found = {"needles": needles(split), **actions(split)}
    found["not finite"], found["told late"] = (not_finite(split, short) for short in (False, True))
    if split == {"ring": 2}:
        found["generations"] = generations(split)
    return found


SPLITS = {"ring": {"ring": 2}, "hybrid": {"ring": 2, "ulysses": 2}}


@pytest.fixture(scope="module", params=sorted(SPLITS))
def ranks(request) -> list[dict[str, Any]]:
    """What each rank found."""
    split = SPLITS[request.param]
    found = run_ranks(partial(on_ranks, split), math.prod(split.values()))
    assert not any(isinstance(one, str) for one in found), found
    return found


def check_alike(found: dict[str, Any]) -> None:
    """As on one rank, and the same again."""
    expected, decided = found["decided"]
    assert decided == expected
    alone, together = found["errors"]
    assert together == pytest.approx(alone, rel=1e-3, abs=1e-5)
    assert found["difference"] < ROUNDING
    assert found["again"]


def test_a_needle_trips_and_is_repaired(ranks):
    for rank in ranks:
        found = rank["needles"]
        check_alike(found)
        assert min(found["unguarded"][1:3]) > 0.6, "without the guard the output is wrong"
        assert max(found["guarded"][1:3]) < ROUNDING
        assert found["others"] == 0, "other heads stay as they are"
        assert found["decided"][1][0] == (0, 0, (), (1, 2), (1, 2))


@pytest.mark.parametrize(
    "case", ["released", "layer", "step", "report", "most heads", "all heads", "few rows"]
)
def test_decisions_and_repairs_are_those_of_one_rank(ranks, case):
    for rank in ranks:
        check_alike(rank[case])
        assert rank[case]["trips"]


def test_what_is_not_finite_on_one_rank_is_repaired_on_all(ranks):
    for rank in ranks:
        found = rank["not finite"]
        head = (found["head"],)
        assert found["right"] == [False, True, True, True]
        assert not found["told late"]
        assert found["records"] == [(0, (), ()), *((step, head, head) for step in (1, 2, 3))]
        late = rank["told late"]
        assert late["right"] == [False, False, False, True]
        assert len(late["told late"]) == 1
        assert late["records"] == [(0, (), ()), (3, head, head)]


def test_whole_generations_with_text_and_of_odd_length(ranks):
    for rank in ranks:
        for name, found in rank.get("generations", {}).items():
            check_alike(found)
            assert found["trips"], name
            assert found["density"][1] == pytest.approx(found["density"][0])
