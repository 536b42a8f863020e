"""Joining the processes that ``torchrun`` started, and making sure that they are of one mind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from dit_accel.environment import pick_device
from dit_accel.errors import ContextParallelError, OptionError, RankFailedError, did_you_mean

TIMEOUT_S = 600.0
"""How long a rank waits for the others before it gives up."""
DEGREES = ("cfg", "ring", "ulysses")
_COUNT, _FAILURE = "dit_accel_failures", "dit_accel_first_failure"


@dataclass(frozen=True)
class Degrees:
    """Over how many ranks what is split.

    Attributes:
        ulysses: ranks that share the heads of a sequence, or of a part of a ring.
        ring: parts of a sequence that pass keys and values around.
        cfg: 2 to run the conditional and the unconditional pass on ranks of their own.

    Raises:
        OptionError: if one is less than 1, or ``cfg`` more than 2.
    """

    ulysses: int = 1
    ring: int = 1
    cfg: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in DEGREES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"{name}={value!r} must be an integer of at least 1.")
        if self.cfg > 2:
            raise OptionError(
                f"cfg={self.cfg} must be 1 or 2: guidance has two passes. Spread each of them by "
                "ulysses=... or ring=...."
            )

    @classmethod
    def parse(cls, text: str) -> Degrees:
        """Read e.g. ``"ulysses=2,ring=2"``.

        Raises:
            OptionError: if it is anything else.
        """
        found: dict[str, int] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name not in DEGREES:
                raise OptionError(f"parallel={text!r}: {name!r}?{did_you_mean(name, DEGREES)}")
            if not value.isdecimal() or name in found:
                raise OptionError(
                    f"parallel={text!r}: give each of {', '.join(DEGREES)} at most once and with a "
                    "number of ranks, e.g. ulysses=2,ring=2."
                )
            found[name] = int(value)
        return cls(**found)

    @property
    def ranks(self) -> int:
        """How many ranks they take."""
        return self.ulysses * self.ring * self.cfg

    def check_world(self, world: int) -> None:
        """Raise `ContextParallelError` unless they take all of ``world`` ranks."""
        if self.ranks != world:
            raise ContextParallelError(
                f"cfg={self.cfg}, ring={self.ring} and ulysses={self.ulysses} take {self.ranks} "
                f"processes, but {world} were started: start {self.ranks} "
                f"(torchrun --nproc-per-node {self.ranks}), or choose e.g. "
                f"{' or '.join(_fitting(world))}."
            )


def _fitting(world: int) -> list[str]:
    if world == 1:
        return ["no split"]
    found = [f"ulysses={world}", f"ring={world}"]
    if world % 2 == 0:
        found.append("cfg=2" if world == 2 else f"cfg=2,ulysses={world // 2}")
    if world > 2 and world % 2 == 0:
        found.append(f"ulysses={world // 2},ring=2")
    return found


def join_ranks(device: str = "auto", timeout_s: float = TIMEOUT_S) -> str:
    """Join the processes that ``torchrun`` started; return this one's device.

    Does nothing if a process group exists.

    Args:
        device: as for `pick_device`; of several processes it chooses the kind of device alone.
        timeout_s: how long to wait for other ranks, here and in every exchange.

    Raises:
        ContextParallelError: if there are no others, or GPUs can't talk to one another.
    """
    import torch.distributed as dist

    kind = torch.device(pick_device(device)).type
    if not dist.is_available():
        raise ContextParallelError("this torch has no torch.distributed: install one that has.")
    local = dist.get_node_local_rank(0)
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise ContextParallelError(
                f"process {local} of this machine has no GPU: {torch.cuda.device_count()} are "
                f"here. Start one process per GPU (torchrun --nproc-per-node "
                f"{torch.cuda.device_count()})."
            )
        torch.cuda.set_device(local)
    chosen = f"cuda:{local}" if kind == "cuda" else kind
    if dist.is_initialized():
        return chosen
    if not dist.is_torchelastic_launched():
        raise ContextParallelError(
            "parallel generation needs several processes: start the command with "
            "`torchrun --nproc-per-node N -m dit_accel.cli generate ...`."
        )
    if kind == "cuda" and not dist.is_nccl_available():
        raise ContextParallelError(
            "this torch was built without NCCL, by which GPUs exchange tokens: install a CUDA "
            "build for Linux from https://pytorch.org."
        )
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return chosen


def agree(what: Mapping[str, Any]) -> None:
    """Make sure that all ranks say the same.

    Raises:
        ContextParallelError: on every rank, saying who differs in what.
    """
    import torch.distributed as dist

    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, dict(what))
    for rank, other in enumerate(every):
        for name, value in every[0].items():
            if other.get(name) != value:
                raise ContextParallelError(
                    f"rank {rank} has {name} {other.get(name)!r}, but rank 0 has {value!r}: start "
                    "all processes with the same versions, model and options."
                )


def rank_mesh(device: str, shape: tuple[int, ...], names: tuple[str, ...], timeout_s: float) -> Any:
    """Return a mesh of all ranks whose exchanges give up after ``timeout_s`` seconds."""
    from torch.distributed import distributed_c10d
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(torch.device(device).type, shape, mesh_dim_names=names)
    for name in names:
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), mesh[name].get_group())
    return mesh


@contextmanager
def together() -> Iterator[None]:
    """Let the failure of one rank end all of them, with one message.

    Raises:
        RankFailedError: on ranks that stop because another one failed, which says so itself.
        ContextParallelError: on the first rank that misses one that ended without a word.
    """
    import torch.distributed as dist

    try:
        yield
    except BaseException as error:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        if _is_of_exchange(error):
            before = _told_by_others() or _first_failure("a rank has ended or does not answer")
            if before is None:
                raise ContextParallelError(
                    "another rank has ended or does not answer: look for its own message, or for "
                    f"what killed it. ({error})"
                ) from error
        else:
            before = _first_failure(f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
            if before is None:
                raise
        raise RankFailedError(f"stopped, because another rank failed ({before})") from error


def _is_of_exchange(error: BaseException) -> bool:
    """Whether an exchange between ranks broke off."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        word in str(error).lower()
        for word in ("gloo", "nccl", "connection closed", "process group")
    )


def _told_by_others() -> str | None:
    """Return what a rank said when it failed, if one does within a moment."""
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        store = _get_default_store()
        store.wait([_FAILURE], timedelta(seconds=3))
        return str(store.get(_FAILURE).decode())
    except RuntimeError:  # nobody did, or the rank that keeps the store is gone
        return None


def _first_failure(text: str) -> str | None:
    """Tell the other ranks of a failure; return what failed first, None if this did."""
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        store = _get_default_store()
        if store.add(_COUNT, 1) == 1:
            store.set(_FAILURE, text)
            return None
    except RuntimeError:  # the rank that keeps the store is gone
        return None
    return _told_by_others() or "it did not say why"
