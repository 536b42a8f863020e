"""Inward sliding window: every frame, and a window around the query within frames."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from dit_accel.call import TokenLayout
from dit_accel.errors import OptionError
from dit_accel.grid import Grid, TokenOrder
from dit_accel.methods.base import StaticMethod, check_density
from dit_accel.methods.gna import GNA, Window, check_window
from dit_accel.plan import TokenPredicate


@dataclass(frozen=True)
class SlidingWindow(StaticMethod):
    """FreeSwim's inward sliding window (arXiv 2511.14712): `GNA` of stride 1 on (h, w) alone.

    A query sees, in all frames, the window centred on its own position; at the borders the window
    slides inward rather than being cut, so that every query has as many keys.

    Attributes:
        window: (h, w), or one value for both: an int counts tokens and must fit the axis, a float
            in (0, 1] is a share of it. FreeSwim takes the grid the model was trained on: 31 x 53
            for 480 x 832 pixels, 45 x 81 for 720 x 1280.
        gain: factor on the logits, for sequences longer than in training; 1.0 changes nothing,
            and FreeSwim's is `dit_accel.highres.reference.length_gain`.
    """

    name: ClassVar[str] = "sliding_window"
    paper: ClassVar[str] = "FreeSwim, arXiv 2511.14712"

    window: Window | tuple[Window, Window] = 0.5
    gain: float = 1.0

    def __post_init__(self) -> None:
        """Check the window and the gain."""
        super().__post_init__()
        number = isinstance(self.gain, int | float) and not isinstance(self.gain, bool)
        if not number or not 0 < self.gain < math.inf:
            raise OptionError(f"gain={self.gain!r} must be a finite number above 0.")
        if isinstance(self.window, list):
            object.__setattr__(self, "window", tuple(self.window))
        windows = self.window if isinstance(self.window, tuple) else (self.window,) * 2
        if len(windows) != 2:
            raise OptionError(f"window={self.window!r}: give one value, or (h, w).")
        for window in windows:
            check_window(window)

    @property
    def softmax_gain(self) -> float:
        """See `AttentionMethod.softmax_gain`."""
        return self.gain

    def as_gna(self) -> GNA:
        """Return the same pattern as `GNA`, which has no gain."""
        h, w = self.window if isinstance(self.window, tuple) else (self.window,) * 2
        return GNA((1.0, h, w), block_size=self.block_size, remainder=self.remainder)

    def allowed(self, layout: TokenLayout, device: torch.device | str = "cpu") -> TokenPredicate:
        """Return the pattern's definition; see `StaticMethod.allowed`."""
        return self.as_gna().allowed(layout, device)

    def token_order(self, grid: Grid) -> TokenOrder:
        """Return the order with the fewest visited blocks; see `AttentionMethod.token_order`."""
        return self.as_gna().token_order(grid)

    def tile_states(
        self, layout: TokenLayout, order: TokenOrder, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return the state of each pair of blocks; see `StaticMethod.tile_states`."""
        return self.as_gna().tile_states(layout, order, device)

    def at_density(
        self, density: float, layout: TokenLayout, order: TokenOrder | None = None
    ) -> Self:
        """Return this with both windows scaled by one factor; see `AttentionMethod.at_density`."""
        check_density(density)
        if density == 1:
            return replace(self, window=1.0)
        gna = self.as_gna().scaled_to(density, layout, order, scaled=(False, True, True))
        _, h, w = gna.axes(layout.grid)
        return replace(self, window=(h.window, w.window))
