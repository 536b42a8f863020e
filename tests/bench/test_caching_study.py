"""The study of caches runs, counts what the closed form says, and goes on where it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_pipelines import tiny_sd3

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_measures_goes_on_and_draws(tmp_path):
    folder = tmp_path / "tiny"
    tiny_sd3().save_pretrained(folder)
    defaults = {"steps": 9, "height": 128, "width": 128, "world": "pictures"}
    (folder / "dit_accel.json").write_text(json.dumps(defaults))
    output = tmp_path / "caching-tiny.json"

    def run(*more: str) -> dict:
        command = [sys.executable, str(ROOT / "benchmarks" / "caching.py"), "--models", str(folder)]
        command += ["--prompts", "1", "--output", str(tmp_path), "--commit", "none", *more]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        if "--plot" not in more:
            told = json.loads(done.stdout[done.stdout.index("\n{") :])["tiny"]
            assert told["not_the_closed_form"] == 0
        return json.loads(output.read_text())

    few = ("--caches", "taylorseer", "teacache", "--attention", "none")
    first = run(*few)
    rows = [row for row in first["rows"] if "psnr_db" in row]
    assert {row["cache"] for row in rows} == {"taylorseer"}
    assert [row["strength"] for row in rows] == first["rows"][0]["strengths"]
    assert any("no TeaCache coefficients" in row.get("refused", "") for row in first["rows"])
    again = run(*few)
    assert [row["date"] for row in again["rows"] if "psnr_db" in row] == [
        row["date"] for row in rows
    ]
    pytest.importorskip("matplotlib")
    run(*few, "--plot")
    assert (tmp_path / "caching.svg").exists()
