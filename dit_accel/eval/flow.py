"""Optical flow: how fast the fastest pixels move, and a classical flow that needs no network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.eval.backbones import Backbone
from dit_accel.eval.pixels import pad_to_multiple

WINDOW = 15  # pixels of a side of the window in which everything moves alike
FINEST = 256  # pixels of the shorter side at most: larger pictures are made smaller first
COARSEST = 24  # pixels of the shorter side below which pictures are not halved
ROUNDS = 3  # at each resolution


def fastest(flow: Backbone, first: Tensor, second: Tensor, *, share: float) -> float:
    """Return the mean speed of the fastest ``share`` of pixels between two frames ``[3, H, W]``.

    In pixels; the border that is added to make height and width multiples of 8 counts too.
    """
    before, after = (pad_to_multiple(frame[None], 8) for frame in (first, second))
    speeds = flow(before, after).float().square().sum(1).sqrt().flatten()
    return float(speeds.topk(max(1, int(speeds.numel() * share))).values.mean())


def lucas_kanade(first: Tensor, second: Tensor) -> Tensor:
    """Return the optical flow from the first frame to the second, in pixels.

    Lucas and Kanade 1981, from coarse to fine: a window's shift is the least-squares solution of
    "brightness stays the same", and zero where nothing is seen that could tell. It doesn't see
    things that move further than about their own size.

    Args:
        first: ``[1, 3, H, W]`` of 0 to 255, RGB.
        second: of the same shape.

    Returns:
        ``[1, 2, H, W]``: how far each pixel of the first frame goes right and down.
    """
    shrink = min(1.0, FINEST / min(first.shape[-2:]))
    finest = [round(size * shrink) for size in first.shape[-2:]]
    grey = torch.cat((first, second)).float().mean(1, keepdim=True)
    levels = [F.interpolate(grey, finest, mode="area")]
    while min(levels[-1].shape[-2:]) >= 2 * COARSEST:
        levels.append(F.avg_pool2d(levels[-1], 2))
    flow = torch.zeros(1, 2, 1, 1, device=first.device)
    for pictures in reversed(levels):
        flow = _enlarged(flow, pictures.shape[-2:])
        for _ in range(ROUNDS):
            flow = flow + _refinement(pictures[:1], _shifted(pictures[1:], flow))
    return _enlarged(flow, first.shape[-2:])


def _enlarged(flow: Tensor, size: Sequence[int]) -> Tensor:
    """Return the flow ``[1, 2, *size]`` of pictures of another size."""
    scale = torch.tensor([size[1] / flow.shape[-1], size[0] / flow.shape[-2]]).to(flow)
    return F.interpolate(flow, size, mode="bilinear") * scale.view(1, 2, 1, 1)


def _refinement(before: Tensor, after: Tensor) -> Tensor:
    """Return the small shift ``[1, 2, H, W]`` of each window between two grey pictures."""
    padded = F.pad((before + after) / 2, (1, 1, 1, 1), mode="replicate")
    right = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    change = after - before
    products = torch.cat(
        (right * right, down * down, right * down, right * change, down * change), dim=1
    )
    half = WINDOW // 2
    means = F.avg_pool2d(products, (WINDOW, 1), 1, (half, 0), count_include_pad=False)
    means = F.avg_pool2d(means, (1, WINDOW), 1, (0, half), count_include_pad=False)
    xx, yy, xy, xt, yt = means.split(1, dim=1)
    xx, yy = xx + 1.0, yy + 1.0  # without texture there is no answer: keep it at zero
    determinant = xx * yy - xy * xy
    shift = torch.cat((xy * yt - yy * xt, xy * xt - xx * yt), dim=1) / determinant
    return shift.clamp(-1, 1)  # brightness is linear over a pixel or so


def _shifted(picture: Tensor, flow: Tensor) -> Tensor:
    """Return the picture where the flow says that its pixels have gone."""
    height, width = picture.shape[-2:]
    rows = torch.arange(height, device=picture.device).view(1, -1, 1)
    columns = torch.arange(width, device=picture.device).view(1, 1, -1)
    x = (columns + flow[:, 0] + 0.5) / width * 2 - 1
    y = (rows + flow[:, 1] + 0.5) / height * 2 - 1
    grid = torch.stack((x, y), dim=-1)
    return F.grid_sample(picture, grid, align_corners=False, padding_mode="border")
