"""MagCache: the residual's size shrinks by known ratios, which tell the error of keeping it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from dit_accel.caching.base import check_threshold
from dit_accel.caching.gates import Gate, mask_from, nearest
from dit_accel.caching.stack import Setting, StackCache
from dit_accel.errors import OptionError
from dit_accel.schedule import Steps
from dit_accel.session import Seam, Session


@dataclass(frozen=True)
class MagCache(StackCache):
    """Reuse the whole stack while the ratios of residual sizes promise a small error.

    All steps are decided before the first; nothing is read from the device.

    Args:
        threshold: reuse while the summed error, the distance of the product of ratios from 1, is
            at most this; 0 reuses nothing.
        ratios: mean size of each step's residual over that of the step before, for the steps of
            one generation; other numbers of steps take the nearest. None: as published for the
            model, which must have some.
        uncond_ratios: those of the unconditional branch; None for the same.
        first_steps, last_steps, max_reuses, min_steps: see `StackCache`.
    """

    name: ClassVar[str] = "magcache"
    paper: ClassVar[str] = "MagCache, 2506.09045"
    strength: ClassVar[str] = "threshold"
    strengths: ClassVar[tuple[float, ...]] = (0.12, 0.24, 0.4)

    threshold: float = 0.06
    ratios: tuple[float, ...] | None = None
    uncond_ratios: tuple[float, ...] | None = None
    first_steps: Steps = field(default=0.2, kw_only=True)
    max_reuses: int | None = field(default=3, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_threshold("threshold", self.threshold)

    def session(self, pipe: Any, seam: Seam) -> Session:
        """Refuse models without ratios."""
        if not self.ratios:
            raise OptionError(
                "no MagCache ratios are published for this model: measure them with `dit-accel "
                "calibrate`, give ratios=(...), or choose first_block_cache or easycache, which "
                "need none."
            )
        return super().session(pipe, seam)

    def gate(self, setting: Setting) -> Gate:
        """Play through the schedule with this branch's ratios."""
        ratios = self.ratios or ()
        if setting.moment.branch == "uncond" and self.uncond_ratios:
            ratios = self.uncond_ratios
        ratios = nearest(ratios, setting.num_steps)
        product, error = 1.0, 0.0

        def spend(step: int, reuses: int) -> tuple[float, bool]:
            nonlocal product, error
            if not reuses:
                product, error = 1.0, 0.0
            product *= ratios[step]
            error += abs(1 - product)
            return error, error <= self.threshold and self.threshold > 0

        return mask_from(spend, setting.num_steps, setting.start, setting.limits)
