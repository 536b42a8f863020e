"""TaylorSeer: extrapolate the stack's residual between full steps at fixed intervals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dit_accel.caching.base import check_count
from dit_accel.caching.gates import Gate, StepMask
from dit_accel.caching.predictors import Predictor, Taylor
from dit_accel.caching.stack import Setting, StackCache
from dit_accel.schedule import Steps


@dataclass(frozen=True)
class TaylorSeer(StackCache):
    """Run every few steps and extrapolate between them.

    On the whole stack's residual, not on every module's output as in the paper: that would hold
    tens of times the memory. Good at keeping what a picture shows, poor at keeping its pixels.

    Args:
        interval: one step of so many runs; 1 reuses nothing.
        order: of the extrapolation. More than 1 is seldom better.
        horizon: steps after which extrapolation stops; beyond about 3 it overshoots.
        first_steps, last_steps, max_reuses, min_steps: see `StackCache`.
    """

    name: ClassVar[str] = "taylorseer"
    paper: ClassVar[str] = "TaylorSeer, 2503.06923"
    strength: ClassVar[str] = "interval"
    strengths: ClassVar[tuple[float, ...]] = (2, 3, 4)

    interval: int = 4
    order: int = 1
    horizon: int = 3
    first_steps: Steps = field(default=3, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        for name, least in (("interval", 1), ("order", 0), ("horizon", 1)):
            check_count(name, getattr(self, name), least)

    def gate(self, setting: Setting) -> Gate:
        """Run every ``interval`` steps from the last of the first ones on."""
        first = max(setting.limits.first - 1, setting.start)
        steps = range(setting.num_steps)
        return StepMask([step <= first or (step - first) % self.interval == 0 for step in steps])

    def predictor(self, setting: Setting) -> Predictor:
        """Extrapolate."""
        return Taylor(self.order, self.horizon)
