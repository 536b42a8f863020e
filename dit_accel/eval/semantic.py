"""Prompt following in the manner of VBench's semantic dimensions, read by a drawn world's checker.

VBench asks networks whether prompted objects, colours and places are there. In the drawn worlds of
the bundled models a checker without a network can tell (`dit_accel.world`). The names begin with
``world_``: they are no VBench scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import VideoError
from dit_accel.world.worlds import Marks, fixed_prompts, make_reader

SEMANTIC = {
    "world_object_class": "share of prompted shapes that are seen, in any colour",
    "world_color": "share of the prompted shapes seen that have the prompted colour",
    "world_multiple_objects": "whether all prompted things are seen, where there are several",
    "world_spatial_relationship": "share of prompted places and relations that are right",
    "world_motion": "share of prompted motions, of things and of the camera, that are right",
    "world_style": "whether the prompted style is seen",
    "world_scene": "whether background and pattern are as prompted",
}
"""What each value of `semantic_values` is; all are between 0 and 1."""


def semantic_values(entry: Mapping[str, Any], marks: Marks) -> dict[str, float]:
    """Return how a generation follows its prompt, by the names in `SEMANTIC`.

    A name is left out where the prompt doesn't ask for it; so is the colour where no prompted
    shape is seen, as VBench does.

    Args:
        entry: of `world.worlds.fixed_prompts`.
        marks: what the world's reader says of the generation.
    """
    asked = [(thing["shape"], thing["colour"]) for thing in entry["things"]]
    seen = [(thing["shape"], colour) for colour, thing in marks["seen"]["things"].items()]
    present = [one for one in asked if one[0] in {shape for shape, _ in seen}]
    things = [one in seen for one in asked]
    values: dict[str, float] = {"world_object_class": len(present) / len(asked)}
    if present:
        values["world_color"] = sum(one in seen for one in present) / len(present)
    if len(asked) > 1:
        values["world_multiple_objects"] = float(all(things))
    right = {
        "world_spatial_relationship": [*marks.get("place", ()), *marks.get("relation", ())],
        "world_motion": [*marks.get("motion", ()), *marks.get("camera", ())],
        "world_style": marks.get("style", ()),
    }
    for name, found in right.items():
        if found:
            values[name] = sum(found) / len(found)
    values["world_scene"] = float(all([*marks["background"], *marks["pattern"]]))
    return values


def make_semantic_reader(
    world: str, device: str | torch.device = "cpu"
) -> Callable[[Tensor, str], dict[str, float]]:
    """Return what gives `semantic_values` of frames ``[T, 3, H, W]`` in [0, 1] and their prompt.

    It raises `VideoError` for a prompt that is none of the world's fixed ones.

    Raises:
        OptionError: if there is no such world.
    """
    entries = {entry["prompt"]: entry for entry in fixed_prompts(world)}
    reader = make_reader(world, device)

    def read(frames: Tensor, prompt: str) -> dict[str, float]:
        if prompt not in entries:
            raise VideoError(f"{prompt!r} is no fixed prompt of the drawn world {world!r}.")
        return semantic_values(entries[prompt], reader(frames, entries[prompt]))

    return read


def mean_values(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each value over the generations that have it."""
    collected: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            collected.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in collected.items()}
