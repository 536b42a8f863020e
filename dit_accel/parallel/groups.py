"""The ranks that share a sequence, as diffusers' context parallelism has arranged them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel import compat
from dit_accel.errors import ContextParallelError


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of the mesh: this rank's place among ``size`` ranks of a process group."""

    size: int = 1
    rank: int = 0
    group: Any = None

    def all_gather(self, tokens: Tensor) -> Tensor:
        """Return every rank's ``tokens``, stacked in front: ``[size, ...]``."""
        if self.size == 1:
            return tokens.unsqueeze(0)
        import torch.distributed as dist

        gathered = tokens.new_empty(self.size, *tokens.shape)
        # Its name from torch 2.13 on, and before.
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered.flatten(0, 1), tokens.contiguous(), group=self.group)
        return gathered

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the sum of every rank's ``values``."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """Ranks that hold one sequence together: ring parts, each held by Ulysses ranks.

    A rank's tokens are the share ``ring.rank * ulysses.size + ulysses.rank`` of the sequence. In
    attention, the Ulysses ranks of a part see all tokens of the part with a share of the heads
    (arXiv 2309.14509), and parts pass their keys and values around the ring (arXiv 2310.01889).
    """

    ulysses: Axis
    ring: Axis

    @classmethod
    def of(cls, parallel_config: Any) -> SequenceGroup:
        """Read the arrangement off a config that diffusers has set up."""
        ulysses, ring = compat.sequence_mesh(parallel_config)
        return cls(*(Axis(mesh.size(), mesh.get_local_rank(), mesh.get_group()) for mesh in
                     (ulysses, ring)))  # fmt: skip

    @property
    def ranks(self) -> int:
        """How many ranks share the sequence."""
        return self.ulysses.size * self.ring.size

    @property
    def rank(self) -> int:
        """This rank's share, from 0."""
        return self.ring.rank * self.ulysses.size + self.ulysses.rank

    def check_heads(self, heads: int) -> None:
        """Raise `ContextParallelError` unless the Ulysses ranks can share ``heads`` evenly."""
        if heads % self.ulysses.size:
            fits = [n for n in range(2, heads + 1) if heads % n == 0]
            raise ContextParallelError(
                f"{heads} heads can't be shared by {self.ulysses.size} Ulysses ranks: choose "
                f"ulysses out of {fits}, and put other ranks on the ring (ring=...)."
            )

    def mean(self, value: float, device: torch.device) -> float:
        """Return the mean of all ranks' values, which is the same number on all of them."""
        total = torch.tensor([value], dtype=torch.float64, device=device)
        total = self.ring.all_reduce(self.ulysses.all_reduce(total))
        return float(total.item()) / self.ranks
