"""Radial attention: the farther apart two frames, the narrower the band of positions they share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from dit_accel.call import TokenLayout
from dit_accel.errors import OptionError
from dit_accel.grid import RASTER, TokenOrder
from dit_accel.methods.base import StaticMethod, check_density, unreachable
from dit_accel.plan import EMPTY, FULL, PARTIAL, TokenPredicate

NO_PAIR = -1
"""Reach of two frames that share nothing."""


@dataclass(frozen=True, kw_only=True)
class Radial(StaticMethod):
    """Radial Attention (arXiv 2506.19852): density decays with the distance between frames.

    A query at position k of frame i may see the key at position l of frame j if ``|k - l|`` is at
    most `reach` of the distance ``|i - j|``. Positions count in raster order within a frame, so
    the band is a band of rows. A frame sees itself and its neighbours wholly.

    ``rule="released"`` follows the authors' code, which works on blocks: two blocks of
    ``block_size`` successive tokens attend wholly to one another if any pair of their tokens is
    within reach. Where frames are whole blocks this is the authors' mask, bit for bit. Where they
    are not (720p and 480p at 81 frames), the authors' code fails: it raises a size mismatch, or
    loses the last, partial block of each frame. Here blocks run on across frames instead, and one
    that lies in two frames gets what either of its parts gets.

    ``rule="paper"`` is Eq. 4 of the paper, token by token: about twice as wide.

    Attributes:
        decay: scales the reach of frames two or more apart (the authors' ``decay_factor``; not in
            the paper). 0 leaves the narrowest band, ``math.inf`` keeps every pair.
        sink: whether everyone sees frame 0 wholly. None: yes unless text is in the sequence, as
            released (Wan with, HunyuanVideo without).
        rule: "released" or "paper".
        thin_below: where the band, before ``decay``, falls under this many tokens, only every
            second, fourth, eighth ... distance is kept. 128 in the released code, where frames of
            under 128 tokens thereby lose even their neighbours: set it lower for small frames.
            Unused by ``rule="paper"``.
    """

    name: ClassVar[str] = "radial"
    paper: ClassVar[str] = "Radial Attention, arXiv 2506.19852"

    decay: float = 1.0
    sink: bool | None = None
    rule: Literal["released", "paper"] = "released"
    thin_below: int = 128

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.rule not in ("released", "paper"):
            raise OptionError(f"rule={self.rule!r} must be 'released' or 'paper'.")
        if isinstance(self.decay, bool) or not self.decay >= 0:
            raise OptionError(f"decay={self.decay!r} must be a number, 0 or more.")
        if self.thin_below < 1:
            raise OptionError(f"thin_below={self.thin_below} must be at least 1 token.")

    def reach(self, distance: int, frame: int) -> int:
        """Return the largest ``|k - l|`` seen across ``distance`` frames of ``frame`` tokens.

        `NO_PAIR` if frames that far apart share nothing.
        """
        if math.isinf(self.decay):
            return frame - 1
        return (self._paper_reach if self.rule == "paper" else self._released_reach)(
            distance, frame
        )

    def _paper_reach(self, distance: int, frame: int) -> int:
        # Eq. 4: |k - l| + 1 <= s / R, R the power of two at or under the distance. Where that is
        # under one token, only the diagonal, at the distances that ceil(R / s) divides.
        power = 2 ** (max(distance, 1).bit_length() - 1)
        if distance <= 1:
            return frame - 1
        if power <= frame:
            return min(max(math.floor(self.decay * frame / power) - 1, 0), frame - 1)
        return 0 if distance % math.ceil(power / frame) == 0 else NO_PAIR

    def _released_reach(self, distance: int, frame: int) -> int:
        band = 2 ** frame.bit_length() / 2 ** distance.bit_length()
        if band < self.thin_below and distance % int(self.thin_below / band):
            return NO_PAIR
        if distance <= 1:
            return frame - 1
        # The released code fills a block if over 60 % of its columns are over a third full. For a
        # diagonal band over whole blocks that is the same as "any overlap" with a band narrower
        # by this trim (none at block size 1).
        trim = 5 * (self.block_size // 3) // 2
        return min(math.floor(max(band * self.decay, self.block_size)) - trim, frame - 1)

    def allowed(self, layout: TokenLayout, device: torch.device | str = "cpu") -> TokenPredicate:
        """Return the pattern's definition; see `StaticMethod.allowed`."""
        if self.rule == "released":
            on = self.tile_states(layout, RASTER, device) == FULL
            return lambda query, key: on[query // self.block_size, key // self.block_size]
        return self._within_reach(layout, device)

    def _within_reach(self, layout: TokenLayout, device: torch.device | str) -> TokenPredicate:
        frame, reach = self._frame(layout), self._reach_table(layout, device)

        def predicate(query: Tensor, key: Tensor) -> Tensor:
            distance = (query // frame - key // frame).abs()
            near = (query % frame - key % frame).abs() <= reach[distance]
            return near | (key < frame) if self._has_sink(layout) else near

        return predicate

    def tile_states(
        self, layout: TokenLayout, order: TokenOrder, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return the state of each pair of blocks; see `StaticMethod.tile_states`."""
        if not order.is_raster:
            raise OptionError("radial attention works on tokens in raster order only.")
        # A part is what one block and one frame have in common: a range of positions.
        frame = self._frame(layout)
        count, block = layout.video_length, self.block_size
        borders = [torch.arange(0, count, step, device=device) for step in (block, frame)]
        first = torch.cat(borders).unique()
        last = torch.cat([first[1:], first.new_tensor([count])]) - 1
        frame_of, block_of = (first // frame).int(), first // block
        low, high = (first % frame).int(), (last % frame).int()

        reach = self._reach_table(layout, device)[(frame_of[:, None] - frame_of).abs()]
        if self._has_sink(layout):
            reach[:, frame_of == 0] = frame
        nearest = torch.maximum(low[:, None] - high, low - high[:, None]).clamp(min=0)
        visited = _any_part(nearest <= reach, block_of)
        if self.rule == "released":
            return visited.to(torch.int8) * FULL
        farthest = torch.maximum(high[:, None] - low, high - low[:, None])
        masked = _any_part(farthest > reach, block_of)
        return torch.where(visited, torch.where(masked, PARTIAL, FULL), EMPTY).to(torch.int8)

    def at_density(
        self, density: float, layout: TokenLayout, order: TokenOrder | None = None
    ) -> Self:
        """Return this with the largest decay that fits; see `AttentionMethod.at_density`."""
        check_density(density)
        if density == 1:
            return replace(self, decay=math.inf)
        # At the upper end every band is as wide as a frame, so the mask grows no more.
        low, high = 0.0, 2.0 ** (layout.grid[0].bit_length() + 1)
        least = replace(self, decay=low).block_density(layout, order)
        if least > density:
            raise unreachable(self, density, layout, least)
        if replace(self, decay=high).block_density(layout, order) <= density:
            return replace(self, decay=high)
        for _ in range(16):
            middle = (low + high) / 2
            if replace(self, decay=middle).block_density(layout, order) <= density:
                low = middle
            else:
                high = middle
        return replace(self, decay=low)

    def _has_sink(self, layout: TokenLayout) -> bool:
        return layout.text_length == 0 if self.sink is None else self.sink

    @staticmethod
    def _frame(layout: TokenLayout) -> int:
        return layout.grid[1] * layout.grid[2]

    def _reach_table(self, layout: TokenLayout, device: torch.device | str) -> Tensor:
        frame = self._frame(layout)
        table = [self.reach(distance, frame) for distance in range(layout.grid[0])]
        return torch.tensor(table, dtype=torch.int32, device=device)


def _any_part(hits: Tensor, block_of: Tensor) -> Tensor:
    """Bool ``[parts, parts]`` -> ``[blocks, blocks]``: whether any of the blocks' parts hit."""
    blocks = int(block_of[-1]) + 1
    if blocks == len(block_of):
        return hits
    for _ in range(2):
        rows = hits.new_zeros(blocks, hits.shape[1], dtype=torch.int32)
        hits = rows.index_add_(0, block_of, hits.int()).T > 0
    return hits
