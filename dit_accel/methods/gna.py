"""Generalized Neighborhood Attention: a window per query, or per group of queries, on each axis."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from dit_accel.call import TokenLayout
from dit_accel.errors import OptionError
from dit_accel.grid import Grid, TokenOrder, coordinates
from dit_accel.methods.base import StaticMethod, check_density, unreachable
from dit_accel.methods.windows import Axes, Axis, best_order, window_states
from dit_accel.plan import TokenPredicate

Window = int | float
"""Tokens (int), or a share of the axis (float in (0, 1])."""

AXIS_NAMES = ("t", "h", "w")
EVERY_WINDOW_BLOCKS = 64
"""Blocks up to which `GNA.at_density` tries every window instead of searching."""


@dataclass(frozen=True)
class GNA(StaticMethod):
    """Generalized Neighborhood Attention (arXiv 2504.16922), as NATTEN computes it.

    Along each axis of the (t, h, w) grid, a query sees the ``window`` keys around itself, pushed
    inward at the borders so that the window is always whole. With ``stride`` s, s successive
    queries share the window of their middle one: 1 is neighborhood attention, ``stride=window``
    blocked attention. A key is visible if it is on every axis.

    Each option takes one value for every axis, or a tuple whose last value is for w, the one
    before for h, then t; axes that a shorter tuple leaves out are seen whole. A single value
    means 1 on axes of one token, so that the same options serve images and videos.

    Attributes:
        window: an int counts tokens, and must fit the axis. A float in (0, 1] is a share of the
            axis, rounded, at least one token; 1.0 is the whole axis. The default keeps a quarter
            of the pairs: every frame, and half of each axis within frames.
        stride: at most the window. An int counts tokens, and is clipped to a window given as a
            share; a float in (0, 1] is a share of the window, rounded, at least one token, and
            keeps its proportion on every grid. Blocked attention (stride = window) shows seams.
        dilation: a query sees only keys whose distance on the axis is a multiple of this.
            ``window * dilation`` must fit the axis; shares are clipped to fit.
        causal: hide the keys after the query on that axis.
    """

    name: ClassVar[str] = "gna"
    paper: ClassVar[str] = "Generalized Neighborhood Attention, arXiv 2504.16922"

    window: Window | tuple[Window, ...] = (1.0, 0.5, 0.5)
    stride: Window | tuple[Window, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False

    def __post_init__(self) -> None:
        """Check all that can be checked without a grid."""
        super().__post_init__()
        for option in ("window", "stride", "dilation", "causal"):
            value = getattr(self, option)
            if isinstance(value, Sequence) and not isinstance(value, str):
                # Lists come from JSON; a tuple keeps the config hashable.
                object.__setattr__(self, option, tuple(value))
                if not 1 <= len(value) <= 3:
                    raise OptionError(f"{option}={value!r}: give one value, or one per axis.")
        for value in _values(self.window):
            check_window(value)
        for value in _values(self.stride):
            if not (_is_int(value) and value >= 1) and not _is_share(value):
                raise OptionError(
                    f"stride={value!r}: give a number of tokens (int, at least 1) or a share of "
                    "the window (float in (0, 1])."
                )
        for value in _values(self.dilation):
            if not _is_int(value) or value < 1:
                raise OptionError(f"dilation={value!r} must be an integer of at least 1.")
        if not all(isinstance(value, bool) for value in _values(self.causal)):
            raise OptionError(f"causal={self.causal!r} must be True or False for each axis.")
        windows, strides = _per_axis(self.window, 1.0), _per_axis(self.stride, 1)
        for name, window, stride in zip(AXIS_NAMES, windows, strides, strict=True):
            if _is_int(window) and _is_int(stride) and stride > window:
                raise OptionError(
                    f"stride {stride} is larger than window {window} on axis {name}: queries "
                    "would not see themselves. Choose a stride of at most the window."
                )

    def axes(self, grid: Grid) -> Axes:
        """Return the window in tokens on each axis of ``grid``.

        Raises:
            OptionError: if a window, dilated, is larger than its axis.
        """
        options = (
            _per_axis(self.window, 1.0, grid),
            _per_axis(self.stride, 1, grid),
            _per_axis(self.dilation, 1, grid),
            _per_axis(self.causal, False),
        )
        t, h, w = map(_axis, AXIS_NAMES, grid, *options)
        return t, h, w

    def allowed(self, layout: TokenLayout, device: torch.device | str = "cpu") -> TokenPredicate:
        """Return the pattern's definition; see `StaticMethod.allowed`."""
        axes, grid = self.axes(layout.grid), layout.grid

        def predicate(query: Tensor, key: Tensor) -> Tensor:
            q, k = coordinates(query, grid), coordinates(key, grid)
            on_t, on_h, on_w = (axis.allows(q[i], k[i]) for i, axis in enumerate(axes))
            return on_t & on_h & on_w

        return predicate

    def token_order(self, grid: Grid) -> TokenOrder:
        """Return the order with the fewest visited blocks; see `AttentionMethod.token_order`."""
        return best_order(self.axes(grid), self.block_size)

    def tile_states(
        self, layout: TokenLayout, order: TokenOrder, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return the state of each pair of blocks; see `StaticMethod.tile_states`."""
        return window_states(self.axes(layout.grid), order, self.block_size, device)

    def at_density(
        self, density: float, layout: TokenLayout, order: TokenOrder | None = None
    ) -> Self:
        """Return this with its windows scaled by one factor; see `AttentionMethod.at_density`.

        Windows keep their proportions, and axes seen whole (1.0) stay whole unless all are. The
        windows returned are tokens of ``layout.grid``; for density 1 they are 1.0, undilated, and
        causal axes stay causal.
        """
        check_density(density)
        if density == 1:
            return replace(self, window=1.0, stride=1, dilation=1)
        shares = [isinstance(window, float) for window in _per_axis(self.window, 1.0)]
        whole = [s and w == 1.0 for s, w in zip(shares, _per_axis(self.window, 1.0), strict=True)]
        scaled = [all(whole) or not stays for stays in whole]
        return self.scaled_to(density, layout, order, scaled=scaled)

    def scaled_to(
        self,
        density: float,
        layout: TokenLayout,
        order: TokenOrder | None = None,
        *,
        scaled: Sequence[bool],
    ) -> Self:
        """Return this with the windows on the ``scaled`` axes as large as ``density`` allows."""
        axes = self.axes(layout.grid)
        most = [axis.size // axis.dilation for axis in axes]
        largest = max(m / a.window for m, a, free in zip(most, axes, scaled, strict=True) if free)
        windows = _distinct_windows(axes, most, scaled, largest)
        options = [self._with_windows(axes, w) for w in windows]
        least = options[0].block_density(layout, order)
        if least > density:
            raise unreachable(self, density, layout, least)
        if layout.video_length <= EVERY_WINDOW_BLOCKS * self.block_size:
            # Few blocks line up badly with many windows, so that density jumps: ask them all.
            return next(o for o in reversed(options) if o.block_density(layout, order) <= density)
        # Finding the best order is the slow part, and it changes little with the window: search
        # in one order, then step down until the order that will be used agrees. (Not in that of
        # the largest window: it may be dense, and then any order is as good.)
        guess = int((len(options) - 1) * density ** (1 / sum(scaled)))
        in_order = order or options[guess].token_order(layout.grid)

        def fits(index: int) -> bool:
            return options[index].block_density(layout, in_order) <= density

        best = bisect_right(range(len(options)), False, key=lambda index: not fits(index)) - 1
        # Not quite monotone: a larger window may line up better with the blocks.
        above = range(best + 1, min(best + 7, len(options)))
        best = max([best, *(index for index in above if fits(index))])
        while best > 0 and options[best].block_density(layout, order) > density:
            best -= 1
        return options[max(best, 0)]

    def _with_windows(self, axes: Axes, windows: tuple[int, ...]) -> Self:
        given = _per_axis(self.stride, 1)
        strides = tuple(
            stride if isinstance(stride, float) else min(axis.stride, w)
            for stride, axis, w in zip(given, axes, windows, strict=True)
        )
        dilations = tuple(axis.dilation for axis in axes)
        return replace(self, window=windows, stride=strides, dilation=dilations)


def _distinct_windows(
    axes: Axes, most: Sequence[int], scaled: Sequence[bool], largest: float
) -> list[tuple[int, ...]]:
    """Return the windows of ``axes`` times factors from 0 to ``largest``, ascending."""
    steps = 128
    windows: dict[tuple[int, ...], None] = {}
    for step in range(steps + 1):
        factor = largest * step / steps
        rounded = (math.floor(factor * axis.window + 0.5) for axis in axes)
        window = tuple(
            min(max(tokens, 1), limit) if free else axis.window
            for tokens, limit, free, axis in zip(rounded, most, scaled, axes, strict=True)
        )
        windows[window] = None
    return list(windows)


def check_window(window: Any) -> None:
    """Raise `OptionError` unless ``window`` is a number of tokens or a share of an axis."""
    if _is_int(window) and window >= 1:
        return
    if _is_share(window):
        return
    raise OptionError(
        f"window={window!r}: give a number of tokens (int, at least 1) or a share of the axis "
        "(float in (0, 1], 1.0 for the whole axis)."
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return isinstance(value, float) and 0 < value <= 1


def _values(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _per_axis(value: Any, missing: Any, grid: Grid | None = None) -> tuple[Any, Any, Any]:
    """Spread an option over (t, h, w)."""
    if isinstance(value, tuple):
        spread = (missing,) * (3 - len(value)) + value
        return spread[0], spread[1], spread[2]
    t, h, w = (missing if size == 1 else value for size in grid or (0, 0, 0))
    return t, h, w


def _axis(
    name: str, size: int, window: Window, stride: Window, dilation: int, causal: bool
) -> Axis:
    if _is_int(window):
        tokens = int(window)
    else:
        tokens = max(min(math.floor(window * size + 0.5), size // dilation), 1)
    if tokens * dilation > size:
        dilated = f" with dilation {dilation}" if dilation > 1 else ""
        raise OptionError(
            f"window {tokens}{dilated} spans {tokens * dilation} tokens, but axis {name} has "
            f"{size}. Choose a smaller one, or a share of the axis such as 1.0."
        )
    step = int(stride) if _is_int(stride) else max(math.floor(stride * tokens + 0.5), 1)
    return Axis(size, tokens, min(step, tokens), dilation, causal)
