"""Replaying the automatic choice on a measured grid."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "auto_replay.py"
EASY, FIRST = "easycache", "first_block_cache"


def row(method, threshold, speedup, psnr_db):
    options = {method: {"threshold": threshold, "first_steps": 2}}
    return {
        "grid": {"methods": [method], "options": options},
        "speedup": speedup,
        "psnr_db": psnr_db,
    }


@pytest.fixture(scope="module")
def auto_replay():
    spec = importlib.util.spec_from_file_location("auto_replay_bench", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # named tuples look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def grid(tmp_path, auto_replay):
    """EasyCache loses 2 dB a step; the other is faster, and half of its prompts are bad."""
    steps = range(1, 10)
    good = [row(EASY, n, 1 + n / 10, [45 - 2 * n + i % 4 / 10 for i in range(32)]) for n in steps]
    torn = [20.0 if i % 2 == 0 else None for i in range(32)]  # None: no difference
    rows = [*good, row(FIRST, 1, 3.0, torn), {"budget": 30, "psnr_db": [1.0]}]
    path = tmp_path / "auto-x.json"
    path.write_text(json.dumps({"rows": rows}))
    return auto_replay.read(path)


def test_lines_go_from_weak_to_strong(grid, auto_replay):
    lines = {line.method: line for line in auto_replay.lines(grid)}
    assert lines[EASY].values == tuple(range(1, 10))
    assert lines[EASY].knob == "threshold"
    assert lines[EASY].own == {"first_steps": 2}
    assert lines[FIRST].at(0).key in grid


def test_what_is_chosen_keeps_to_the_budget(grid, auto_replay):
    kept, share, of_best, trials, generations = auto_replay.replay(grid, 16, 30)
    assert (kept, share) == (1, 1)
    assert of_best == pytest.approx(1.0, abs=0.06)  # 7 steps, or one less to be careful
    assert trials <= len(grid)
    assert generations < 16 * trials  # what is hopeless ends early


def test_nothing_within_the_budget_is_dense(grid, auto_replay):
    kept, share, of_best, *_ = auto_replay.replay(grid, 16, 60)
    assert (kept, share, of_best) == (1, 1, 1)


def test_blocks_that_were_spared_can_stand_for_speed(tmp_path, auto_replay):
    path = tmp_path / "auto-x.json"
    rows = [row(EASY, 1, 0.9, [40.0] * 32) | {"blocks_run": 0.4}, row(FIRST, 1, 1.2, [40.0] * 32)]
    path.write_text(json.dumps({"rows": [rows[0], rows[1] | {"blocks_run": None}]}))
    assert [one.speedup for one in auto_replay.read(path).values()] == [0.9, 1.2]
    assert [one.speedup for one in auto_replay.read(path, True).values()] == [2.5, 1.0]
