"""Rows are kept as they are made; failures are rows, and a later run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel.bench.measuring import alternating_ms, manifest
from dit_accel.bench.runs import ResultFile, run_tasks
from dit_accel.errors import OperatorUnavailableError, OptionError

MANIFEST = {"gpu": "Some GPU", "torch": "2.11", "commit": "abc", "seed": 0}
TASKS = [{"what": what} for what in ("fine", "refused", "memory", "broken", "fine again")]


@dataclass
class Moody:
    """A bench of which some tasks go wrong."""

    asked: list[str] = field(default_factory=list)

    def measure(self, task: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append(task["what"])
        if task["what"] == "refused":
            raise OperatorUnavailableError("not here")
        if task["what"] == "memory":
            raise torch.OutOfMemoryError("tried to allocate a lot")
        if task["what"] == "broken":
            raise ZeroDivisionError("oh")
        if task["what"] == "dies":
            os._exit(7)
        if task["what"] == "hangs":
            while True:
                pass
        return {"ms": 1.0, "process": os.getpid()}


def results(output: Path | None = None, restart: bool = False, **about: Any) -> ResultFile:
    return ResultFile("kernel", {**MANIFEST, **about}, {"sizes": (1, 2)}, output, restart)


def test_failures_are_rows_and_the_run_goes_on(tmp_path):
    kept = results(tmp_path / "rows.json")
    run_tasks(Moody(), TASKS, kept)
    fine, refused, memory, broken, again = kept.rows
    assert fine["ms"] == again["ms"] == 1.0
    assert refused["refused"] == "not here"
    assert memory["out_of_memory"]
    assert "tried to allocate" in memory["failed"]
    assert broken["failed"] == "ZeroDivisionError: oh"
    assert "measure" in broken["trace"]
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["rows"] == kept.rows
    assert {row["commit"] for row in written["rows"]} == {"abc"}
    assert all(row["date"] for row in written["rows"])


def test_rows_are_written_one_by_one(tmp_path):
    seen = []
    output = tmp_path / "rows.json"
    run_tasks(
        Moody(),
        TASKS[:2],
        results(output),
        show=lambda row: seen.append(len(json.loads(output.read_text())["rows"])),
    )
    assert seen == [1, 2]


def test_a_later_run_measures_what_is_missing_or_failed(tmp_path):
    output, first, second = tmp_path / "rows.json", Moody(), Moody()
    run_tasks(first, TASKS[:4], results(output))
    kept = results(output, commit="def")
    run_tasks(second, TASKS, kept)
    assert second.asked == ["refused", "memory", "broken", "fine again"]
    assert len(kept.rows) == len(TASKS)
    assert [row["commit"] for row in kept.rows if "ms" in row] == ["abc", "def"]


def test_force_starts_again(tmp_path):
    output = tmp_path / "rows.json"
    run_tasks(Moody(), TASKS, results(output))
    assert results(output, restart=True).rows == []


def test_rows_of_another_machine_are_not_mixed_in(tmp_path):
    output = tmp_path / "rows.json"
    run_tasks(Moody(), TASKS[:1], results(output))
    with pytest.raises(OptionError, match="another gpu, torch"):
        results(output, gpu="Other", torch="2.13")
    with pytest.raises(OptionError, match="another sizes"):
        ResultFile("kernel", MANIFEST, {"sizes": (1, 3)}, output)
    with pytest.raises(OptionError, match="kind of bench"):
        ResultFile("step", MANIFEST, {"sizes": (1, 2)}, output)
    output.write_text("{}")
    with pytest.raises(OptionError, match="no result"):
        results(output)


def test_a_process_that_dies_or_hangs_costs_its_row_alone():
    kept = results()
    tasks = [{"what": what} for what in ("fine", "dies", "fine again", "hangs", "fine at last")]
    run_tasks(Moody(), tasks, kept, timeout_s=5)
    assert kept.rows[1]["failed"] == "its process died (exit code 7)"
    assert kept.rows[3]["failed"] == "nothing after 5 s: its process was killed"
    processes = [row["process"] for row in kept.rows if "process" in row]
    assert len(set(processes)) == 3
    assert os.getpid() not in processes


def test_runs_take_turns():
    order: list[str] = []
    times = alternating_ms([lambda: order.append("a"), lambda: order.append("b")], device="cpu")
    assert order == ["a", "b"]
    assert all(time >= 0 for time in times)


def test_manifest_says_where_and_with_what():
    about = manifest("abc", dense_backend="cudnn")
    assert about["commit"] == "abc"
    assert about["dense_backend"] == "cudnn"
    for name in ("date", "gpu", "torch", "triton", "cudnn", "seed"):
        assert name in about
    assert set(about["peers"]) == {"diffusers", "flash-attn-4", "sageattention", "natten"}
