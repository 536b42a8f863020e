"""A picture of a static method's mask, block by block, and token by token where that fits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_accel.call import TokenLayout
from dit_accel.grid import TokenOrder
from dit_accel.methods.base import StaticMethod
from dit_accel.plan import (
    EMPTY,
    FULL,
    PARTIAL,
    AttentionPlan,
    BlockSparsePlan,
    dense_block_states,
)

PANEL = 760
"""Pixels along the longer side of a panel, about."""
MAX_TOKENS = 1024
"""Sequences up to this length are also drawn token by token."""
MARGIN = 70
HEADER = 86
FOOTER = 56

COLOURS = {EMPTY: (242, 242, 238), PARTIAL: (240, 160, 75), FULL: (38, 84, 140)}
LABELS = {FULL: "whole block", PARTIAL: "block with a mask", EMPTY: "not visited"}
INK = (40, 40, 40)
FRAME_LINE = (200, 60, 60)


@dataclass(frozen=True)
class _Panel:
    """A square matrix of states, and what to write around it."""

    states: np.ndarray  # [rows, columns] of EMPTY, PARTIAL, FULL
    tokens_per_cell: int
    borders: list[int]  # of frames and text, in tokens
    title: str


def save_mask_picture(method: StaticMethod, layout: TokenLayout, path: str | Path) -> AttentionPlan:
    """Write a PNG of ``method``'s mask on ``layout`` to ``path`` and return the plan it shows.

    Rows are queries and columns keys, video first and then text. Blocks follow the method's token
    order; up to `MAX_TOKENS` tokens, a second panel shows the tokens in raster order. Red lines
    are the borders of frames (in raster order) and of the text.
    """
    order = method.token_order(layout.grid)
    plan = method.plan_layout(layout, order)
    panels = [_block_panel(plan, order, layout, method.block_size)]
    if layout.num_tokens <= MAX_TOKENS:
        tokens = method.attention_mask(layout).numpy()
        states = np.where(tokens, FULL, EMPTY)
        panels.append(_Panel(states, 1, _borders(layout, frames=True), "tokens, in raster order"))

    images = [_draw_panel(panel, layout.num_tokens) for panel in panels]
    width = max(sum(image.width for image in images) + MARGIN // 2, PANEL)
    height = HEADER + max(image.height for image in images) + FOOTER
    canvas = Image.new("RGB", (width, height), "white")
    left = 0
    for image in images:
        canvas.paste(image, (left, HEADER))
        left += image.width
    _draw_texts(ImageDraw.Draw(canvas), method, layout, plan, height)
    canvas.save(path, format="PNG")
    return plan


def _block_panel(
    plan: AttentionPlan, order: TokenOrder, layout: TokenLayout, block_size: int
) -> _Panel:
    if isinstance(plan, BlockSparsePlan):
        states = dense_block_states(plan.block_mask)[0, 0].numpy()
    else:
        blocks = -(-layout.num_tokens // block_size)
        states = np.full((blocks, blocks), FULL)
    if order.tile is None:
        where = "raster order"
    else:
        where = "tiles of t x h x w = " + " x ".join(map(str, order.tile))
    borders = _borders(layout, frames=order.is_raster)
    return _Panel(states, block_size, borders, f"blocks of {block_size} tokens, in {where}")


def _borders(layout: TokenLayout, *, frames: bool) -> list[int]:
    frame = layout.grid[1] * layout.grid[2]
    starts = list(range(frame, layout.video_length, frame)) if frames else []
    return [*starts, layout.video_length] if layout.text_length else starts


def _draw_panel(panel: _Panel, num_tokens: int) -> Image.Image:
    cells = len(panel.states)
    palette = np.array([COLOURS[state] for state in (EMPTY, PARTIAL, FULL)], dtype=np.uint8)
    mask = Image.fromarray(palette[panel.states])
    zoom = max(PANEL // cells, 1)
    if cells > 2 * PANEL:
        mask = mask.resize((PANEL, PANEL), Image.Resampling.BOX)
    elif zoom > 1:
        mask = mask.resize((cells * zoom, cells * zoom), Image.Resampling.NEAREST)
    side = mask.width
    scale = side / (cells * panel.tokens_per_cell)

    draw = ImageDraw.Draw(mask)
    if panel.borders and side / len(panel.borders) >= 8:
        for border in panel.borders:
            at = border * scale
            draw.line([(at, 0), (at, side)], fill=FRAME_LINE)
            draw.line([(0, at), (side, at)], fill=FRAME_LINE)

    image = Image.new("RGB", (side + MARGIN + 20, side + 60), "white")
    image.paste(mask, (MARGIN, 40))
    draw = ImageDraw.Draw(image)
    draw.rectangle((MARGIN - 1, 39, MARGIN + side, 40 + side), outline=INK)
    draw.text((MARGIN, 2), panel.title, fill=INK, font=_font(13))
    for tick in _ticks(num_tokens):
        at = tick * scale
        draw.line([(MARGIN + at, 35), (MARGIN + at, 39)], fill=INK)
        draw.text((MARGIN + at, 34), str(tick), fill=INK, font=_font(11), anchor="mb")
        draw.line([(MARGIN - 5, 40 + at), (MARGIN - 1, 40 + at)], fill=INK)
        draw.text((MARGIN - 8, 40 + at), str(tick), fill=INK, font=_font(11), anchor="rm")
    draw.text((MARGIN, 44 + side), "rows: query token, columns: key token", INK, _font(11))
    return image


def _ticks(num_tokens: int) -> list[int]:
    """Return about six round token numbers from 0 up."""
    rough = num_tokens / 6
    power = 10 ** (len(str(int(rough))) - 1)
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    return list(range(0, num_tokens, step))


def _draw_texts(
    draw: ImageDraw.ImageDraw,
    method: StaticMethod,
    layout: TokenLayout,
    plan: AttentionPlan,
    height: int,
) -> None:
    attended = computed = 1.0
    if isinstance(plan, BlockSparsePlan):
        attended, computed = plan.density, plan.block_density
    text = f" + {layout.text_length} text" if layout.text_length else ""
    shape = " x ".join(map(str, layout.grid))
    draw.text((MARGIN, 12), str(method), fill=INK, font=_font(15))
    summary = (
        f"{shape} (t x h x w){text} = {layout.num_tokens} tokens;  "
        f"density {attended:.4f} attended, {computed:.4f} computed"
    )
    draw.text((MARGIN, 40), summary, fill=INK, font=_font(13))
    left, top = MARGIN, height - FOOTER + 14
    for state, label in LABELS.items():
        draw.rectangle((left, top, left + 14, top + 14), fill=COLOURS[state], outline=INK)
        draw.text((left + 22, top), label, fill=INK, font=_font(13))
        left += 200


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
