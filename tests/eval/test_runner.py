"""Runs end the same however often they are cut off, and by however many processes."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from eval_fakes import FakeSampler, fake_run, without_times

from dit_accel.errors import OptionError
from dit_accel.eval import runner
from dit_accel.eval.candidates import make_candidates
from dit_accel.eval.results import read_results
from dit_accel.eval.runner import run_evaluation
from dit_accel.eval.share import Share
from dit_accel.eval.suites import load_suite
from dit_accel.files import write_frames
from dit_accel.journal import Journal

TESTS = Path(__file__).parents[1]
LABELS = ("dense", "gna", "radial")


def start_python(*arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths, **variables}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def sample_keys(folder: Path) -> list[tuple[str, int, int]]:
    rows = Journal(folder / runner.JOURNAL_FILE).rows()
    return [(r["method"], r["index"], r["seed"]) for r in rows if r["kind"] == "sample"]


def clips(folder: Path) -> dict[str, bytes]:
    files = sorted((folder / runner.CLIPS).rglob("*"))
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.is_file()}


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_as_an_unbroken_one(tmp_path):
    finish(start_python(TESTS / "eval_killed.py", tmp_path, "10"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = read_results(whole)
    assert without_times(read_results(killed)) == without_times(expected)
    assert len(expected["rows"]) == 6 * len(LABELS)
    assert not expected["problems"]
    assert sorted(sample_keys(killed)) == sorted(sample_keys(whole))
    assert len(set(sample_keys(killed))) == len(sample_keys(killed))
    assert clips(killed) == clips(whole)
    assert len(read_results(killed)["sessions"]) > 5  # others died before they were noted
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in whole.iterdir())


@pytest.mark.slow
def test_two_processes_and_one_give_the_same_table(tmp_path):
    # What a launcher sets for the processes that it starts.
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        start_python(
            *(TESTS / "eval_fakes.py", tmp_path / "two"),
            **{"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2", **meeting},
        )
        for rank in ("0", "1")
    ]
    for process in processes:
        finish(process)
    run_evaluation(fake_run(), tmp_path / "one", sampler=FakeSampler())
    two = read_results(tmp_path / "two")
    assert two["manifest"]["processes"] == 2
    assert without_times(two) == without_times(read_results(tmp_path / "one"))
    assert clips(tmp_path / "two") == clips(tmp_path / "one")


def test_a_share_makes_its_own_batches_whatever_others_made(tmp_path):
    first, second = FakeSampler(), FakeSampler()
    assert run_evaluation(fake_run(), tmp_path, share=Share(0, 2), sampler=first)["problems"]
    assert run_evaluation(fake_run(), tmp_path, share=Share(1, 2), sampler=second) is None
    assert len(first.asked) == 4 * len(LABELS)
    assert len(second.asked) == 2 * len(LABELS)
    assert not set(first.asked) & set(second.asked)
    last = FakeSampler()
    assert not run_evaluation(fake_run(), tmp_path, sampler=last)["problems"]
    assert not last.asked


def test_what_fails_is_named_and_made_by_the_next_call(tmp_path):
    run = fake_run()
    prompt = run.suite.entries[0].prompt
    sampler = FakeSampler(failing={("gna", prompt)})
    results = run_evaluation(run, tmp_path, sampler=sampler)
    assert len(results["problems"]) == run.batch  # what is generated together fails together
    assert "gna, prompt 0, seed 0: RuntimeError: no" in results["problems"][0]
    assert len(results["rows"]) == 6 * len(LABELS) - run.batch
    by_method = {line["method"]: line["samples"] for line in results["summary"]}
    assert by_method == {"dense": 6, "gna": 4, "radial": 6}

    again = FakeSampler()
    mended = run_evaluation(run, tmp_path, sampler=again)
    assert not mended["problems"]
    assert {label for label, _ in again.asked} == {"dense", "gna"}  # gna has to be compared
    unbroken = run_evaluation(run, tmp_path / "unbroken", sampler=FakeSampler())
    assert without_times(mended) == without_times(unbroken)


def test_without_its_dense_sample_a_method_is_not_measured(tmp_path):
    run = fake_run()
    sampler = FakeSampler(failing={("dense", run.suite.entries[0].prompt)})
    results = run_evaluation(run, tmp_path, sampler=sampler)
    assert len(results["problems"]) == run.batch * len(LABELS)
    assert "the dense baseline failed" in results["problems"][-1]


def test_a_dense_sample_that_can_not_be_repeated_is_noticed(tmp_path):
    prompt = fake_run().suite.entries[0].prompt
    run_evaluation(fake_run(), tmp_path, sampler=FakeSampler(failing={("gna", prompt)}))
    results = run_evaluation(fake_run(), tmp_path, sampler=FakeSampler(brightness=0.9))
    assert [problem.partition(":")[0] for problem in results["problems"]] == [
        "gna, prompt 0, seed 0",
        "gna, prompt 1, seed 1",
    ]
    assert "compared with a dense sample that differs" in results["problems"][0]


def test_a_full_disk_costs_the_clips_that_it_has_no_room_for(tmp_path, monkeypatch):
    def no_room(path: Path, *rest: object) -> None:
        if "radial/0001" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_frames(path, *rest)

    monkeypatch.setattr(runner, "write_frames", no_room)
    results = run_evaluation(fake_run(), tmp_path, sampler=FakeSampler())
    (problem,) = results["problems"]
    assert problem.startswith("radial, prompt 1, seed 1: clips/radial/0001-1.png could not be")
    assert "No space left" in problem
    monkeypatch.undo()
    assert not run_evaluation(fake_run(), tmp_path, sampler=FakeSampler())["problems"]


def test_a_clip_that_was_deleted_is_made_again(tmp_path):
    results = run_evaluation(fake_run(), tmp_path, sampler=FakeSampler())
    before = clips(tmp_path)
    (tmp_path / results["rows"][0]["clip"]).unlink()
    again = run_evaluation(fake_run(), tmp_path, sampler=FakeSampler())
    assert clips(tmp_path) == before
    assert without_times(again) == without_times(results)


def test_methods_can_be_added_and_nothing_else_changed(tmp_path):
    run_evaluation(fake_run(), tmp_path, sampler=FakeSampler())
    sampler = FakeSampler()
    more = fake_run(candidates=make_candidates(["gna", "radial", "psa"]))
    results = run_evaluation(more, tmp_path, sampler=sampler)
    assert list(results["methods"]) == ["dense", "gna", "radial", "psa"]
    assert {label for label, _ in sampler.asked} == {"dense", "psa"}
    assert len(results["rows"]) == 24
    other = make_candidates(["gna"], options={"gna": {"density": 0.5}})
    with pytest.raises(OptionError, match="another gna's options"):
        run_evaluation(fake_run(candidates=other), tmp_path, sampler=FakeSampler())
    with pytest.raises(OptionError, match="another steps"):
        run_evaluation(fake_run(steps=3), tmp_path, sampler=FakeSampler())
    suite = load_suite("smoke")
    with pytest.raises(OptionError, match="another suite"):
        run_evaluation(fake_run(suite=suite), tmp_path, sampler=FakeSampler())
    restarted = run_evaluation(fake_run(steps=3), tmp_path, sampler=FakeSampler(), restart=True)
    assert list(restarted["methods"]) == list(LABELS)
    assert not (tmp_path / "clips" / "psa").exists()


def test_folders_that_are_no_run_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("dear diary")
    with pytest.raises(OptionError, match="other content"):
        run_evaluation(fake_run(), tmp_path, sampler=FakeSampler())
    with pytest.raises(OptionError, match="is no folder"):
        run_evaluation(fake_run(), tmp_path / "mine.txt", sampler=FakeSampler())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_results_are_measured_against_dense(tmp_path):
    run = fake_run(model="tiny-wan", suite=load_suite("smoke", "clips", 3))
    sampler = FakeSampler(size=(3, 3, 24, 32))
    results = run_evaluation(run, tmp_path, sampler=sampler, commit="abc")
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["manifest"]["commit"] == "abc"
    assert results["manifest"]["dense_backend"]
    dense, gna, _ = results["summary"]
    assert "psnr_db" not in dense
    assert dense["speed"]["speedup"] == 1.0
    assert gna["speed"]["speedup"] == pytest.approx(6 / 4)
    low, high = gna["psnr_db"]["interval"]
    assert low < gna["psnr_db"]["mean"] < high
    assert gna["following"]["delta"] == pytest.approx(
        gna["following"]["mean"] - dense["following"]["mean"]
    )
    row = results["rows"][-1]
    assert row["size"] == [3, 24, 32]
    assert row["fidelity"]["psnr_worst_db"] <= row["fidelity"]["psnr_db"]
