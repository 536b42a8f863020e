"""Reading colours, shapes and patterns off frames, without a learned model.

Pixels are matched with the drawn worlds' colours, and outlines with drawn masks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.world.painting import outline_distance
from dit_accel.world.vocabulary import BACKGROUNDS, COLOURS, SHAPES, second_tone

CROP = 32  # pixels of a side of the view on a tracked thing
VIEW = 1.9  # half a side of that view, in radii of the disc of equal area
TURNS = 24  # rotations at which a shape is compared
SHADOW = 0.6


def distance_to_tones(pixels: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Distance of pixels [..., 3] to the line between two tones [3]."""
    line = second - first
    share = ((pixels - first) @ line / line.square().sum()).clamp(0, 1)
    r, g, b = (pixels - first - share[..., None] * line).unbind(-1)
    return (r * r + g * g + b * b).sqrt()  # much faster than norm(dim=-1) on a CPU


def background_distance(clip: Tensor, name: str) -> Tensor:
    """Distance of the clip's pixels to a background's tones, in light or shadow."""
    tone = torch.tensor(BACKGROUNDS[name], device=clip.device)
    second = second_tone(tone)
    lit = distance_to_tones(clip, tone, second)
    return torch.minimum(lit, distance_to_tones(clip, SHADOW * tone, SHADOW * second))


def colour_distance(clip: Tensor, name: str) -> Tensor:
    """Distance of the clip's pixels to a thing's tones."""
    first, second = (torch.tensor(c, device=clip.device) for c in COLOURS[name])
    return distance_to_tones(clip, first, second)


def opened(mask: Tensor) -> Tensor:
    """Drop what is thinner than three pixels from masks [T, H, W]."""
    core = -F.max_pool2d(-mask.float()[:, None], 3, 1, 1)
    return F.max_pool2d(core, 3, 1, 1)[:, 0] > 0.5


def find_colours(clip: Tensor, things: int) -> tuple[str, list[str]]:
    """The background and the `things` most visible colours of a clip [T, H, W, 3]."""
    names = [*BACKGROUNDS, *COLOURS]
    distances = [background_distance(clip, n) for n in BACKGROUNDS]
    distances += [colour_distance(clip, n) for n in COLOURS]
    label = torch.stack(distances).argmin(0)
    area = torch.stack([opened(label == i).float().mean() for i in range(len(names))])
    ground = int(area[: len(BACKGROUNDS)].argmax())
    seen = area[len(BACKGROUNDS) :]
    order = seen.argsort(descending=True)[:things].tolist()
    return names[ground], [list(COLOURS)[i] for i in order if seen[i] > 2e-3]


def thing_masks(clip: Tensor, background: str, colours: list[str]) -> Tensor:
    """Masks [K, T, H, W] of the things in `colours`."""
    distances = [
        background_distance(clip, background),
        *(colour_distance(clip, c) for c in colours),
    ]
    label = torch.stack(distances).argmin(0)
    found = [opened(label == i + 1) for i in range(len(colours))]
    if not found:
        return torch.zeros(0, *label.shape, dtype=torch.bool, device=clip.device)
    return torch.stack(found)


def positions(count: int, device: torch.device | str) -> Tensor:
    """Pixel centres between 0 and 1."""
    return (torch.arange(count, device=device) + 0.5) / count


def track(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Centre [T, 2] (x, y) and area [T] of a thing, as shares of the frame."""
    m = mask.float()
    area = m.mean((1, 2))
    x = (m.mean(1) * positions(m.shape[2], m.device)).mean(1)
    y = (m.mean(2) * positions(m.shape[1], m.device)).mean(1)
    return torch.stack((x, y), 1) / area.clamp(min=1e-6)[:, None], area


def find_pattern(clip: Tensor, free: Tensor, background: str) -> str:
    """The background's pattern, from the shares of its tones and the direction of its edges."""
    tone = torch.tensor(BACKGROUNDS[background], device=clip.device)
    line = second_tone(tone) - tone
    share = (clip - tone) @ line / line.square().sum()
    inside = -F.max_pool2d(-free.float()[:, None], 9, 1, 4)[:, 0] > 0.5  # away from shadows
    values = share[inside]
    if len(values) < 100 or values.std() < 0.15:
        return "plain"
    values = values[:: 1 + len(values) // 100_000]
    low, high = values.quantile(torch.tensor([0.02, 0.98], device=values.device))
    level = (values - low) / (high - low)
    if ((level > 0.25) & (level < 0.75)).float().mean() > 0.38:
        return "cloudy"
    gy, gx = share[:, 1:, :-1] - share[:, :-1, :-1], share[:, :-1, 1:] - share[:, :-1, :-1]
    keep = inside[:, 1:, 1:] & inside[:, :-1, :-1]
    gx, gy = gx[keep], gy[keep]
    xx, yy, xy = (gx * gx).mean(), (gy * gy).mean(), (gx * gy).mean()
    if math.hypot(float(xx - yy), 2 * float(xy)) > 0.6 * float(xx + yy):
        return "striped"
    return "dotted" if (level > 0.5).float().mean() < 0.35 else "checkered"


def views(images: Tensor, centre: Tensor, area: Tensor) -> Tensor:
    """Crops [T, C, CROP, CROP] of images [T, C, H, W], of the same place and size on the thing."""
    side = torch.linspace(-VIEW, VIEW, CROP, device=images.device)
    offset = torch.stack(torch.meshgrid(side, side, indexing="ij")[::-1], -1)
    radius = (area / math.pi).sqrt()[:, None, None, None]
    grid = (centre[:, None, None] + radius * offset) * 2 - 1
    return F.grid_sample(images, grid, align_corners=False)


def shape_masks(device: torch.device | str = "cpu") -> Tensor:
    """Masks [shape, turn, CROP, CROP] of all shapes, seen as `views` sees a thing."""
    side = positions(128, device)
    y, x = torch.meshgrid(side, side, indexing="ij")
    angles = torch.arange(TURNS, device=device) * (2 * math.pi / TURNS)
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    x, y = x - 0.5, y - 0.5
    out = []
    for index in range(len(SHAPES)):
        radius = torch.tensor(0.3, device=device)
        edge = outline_distance(
            torch.tensor(index, device=device), x * cos + y * sin, y * cos - x * sin, radius
        )
        mask = (edge < 0).float()
        out.append(views(mask[:, None], *track(mask))[:, 0])
    return torch.stack(out)


def find_shape(mask_views: Tensor, masks: Tensor) -> str:
    """The shape whose drawn mask overlaps best with the views [T, CROP, CROP] of a thing."""
    seen = mask_views[:, None, None]
    both = torch.minimum(seen, masks).sum((-1, -2))
    either = torch.maximum(seen, masks).sum((-1, -2))
    overlap = (both / either).amax(2)  # [T, shape]
    return SHAPES[int(overlap.mean(0).argmax())]


def count_parts(masks: Tensor, least: float = 0.2) -> Tensor:
    """Count the parts of masks [T, H, W] that hang together: int64 [T].

    Only parts of at least ``least`` times the largest one's area count.
    """
    _, height, width = masks.shape
    names = torch.arange(1, height * width + 1, device=masks.device).view(height, width)
    labels = (names * masks).float()
    while True:  # each part takes the largest name in it
        spread = F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * masks
        if torch.equal(spread, labels):
            break
        labels = spread
    counts = []
    for frame in labels.long():
        _, sizes = frame[frame > 0].unique(return_counts=True)
        counts.append(int((sizes >= least * sizes.max()).sum()) if len(sizes) else 0)
    return torch.tensor(counts, device=masks.device)
