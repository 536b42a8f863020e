"""Index tensors that take tokens from one order into another, made once for each layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_accel.call import TokenLayout
from dit_accel.grid import Grid, TokenOrder

There = tuple[Tensor, Tensor]
"""Indices that take tokens into an order, and indices that take them back."""


class Reorderings:
    """The index tensors of one acceleration."""

    def __init__(self) -> None:
        self._made: dict[Any, There] = {}

    def of_forward(
        self, grid: Grid, wanted: TokenOrder, tail_first: int, device: torch.device
    ) -> There:
        """Return how to put a forward's raster tokens into an order.

        Args:
            grid: of the video tokens.
            wanted: their order.
            tail_first: how many tokens behind the video go to its front.
            device: of the result.
        """
        key = (grid, wanted, tail_first, device)
        if key not in self._made:
            gather = wanted.permutation(grid, device)
            tail = torch.arange(tail_first, device=device) + len(gather)
            gather = torch.cat([tail, gather])
            self._made[key] = gather, torch.argsort(gather)
        return self._made[key]

    def of_call(
        self, layout: TokenLayout, order: TokenOrder, wanted: TokenOrder, device: torch.device
    ) -> There:
        """Return how to take one call's tokens from ``order`` into another. Text stays."""
        key = (layout, order, wanted, device)
        if key not in self._made:
            video = wanted.permutation(layout.grid, device)
            if not order.is_raster:
                video = order.permutation(layout.grid, device).argsort()[video]
            text = torch.arange(layout.text_length, device=device)
            gather = (
                torch.cat([text, video + layout.text_length])
                if layout.text_first
                else torch.cat([video, text + layout.video_length])
            )
            self._made[key] = gather, torch.argsort(gather)
        return self._made[key]
