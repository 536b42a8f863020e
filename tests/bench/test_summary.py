"""The flat summary, and that the repository's is up to date."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dit_accel.bench.summary import break_even, summarise

ROOT = Path(__file__).parents[2]
STAMP = {"date": "2026-01-02T03:04:05+00:00", "commit": "abc"}


def kernel_row(contender: str, density: float, tflops: float, **more: Any) -> dict[str, Any]:
    size = {"dtype": "bfloat16", "head_size": 128, "tokens": 75_600, "lists": "random"}
    row = {**size, "density": density, "contender": contender, "tflops": tflops, "ms": 1.0}
    return {**row, **STAMP, **more}


def content(kind: str, rows: list[dict[str, Any]], **about: Any) -> dict[str, Any]:
    return {"kind": kind, "manifest": {"gpu": "NVIDIA H200", **about}, "rows": rows}


def paired(contender: str, density: float, ratio: float, ms: float = 1.0) -> dict[str, Any]:
    """A row of which the baseline took 4 ms."""
    return kernel_row(
        contender, density, 600 * ratio, ms=ms, baseline_ms=4.0, of_baseline_rate=ratio
    )


def test_kernel_keys():
    dense = kernel_row("cudnn", 1.0, 610.0) | {"lists": "dense"}
    sage = paired("sage", 1.0, 0.8) | {"lists": "dense"}
    rows = [dense, sage, paired("triton", 0.25, 0.9), paired("hopper", 0.25, 1.04),
            paired("flash-attn-4", 0.25, 1.0)]  # fmt: skip
    found = summarise({"a.json": content("kernel", rows)})
    prefix = "kernel.bf16.75600.0.25"
    assert found[f"{prefix}.ours"] == "hopper"
    assert found[f"{prefix}.vs_cudnn"] == 1.04
    assert found[f"{prefix}.vs_fa4"] == 1.04
    assert found[f"{prefix}.vs_sage"] == 1.3
    assert found[f"{prefix}.speedup"] == 4
    assert found[f"{prefix}.date"] == STAMP["date"]
    assert found[f"{prefix}.commit"] == "abc"
    assert found[f"{prefix}.file"] == "a.json"


def test_step_and_pipeline_keys():
    task = {"model": "wan2.1-14b", "size": "720p81", "layers": None}
    layers = {"layers_measured": 40, "layers_of_model": 40}
    parts = {"attention": 60.0, "matmul": 20.0, "rest": 20.0, "total": 100.0}
    rows = []
    for compiled, attention, ms in ((False, "stock", 90.0), (True, "stock", 60.0),
                                    (False, "radial", 30.0), (True, "radial", 20.0)):  # fmt: skip
        rows.append({**task, **layers, **STAMP, "compiled": compiled, "attention": attention,
                     "density": None, "measured_ms": ms, "forward_s": ms, "breakdown_ms": parts,
                     "block_density": 0.25, "attended_density": 0.2, "peak_gib": ms})  # fmt: skip
    found = summarise({"s.json": content("step", rows)})
    assert found["step.wan2.1-14b.720p81.radial.vs_eager"] == 3
    assert found["step.wan2.1-14b.720p81.radial.vs_compiled"] == 2
    assert found["step.wan2.1-14b.720p81.radial-compiled.vs_compiled"] == 3
    assert found["step.wan2.1-14b.720p81.radial.amdahl"] == round(1 / 0.55, 4)
    assert found["step.wan2.1-14b.720p81.radial.attention_share"] == 0.6
    assert found["step.wan2.1-14b.720p81.radial.peak_of_stock"] == round(1 / 3, 4)
    shared = {"model": "tiny-wan", "density": None, "block_size": None, **STAMP}
    rows = [
        {**shared, "method": "dense", "total_s": 3.0, "denoise_s": 2.0},
        {**shared, "method": "radial", "total_s": 2.0, "denoise_s": 1.0, "psnr_db": 30.0},
    ]
    found = summarise({"p.json": content("pipeline", rows)})
    assert found["pipeline.tiny-wan.radial.vs_dense"] == 1.5
    assert found["pipeline.tiny-wan.radial.loop_vs_dense"] == 2


def test_the_newer_of_two_measurements_counts():
    old = content("kernel", [paired("triton", 0.25, 0.8)])
    new = content("kernel", [paired("triton", 0.25, 0.9) | {"date": "2026-02-01"}])
    for files in ({"a": old, "b": new}, {"b": old, "a": new}):
        assert summarise(files)["kernel.bf16.75600.0.25.tflops"] == 540


def test_trials_and_studies_are_left_out():
    rows = [paired("triton", 0.25, 0.8)]
    assert summarise({"t.json": content("kernel", rows, trial=True)}) == {}
    assert summarise({"t.json": {"rows": rows, "manifest": {}}}) == {}
    failed = [kernel_row("triton", 0.25, 0) | {"failed": "oh"}]
    del failed[0]["tflops"]
    assert summarise({"t.json": content("kernel", failed)}) == {}


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([(0.1, 0.2), (0.5, 0.8), (1.0, 1.2)], 0.75),
        ([(0.1, 0.2), (0.5, 0.6)], 0.5),
        ([(0.1, 1.1), (0.5, 1.6)], None),
        ([(0.1, 1.1), (0.5, 0.9)], None),
    ],
    ids=["between", "at all", "at none", "not at the low ones"],
)
def test_break_even(times, expected):
    assert break_even(times) == (None if expected is None else pytest.approx(expected))


def test_break_even_is_a_row():
    rows = [paired("triton", 0.5, 1.0, ms=2.0), paired("triton", 1.0, 0.8, ms=5.0)]
    found = summarise({"a.json": content("kernel", rows)})
    assert found["kernel.bf16.75600.break_even.triton"] == round(0.5 + 0.5 * 0.5 / 0.75, 4)


@pytest.mark.parametrize("script", ["summary.py", "readme_tables.py"])
def test_the_repository_is_up_to_date(script):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), "--check"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
