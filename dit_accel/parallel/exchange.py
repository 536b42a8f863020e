"""Ulysses' exchange: all heads of a share of the tokens for a share of the heads of all tokens.

One copy in front of an exchange or behind it: for a batch of one, what arrives lies in memory as
attention reads it, and what attention wrote lies as it is sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.parallel.groups import Axis


def scatter_heads(tensors: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """Give every rank its share of the heads of this rank's tokens.

    Args:
        tensors: ``[B, L, H, D]`` each, H divisible by the number of ranks.
        axis: the Ulysses ranks.

    Returns:
        ``[P, B, L, H / P, D]`` each: this rank's heads of the tokens of each of the P ranks.
    """
    if axis.size == 1:
        return [tokens.unsqueeze(0) for tokens in tensors]
    import torch.distributed as dist

    found, works = [], []
    for tokens in tensors:  # the next is copied while this one is under way
        send = tokens.unflatten(2, (axis.size, -1)).movedim(2, 0).contiguous()
        received = torch.empty_like(send)
        work = dist.all_to_all_single(received, send, group=axis.group, async_op=True)
        found.append(received)
        works.append((work, send))
    for work, _ in works:
        work.wait()
    return found


def gather_heads(tokens: Tensor, axis: Axis) -> Tensor:
    """Undo `scatter_heads`: ``[P, B, L, H / P, D]`` to ``[B, L, H, D]``."""
    if axis.size == 1:
        return tokens.squeeze(0)
    import torch.distributed as dist

    send = tokens.contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=axis.group)
    return received.movedim(0, 2).flatten(2, 3)
