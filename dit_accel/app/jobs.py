"""One request at a time, the others in line; each can be followed and cancelled."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from dit_accel.errors import DitAccelError, OptionError

State = Literal["waiting", "running", "done", "failed", "cancelled"]
CLOSE_S = 10
_LOG = logging.getLogger(__name__)


class Cancelled(BaseException):
    """A job was cancelled.

    Not an `Exception`, so that nothing which goes on after failures goes on after this.
    """


@dataclass(eq=False)
class Job:
    """One request.

    Attributes:
        owner: the browser session that it belongs to.
        work: what to do; it calls `report` often, which raises `Cancelled` once that is wished.
        state: what has become of it.
        stage, done, total: what `report` was told last.
        result: what ``work`` returned.
        refusal: why it failed, in words.
    """

    owner: str
    work: Callable[[Job], Any]
    state: State = "waiting"
    stage: str = ""
    done: int = 0
    total: int = 0
    result: Any = None
    refusal: str = ""
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _began: tuple[float, int] = (0.0, 0)  # when the stage was first reported, and how far it was
    _told: float = 0.0  # when it was last reported

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("done", "failed", "cancelled")

    @property
    def is_cancelling(self) -> bool:
        """Whether it was cancelled and has not stopped yet."""
        return self._cancelled.is_set() and not self.is_over

    def cancel(self) -> None:
        """Stop it at its next step."""
        self._cancelled.set()

    def report(self, stage: str, done: int, total: int) -> None:
        """Say how far it is; a `generation.Progress`.

        Raises:
            Cancelled: if it was cancelled.
        """
        self._told = time.monotonic()
        if stage != self.stage or done < self.done:
            self._began = self._told, done
        self.stage, self.done, self.total = stage, done, total
        self.stop_if_cancelled()

    def stop_if_cancelled(self, *_: object) -> None:
        """Raise `Cancelled` if it was cancelled; a hook of modules, too."""
        if self._cancelled.is_set():
            raise Cancelled

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the stage will take yet, if that can be told."""
        began, before = self._began
        if self.state != "running" or not before < self.done < self.total:
            return None
        pace = (self._told - began) / (self.done - before)
        return max(0.0, pace * (self.total - self.done) - (time.monotonic() - self._told))


class Jobs:
    """The line of requests, and the thread that serves it.

    Args:
        max_waiting: requests that may wait for the one under way.
        clean_up: called after a job that did not end well.
    """

    def __init__(self, max_waiting: int, clean_up: Callable[[], None] = lambda: None) -> None:
        self._max_waiting, self._clean_up = max_waiting, clean_up
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, owner: str, work: Callable[[Job], Any]) -> Job:
        """Put work in line.

        Raises:
            OptionError: if its owner has work in line already, or the line is full.
        """
        job = Job(owner, work)
        with self._changed:
            if any(other.owner == owner for other in self._all()):
                raise OptionError(
                    "this page has a request under way already: wait for it, or cancel it."
                )
            if len(self._waiting) >= self._max_waiting:
                raise OptionError(
                    f"{len(self._waiting)} requests are waiting already: try again in a while."
                )
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, daemon=True, name="jobs")
                self._thread.start()
            self._changed.notify_all()
        return job

    def ahead_of(self, job: Job) -> int:
        """Return how many requests come before this one."""
        with self._changed:
            everyone = self._all()
            return everyone.index(job) if job in everyone else 0

    def cancel(self, owner: str) -> None:
        """Cancel what a session has in line: at once if it waits, else at its next step."""
        with self._changed:
            for job in self._all():
                if job.owner == owner:
                    job.cancel()
                    if job in self._waiting:
                        self._waiting.remove(job)
                        job.state = "cancelled"

    def close(self) -> None:
        """Cancel everything and give the thread a moment to end."""
        with self._changed:
            for job in self._all():
                job.cancel()
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _all(self) -> list[Job]:
        running = [] if self._running is None else [self._running]
        return [*running, *self._waiting]

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    for job in self._waiting:
                        job.state = "cancelled"
                    return
                job = self._running = self._waiting.popleft()
                job.state = "running"
            state = self._run(job)
            if state != "done":
                self._clean_up()
            with self._changed:
                self._running = None
                job.state = state

    def _run(self, job: Job) -> State:
        try:
            job.stop_if_cancelled()
            job.result = job.work(job)
        except Cancelled:
            return "cancelled"
        except DitAccelError as error:
            job.refusal = str(error)
        except (MemoryError, torch.OutOfMemoryError):
            job.refusal = (
                "there is not enough memory for this: take a smaller size, fewer frames, or a "
                "smaller model. What it held has been freed."
            )
        except OSError as error:
            job.refusal = f"a file could not be read or written: {error.strerror or error}."
        except Exception as error:
            _LOG.exception("a request failed in a way that is not foreseen")
            job.refusal = (
                f"this failed in a way that dit-accel did not foresee ({type(error).__name__}). "
                "The terminal in which the page was started says more."
            )
        else:
            return "done"
        return "failed"
