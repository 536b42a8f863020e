"""Two runs are compared sample by sample; what can't be compared is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dit_accel.errors import OptionError
from dit_accel.eval.comparing import Limits, check_run, compare_runs
from dit_accel.eval.results import read_results, write_results


def results(psnr_db: float = 30.0, prompts: int = 4, generate_s: float = 1.0) -> dict[str, Any]:
    """Return results of dense and gna, whose PSNR differs from prompt to prompt."""
    rows: list[dict[str, Any]] = []
    for label in ("dense", "gna"):
        for index in range(prompts):
            row: dict[str, Any] = {"method": label, "index": index, "seed": index}
            row |= {"prompt": f"prompt {index}", "size": [9, 64, 64], "following": 0.5}
            if label == "gna":
                row["fidelity"] = {"psnr_db": psnr_db + index}
            rows.append(row)
    methods: dict[str, Any] = {label: {} for label in ("dense", "gna")}
    summary = [{"method": label, "speed": {"generate_s": generate_s}} for label in methods]
    return {
        "kind": "eval", "settings": {}, "methods": methods, "summary": summary, "problems": [],
        "rows": rows,
    }  # fmt: skip


def test_equal_runs_differ_by_nothing():
    found = compare_runs(results(), results())
    assert not found.problems
    assert [(row["method"], row["metric"]) for row in found.rows] == [
        ("dense", "following"),
        ("gna", "psnr_db"),
        ("gna", "following"),
    ]
    assert {row["delta"] for row in found.rows} == {0.0}


def test_differences_are_paired_and_have_an_interval():
    second = results()
    for row, change in zip(second["rows"][4:], (1, 2, 3, 6), strict=True):
        row["fidelity"]["psnr_db"] += change
    row = compare_runs(results(), second).rows[1]
    assert row["delta"] == pytest.approx(3)
    low, high = row["delta_interval"]
    assert 1 <= low < 3 < high <= 6
    assert (row["first"], row["second"], row["prompts"]) == (31.5, 34.5, 4)


def test_what_only_one_run_has_is_named_and_the_rest_compared():
    second = results(prompts=3)
    second["methods"]["psa"] = {}
    second["rows"][0]["prompt"] = "another"
    second["rows"][4]["size"] = [9, 32, 64]
    second["problems"] = ["psa, prompt 0, seed 0: failed"]
    found = compare_runs(results(), second)
    assert found.problems == [
        "psa is in the second run only",
        "second run: psa, prompt 0, seed 0: failed",
        "dense: the second run lacks prompt 3 (seed 3)",
        "dense: the runs have other texts for prompt 0 (seed 0)",
        "gna: the second run lacks prompt 3 (seed 3)",
        "gna: sizes differ, 9x64x64 and 9x32x64 (frames x height x width), for prompt 1 (seed 1)",
    ]
    assert {row["method"]: row["prompts"] for row in found.rows} == {"dense": 2, "gna": 2}


def test_a_check_names_what_dropped_further_than_allowed():
    limits = Limits(psnr_drop=0.5)
    assert not check_run(results(29.6), results(), limits).problems
    (problem,) = check_run(results(29.4), results(), limits).problems
    assert problem == "gna: PSNR, dB dropped by 0.6, more than 0.5 (31.5 to 30.9)"
    assert not check_run(results(35.0), results(), limits).problems


def test_a_check_wants_all_that_the_baseline_has_and_no_more():
    limits = Limits(psnr_drop=0.5)
    more = results()
    more["methods"]["psa"] = {}
    assert not check_run(more, results(), limits).problems
    less = copy.deepcopy(results())
    del less["methods"]["gna"]
    problems = check_run(less, results(), limits).problems
    assert "gna is in the first run only" in problems
    assert "PSNR, dB was asked for, but not measured in both" in problems


def test_other_limits():
    slow = results(generate_s=1.3)
    (problem,) = check_run(slow, results(), Limits(slowdown=0.2)).problems[:1]
    assert problem == "dense: a sample takes 1.3 s, 30% more than 1 s"
    for row in slow["rows"]:
        row["following"] = 0.4
    assert len(check_run(slow, results(), Limits(following_drop=0.05)).problems) == 2
    assert not check_run(slow, results(), Limits(following_drop=0.2)).problems


def test_results_come_back_as_written(tmp_path):
    write_results(results(), tmp_path / "results.json")
    assert read_results(tmp_path) == read_results(tmp_path / "results.json") == results()
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(OptionError, match="no results of"):
        read_results(tmp_path)
    with pytest.raises(OptionError, match="no results of"):
        read_results(tmp_path / "nowhere")
