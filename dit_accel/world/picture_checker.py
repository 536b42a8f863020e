"""Read colours, shapes, textures, counts, places, background and style off pictures, and score them
by their captions.

The style is read first, from brightness, thin white lines, fine grain and hatching, and undone;
then pixels are matched with the known colours, and the pieces of each colour counted and compared
with drawn shapes and textures.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.world.painting import paint_thing
from dit_accel.world.pictures import COUNTS, PLACES, RELATIONS, Scene
from dit_accel.world.reading import (
    CROP,
    VIEW,
    background_distance,
    colour_distance,
    find_pattern,
    find_shape,
    opened,
    positions,
    track,
    views,
)
from dit_accel.world.vocabulary import BACKGROUNDS, COLOURS, SHAPES, TEXTURES

SIDE = 256  # pixels of the shorter side that a picture is read at
DARK, PASTEL = 0.58, 0.45  # brightness of the lightest and darkest spots that tell these styles
GRAIN = 0.015  # median height of fine detail that counts as noise
HATCH = 0.06  # share of the picture in diagonal thin lines that counts as hatching
LEAST_AREA = 0.0015  # of one object, as a share of the picture
TEXTURE_LIKENESS, TEXTURE_HEIGHT = 0.5, 0.3  # least correlation and contrast of a texture
AWAY = 0.25  # places lie so far from the picture's middle


def resized(picture: Tensor) -> Tensor:
    """A picture [H, W, 3] with a shorter side of `SIDE` pixels."""
    height, width = picture.shape[:2]
    factor = SIDE / min(height, width)
    size = (round(height * factor), round(width * factor))
    x = picture.float().permute(2, 0, 1)[None]
    if factor < 1:
        x = F.interpolate(x, size, mode="area")
    elif factor > 1:
        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
    return x[0].permute(1, 2, 0).contiguous()


def smoothed(
    picture: Tensor, width: int, ways: Sequence[tuple[int, int]] = ((0, 1), (1, 0))
) -> Tensor:
    """The median of `width` pixels of [H, W, 3] along each of `ways` (steps in y, x) in turn."""
    height, wide = picture.shape[:2]
    half = width // 2
    x = picture.permute(2, 0, 1)
    for dy, dx in ways:
        padded = F.pad(x[None], [half] * 4, mode="replicate")[0]
        x = torch.stack(
            [
                padded[:, half + k * dy :, half + k * dx :][:, :height, :wide]
                for k in range(-half, half + 1)
            ],
            -1,
        )
        x = x.median(-1).values
    return x.permute(1, 2, 0).contiguous()


def averaged(picture: Tensor, width: int) -> Tensor:
    """The mean over squares of `width` pixels of [H, W, 3]."""
    x = F.avg_pool2d(picture.permute(2, 0, 1), width, 1, width // 2, count_include_pad=False)
    return x.permute(1, 2, 0).contiguous()


def pieces(mask: Tensor) -> Tensor:
    """Connected pieces [P, H, W] of a mask [H, W], the largest first; specks are left out."""
    small = F.max_pool2d(mask.float()[None, None], 2)  # touching is decided on half the pixels
    index = torch.arange(1, small.numel() + 1, device=mask.device).view(small.shape).float()
    label = index * small
    while True:
        spread = label
        for _ in range(8):
            spread = F.max_pool2d(spread, 3, 1, 1) * small
        if torch.equal(spread, label):
            break
        label = spread
    label = F.interpolate(label, mask.shape, mode="nearest")[0, 0] * mask
    names, sizes = label[mask].unique(return_counts=True)
    least = max(LEAST_AREA * SIDE * SIDE, 0.2 * float(sizes.max())) if len(sizes) else 0
    kept = names[sizes.argsort(descending=True)][: int((sizes > least).sum())]
    return label == kept[:, None, None]


def find_tone(picture: Tensor) -> tuple[str, Tensor]:
    """Whether a picture is dark or pastel (else plain), and the picture without that."""
    light = picture.amax(-1).flatten().sort().values
    dim = picture.amin(-1).flatten().sort().values
    if dim[int(0.02 * len(dim))] > PASTEL:
        return "pastel", (2 * picture - 1).clamp(0, 1)
    if light[int(0.998 * len(light))] < DARK:
        return "dark", (2 * picture).clamp(0, 1)
    return "plain", picture


def find_overlay(picture: Tensor) -> str:
    """Whether fine detail makes a picture noisy or hatched; else plain."""
    gray = picture.mean(-1, keepdim=True)
    detail = (gray - smoothed(gray, 7))[..., 0]
    if detail.abs().median() > GRAIN:
        return "noisy"
    power = detail.square().mean().clamp(min=1e-9)
    along = (detail[4:, 4:] * detail[:-4, :-4]).mean() / power
    across = (detail[4:, :-4] * detail[:-4, 4:]).mean() / power
    lines = (detail > 0.05).float().mean()
    return "hatched" if lines > HATCH and along > across + 0.3 else "plain"


def find_colours(picture: Tensor, things: int) -> tuple[str, list[str], bool]:
    """The background, the `things` most visible colours and whether thin white lines are seen."""
    picture = picture[::2, ::2].contiguous()
    names = [*BACKGROUNDS, *COLOURS]
    distances = [background_distance(picture, n) for n in BACKGROUNDS]
    distances += [colour_distance(picture, n) for n in COLOURS]
    label = torch.stack(distances).argmin(0)
    ground = int(label.flatten().bincount(minlength=len(names))[: len(BACKGROUNDS)].argmax())
    masks = torch.stack([label == names.index(n) for n in COLOURS])
    area = dict(zip(COLOURS, opened(masks).float().mean((1, 2)).tolist(), strict=True))
    white = float((label == names.index("white")).float().mean())
    outlined = white > 0.0025 and area["white"] < 0.6 * white
    if outlined:
        area["white"] = 0.0
    order = sorted(COLOURS, key=lambda n: -area[n])[:things]
    return names[ground], [n for n in order if area[n] > LEAST_AREA / 2], outlined


def texture_views(shape: str, device: torch.device) -> Tensor:
    """Second-tone shares [texture, turn, CROP, CROP] of a shape, seen as `views` sees a thing."""
    turns = torch.tensor([-0.08, 0.0, 0.08], device=device)
    count = (len(TEXTURES) - 1) * len(turns)
    texture = torch.arange(1, len(TEXTURES), device=device).repeat_interleave(len(turns))
    place = torch.tensor([0.5, 0.5, 0.3, 0.0], device=device).repeat(count, 1, 1)
    place[:, 0, 3] = turns.repeat(len(TEXTURES) - 1)
    side = positions(96, device)
    x, y = side.view(1, 1, 1, -1), side.view(1, 1, -1, 1)
    index = torch.full((count,), SHAPES.index(shape), device=device)
    ground = torch.zeros(count, 3, 1, 96, 96, device=device)
    tones = torch.zeros(count, 2, 3, device=device)
    solid = paint_thing(ground, place, index, texture, tones + 1, x, y, 96)[:, 0, 0]
    tones[:, 1] = 1
    share = paint_thing(ground, place, index, texture, tones, x, y, 96)[:, :1, 0]
    return views(share, *track((solid > 0.4).float())).view(-1, len(turns), CROP, CROP)


def find_texture(masks: Tensor, shares: Tensor, shape: str) -> str:
    """The texture of like things, from views [P, CROP, CROP] of mask and second-tone share."""
    weight = (masks > 0.9).float()[:, None, None]
    weight = weight / weight.sum((-1, -2), keepdim=True).clamp(min=1)

    def centred(x: Tensor) -> Tensor:
        return (x - (x * weight).sum((-1, -2), keepdim=True)) * weight.sqrt()

    seen, drawn = centred(shares[:, None, None]), centred(texture_views(shape, masks.device))
    both = (seen * drawn).sum((-1, -2))
    power = drawn.square().sum((-1, -2)).clamp(min=1e-6)
    likeness = both / (power * seen.square().sum((-1, -2)).clamp(min=1e-6)).sqrt()
    mean, best = likeness.amax(2).mean(0).max(0)
    height = (both / power).flatten(2).gather(2, likeness.argmax(2, keepdim=True))[:, best].mean()
    plain = mean < TEXTURE_LIKENESS or height < TEXTURE_HEIGHT
    return "plain" if plain else TEXTURES[int(best) + 1]


def crops(images: Tensor, centre: Tensor, area: Tensor) -> Tensor:
    """Crops [P, C, CROP, CROP] of images [P, C, H, W] on things, as `views` of square frames."""
    height, width = images.shape[-2:]
    side = torch.linspace(-VIEW, VIEW, CROP, device=images.device)
    offset = torch.stack(torch.meshgrid(side, side, indexing="ij")[::-1], -1)
    radius = (area * height * width / math.pi).sqrt()[:, None, None, None]
    pixels = torch.tensor([width, height], device=images.device)
    grid = (centre[:, None, None] + radius * offset / pixels) * 2 - 1
    return F.grid_sample(images, grid, align_corners=False)


def read_thing(picture: Tensor, mask: Tensor, colour: str, masks: Tensor) -> dict | None:
    """Shape, texture, count and centre of the things in `mask` [H, W], or None without any."""
    found = pieces(mask)
    if not len(found):
        return None
    first, second = (torch.tensor(c, device=picture.device) for c in COLOURS[colour])
    line = second - first
    share = ((picture - first) @ line / line.square().sum()).clamp(-0.2, 1.2)
    centre, area = track(found)
    seen = crops(
        torch.stack((found.float(), share.expand(found.shape)), 1), centre, area.clamp(min=1e-4)
    )
    shape = find_shape(seen[:, 0], masks)
    return {
        "shape": shape,
        "texture": find_texture(seen[:, 0], seen[:, 1], shape),
        "count": COUNTS[len(found) - 1] if len(found) <= len(COUNTS) else "many",
        "centre": tuple(centre.mean(0).tolist()),
    }


def find_place(centre: tuple[float, float]) -> str:
    """The named place nearest to a point (x, y), in shares of the picture."""
    return min(
        PLACES,
        key=lambda name: math.dist(centre, [0.5 + AWAY * way for way in PLACES[name]]),
    )


def find_relation(first: tuple[float, float], second: tuple[float, float]) -> str:
    """How the first of two points lies to the second."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def read_picture(picture: Tensor, things: int, masks: Tensor) -> dict:
    """What a picture [H, W, 3] in [0, 1] with `things` colours of things shows.

    `masks` are those of `reading.shape_masks`. Returns background, pattern, style and, per colour,
    shape, texture, count, centre (x, y) and place.
    """
    picture = resized(picture)
    style, picture = find_tone(picture)
    if style == "plain":
        style = find_overlay(picture)
    sharp = even = smoothed(picture, 3)
    if style == "noisy":
        even = smoothed(picture, 7)
    elif style == "hatched":
        even = smoothed(picture, 7, [(1, -1)])
    background, colours, outlined = find_colours(even, things)
    if style == "plain" and outlined:
        style = "outlined"
    distances = [
        background_distance(even, background),
        *(colour_distance(even, c) for c in colours),
    ]
    if outlined:
        distances.append(colour_distance(even, "white"))
    label = torch.stack(distances).argmin(0)
    found = opened(torch.stack([label == i + 1 for i in range(len(colours))])) if colours else ()
    seen = {}
    for colour, mask in zip(colours, found, strict=True):
        if thing := read_thing(sharp, mask, colour, masks):
            seen[colour] = {**thing, "place": find_place(thing["centre"])}
    free = F.max_pool2d(opened((label > 0)[None]).float(), 25, 1, 12) < 0.5  # nor in shadows
    calm = averaged(even, 5)[::2, ::2]
    if style == "noisy":
        calm = averaged(smoothed(averaged(picture, 7)[::2, ::2], 7), 3)
    pattern = find_pattern(calm[None], free[:, ::2, ::2], background)
    return {"background": background, "pattern": pattern, "style": style, "things": seen}


def score_picture(picture: Tensor, scene: Scene, masks: Tensor) -> dict:
    """Which attributes of `scene` the picture [H, W, 3] in [0, 1] shows.

    A list of marks per kind of attribute, and as "seen" what `read_picture` returns.
    """
    seen = read_picture(picture, len(scene.things), masks)
    marks = defaultdict(list)
    for thing in scene.things:
        found = seen["things"].get(thing.colour)
        marks["colour"].append(found is not None)
        for name in ("shape", "texture", "count"):
            marks[name].append(found is not None and found[name] == getattr(thing, name))
        if scene.relation == "none" and thing.place != "spread":
            marks["place"].append(found is not None and found["place"] == thing.place)
    if scene.relation in RELATIONS:
        ends = [seen["things"].get(t.colour) for t in scene.things[:2]]
        points = [end["centre"] for end in ends if end]
        marks["relation"].append(len(points) == 2 and find_relation(*points) == scene.relation)
    for name in ("background", "pattern", "style"):
        marks[name].append(seen[name] == getattr(scene, name))
    return {**marks, "seen": seen}
