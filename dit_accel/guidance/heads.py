"""Lists of attention heads: as options, as JSON files that know their model, and by name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from dit_accel.errors import OptionError, did_you_mean
from dit_accel.files import write_text
from dit_accel.guidance.attention import heads_per_layer
from dit_accel.pipelines.base import PipelineFamily

Head = tuple[int, int]
"""Layer (block in running order) and head, from 0."""

VERSION = 1
SETS_FOLDER = "heads"
"""Folder beside a model's ``model_index.json`` with files of heads, found by their names."""
_PAIRS = re.compile(r"\s*\d+:\d+(\s*,\s*\d+:\d+)*\s*")
_NAME = re.compile(r"[A-Za-z][\w-]*")
_NUMBERS = re.compile(r"\[[\s\d.,e+-]*\]")  # a list of them, however broken into lines


@dataclass(frozen=True)
class HeadFile:
    """A list of heads and what it was found for; another model's heads mean other things.

    Attributes:
        heads: the heads.
        model: what `model_identity` returns.
        perturbation: under which they were found.
        scope: likewise.
        strength: that suits them; None if it is not known.
        scale: likewise.
        found: how they were found, for people.
    """

    heads: tuple[Head, ...]
    model: Mapping[str, Any]
    perturbation: str
    scope: str
    strength: float | None = None
    scale: float | None = None
    found: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> HeadFile:
        """Read a file.

        Raises:
            OptionError: if it is not there or is no list of heads.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                raise OptionError(
                    f"{path} has version {content['version']!r} of a list of heads; this "
                    f"dit-accel reads version {VERSION}."
                )
            return cls(
                tuple(tuple(head) for head in content["heads"]),
                content["model"],
                content["perturbation"],
                content["scope"],
                content.get("strength"),
                content.get("scale"),
                content.get("found", {}),
            )
        except OSError as error:
            raise OptionError(
                f"heads={str(path)!r}: no such file can be read. Give a JSON file of heads, pairs "
                "such as [(12, 3), (12, 7)], or '12:3,12:7'."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, OptionError):
                raise
            raise OptionError(f"{path} is no list of heads, or is cut short.") from error

    def write(self, path: Path) -> None:
        """Write a file."""
        content = {"version": VERSION, "model": dict(self.model), "heads": self.heads}
        content |= {"perturbation": self.perturbation, "scope": self.scope}
        content |= {"strength": self.strength, "scale": self.scale, "found": dict(self.found)}
        text = json.dumps(content, indent=1, allow_nan=False)
        flat = _NUMBERS.sub(lambda match: " ".join(match.group().split()), text)
        write_text(path, flat + "\n")

    def check(
        self, family: PipelineFamily, transformer: nn.Module, perturbation: str, scope: str
    ) -> None:
        """Raise `OptionError` if the heads were found for something else."""
        here = model_identity(family, transformer)
        here |= {"perturbation": perturbation, "scope": scope}
        found = {**self.model, "perturbation": self.perturbation, "scope": self.scope}
        for name, value in here.items():
            if found.get(name) != value:
                raise OptionError(
                    f"these heads were found for {name}={found.get(name)!r}, and here it is "
                    f"{value!r}: search anew, or give the heads as pairs."
                )


def model_identity(family: PipelineFamily, transformer: nn.Module) -> dict[str, Any]:
    """Return what tells a transformer's heads from those of others, as JSON-ready values."""
    return {
        "transformer": type(transformer).__name__,
        "layers": len(family.blocks(transformer)),
        "heads": heads_per_layer(family, transformer),
    }


def is_name(heads: object) -> bool:
    """Whether heads are given by the name of a set that a model's folder brings."""
    return isinstance(heads, str) and _NAME.fullmatch(heads) is not None


def named_heads(pipe: Any, name: str) -> Path:
    """Return the file of the set of heads that the folder of ``pipe`` brings under a name.

    Raises:
        OptionError: if there is none; the message lists those that there are.
    """
    folder = Path(getattr(pipe, "config", {}).get("_name_or_path") or "")
    sets = {path.stem: path for path in sorted((folder / SETS_FOLDER).glob("*.json"))}
    if name in sets:
        return sets[name]
    if not sets:
        raise OptionError(
            f"heads={name!r}: this model's folder brings no sets of heads. Search for one with "
            "`dit-accel headhunt`, or give pairs such as [(12, 3), (12, 7)]."
        )
    raise OptionError(
        f"heads={name!r}: this model's folder brings no such set.{did_you_mean(name, sets)}"
    )


def settle_heads(heads: object) -> tuple[tuple[Head, ...], HeadFile | None]:
    """Return heads as pairs, and the file that they came from, if any.

    Args:
        heads: pairs (layer, head), a text such as "12:3,12:7", or a path.

    Raises:
        OptionError: if they are none of these, empty, negative or given twice.
    """
    file = None
    if isinstance(heads, str | Path):
        if _PAIRS.fullmatch(str(heads)):
            heads = [tuple(map(int, pair.split(":"))) for pair in str(heads).split(",")]
        else:
            file = HeadFile.read(Path(heads))
            heads = file.heads
    if not isinstance(heads, Sequence):
        raise OptionError(f"heads={heads!r}: give pairs (layer, head), or a JSON file of them.")
    if not heads:
        raise OptionError("heads is empty: give pairs (layer, head), such as [(12, 3)].")
    found = [_pair(head) for head in heads]
    for head in found:
        if found.count(head) > 1:
            raise OptionError(f"heads has {head} twice: give each head once.")
    return tuple(found), file


def _pair(head: object) -> Head:
    numbers = head if isinstance(head, Sequence) and not isinstance(head, str) else ()
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
    if len(numbers) != 2 or not whole:
        raise OptionError(f"heads has {head!r}, which is no pair (layer, head) counted from 0.")
    return numbers[0], numbers[1]
