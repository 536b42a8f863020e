"""Which tokens each rank holds: one permutation per forward that orders, pads and balances.

Diffusers cuts a sequence into equal shares of successive tokens. Before it does, tokens are put
into the order in which the shares are right: the method's order, and on a ring whole blocks dealt
out so that every part attends to as many pairs. The end of each part is padded with repeated
tokens, which nobody attends to and which are dropped at the end of the forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.errors import ContextParallelError


@dataclass(frozen=True, eq=False)
class Shares:
    """The tokens of one stream, by ring part.

    Attributes:
        places: int64 per part, ascending: where its tokens are in the method's order.
        length: tokens that each part holds, padding included.
        gather: int64 ``[parts * length]``, the stream's tokens as they are dealt out; None if that
            is the order in which they come.
        scatter: int64, where each of the stream's tokens was dealt to; None likewise.
    """

    places: tuple[Tensor, ...]
    length: int
    gather: Tensor | None
    scatter: Tensor | None

    def count(self, part: int) -> int:
        """Return how many tokens a part has, without padding."""
        return len(self.places[part])

    def blocks(self, part: int, size: int) -> Tensor:
        """Return which blocks of ``size`` tokens, in the method's order, a part has."""
        return self.places[part][::size] // size

    def rows(self, part: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows in which a part holds what is at some places of the method's order.

        Args:
            part: which part.
            places: int64 ``[R]``.

        Returns:
            int64 ``[R]``, and bool ``[R]``: whether the part holds it. Where it doesn't, the row is
            another of the part's, so that nothing waits for the device to count rows.
        """
        held = self.places[part]
        rows = torch.searchsorted(held, places).clamp(max=len(held) - 1)
        return rows, held[rows] == places


def deal(
    permutation: Tensor,
    *,
    ring: int = 1,
    ulysses: int = 1,
    unit: int = 1,
    work: Tensor | None = None,
    tail: int = 0,
) -> Shares:
    """Deal the tokens of a stream out to the ranks.

    Args:
        permutation: int64 ``[N]``, the method's order of the tokens.
        ring: number of parts.
        ulysses: ranks per part.
        unit: tokens that stay together, in the method's order; the last unit may have fewer.
        work: what the queries of each unit cost; None if all cost the same.
        tail: tokens that follow the N in the stream and are to come first; only for one part.

    Raises:
        ContextParallelError: if there are fewer units than parts.
    """
    count, device = len(permutation), permutation.device
    places: tuple[Tensor, ...]
    if ring == 1:
        places = (torch.arange(count, device=device),)
    else:
        dealt = _snake(count, unit, ring, work)
        places = tuple(
            (units[:, None] * unit + torch.arange(unit)).flatten().to(device) for units in dealt
        )
        places = tuple(part[part < count] for part in places)
    longest = max(map(len, places)) + tail
    length = math.ceil(longest / ulysses) * ulysses
    first = torch.arange(tail, device=device) + count
    parts = [torch.cat([first, permutation[part]]) for part in places]
    padded = [torch.cat([part, part[-1:].expand(length - len(part))]) for part in parts]
    gather = torch.cat(padded)
    if len(gather) == count + tail and bool(
        (gather == torch.arange(len(gather), device=device)).all()
    ):
        return Shares(places, length, None, None)
    scatter = gather.new_empty(count + tail)
    for part, tokens in enumerate(parts):
        scatter[tokens] = torch.arange(len(tokens), device=device) + part * length
    return Shares(places, length, gather, scatter)


def _snake(count: int, unit: int, parts: int, work: Tensor | None) -> list[Tensor]:
    """Deal units out in falling order of their work, to and fro over the parts; then sort each."""
    units = math.ceil(count / unit)
    if units < parts:
        raise ContextParallelError(
            f"{count} tokens make {units} blocks of {unit}, too few for {parts} ring parts: choose "
            f"ring={units} or less, or more Ulysses ranks."
        )
    order = torch.arange(units)
    if work is not None:
        order = work.cpu().argsort(descending=True, stable=True)
    turn = torch.arange(units) % (2 * parts)
    part = torch.where(turn < parts, turn, 2 * parts - 1 - turn)
    return [order[part == which].sort().values for which in range(parts)]


def imbalance(work: Tensor, shares: Shares, unit: int) -> float:
    """Return how much more the busiest part has to do than the mean, as a share of the mean."""
    loads = [float(work[shares.blocks(part, unit).to(work.device)].sum())
             for part in range(len(shares.places))]  # fmt: skip
    return max(loads) / (sum(loads) / len(loads)) - 1
