"""FreeSwim: pictures and videos larger than a model was trained for, without training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from dit_accel.errors import OptionError, did_you_mean
from dit_accel.highres.reference import Parity, length_gain, window_tokens
from dit_accel.kinds import Method
from dit_accel.methods.base import AttentionMethod
from dit_accel.methods.sliding_window import SlidingWindow
from dit_accel.session import Seam, Session, SessionMethod

Override = Literal["cross", "joint", "none"]
Branches = Literal["cond", "both"]


@dataclass(frozen=True)
class FreeSwim(SessionMethod):
    """Generate at the trained size, enlarge, and denoise again with windows of that size.

    In the second stage a token attends to a window as large as the trained grid, in all frames
    (`SlidingWindow`). In some steps a second, full pass through the same blocks sees everything,
    and what its tokens read from the text replaces what the window's tokens read; between these
    steps it is kept. An attention method chosen beside it runs the first stage and the full
    passes; without one they are dense. Calls at the trained size are left as they are.

    Args:
        native_size: (height, width) in pixels that the model was trained for. None: what its
            folder recommends, or else its pipeline's own default.
        window: "released" is the odd window of the released code (31 x 53 tokens for 480 x 832
            pixels), "native" exactly the trained grid (30 x 52), or (h, w) in tokens.
        gain: factor on the logits of self-attention in the second stage; None for FreeSwim's,
            1.0461 for 480 x 832.
        override: "cross" replaces what cross-attention gives. "joint", for models without
            cross-attention, replaces the text's part of joint attention and the text tokens
            themselves (experimental: not in the paper). "none" has windows alone.
        branches: whose text is replaced: the conditional pass's, or "both". A pipeline that runs
            both in one batch has both replaced.
        refresh_every: a full pass runs in one step of so many; 1 keeps nothing between steps.
        offload: keep what is kept in CPU memory, and move it beside the computation.
        budget_gib: most memory to take for it; None for what is free. More is refused before
            anything is generated.
        pool_keys: the full pass attends to means of so many by so many tokens of a frame.
        sigma: noise level from which the second stage starts, in (0, 1]: latents are mixed as
            ``(1 - sigma) * latents + sigma * noise``. 0.9546 is what the released "strength 0.7"
            comes to.
        flow_shift: of the scheduler in the second stage; None leaves it.
        tiled_vae: whether the VAE works in tiles in the second stage.
    """

    name: ClassVar[str] = "freeswim"
    kind: ClassVar[str] = "resolution"
    paper: ClassVar[str] = "FreeSwim, arXiv 2511.14712"

    native_size: tuple[int, int] | None = None
    window: Parity | tuple[int, int] = "released"
    gain: float | None = None
    override: Override = "cross"
    branches: Branches = "cond"
    refresh_every: int = 2
    offload: bool = False
    budget_gib: float | None = None
    pool_keys: int = 1
    sigma: float = 0.9546
    flow_shift: float | None = None
    tiled_vae: bool = True

    def __post_init__(self) -> None:
        """Check all that can be checked without a pipeline."""
        for name in ("native_size", "window"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        if self.native_size is not None:
            _check_pair("native_size", self.native_size)
        if isinstance(self.window, str):
            _check_word("window", self.window, get_args(Parity), ", or (h, w) in tokens")
        else:
            _check_pair("window", self.window)
        _check_word("override", self.override, get_args(Override))
        _check_word("branches", self.branches, get_args(Branches))
        for name in ("refresh_every", "pool_keys"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"{name}={value!r} must be an integer of at least 1.")
        for name in ("gain", "flow_shift", "budget_gib"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                raise OptionError(f"{name}={value!r} must be a finite number above 0, or None.")
        if not _is_number(self.sigma) or not 0 < self.sigma <= 1:
            raise OptionError(f"sigma={self.sigma!r} must be in (0, 1]: 1 is nothing but noise.")

    def sliding_window(self, grid: tuple[int, int, int], trained: tuple[int, int]) -> SlidingWindow:
        """Return the window on a grid (T, H, W) for a model trained on (H, W) tokens per frame."""
        window = self.window
        if isinstance(window, str):
            window = window_tokens(trained[0], window), window_tokens(trained[1], window)
        gain = length_gain(math.prod(trained)) if self.gain is None else self.gain
        return SlidingWindow((min(window[0], grid[1]), min(window[1], grid[2])), gain=gain)

    def check_beside(self, others: Sequence[Method]) -> None:
        """Refuse caches, and a second method for the full passes; see `SessionMethod`."""
        for other in others:
            if other.kind == "cache":
                raise OptionError(
                    f"{self.name!r} and the cache {other.name!r} don't run together: leave one out "
                    f"({self.name}'s own refresh_every spares full passes)."
                )
            if isinstance(other, AttentionMethod) and other.name != "dense" and self.pool_keys > 1:
                raise OptionError(
                    f"pool_keys={self.pool_keys} and the method {other.name!r} both say what the "
                    "full passes attend to: leave one out."
                )

    def session(self, pipe: Any, seam: Seam) -> Session:
        """See `SessionMethod.session`."""
        from dit_accel.highres.engine import FreeSwimSession

        return FreeSwimSession(self, pipe, seam)


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]


def _check_pair(name: str, value: object) -> None:
    pair = isinstance(value, tuple) and len(value) == 2
    if not pair or any(not isinstance(x, int) or isinstance(x, bool) or x < 1 for x in value):  # type: ignore[attr-defined]
        raise OptionError(f"{name}={value!r}: give (height, width), two integers of at least 1.")


def _check_word(name: str, value: object, words: tuple[str, ...], more: str = "") -> None:
    if value not in words:
        hint = did_you_mean(str(value), words)
        raise OptionError(f"unknown {name} {value!r}.{hint.rstrip('.')}{more}.")
