"""What a search can look for, by name.

A name may go with an argument: ``style:dark``, ``clip_image:picture.png``, ``pickscore:FOLDER``.
"""

from __future__ import annotations

from dit_accel.errors import OptionError, did_you_mean
from dit_accel.headhunt.objectives.base import Entry, Objective
from dit_accel.headhunt.objectives.drawn import Following, Style
from dit_accel.headhunt.objectives.networks import (
    Aesthetic,
    ClipImage,
    ClipText,
    PickScore,
)

__all__ = ["OBJECTIVES", "Entry", "Objective", "make_objective"]

OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls for cls in (Following, Style, PickScore, ClipText, ClipImage, Aesthetic)
}


def make_objective(text: str, world: str | None = None) -> Objective:
    """Return the objective called ``text``; nothing is loaded yet.

    Args:
        text: a name, with an argument after a colon where it takes one.
        world: the drawn world of the model, if it has one.

    Raises:
        OptionError: if there is no such objective, or it can't be used so.
    """
    name, _, argument = text.partition(":")
    if name not in OBJECTIVES:
        raise OptionError(f"unknown objective {name!r}.{did_you_mean(name, OBJECTIVES)}")
    return OBJECTIVES[name](argument or None, world)
