"""The contract of a feature cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.errors import OptionError
from dit_accel.session import Seam, SessionMethod


@dataclass(frozen=True)
class Cache(SessionMethod):
    """Keeps what a transformer computed in earlier steps. Its options are its fields."""

    kind: ClassVar[str] = "cache"
    strength: ClassVar[str]
    """The option that trades quality for speed: the larger, the more is reused."""
    strengths: ClassVar[tuple[float, ...]]
    """Three of its values, from weak to strong, for benchmarks and as a start for calibration."""
    most: ClassVar[float] = float("inf")
    """What all its values are less than."""
    skips_blocks: ClassVar[bool] = True
    """Whether it leaves out whole blocks, rather than attention inside them."""


def check_count(name: str, value: int, least: int) -> None:
    """Raise `OptionError` unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{name}={value!r} must be an integer of at least {least}.")


def check_threshold(name: str, value: float, most: float = float("inf")) -> None:
    """Raise `OptionError` unless ``value`` is a finite number in [0, ``most``]."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= most or value == float("inf"):
        limit = "" if most == float("inf") else f" and at most {most}"
        raise OptionError(f"{name}={value!r} must be a finite number, at least 0{limit}.")


def few_steps(min_steps: int) -> str:
    """Return why a short generation runs in full."""
    return f"a generation of fewer than {min_steps} steps (min_steps)"


def note_idle(seam: Seam, cache: Cache, why: str) -> None:
    """Say in the report that a cache did nothing."""
    seam.recorder.note(f"{cache.name} skipped nothing: {why}")
