"""The drawn worlds by name: their fixed prompts, their words, and how a generation is read."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import OptionError, did_you_mean

WORLDS = ("clips", "pictures")

Marks = dict[str, Any]
"""Per kind of attribute whether each was right, and under "seen" what was read."""


def fixed_prompts(world: str) -> list[dict[str, Any]]:
    """Return the world's fixed prompts: captions under "prompt", with what their scenes hold.

    Raises:
        OptionError: if there is no such world.
    """
    check_world(world)
    path = Path(__file__).with_name("prompts") / f"{world}.json"
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return entries


def sample_prompts(
    world: str, count: int, seed: int, style: str | None = None
) -> list[dict[str, Any]]:
    """Return captions of random scenes in the form of `fixed_prompts`, all different.

    Args:
        world: its name.
        count: how many.
        seed: says which.
        style: the style of all pictures; None leaves it to chance. Clips have none.

    Raises:
        OptionError: if there is no such world, or it has no such style.
    """
    check_world(world)
    rng = random.Random(seed)
    found: dict[str, dict[str, Any]] = {}
    if world == "clips":
        from dit_accel.world import clips

        if style is not None:
            raise OptionError(f"clips have no styles: leave {style=} out.")
        while len(found) < count:
            clip = clips.sample_scene(rng)
            found.setdefault(text := clips.caption(clip), {"prompt": text, **asdict(clip)})
        return list(found.values())
    from dit_accel.world import pictures

    if style is not None and style not in pictures.STYLES:
        raise OptionError(f"no style {style!r}.{did_you_mean(style, pictures.STYLES)}")
    while len(found) < count:
        picture = pictures.sample_scene(rng)
        if style is not None:
            if style == "outlined" and any(thing.colour == "white" for thing in picture.things):
                continue  # outlines are white
            picture = replace(picture, style=style)
        found.setdefault(text := pictures.caption(picture), {"prompt": text, **asdict(picture)})
    return list(found.values())


def unknown_words(world: str, text: str) -> list[str]:
    """Return the words of ``text`` that no caption of the world has, each once, in order.

    Raises:
        OptionError: if there is no such world.
    """
    check_world(world)
    if world == "clips":
        from dit_accel.world.clips import vocabulary
    else:
        from dit_accel.world.pictures import vocabulary
    known = set(vocabulary())
    words = re.findall(r"\w+|[^\w\s]+", text.lower())  # as the models' tokenizers split
    return [word for word in dict.fromkeys(words) if word not in known]


def make_reader(
    world: str, device: str | torch.device = "cpu"
) -> Callable[[Tensor, dict[str, Any]], Marks]:
    """Return what reads from frames ``[T, 3, H, W]`` in [0, 1] which attributes they show.

    Its second argument is an entry of `fixed_prompts`; a picture has T = 1. Reading runs on
    ``device``, wherever the frames are.

    Raises:
        OptionError: if there is no such world.
    """
    check_world(world)
    from dit_accel.world.reading import shape_masks

    masks = shape_masks(device)
    if world == "clips":
        from dit_accel.world import clip_checker, clips

        def read_clip(frames: Tensor, entry: dict[str, Any]) -> Marks:
            pixels = frames.to(device, torch.float32).permute(0, 2, 3, 1)
            return clip_checker.score_clip(pixels, clips.Scene.from_dict(entry), masks)

        return read_clip
    from dit_accel.world import picture_checker, pictures

    def read_picture(frames: Tensor, entry: dict[str, Any]) -> Marks:
        pixels = frames[0].to(device, torch.float32).permute(1, 2, 0)
        return picture_checker.score_picture(pixels, pictures.Scene.from_dict(entry), masks)

    return read_picture


def shares_right(marks: Iterable[Marks]) -> dict[str, float]:
    """Return the share of right attributes of each kind and of "all", and how many there are."""
    values: dict[str, list[bool]] = {}
    for mark in marks:
        for kind, right in mark.items():
            if kind != "seen":
                values.setdefault(kind, []).extend(right)
    everything = [right for kind in values.values() for right in kind]
    if not everything:
        return {"attributes": 0}
    shares = {kind: sum(right) / len(right) for kind, right in values.items() if right}
    return {**shares, "all": sum(everything) / len(everything), "attributes": len(everything)}


def check_world(world: str) -> None:
    """Raise `OptionError` if there is no such world."""
    if world not in WORLDS:
        raise OptionError(f"no drawn world is called {world!r}.{did_you_mean(world, WORLDS)}")
