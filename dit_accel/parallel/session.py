"""What a command does on each rank of a generation, and on the only one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from dit_accel.environment import pick_device
from dit_accel.parallel.launch import Degrees, join_ranks, together
from dit_accel.parallel.pipeline import parallelize_pipeline
from dit_accel.parallel.reports import report_of_ranks
from dit_accel.report import AccelerationReport


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a generation.

    Attributes:
        device: where its part runs.
        degrees: how the generation is split; None if it is not.
        first: whether this process writes and prints.
    """

    device: str
    degrees: Degrees | None = None
    first: bool = True

    def spread(self, pipe: Any) -> Any:
        """Spread a pipeline over the ranks, and return it."""
        return pipe if self.degrees is None else parallelize_pipeline(pipe, **asdict(self.degrees))

    def report(self, report: AccelerationReport) -> AccelerationReport:
        """Return what all ranks did; every rank calls it."""
        return report if self.degrees is None else report_of_ranks(report)


@contextmanager
def ranks_of(parallel: str | None, device: str) -> Iterator[Ranks]:
    """Join the ranks of a generation, and leave them at the end; a failure of one ends all.

    Args:
        parallel: e.g. "ulysses=2,ring=2"; None for one process.
        device: as for `pick_device`.

    Raises:
        OptionError: if ``parallel`` says something else.
        ContextParallelError: if these processes can't share a generation.
    """
    if parallel is None:
        yield Ranks(pick_device(device))
        return
    degrees = Degrees.parse(parallel)
    place = join_ranks(device)
    import torch.distributed as dist

    with together():
        degrees.check_world(dist.get_world_size())
        yield Ranks(place, degrees, first=dist.get_rank() == 0)
        dist.barrier()
    dist.destroy_process_group()
