"""The line of requests: one at a time, in turn, cancelled at once, and never a trace for words."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dit_accel.app import views
from dit_accel.app.jobs import Job, Jobs
from dit_accel.errors import OptionError

WAIT_S = 30


@pytest.fixture
def cleaned() -> list[int]:
    return []


@pytest.fixture
def jobs(cleaned) -> Iterator[Jobs]:
    jobs = Jobs(max_waiting=2, clean_up=lambda: cleaned.append(1))
    yield jobs
    jobs.close()


class Held:
    """Work that goes on until it is let go or cancelled."""

    def __init__(self) -> None:
        self.began, self.let_go = threading.Event(), threading.Event()

    def __call__(self, job: Job) -> str:
        self.began.set()
        while not self.let_go.wait(0.01):
            job.report("holding", 1, 4)
        return "held"


def settled(jobs: Jobs, *others: Job) -> None:
    """Wait until the line is empty, by being the last in it."""
    last = threading.Event()
    jobs.submit("the last", lambda job: last.set())
    assert last.wait(WAIT_S)
    assert all(job.is_over for job in others)


def test_work_is_done_in_turn(jobs, cleaned):
    held, order = Held(), []
    first = jobs.submit("a", held)
    assert held.began.wait(WAIT_S)
    second = jobs.submit("b", lambda job: order.append("b"))
    assert [jobs.ahead_of(job) for job in (first, second)] == [0, 1]
    assert "1 request before yours" in views.progress(second, 1)
    held.let_go.set()
    settled(jobs, first, second)
    assert (first.state, first.result, order, cleaned) == ("done", "held", ["b"], [])


def test_cancelling_stops_what_runs_and_takes_what_waits_out(jobs, cleaned):
    held = Held()
    running, waiting = jobs.submit("a", held), jobs.submit("b", lambda job: pytest.fail("ran"))
    assert held.began.wait(WAIT_S)
    jobs.cancel("b")
    assert waiting.state == "cancelled"
    jobs.cancel("a")
    settled(jobs, running)
    assert (running.state, cleaned) == ("cancelled", [1])


def test_nobody_cancels_for_another(jobs):
    held = Held()
    job = jobs.submit("a", held)
    assert held.began.wait(WAIT_S)
    jobs.cancel("b")
    assert not job.is_cancelling
    held.let_go.set()
    settled(jobs, job)
    assert job.state == "done"


def test_the_line_has_an_end(jobs):
    held = Held()
    jobs.submit("a", held)
    assert held.began.wait(WAIT_S)
    with pytest.raises(OptionError, match="under way already: wait for it, or cancel it"):
        jobs.submit("a", held)
    jobs.submit("b", lambda job: None)
    jobs.submit("c", lambda job: None)
    with pytest.raises(OptionError, match="2 requests are waiting already: try again"):
        jobs.submit("d", lambda job: None)
    held.let_go.set()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OptionError("say what to do."), "say what to do."),
        (torch.OutOfMemoryError("CUDA out of memory"), "take a smaller size"),
        (OSError(28, "No space left on device", "/secret/place"), "No space left on device"),
        (ValueError("/secret/place"), r"did not foresee \(ValueError\)"),
    ],
    ids=["refusal", "memory", "disk", "unforeseen"],
)
def test_failures_are_words_without_traces_and_free_memory(jobs, cleaned, error, words):
    def fail(job: Job) -> Any:
        raise error

    job = jobs.submit("a", fail)
    settled(jobs, job)
    assert job.state == "failed"
    assert len(cleaned) == 1
    assert "secret" not in job.refusal
    assert re.search(words, job.refusal)


def test_progress_tells_steps_and_time_left():
    job = Job("a", lambda job: None, state="running")
    job.report("denoising", 0, 10)
    assert job.seconds_left is None
    job.report("denoising", 5, 10)
    assert job.seconds_left is not None
    shown = views.progress(job, 0)
    assert "5 of 10" in shown
    assert 'aria-valuenow="50"' in shown
    assert "left" in shown


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (59, "59 s"), (61, "1 min"), (5400, "1.5 h")]
)
def test_durations_are_words(seconds, words):
    assert views.duration(seconds) == words
