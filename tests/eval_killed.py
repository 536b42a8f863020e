"""Runs once unbroken and once killed at random points, in children of this small process.

python tests/eval_killed.py FOLDER KILLS    # writes FOLDER/whole and FOLDER/killed
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from eval_fakes import FakeSampler, fake_run

from dit_accel.eval.runner import run_evaluation


class Counter:
    """Counts calls, and kills its process at one of them."""

    def __init__(self, die_at: int | None = None) -> None:
        self.calls, self._die_at = 0, die_at

    def __call__(self, _frame: FrameType, _event: str, _arg: Any) -> None:
        self.calls += 1
        if self.calls == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, die_at: int | None = None) -> int:
    """Make what the folder lacks; return the number of calls that this took."""
    counter = Counter(die_at)
    sys.setprofile(counter)
    run_evaluation(fake_run(), folder, sampler=FakeSampler())
    sys.setprofile(None)
    return counter.calls


def killed(folder: Path, die_at: int) -> bool:
    """Run in a child that kills itself at its ``die_at``-th call; return whether it got there."""
    child = os.fork()
    if not child:
        try:
            run(folder, die_at)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def main() -> None:
    torch.set_num_threads(1)  # threads don't survive a fork
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    run(folder / "imports")  # children inherit what is imported: their calls are those of the run
    longest = run(folder / "whole")
    chance = random.Random(0)
    while kills:
        if killed(folder / "killed", chance.randint(1, longest)):
            kills -= 1
        else:
            longest //= 2  # all is made: what is left is to start and to end
    run(folder / "killed")


if __name__ == "__main__":
    main()
