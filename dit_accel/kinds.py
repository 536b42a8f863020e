"""The kinds of methods. A pipeline can have one method of each at a time.

A kind is a folder of this package and an entry point group of the same name for other packages;
its classes derive from `Method`, say their ``kind``, and are found by `registry`.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "attention": "dit_accel.methods",
        "cache": "dit_accel.caching",
        "guidance": "dit_accel.guidance",
        "resolution": "dit_accel.highres",
    }
)
"""Kind: the package whose modules define its methods, and the entry point group of others."""


@dataclass(frozen=True)
class Method(ABC):
    """What every method has. Subclasses are frozen dataclasses; their fields are its options."""

    name: ClassVar[str]
    """Registered name, as in ``accelerate_pipeline(pipe, method=name)``."""
    kind: ClassVar[str]
    """One of `KINDS`."""
    paper: ClassVar[str] = ""
    """Title and arXiv number, for tables."""

    @classmethod
    def options_from(cls, published: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options to construct with: those given, and published ones for the rest."""
        return {**published, **given}

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the class's docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]
