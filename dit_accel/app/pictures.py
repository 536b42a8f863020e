"""Pictures of the page: difference heat maps, masks, and what one token sees."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dit_accel.call import TokenLayout
from dit_accel.files import replacing
from dit_accel.grid import TokenOrder
from dit_accel.methods.base import StaticMethod
from dit_accel.plan import EMPTY, FULL, PARTIAL, BlockSparsePlan, dense_block_states
from dit_accel.report import AccelerationReport

HEAT = ((0.05, 0.06, 0.14), (0.36, 0.13, 0.46), (0.85, 0.29, 0.30), (0.99, 0.66, 0.24), (1, 1, 0.8))
"""Colours of a difference, from none to the scale's end."""
STATES = {EMPTY: (232, 234, 238), PARTIAL: (242, 158, 76), FULL: (37, 87, 167)}
"""Colours of a pair of blocks; the page's legend has the same."""
MAX_CELLS = 1024
"""Longest side of a mask's picture in its cells; larger ones are averaged."""
MAX_LINES = 64
"""Most borders of frames that are drawn over a mask."""
SEEN, SELF = (0.15, 0.42, 0.82), (1.0, 0.25, 0.2)


def difference(actual: Tensor, dense: Tensor) -> tuple[Tensor, float]:
    """Return the mean absolute difference of the colours as a heat map, and its scale.

    Args:
        actual: float ``[T, 3, H, W]`` in [0, 1]; likewise ``dense``.

    Returns:
        ``[T, 3, H, W]`` in [0, 1], and the difference at the end of its colours.
    """
    gap = (actual - dense).abs().mean(1)
    scale = max(float(gap.max()), 0.02)  # so that rounding doesn't look like a difference
    return _heat((gap / scale).clamp(0, 1)), scale


def _heat(share: Tensor) -> Tensor:
    """[T, H, W] in [0, 1] -> colours [T, 3, H, W]."""
    stops = torch.tensor(HEAT)
    place = share * (len(stops) - 1)
    lower = place.floor().clamp(max=len(stops) - 2).long()
    part = (place - lower)[..., None]
    return (stops[lower] * (1 - part) + stops[lower + 1] * part).permute(0, 3, 1, 2)


def write_poster(path: Path, frames: Tensor) -> None:
    """Write the middle frame of ``[T, 3, H, W]`` as a PNG."""
    with replacing(path) as partial:
        _image(frames[len(frames) // 2]).save(partial, format="PNG")


def png_uri(image: Image.Image) -> str:
    """Return an image as a data URI, so that it needs no file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def block_picture(method: StaticMethod, layout: TokenLayout) -> dict[str, Any]:
    """Return a method's mask block by block: the picture, densities and borders of frames.

    See `mask_of` for what it holds.
    """
    order = method.token_order(layout.grid)
    plan = method.plan_layout(layout, order)
    if isinstance(plan, BlockSparsePlan):
        states = dense_block_states(plan.block_mask)[0, 0]
        attended, computed = plan.density, plan.block_density
    else:
        # Dense, or with a remainder: what is attended exactly is what the pattern lists.
        sparse = method.plan_block_sparse(layout, order)
        states = dense_block_states(sparse.block_mask)[0, 0]
        attended, computed = getattr(plan, "density", 1.0), getattr(plan, "block_density", 1.0)
    return {
        "title": f"{method.name}, blocks of {method.block_size} tokens",
        "image": png_uri(_states_image(states.numpy())),
        "borders": _borders(layout, order),
        "attended": attended,
        "computed": computed,
        "tokens": layout.num_tokens,
        "grid": list(layout.grid),
        "text": layout.text_length,
    }


def token_picture(method: StaticMethod, layout: TokenLayout) -> dict[str, Any]:
    """Return a method's mask token by token, in raster order."""
    seen = method.attention_mask(layout).numpy()
    return {
        "title": "token by token, in raster order",
        "image": png_uri(_states_image(np.where(seen, FULL, EMPTY))),
        "borders": _borders(layout, TokenOrder()),
    }


def mask_of(report: AccelerationReport) -> dict[str, Any] | None:
    """Return the picture of a static method's pattern where it ran; None if there is none."""
    plans = (call.plan for call in report.calls)
    plan = next((plan for plan in plans if isinstance(plan, BlockSparsePlan)), None)
    method = next((m for m in report.methods if isinstance(m, StaticMethod)), None)
    if plan is None or method is None:
        return None
    density = report.settings["density"]
    if density is not None:
        method = method.at_density(density, plan.layout)
    return block_picture(method, plan.layout)


def seen_by(method: StaticMethod, layout: TokenLayout, token: int) -> Tensor:
    """Return bool ``[T, H, W]``: which video tokens a token of the video sees."""
    every = torch.arange(layout.video_length)
    return method.allowed(layout)(torch.tensor(token), every).view(layout.grid)


def view_picture(seen: Tensor, token: tuple[int, int, int], frames: Tensor) -> Image.Image:
    """Draw what a token sees over the frames that its video shows, frames in reading order.

    Args:
        seen: bool ``[T, H, W]``.
        token: (t, h, w).
        frames: float ``[T, 3, h, w]`` in [0, 1].
    """
    count, height, width = seen.shape
    cell = max(2, min(16, round(240 / max(height, width))))
    size = height * cell, width * cell
    frames = functional.interpolate(frames, size=size, mode="bilinear", antialias=True)
    mask = seen[:, None].float().repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    colour = torch.tensor(SEEN)[None, :, None, None]
    gray = frames.mean(1, keepdim=True) * 0.35 + 0.6
    drawn = torch.where(mask.bool(), frames * 0.5 + colour * 0.5, gray)
    t, h, w = token
    drawn[t, :, h * cell : (h + 1) * cell, w * cell : (w + 1) * cell] = torch.tensor(SELF)[
        :, None, None
    ]
    columns, gap = columns_of(count), 6
    rows = math.ceil(count / columns)
    canvas = Image.new(
        "RGBA", (columns * (size[1] + gap) - gap, rows * (size[0] + gap) - gap), (0, 0, 0, 0)
    )
    for index, frame in enumerate(drawn):
        at = (index % columns) * (size[1] + gap), index // columns * (size[0] + gap)
        canvas.paste(_image(frame), at)
    return canvas


def columns_of(count: int) -> int:
    """Return how many frames lie side by side."""
    return min(count, max(3, math.ceil(math.sqrt(count * 1.2))))


def _image(frame: Tensor) -> Image.Image:
    pixels = (frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())


def _states_image(states: np.ndarray) -> Image.Image:
    palette = np.zeros((3, 3), dtype=np.uint8)
    for state, colour in STATES.items():
        palette[state] = colour
    image = Image.fromarray(palette[states])
    if max(image.size) > MAX_CELLS:
        return image.resize((MAX_CELLS, MAX_CELLS), Image.Resampling.BOX)
    # Whole enlargements stay sharp however the page scales them.
    zoom = max(1, 512 // max(image.size))
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def _borders(layout: TokenLayout, order: TokenOrder) -> list[float]:
    """Return where frames and the text begin, as shares of all tokens."""
    frame = layout.grid[1] * layout.grid[2]
    starts = list(range(frame, layout.video_length, frame)) if order.is_raster else []
    if len(starts) > MAX_LINES:
        starts = []
    ends = [layout.video_length] if layout.text_length else []
    return [start / layout.num_tokens for start in [*starts, *ends]]
