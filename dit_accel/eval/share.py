"""Which part of a run is this process's, as accelerate's launcher started it."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch

from dit_accel.environment import pick_device

PATIENCE = timedelta(days=30)  # processes wait for one another at the end of a run


@dataclass(frozen=True)
class Share:
    """This process among those of a run.

    Attributes:
        rank: from 0.
        count: of processes.
        wait: returns once every process has called it.
    """

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def first(self) -> bool:
        """Whether this process prepares the run and writes its results."""
        return self.rank == 0


def join_processes(device: str = "auto") -> tuple[Share, str]:
    """Return this process's share, and the device that it runs on.

    Under ``accelerate launch`` or ``torchrun`` each process gets a GPU of its own.

    Args:
        device: as for `pick_device`; of several processes it chooses the kind of device alone.

    Raises:
        OptionError: if there is no such device here.
    """
    from accelerate import PartialState

    chosen = pick_device(device)
    state = PartialState(cpu=torch.device(chosen).type == "cpu", timeout=PATIENCE)
    if state.num_processes == 1:
        return Share(), chosen
    atexit.register(state.destroy_process_group)  # its threads may not outlive Python
    share = Share(state.process_index, state.num_processes, state.wait_for_everyone)
    return share, str(state.device)
