"""Several processes that share the work of one search, as `accelerate launch` starts them.

All of them run the same search. Where heads are to be scored, each takes its part, and the scores
are gathered by gloo, since a few numbers need no fast link and processes may share a GPU.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch

_PATIENCE = timedelta(days=7)
"""One process may wait long for another's generations."""

Item = TypeVar("Item")


class Processes:
    """The processes that were launched together; one where none were."""

    def __init__(self) -> None:
        self.count, self.index, self.local_index = 1, 0, 0
        # `accelerate launch` starts several processes as torchrun does.
        if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
            from accelerate import PartialState

            state = PartialState(cpu=True, backend="gloo", timeout=_PATIENCE)
            atexit.register(state.destroy_process_group)  # its threads may not outlive Python
            self.count, self.index = state.num_processes, state.process_index
            self.local_index = state.local_process_index

    @property
    def is_main(self) -> bool:
        """Whether this one writes and shows results."""
        return self.index == 0

    def device(self, name: str) -> str:
        """Return the device for this process: of "cuda", GPUs take turns."""
        if name != "cuda":
            return name
        return f"cuda:{self.local_index % torch.cuda.device_count()}"

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's part of the items: neighbours stay together."""
        size = -(-len(items) // self.count)
        return items[self.index * size : (self.index + 1) * size]

    def gather(self, mine: list[Item]) -> list[Item]:
        """Return the items of all processes, in the order of `share`."""
        if self.count == 1:
            return mine
        from accelerate.utils import gather_object

        found: list[Item] = gather_object(mine)
        return found

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.gather([None])
