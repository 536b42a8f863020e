"""The study of the cost model predicts and times the same forwards, and goes on where it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_it_predicts_measures_and_goes_on(tmp_path):
    output = tmp_path / "cost-model.json"

    def run(*more: str) -> tuple[dict, dict]:
        command = [sys.executable, str(ROOT / "benchmarks" / "cost_model.py"), "--device", "cpu"]
        command += ["--models", "wan2.1-14b", "--size", "toy", "--density", "0.4", "--repeats", "1"]
        command += ["--output", str(output), "--commit", "none", *more]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(output.read_text()), json.loads(done.stdout[done.stdout.index("\n{\n") :])

    content, told = run("--methods", "gna")
    assert content["manifest"]["clock"] == "process_time"
    assert [row["guard"] for row in content["rows"]] == [True, False]
    for row in content["rows"]:
        saved = 4 * (row["call_dense_ms"] - row["call_ms"])
        predicted = row["predicted_measured_ms"]
        assert predicted == pytest.approx(max(row["dense_ms"] - saved, 0.02 * row["dense_ms"]))
        assert row["off_measured"] == pytest.approx(predicted / row["measured_ms"] - 1)
        assert row["operators"] == ["torch"]
        assert "predicted_table_ms" not in row  # no table of this card
    assert told["within_ten_percent"].keys() == {"wan2.1-14b toy step measured"}
    again, _ = run("--methods", "gna", "psa", "--guard", "off")
    assert again["rows"][:2] == content["rows"]
    assert [row["method"] for row in again["rows"]] == ["gna", "gna", "psa"]
