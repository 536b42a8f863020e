"""An objective for tests of searches for heads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dit_accel.headhunt.objectives import Entry, Objective


class Brightness(Objective):
    """How light the pictures are; may break off, as a search that is interrupted does."""

    name = "brightness"

    def __init__(self, breaks_after: int | None = None) -> None:
        super().__init__()
        self.left, self.scored = breaks_after, 0

    def score(self, frames: Tensor, entries: Sequence[Entry]) -> list[float]:
        if self.left is not None:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
        self.scored += len(frames)
        return frames.mean((1, 2, 3, 4)).tolist()
