"""Runs a bench in a process of its own, which may die or hang without taking the run with it.

A wrong barrier hangs a GPU, an illegal access spoils every later call of the process, and the
kernel of the operating system kills what takes too much memory.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from dit_accel.bench.measuring import Row, guarded


class Bench(Protocol):
    """Measures one task at a time. What it keeps between tasks is lost when its process is."""

    def measure(self, task: Mapping[str, Any]) -> Row:
        """Return what was measured of ``task``."""
        ...


class Direct:
    """Runs a bench in this process."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def measure(self, task: Mapping[str, Any]) -> Row:
        """Measure one task, or return why that failed."""
        return guarded(self._bench.measure, task)

    def close(self) -> None:
        """Nothing to end."""


class Isolated:
    """Runs a bench (which must be picklable) in a child process.

    Args:
        bench: is sent to each child that is started.
        timeout_s: a task that takes longer is killed.
    """

    def __init__(self, bench: Bench, timeout_s: float) -> None:
        self._bench, self._timeout_s = bench, timeout_s
        self._child: Any = None
        self._pipe: Connection | None = None

    def measure(self, task: Mapping[str, Any]) -> Row:
        """Measure one task, or return why that failed; a lost process is replaced by the next."""
        try:
            pipe = self._pipe or self._start()
            pipe.send(dict(task))
            if not pipe.poll(self._timeout_s):
                self._kill()
                return {"failed": f"nothing after {self._timeout_s:g} s: its process was killed"}
            row, healthy = pipe.recv()
        except (EOFError, OSError):
            self._child.join(10)
            code = self._child.exitcode
            self._kill()
            return {"failed": f"its process died (exit code {code})"}
        if not healthy:
            self._kill()
        return dict(row)

    def close(self) -> None:
        """End the child."""
        self._kill()

    def _start(self) -> Connection:
        """Start a child and wait for it, so that its imports don't count as time of a task."""
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        self._pipe = ours
        self._child = spawn.Process(target=_serve, args=(theirs, self._bench), daemon=True)
        self._child.start()
        theirs.close()
        ours.recv()
        return ours

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.join()
        if self._pipe is not None:
            self._pipe.close()
        self._child = self._pipe = None


def _serve(pipe: Connection, bench: Bench) -> None:
    """Answer tasks until the pipe is closed, with each row and whether the device still works."""
    pipe.send("ready")
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        row = guarded(bench.measure, task)
        pipe.send((row, "failed" not in row or _healthy()))


def _healthy() -> bool:
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
