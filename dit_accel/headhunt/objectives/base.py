"""The contract of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from dit_accel.errors import OptionError
from dit_accel.world.worlds import sample_prompts

Entry = dict[str, Any]
"""A text under "prompt"; with drawn worlds, what its scene holds, too."""


class Objective(ABC):
    """Says how good generations are.

    Args:
        argument: what follows the name and a colon, if anything.
        world: the drawn world of the model, if it has one.

    Raises:
        OptionError: if it can't be used so.
    """

    name: ClassVar[str]
    needs_scenes: ClassVar[bool] = False
    """Whether it has to know what the scenes of the prompts hold."""

    def __init__(self, argument: str | None = None, world: str | None = None) -> None:
        self.argument, self.world = argument, world

    def __str__(self) -> str:
        """Return the name with its argument."""
        return self.name if self.argument is None else f"{self.name}:{self.argument}"

    def identity(self) -> Any:
        """Return all that its scores depend on, ready for JSON."""
        return str(self)

    def prompts(self, count: int, seed: int) -> list[Entry]:
        """Return prompts to search with.

        Raises:
            OptionError: if the model has no drawn world to take them from.
        """
        if self.world is None:
            raise OptionError("this model brings no prompts: give --prompts FILE.")
        return sample_prompts(self.world, count, seed)

    def load(self, device: str) -> None:
        """Load what it needs, before the model to search is loaded.

        Raises:
            OptionError: if a file that was given is not what it should be.
            BackboneError: if a network can't be had; the message names it.
        """
        return None

    @abstractmethod
    def score(self, frames: Tensor, entries: Sequence[Entry]) -> list[float]:
        """Return how good each generation is; more is better.

        Args:
            frames: float ``[B, T, 3, H, W]`` in [0, 1], on the CPU; pictures have T = 1.
            entries: what each was to show.
        """
