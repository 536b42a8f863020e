"""Suites of prompts with their seeds: the bundled ones, and those of users' files.

A bundled suite is a ``.json`` beside this file. "world" lists which of the fixed prompts of a
model's drawn world it takes, the i-th from seed i; "open" are prompts for all other models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel.errors import OptionError, did_you_mean
from dit_accel.world.worlds import fixed_prompts

VBENCH_SAMPLES, VBENCH_FLICKER_SAMPLES = 5, 25


@dataclass(frozen=True)
class Entry:
    """One generation of a suite.

    Attributes:
        index: of the prompt in its suite.
        prompt: what to generate.
        seed: of the noise.
        scene: what the prompt's scene holds, for the checker of a drawn world.
        dimensions: what VBench measures with this prompt.
    """

    index: int
    prompt: str
    seed: int
    scene: Mapping[str, Any] | None = None
    dimensions: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What tells it from the suite's others, also in names of files."""
        return f"{self.index:04d}-{self.seed}"


@dataclass(frozen=True)
class Suite:
    """Prompts in order, under a name."""

    name: str
    entries: tuple[Entry, ...] = field(repr=False)


def list_suites() -> list[str]:
    """Return the names of the bundled suites, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.json"))


def load_suite(name: str, world: str | None = None, first: int | None = None) -> Suite:
    """Return a suite.

    Args:
        name: a bundled suite; or a file: a text with a prompt a line, a JSON list of prompts or of
            ``{"prompt": ..., "seed": ...}``, or VBench's ``VBench_full_info.json``. A prompt
            without a seed starts from the seed of its place.
        world: the model's drawn world, if it has one.
        first: take only so many prompts.

    Raises:
        OptionError: if there is no such suite, or it has no prompts for such a model.
    """
    if first is not None and first < 1:
        raise OptionError(f"prompts={first} must be at least 1.")
    if name in list_suites():
        entries = _bundled(name, world)
    elif Path(name).is_file():
        entries = _from_file(Path(name))
    else:
        raise OptionError(
            f"suite {name!r} is no bundled suite and no file.{did_you_mean(name, list_suites())}"
        )
    if not entries:
        raise OptionError(f"suite {name!r} has no prompts.")
    kept = [entry for entry in entries if first is None or entry.index < first]
    return Suite(Path(name).stem, tuple(kept))


def _bundled(name: str, world: str | None) -> list[Entry]:
    content = json.loads(Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8"))
    if "source" in content:
        raise OptionError(
            f"suite {name!r} is not bundled: get {content['source']} and give "
            f"--suite {content['file']}."
        )
    if world is not None:
        scenes = fixed_prompts(world)
        return [
            Entry(index, scenes[which]["prompt"], which, scenes[which])
            for index, which in enumerate(content["world"])
        ]
    if "open" not in content:
        raise OptionError(
            f"suite {name!r} has prompts for models of a drawn world only: take another suite."
        )
    return _listed(content["open"])


def _from_file(path: Path) -> list[Entry]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() != ".json":
            return _listed([line.strip() for line in text.splitlines() if line.strip()])
        content = json.loads(text)
        if content and isinstance(content[0], dict) and "prompt_en" in content[0]:
            return _of_vbench(content)
        return _listed(content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise OptionError(
            f"suite {str(path)!r} can't be read ({error}): give a text with a prompt a line, or a "
            'JSON list of {"prompt": ..., "seed": ...}.'
        ) from error


def _listed(prompts: Sequence[Any]) -> list[Entry]:
    entries = []
    for index, item in enumerate(prompts):
        row = {"prompt": item} if isinstance(item, str) else item
        entries.append(Entry(index, str(row["prompt"]), int(row.get("seed", index))))
    return entries


def _of_vbench(content: Sequence[Mapping[str, Any]]) -> list[Entry]:
    entries = []
    for index, row in enumerate(content):
        dimensions = tuple(row["dimension"])
        flickers = "temporal_flickering" in dimensions
        samples = VBENCH_FLICKER_SAMPLES if flickers else VBENCH_SAMPLES
        entries += [
            Entry(index, row["prompt_en"], seed, dimensions=dimensions) for seed in range(samples)
        ]
    return entries
