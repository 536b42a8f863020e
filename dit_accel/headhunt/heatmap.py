"""A picture of what each head was worth: layers down, heads across."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dit_accel.files import replacing
from dit_accel.headhunt.hunting import Found

LEFT, TOP, BOTTOM = 56, 78, 40
INK, UNKNOWN = (40, 40, 40), (225, 225, 222)
BETTER, WORSE, EQUAL = (38, 84, 140), (200, 90, 50), (247, 247, 244)


def write_heat_map(found: Found, path: Path) -> None:
    """Write a PNG of the first round: each head's gain over no guidance.

    Chosen heads carry the number of their round. Heads that were not tried are gray.
    """
    layers, heads = found.model["layers"], found.model["heads"]
    search = found.search
    gains = {trial.head: trial.gain for trial in search.rounds[0].trials}
    most = max(map(abs, gains.values())) or 1.0
    round_of = {head: n for n, one in enumerate(search.rounds, 1) for head in one.chosen}
    cell = max(14, min(44, 1000 // max(layers, heads)))
    width = max(LEFT + heads * cell + 24, 460)
    canvas = Image.new("RGB", (width, TOP + layers * cell + BOTTOM), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((LEFT, 10), f"{found.hunt.objective}: gain of single heads", INK, _font(15))
    summary = f"without guidance {search.plain:.3f}, with the chosen heads {search.best.score:.3f}"
    draw.text((LEFT, 32), summary, INK, _font(12))
    for layer in range(layers):
        at = TOP + layer * cell
        draw.text((LEFT - 8, at + cell / 2), str(layer), INK, _font(11), anchor="rm")
        for head in range(heads):
            left = LEFT + head * cell
            box = (left, at, left + cell - 1, at + cell - 1)
            gain = gains.get((layer, head))
            colour = UNKNOWN if gain is None else _colour(gain / most)
            draw.rectangle(box, fill=colour)
            number = round_of.get((layer, head))
            if number is not None:
                draw.rectangle(box, outline=INK, width=2)
                ink = "white" if gain is not None and abs(gain) > most / 2 else INK
                middle = (left + cell / 2, at + cell / 2)
                draw.text(middle, str(number), ink, _font(max(9, cell // 3)), anchor="mm")
    step = 1 if cell >= 18 else 4
    for head in range(0, heads, step):
        draw.text((LEFT + (head + 0.5) * cell, TOP - 6), str(head), INK, _font(11), anchor="mb")
    legend = f"layers down, heads across; blue is better, up to {most:.3f}, and orange worse"
    draw.text((LEFT, TOP + layers * cell + 14), legend, INK, _font(11))
    with replacing(path) as partial:
        canvas.save(partial, format="PNG")


def _colour(share: float) -> tuple[int, int, int]:
    """Return the colour of a gain in [-1, 1] of the largest."""
    end, part = (BETTER, share) if share > 0 else (WORSE, -share)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(EQUAL, end, strict=True))
    return red, green, blue


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
