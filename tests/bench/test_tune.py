"""The tuning bench: candidates are checked, and the best is kept only where it is better."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from dit_accel.bench.tune import (
    BLOCK_SPARSE,
    HOPPER,
    TOKENS,
    TuneBench,
    best_settings,
    built_in_setting,
    tune_tasks,
)
from dit_accel.kernels import block_sparse
from dit_accel.kernels.tuning import HopperConfig, KernelConfig, hopper_config

USUAL, OTHER = KernelConfig(128, 64, 4, 2), KernelConfig(64, 64, 4, 3)


def row(config: Any, tflops: float | None, **more: Any) -> dict[str, Any]:
    found = {"kernel": BLOCK_SPARSE, "dtype": "bfloat16", "head_size": 128, "density": 0.25}
    found |= {"config": asdict(config), **more}
    return found | ({"failed": "too large"} if tflops is None else {"tflops": tflops})


def best(*rows: dict[str, Any], usual: Any = USUAL) -> Any:
    return best_settings(rows, lambda row: asdict(usual), TOKENS)


def test_a_setting_must_be_better_by_more_than_runs_vary():
    assert best(row(USUAL, 500), row(OTHER, 505)).block_sparse == {(128, 2): USUAL}
    assert best(row(USUAL, 500), row(OTHER, 520)).block_sparse == {(128, 2): OTHER}
    assert best(row(USUAL, None), row(OTHER, 400)).block_sparse == {(128, 2): OTHER}
    assert best(row(USUAL, None)).block_sparse == {}


def test_each_kind_of_call_has_its_own():
    single = row(OTHER, 50, dtype="float32", head_size=64)
    assert set(best(row(USUAL, 500), single).block_sparse) == {(128, 2), (64, 4)}
    early, late = HopperConfig(persistent=True), HopperConfig()
    rows = [row(late, 600, kernel=HOPPER), row(early, 500, kernel=HOPPER),
            row(late, 500, kernel=HOPPER, density=0.1),
            row(early, 600, kernel=HOPPER, density=0.1)]  # fmt: skip
    found = best(*rows, usual=late).hopper
    assert found == {(128, "long"): late, (128, "short"): early}


def test_the_built_in_setting_is_the_one_that_the_kernel_takes():
    hopper = row(HopperConfig(), 1, kernel=HOPPER, density=0.1)
    longest = round(0.1 * TOKENS / 128)
    assert built_in_setting(hopper, "cpu", TOKENS) == asdict(hopper_config(128, longest, False))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tries it out under the interpreter")
def test_candidates_are_checked_and_timed(monkeypatch):
    tasks = list(tune_tasks("cpu", head_sizes=[16], dtypes=["float16"], quick=True))
    assert {task["kernel"] for task in tasks} == {BLOCK_SPARSE}
    bench = TuneBench("cpu", tokens=200, heads=1)
    measured = bench.measure(tasks[0])
    assert measured["tflops"] > 0
    assert measured["relative_error"] < 1e-3

    def wrong(query: Any, *rest: Any, **more: Any) -> Any:
        return torch.zeros_like(query)

    monkeypatch.setattr(block_sparse, "block_sparse_attention", wrong)
    assert "wrong result" in bench.measure(tasks[0])["failed"]


def test_out_of_memory_while_tuning_is_a_row_and_the_run_goes_on(monkeypatch):
    from dit_accel.bench.runs import ResultFile, run_tasks

    calls = iter(range(10))

    def full(query: Any, *rest: Any, **more: Any) -> Any:
        if next(calls) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros_like(query)

    monkeypatch.setattr(block_sparse, "block_sparse_attention", full)
    tasks = [row(USUAL, None) | {"dtype": "float32"}, row(OTHER, None) | {"dtype": "float32"}]
    tasks = [{k: v for k, v in task.items() if k != "failed"} for task in tasks]
    results = ResultFile("tune", {"commit": "abc"}, {})
    run_tasks(TuneBench("cpu", tokens=200, heads=1), tasks, results)
    assert results.rows[0]["out_of_memory"]
    assert "wrong result" in results.rows[1]["failed"]
