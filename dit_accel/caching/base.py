"""The contract of a feature cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.session import SessionMethod


@dataclass(frozen=True)
class Cache(SessionMethod):
    """Keeps what a transformer computed in earlier steps. Its options are its fields."""

    kind: ClassVar[str] = "cache"
