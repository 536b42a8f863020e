"""Dense attention, as a method: the baseline under the same interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import Self

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.errors import DensityUnreachableError
from dit_accel.grid import TokenOrder
from dit_accel.methods.base import AttentionMethod, check_density
from dit_accel.plan import AttentionPlan, DensePlan


@dataclass(frozen=True)
class Dense(AttentionMethod):
    """Attend to every token with the best dense kernel that the machine has."""

    name: ClassVar[str] = "dense"

    def plan(
        self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, order: TokenOrder
    ) -> AttentionPlan:
        """Keep every pair; see `AttentionMethod.plan`."""
        return DensePlan("method is dense", order)

    def at_density(
        self, density: float, layout: TokenLayout, order: TokenOrder | None = None
    ) -> Self:
        """Return this method if ``density`` is 1; see `AttentionMethod.at_density`."""
        check_density(density)
        if density < 1:
            raise DensityUnreachableError(
                f"density={density} is out of reach: method 'dense' keeps every pair (density 1).",
                least=1.0,
            )
        return self
