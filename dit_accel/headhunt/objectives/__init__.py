"""What a search can look for, by name.

A name may go with an argument: ``style:dark``, ``clip_image:picture.png``, ``pickscore:FOLDER``.
Another package can bring objectives through the entry point group ``dit_accel.objectives``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from dit_accel.errors import OptionError, did_you_mean
from dit_accel.headhunt.objectives.base import Entry, Objective
from dit_accel.registry import discover

__all__ = ["Entry", "Objective", "list_objectives", "make_objective"]


def list_objectives() -> list[str]:
    """Return the names of all objectives, sorted."""
    return sorted(_objectives())


def make_objective(text: str, world: str | None = None) -> Objective:
    """Return the objective called ``text``; nothing is loaded yet.

    Args:
        text: a name, with an argument after a colon where it takes one.
        world: the drawn world of the model, if it has one.

    Raises:
        OptionError: if there is no such objective, or it can't be used so.
    """
    name, _, argument = text.partition(":")
    found = _objectives().get(name)
    if found is None:
        raise OptionError(f"unknown objective {name!r}.{did_you_mean(name, _objectives())}")
    return found(argument or None, world)


@lru_cache(maxsize=1)
def _objectives() -> Mapping[str, type[Objective]]:
    return discover(__name__, Objective, "dit_accel.objectives")  # type: ignore[type-abstract]
