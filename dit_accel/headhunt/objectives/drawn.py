"""Whether pictures of a drawn world show what they were asked for, as its checker reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from dit_accel.errors import OptionError, did_you_mean
from dit_accel.headhunt.objectives.base import Entry, Objective
from dit_accel.world.pictures import STYLES
from dit_accel.world.worlds import Marks, make_reader, sample_prompts, shares_right


class Following(Objective):
    """The share of the prompted attributes that come out."""

    name: ClassVar[str] = "following"
    needs_scenes: ClassVar[bool] = True

    def __init__(self, argument: str | None = None, world: str | None = None) -> None:
        super().__init__(argument, world)
        if world is None:
            raise OptionError(
                f"objective {self.name!r} reads drawn worlds, and this model belongs to none: take "
                "a bundled model, or another objective, such as 'pickscore'."
            )
        self._check_argument()
        self._read: Any = None

    def _check_argument(self) -> None:
        if self.argument is not None:
            raise OptionError(f"objective {self.name!r} takes no argument: write {self.name!r}.")

    def load(self, device: str) -> None:
        """See `Objective.load`."""
        self._read = make_reader(str(self.world), device)

    def marks(self, frames: Tensor, entries: Sequence[Entry]) -> list[Marks]:
        """Return what the checker reads off each generation; see `Objective.score`."""
        if self._read is None:
            self.load("cpu")
        return [self._read(*pair) for pair in zip(frames, entries, strict=True)]

    def score(self, frames: Tensor, entries: Sequence[Entry]) -> list[float]:
        """See `Objective.score`."""
        return [shares_right([marks])["all"] for marks in self.marks(frames, entries)]


class Style(Following):
    """Half whether the style is right, half the share of right attributes else.

    The argument is a style; prompts are drawn in it. Without, they are in all styles.
    """

    name: ClassVar[str] = "style"

    def _check_argument(self) -> None:
        if self.world != "pictures":
            raise OptionError(f"the drawn world {self.world!r} has no styles: take 'following'.")
        if self.argument is not None and self.argument not in STYLES:
            raise OptionError(f"no style {self.argument!r}.{did_you_mean(self.argument, STYLES)}")

    def prompts(self, count: int, seed: int) -> list[Entry]:
        """See `Objective.prompts`."""
        return sample_prompts(str(self.world), count, seed, style=self.argument)

    def score(self, frames: Tensor, entries: Sequence[Entry]) -> list[float]:
        """See `Objective.score`."""
        return [sum(style_and_rest(marks)) / 2 for marks in self.marks(frames, entries)]


def style_and_rest(marks: Marks) -> tuple[float, float]:
    """Return whether the style is right, as 1 or 0, and the share of the other right attributes."""
    rest = {kind: right for kind, right in marks.items() if kind != "style"}
    return float(all(marks["style"])), shares_right([rest])["all"]
