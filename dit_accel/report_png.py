"""A picture of a report: layers by steps, coloured by density, measured error and operator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from dit_accel.errors import OptionError

if TYPE_CHECKING:
    from dit_accel.report import AccelerationReport

Colour = tuple[int, int, int]
Where = tuple[int, int]
"""A layer and a column, the step's place among the steps."""

PANEL = 420
"""Pixels along a panel's longer side, about."""
LEFT, TOP, GAP, FOOTER = 46, 44, 30, 46
HEADER = 64

NOT_RUN: Colour = (226, 226, 222)
INK: Colour = (40, 40, 40)
SPARSE_END: Colour = (222, 235, 247)
DENSE_END: Colour = (8, 48, 107)
GOOD: Colour = (229, 245, 224)
AT_BUDGET: Colour = (253, 174, 97)
OVER: Colour = (178, 24, 43)
OPERATORS: tuple[Colour, ...] = (
    (44, 123, 182),
    (127, 191, 123),
    (253, 184, 99),
    (175, 141, 195),
    (90, 180, 172),
)
DENSE: Colour = (90, 90, 90)


@dataclass(frozen=True)
class _Panel:
    """Colours of cells, and what to write around them."""

    title: str
    cells: Mapping[Where, Colour]
    legend: Sequence[tuple[str, Colour]]


def save_report_picture(report: AccelerationReport, path: str | Path) -> None:
    """Write a PNG with three panels per guidance branch: density, error and operator.

    Rows are attention layers, the first on top, and columns are denoising steps. Cells are grey
    where a layer did not run its attention (a cache skipped it), or was not probed.

    Raises:
        OptionError: if nothing was generated yet, or without attention of ours.
    """
    if not report.calls:
        raise OptionError(
            "there is no attention call to draw: generate first, with an attention method."
        )
    seen = {call.step for call in report.calls} | {step.step for step in report.steps}
    steps = sorted(seen, key=lambda step: -1 if step is None else step)
    layers = 1 + max(call.layer for call in report.calls)
    branches = list(dict.fromkeys(call.branch for call in report.calls))
    rows = [
        [_draw(panel, layers, steps) for panel in _panels(report, branch, steps)]
        for branch in branches
    ]
    width = max(sum(image.width for image in row) for row in rows)
    height = HEADER + sum(row[0].height for row in rows)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((LEFT, 10), _title(report), fill=INK, font=_font(15))
    draw.text(
        (LEFT, 36), "rows: attention layers, columns: denoising steps", fill=INK, font=_font(12)
    )
    top = HEADER
    for row in rows:
        left = 0
        for image in row:
            canvas.paste(image, (left, top))
            left += image.width
        top += row[0].height
    canvas.save(path, format="PNG")


def _title(report: AccelerationReport) -> str:
    title = f"{report.method} on {report.family}: density {report.density:.3f}"
    if report.guard is None:
        return f"{title}, quality guard off"
    worst = report.guard.worst
    error = "nothing probed" if worst is None else f"worst error {worst:.3f}"
    return f"{title}, {error}, {report.guard.trips} trips of the quality guard"


def _panels(
    report: AccelerationReport, branch: str, steps: Sequence[int | None]
) -> tuple[_Panel, ...]:
    column = {step: index for index, step in enumerate(steps)}
    density: dict[Where, list[float]] = {}
    operator: dict[Where, str] = {}
    for call in report.calls:
        if call.branch == branch:
            where = call.layer, column[call.step]
            density.setdefault(where, []).append(call.density)
            operator[where] = call.operator
    names = list(dict.fromkeys(call.operator for call in report.calls))
    sparse = [name for name in names if not name.startswith("dense")]
    colours = {name: OPERATORS[i % len(OPERATORS)] for i, name in enumerate(sparse)}
    colours |= {name: DENSE for name in names if name not in colours}
    by_operator = {where: colours[name] for where, name in operator.items()}
    return (
        _Panel(
            f"{branch}: density",
            {where: density_colour(sum(of) / len(of)) for where, of in density.items()},
            [(f"{share:g}", density_colour(share)) for share in (0, 0.25, 0.5, 0.75, 1)],
        ),
        _error_panel(report, branch, column),
        _Panel(f"{branch}: operator", by_operator, [*colours.items(), ("not run", NOT_RUN)]),
    )


def _error_panel(
    report: AccelerationReport, branch: str, column: Mapping[int | None, int]
) -> _Panel:
    if report.guard is None:
        return _Panel(f"{branch}: error (not measured)", {}, [("not probed", NOT_RUN)])
    budget = report.guard.options.max_error
    errors = report.guard.worst_by(lambda r: (r.branch, r.layer, r.step))
    cells = {
        (layer, column[step]): error_colour(error, budget)
        for (name, layer, step), error in errors.items()
        if name == branch and step in column
    }
    legend = [("0", GOOD), (f"{budget:g}", AT_BUDGET), (f"over {budget:g}", OVER)]
    return _Panel(f"{branch}: error of the worst head", cells, [*legend, ("not probed", NOT_RUN)])


def density_colour(density: float) -> Colour:
    """Return the colour of a share in [0, 1]."""
    return _between(SPARSE_END, DENSE_END, min(max(density, 0.0), 1.0))


def error_colour(error: float, budget: float) -> Colour:
    """Return the colour of an error: one of its own over the budget."""
    return OVER if error > budget else _between(GOOD, AT_BUDGET, error / budget)


def _between(start: Colour, end: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(start, end, strict=True))
    return red, green, blue


def cell_size(layers: int, columns: int) -> int:
    """Return the pixels along a cell's side."""
    return min(max(PANEL // max(layers, columns), 4), 28)


def _draw(panel: _Panel, layers: int, steps: Sequence[int | None]) -> Image.Image:
    side = cell_size(layers, len(steps))
    width, height = side * len(steps), side * layers
    image = Image.new("RGB", (LEFT + max(width, 300) + GAP, TOP + height + FOOTER), "white")
    draw = ImageDraw.Draw(image)
    draw.text((LEFT, 2), panel.title, fill=INK, font=_font(13))
    for layer in range(layers):
        for column in range(len(steps)):
            colour = panel.cells.get((layer, column), NOT_RUN)
            left, top = LEFT + column * side, TOP + layer * side
            draw.rectangle((left, top, left + side - 2, top + side - 2), fill=colour)
    for layer in range(0, layers, _tick(layers, side, 14)):
        at = TOP + layer * side + side // 2
        draw.text((LEFT - 6, at), str(layer), fill=INK, font=_font(11), anchor="rm")
    for column in range(0, len(steps), _tick(len(steps), side, 24)):
        name = "-" if steps[column] is None else str(steps[column])
        at = LEFT + column * side + side // 2
        draw.text((at, TOP - 4), name, fill=INK, font=_font(11), anchor="mb")
    left, top = LEFT, TOP + height + 10
    for text, colour in panel.legend:
        draw.rectangle((left, top, left + 12, top + 12), fill=colour, outline=INK)
        draw.text((left + 17, top), text, fill=INK, font=_font(11))
        left += 30 + int(draw.textlength(text, font=_font(11)))
    return image


def _tick(count: int, side: int, pixels: int) -> int:
    """Return how many cells lie between numbers that take so many pixels."""
    return max(1, min(count, math.ceil(pixels / side)))


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
