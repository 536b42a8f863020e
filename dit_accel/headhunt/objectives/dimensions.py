"""VBench's dimensions and their proxies as objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from dit_accel.errors import OptionError
from dit_accel.eval.dimensions import dimension_class, load_dimensions
from dit_accel.headhunt.objectives.base import Entry, Objective


class OneDimension(Objective):
    """A dimension of `dit_accel.eval.dimensions`; the argument is its name."""

    name: ClassVar[str] = "dimension"

    def __init__(self, argument: str | None = None, world: str | None = None) -> None:
        super().__init__(argument, world)
        dimension_class(self.dimension)
        self._measure: Any = None

    @property
    def dimension(self) -> str:
        """The name of the dimension."""
        return self.argument or ""

    def load(self, device: str) -> None:
        """See `Objective.load`."""
        made, _ = load_dimensions([self.dimension], device=device)
        self._measure = made[self.dimension].measure

    def score(self, frames: Tensor, entries: Sequence[Entry]) -> list[float]:
        """See `Objective.score`."""
        return [
            self._measure(video, prompt=entry["prompt"])
            for video, entry in zip(frames, entries, strict=True)
        ]


class Aesthetic(OneDimension):
    """LAION's aesthetic score, a tenth of it: VBench's aesthetic quality."""

    name: ClassVar[str] = "aesthetic"

    @property
    def dimension(self) -> str:
        """See `OneDimension.dimension`."""
        if self.argument is not None:
            raise OptionError(f"objective {self.name!r} takes no argument: write {self.name!r}.")
        return "aesthetic_quality"
