"""Painting of backgrounds and things, batched and anti-aliased, for clips and pictures alike.

Images are [N, 3, T, H, W] in [0, 1]; lengths are in frame widths and heights (0 to 1).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.world.vocabulary import BACKGROUNDS, PATTERNS, second_tone

CLOUD_WAVES = 6
GRAIN_CELLS, GRAIN_STRENGTH = 128, 0.16  # noise cells along the shorter side, and their strength
HATCH_CYCLES, HATCH_WIDTH = 13.0, 0.012  # of lines along either side; horizontal width


def outline_distance(shape: Tensor, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance (negative inside) to the outline of each shape of radius `r`."""
    d = (x * x + y * y).sqrt()
    k = math.sqrt(3) / 2
    square = torch.maximum(x.abs(), y.abs()) - 0.84 * r
    triangle = torch.maximum(y, k * x.abs() - 0.5 * y) - 0.55 * r
    bar, arm = 0.33 * r, r
    cross = torch.minimum(
        torch.maximum(x.abs() - bar, y.abs() - arm), torch.maximum(x.abs() - arm, y.abs() - bar)
    )
    ring = (d - 0.74 * r).abs() - 0.26 * r
    # A star's edge is a straight line between an outer tip and an inner corner, in one tenth turn.
    turn = torch.atan2(x, -y) * (5 / (2 * math.pi))
    a = (turn - turn.round()).abs() * (2 * math.pi / 5)
    outer, inner = 1.12, 0.48
    tip, corner = (0.0, outer), (inner * math.sin(math.pi / 5), inner * math.cos(math.pi / 5))
    nx, ny = tip[1] - corner[1], corner[0] - tip[0]
    length = math.hypot(nx, ny)
    star = (d * a.sin() * nx + (d * a.cos() - outer * r) * ny) / length
    out = torch.where(shape == 0, d - r, square)
    for index, value in ((2, triangle), (3, cross), (4, ring), (5, star)):
        out = torch.where(shape == index, value, out)
    return out


def background_tensors(
    backgrounds: list[str], patterns: list[str], noise: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `paint_background` draws, varied a little by `noise`, one row a scene.

    Returns tones [N, 2, 3], pattern [N], its frequency, phase and angle [N, 3], and cloud waves
    [N, W, 3].
    """
    n = len(backgrounds)
    base = torch.tensor([BACKGROUNDS[b] for b in backgrounds])
    ground = torch.stack((base, second_tone(base)), 1)
    ground = ground * (0.94 + 0.12 * torch.rand(n, 1, 1, generator=noise))
    pattern = torch.tensor([PATTERNS.index(p) for p in patterns])
    low = torch.tensor([0.0, 4.0, 2.5, 4.5, 0.0])[pattern]
    look = torch.rand(n, 3, generator=noise)
    look = torch.stack(
        (low * (1 + 0.4 * look[:, 0]), 2 * math.pi * look[:, 1], 0.5 + 0.5 * look[:, 2]), 1
    )
    waves = torch.rand(n, CLOUD_WAVES, 3, generator=noise)
    way, cycles = 2 * math.pi * waves[..., 0], 2.0 + 5.0 * waves[..., 1]
    waves = torch.stack((way.cos() * cycles, way.sin() * cycles, waves[..., 2]), -1) * 2 * math.pi
    return ground, pattern, look, waves


def paint_background(
    ground: Tensor,
    pattern: Tensor,
    look: Tensor,
    waves: Tensor,
    x: Tensor,
    y: Tensor,
    pixels: Tensor | float,
) -> Tensor:
    """Colour [N, 3, T, H, W] at world positions x, y; `pixels` is the length of 1 in pixels."""
    column = (-1, 1, 1, 1)
    cycles, phase, angle = (look[:, i].view(column) for i in range(3))
    kind = pattern.view(column)
    w = cycles * 2 * math.pi
    striped = torch.sin((x * angle.cos() + y * angle.sin()) * w + phase)
    checkered = 1.5 * torch.sin(x * w + phase) * torch.sin(y * w + phase)
    dotted = torch.cos(x * w + phase) + torch.cos(y * w + phase) - 1.0
    edge = torch.where(kind == 1, striped, torch.where(kind == 2, checkered, dotted))
    share = (edge * pixels / w.clamp(min=1e-3) + 0.5).clamp(0, 1)
    cloudy = torch.zeros_like(share)
    for wave in waves.unbind(1):
        across, down, start = (wave[:, i].view(column) for i in range(3))
        cloudy = cloudy + torch.sin(x * across + y * down + start)
    share = torch.where(kind == 4, (0.5 + 0.18 * cloudy).clamp(0, 1), share)
    share = torch.where(kind == 0, torch.zeros_like(share), share)[:, None]
    first, second = ground[:, 0].view(-1, 3, 1, 1, 1), ground[:, 1].view(-1, 3, 1, 1, 1)
    return first + (second - first) * share


def paint_thing(
    image: Tensor,
    place: Tensor,
    shape: Tensor,
    texture: Tensor,
    tones: Tensor,
    x: Tensor,
    y: Tensor,
    pixels: Tensor | float,
) -> Tensor:
    """Draw one thing, its texture and its soft shadow over `image` [N, 3, T, H, W]."""
    column = (-1, 1, 1, 1)
    cx, cy, r, angle = place.unbind(-1)
    cx, cy, r, angle = (v[:, :, None, None] for v in (cx, cy, r, angle))
    shape, texture = shape.view(column), texture.view(column)
    there = (r > 0).to(image.dtype)
    r = r.clamp(min=1e-3)
    cos, sin = angle.cos(), angle.sin()

    def turned(dx: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dx * cos + dy * sin, dy * cos - dx * sin

    dx, dy = x - cx, y - cy
    shadow = outline_distance(shape, *turned(dx - 0.018, dy - 0.03), r)
    dark = 0.4 * there * (0.5 - shadow / 0.03).clamp(0, 1)
    u, v = turned(dx, dy)
    cover = (there * (0.5 - outline_distance(shape, u, v, r) * pixels).clamp(0, 1))[:, None]
    w = 2 * math.pi * torch.where(texture == 3, 0.8, torch.where(texture == 2, 1.7, 1.4)) / r
    striped = torch.sin(v * w)
    dotted = torch.cos(u * w) + torch.cos(v * w) - 0.9
    checkered = 1.5 * torch.sin(u * w) * torch.sin(v * w)
    edge = torch.where(texture == 1, striped, torch.where(texture == 2, dotted, checkered))
    share = torch.where(
        texture == 0, torch.zeros_like(edge), (edge * pixels / w + 0.5).clamp(0, 1)
    )[:, None]
    first, second = tones[:, 0].view(-1, 3, 1, 1, 1), tones[:, 1].view(-1, 3, 1, 1, 1)
    light = 1.0 - 0.12 * ((dx + dy) / r * 0.5).clamp(-1, 1)
    colour = (first + (second - first) * share) * light[:, None]
    return image * (1 - dark[:, None]) * (1 - cover) + colour.clamp(0, 1) * cover


def paint_outline(
    image: Tensor,
    place: Tensor,
    shape: Tensor,
    outlined: Tensor,
    x: Tensor,
    y: Tensor,
    pixels: float,
) -> Tensor:
    """Draw a thick white line around one thing where `outlined` [N] is true."""
    cx, cy, r, angle = (v[:, :, None, None] for v in place.unbind(-1))
    there = ((r > 0) & outlined.view(-1, 1, 1, 1)).to(image.dtype)
    r = r.clamp(min=1e-3)
    cos, sin = angle.cos(), angle.sin()
    dx, dy = x - cx, y - cy
    edge = outline_distance(shape.view(-1, 1, 1, 1), dx * cos + dy * sin, dy * cos - dx * sin, r)
    half = 0.02 * r + 0.0045  # of the line's width; a third of it lies inside the thing
    line = (there * (0.5 + (half - (edge - half / 3).abs()) * pixels).clamp(0, 1))[:, None]
    return image * (1 - line) + 0.97 * line


def grain(seed: Tensor, rows: int, columns: int) -> Tensor:
    """Noise [N, rows, columns], even in [-1, 1], that seeds [N] decide alike on all devices."""
    i = torch.arange(rows, device=seed.device).view(1, -1, 1)
    j = torch.arange(columns, device=seed.device).view(1, 1, -1)
    mask = (1 << 31) - 1
    value = (seed.view(-1, 1, 1) + i * 374761393 + j * 668265263) & mask
    for _ in range(2):
        value = ((value ^ (value >> 15)) * 1274126177) & mask
    return ((value ^ (value >> 16)) & 0xFFFF).float() / 32767.5 - 1


def paint_style(
    image: Tensor, style: Tensor, seed: Tensor, x: Tensor, y: Tensor, pixels: float
) -> Tensor:
    """Turn pictures [N, 3, H, W] into the `style` [N] of each: 0 plain, 1 outlined, 2 noisy,
    3 hatched, 4 dark, 5 pastel; outlines are drawn with the things.
    """
    height, width = image.shape[-2:]
    cells = GRAIN_CELLS / min(height, width)
    noise = grain(seed, math.ceil(cells * height), math.ceil(cells * width))[:, None]
    noise = F.interpolate(noise, (height, width), mode="bilinear", align_corners=False)
    across = (x - y) * HATCH_CYCLES
    line = (0.5 * HATCH_WIDTH - (across - across.round()).abs() / HATCH_CYCLES) * pixels + 0.5
    kind = style.view(-1, 1, 1, 1)
    for index, change in (
        (2, GRAIN_STRENGTH * noise),
        (3, 0.5 * line.clamp(0, 1) * (1 - image)),
        (4, -0.5 * image),
        (5, 0.5 * (1 - image)),
    ):
        image = torch.where(kind == index, (image + change).clamp(0, 1), image)
    return image
