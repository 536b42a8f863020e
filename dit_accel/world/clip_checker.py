"""Read colour, shape, motion, background and camera off clips, and score them by their captions.

Things are tracked by their centre and area, and the camera is found by undoing its movement.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.world.clips import Scene
from dit_accel.world.reading import (
    count_parts,
    find_colours,
    find_pattern,
    find_shape,
    positions,
    thing_masks,
    track,
    views,
)
from dit_accel.world.vocabulary import COLOURS, DIRECTIONS

FRAMES = 17  # looked at, spread over the clip
OUTLINE_CHANGE = 0.13  # least change of outline that counts as spinning, as a share of the area
TEXTURE_POWER = 0.01  # least variance of the second tone's share that counts as texture
STRANGER = 6e-3  # least share of the picture that counts as a thing nobody asked for
TEXTURE_LIKENESS = 0.6  # correlation of texture under which it counts as turned


def undo_camera(
    points: Tensor, camera: tuple[float, float, float], t: Tensor
) -> tuple[Tensor, Tensor]:
    """World positions of screen positions [T, ..., 2] and the zoom [T], at clip times `t` [T]."""
    dx, dy, rate = camera
    zoom = (rate * (t - 0.5)).exp()
    shape = (-1, *[1] * (points.dim() - 1))
    pan = torch.stack((dx * (t - 0.5), dy * (t - 0.5)), 1)
    pan = pan.view(-1, *[1] * (points.dim() - 2), 2)
    return (points - 0.5) / zoom.view(shape) + 0.5 + pan, zoom


def find_camera(clip: Tensor, free: Tensor) -> tuple[str, tuple[float, float, float]]:
    """The camera's movement (x, y, log zoom over the clip) that best explains the background.

    `free` [T, H, W] marks background. A frame is drawn from one an eighth of the clip later.
    """
    guesses = [("still", (0.0, 0.0, 0.0))]
    for reach in (0.2, 0.3, 0.4):
        guesses += [
            (f"panning {d}", (x * reach, y * reach, 0.0)) for d, (x, y) in DIRECTIONS.items()
        ]
        guesses += [
            ("zooming in", (0.0, 0.0, 1.6 * reach)),
            ("zooming out", (0.0, 0.0, -1.6 * reach)),
        ]
    step = len(clip) // 8
    side = torch.meshgrid(
        positions(clip.shape[1], clip.device), positions(clip.shape[2], clip.device), indexing="ij"
    )
    grid = torch.stack((side[1], side[0]), -1)[None]
    later = torch.cat((clip, free[..., None].float()), -1)[step:].permute(0, 3, 1, 2)
    costs = []
    for _, (dx, dy, rate) in guesses:
        where, _ = undo_camera(
            grid,
            (-dx, -dy, -rate),
            torch.tensor([0.5 + step / (len(clip) - 1)], device=clip.device),
        )
        where = where.expand(len(later), -1, -1, -1) * 2 - 1
        seen = F.grid_sample(later, where, align_corners=False)
        weight = free[:-step] * (seen[:, 3] > 0.99)
        error = (seen[:, :3].permute(0, 2, 3, 1) - clip[:-step]).abs().mean(-1)
        costs.append(float((error * weight).sum() / weight.sum().clamp(min=1)))
    best = min(range(len(costs)), key=costs.__getitem__)
    if costs[0] < 1.15 * costs[best] + 2e-3:
        best = 0
    return guesses[best]


def spins(masks: Tensor, shares: Tensor) -> bool:
    """Whether outline or texture turn, from views [T, CROP, CROP] of mask and second-tone share.

    Both are compared with the frame that shows most of the thing.
    """
    first = int(masks.sum((1, 2)).argmax())
    change = (masks - masks[first]).abs().mean((1, 2)) / masks[first].mean()
    if change.quantile(0.6) > OUTLINE_CHANGE:
        return True
    both = masks * masks[first]
    weight = both / both.sum((1, 2), keepdim=True).clamp(min=1e-6)

    def centred(x: Tensor) -> Tensor:
        return x - (x * weight).sum((1, 2), keepdim=True)

    now, then = centred(shares), centred(shares[first])
    power = (now.square() * weight).sum((1, 2)), (then.square() * weight).sum((1, 2))
    if power[1].median() < TEXTURE_POWER:
        return False
    likeness = (now * then * weight).sum((1, 2)) / (power[0] * power[1]).sqrt().clamp(min=1e-6)
    return bool(likeness.quantile(0.4) < TEXTURE_LIKENESS)


def find_motion(centre: Tensor, radius: Tensor, masks: Tensor, shares: Tensor) -> str:
    """The motion of a thing from its world centre [T, 2] and radius [T], and views for `spins`."""
    ends = max(2, len(centre) // 4)
    moved = centre[-ends:].median(0).values - centre[:ends].median(0).values
    if moved.norm() > 0.14:
        axis = int(moved.abs().argmax())
        names = ("left", "right") if axis == 0 else ("up", "down")
        return f"moving {names[int(moved[axis] > 0)]}"
    growth = float(radius[-ends:].median() / radius[:ends].median())
    if growth > 1.3:
        return "growing"
    if growth < 1 / 1.3:
        return "shrinking"
    return "spinning" if spins(masks, shares) else "staying still"


def read_thing(
    clip: Tensor,
    mask: Tensor,
    colour: str,
    movement: tuple[float, float, float],
    masks: Tensor,
) -> dict[str, str] | None:
    """Shape and motion of the thing in `mask` [T, H, W], or None if it is hardly there."""
    centre, area = track(mask)
    kept = area > max(1e-3, 0.1 * float(area.max()))
    if kept.sum() < 6:
        return None
    times = torch.linspace(0, 1, len(clip), device=clip.device)
    world_centre, zoom = undo_camera(centre, movement, times)
    first, second = (torch.tensor(c, device=clip.device) for c in COLOURS[colour])
    line = second - first
    share = ((clip - first) @ line / line.square().sum()).clamp(-0.2, 1.2)
    seen = views(torch.stack((mask.float(), share), 1), centre, area.clamp(min=1e-4))
    clear = kept & (area > 0.4 * float(area.max()))
    motion = find_motion(world_centre[kept], (area.sqrt() / zoom)[kept], *seen[kept].unbind(1))
    return {"shape": find_shape(seen[clear, 0], masks), "motion": motion}


def sampled(clip: Tensor) -> Tensor:
    """`FRAMES` frames of a clip [T, H, W, 3], at about 128 pixels a side."""
    clip = clip[torch.linspace(0, len(clip) - 1, FRAMES).round().long()].float()
    if (factor := clip.shape[1] // 128) > 1:
        clip = F.avg_pool2d(clip.permute(0, 3, 1, 2), factor).permute(0, 2, 3, 1)
    return clip


def read_clip(clip: Tensor, things: int, masks: Tensor) -> dict:
    """What a clip [T, H, W, 3] in [0, 1] with `things` things shows, by `shape_masks`."""
    clip = sampled(clip)
    background, colours = find_colours(clip[::2], things)
    found = thing_masks(clip, background, colours)
    free = F.max_pool2d(found.any(0).float()[:, None], 7, 1, 3)[:, 0] < 0.5
    camera, movement = find_camera(clip, free)
    seen = {c: read_thing(clip, m, c, movement, masks) for c, m in zip(colours, found, strict=True)}
    pattern = find_pattern(clip, free, background)
    return {
        "background": background,
        "pattern": pattern,
        "camera": camera,
        "things": {c: v for c, v in seen.items() if v},
    }


def score_clip(clip: Tensor, scene: Scene, masks: Tensor) -> dict[str, Any]:
    """Which attributes of `scene` the clip [T, H, W, 3] in [0, 1] shows."""
    seen = read_clip(clip, len(scene.things), masks)
    marks: dict[str, list[bool]] = defaultdict(list)
    for thing in scene.things:
        found = seen["things"].get(thing.colour)
        marks["colour"].append(found is not None)
        marks["shape"].append(found is not None and found["shape"] == thing.shape)
        marks["motion"].append(found is not None and found["motion"] == thing.motion)
    marks["background"].append(seen["background"] == scene.background)
    marks["pattern"].append(seen["pattern"] == scene.pattern)
    if scene.camera != "still":
        marks["camera"].append(seen["camera"] == scene.camera)
    return {**marks, "seen": seen}


def find_repeats(clip: Tensor, scene: Scene) -> dict[str, list[bool]]:
    """Whether a clip [T, H, W, 3] in [0, 1] shows each thing of `scene` once, and nothing else.

    "once" per thing: it is in one piece in most of the frames that show it. "alone": no other
    colour of things takes as much room as a small thing does. What is drawn in front of a thing
    may divide it, so few frames in two pieces don't count.
    """
    clip = sampled(clip)
    own = [thing.colour for thing in scene.things]
    masks = thing_masks(clip, scene.background, list(COLOURS))
    found = dict(zip(COLOURS, masks, strict=True))
    once = []
    for colour in own:
        parts = count_parts(found[colour])
        shown = parts[parts > 0]
        visible = float(found[colour].float().mean()) > 2e-3
        once.append(visible and float(shown.float().quantile(0.4)) == 1)
    others = [float(mask.float().mean()) for colour, mask in found.items() if colour not in own]
    return {"once": once, "alone": [max(others) < STRANGER]}
