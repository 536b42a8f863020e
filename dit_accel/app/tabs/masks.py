"""Masks of static methods on any grid: block by block, token by token, and what one token sees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gradio as gr
import torch

from dit_accel.app import pictures, views
from dit_accel.app.options import Controls, MethodControls
from dit_accel.app.settings import AppSettings, check_number
from dit_accel.app.site import Site
from dit_accel.call import TokenLayout
from dit_accel.cli.options import parse_options
from dit_accel.errors import DitAccelError, OptionError
from dit_accel.grid import Grid
from dit_accel.methods.base import StaticMethod
from dit_accel.registry import list_methods, method_class, resolve_method
from dit_accel.world.clips import Scene, Thing, render

MOST_TOKENS_DRAWN = 2304
MOST_TEXT = 2000
SCENE = Scene(
    (
        Thing("large", "red", "plain", "circle", "moving right"),
        Thing("small", "yellow", "plain", "star", "moving up"),
    ),
    "dark blue",
    "striped",
)


def masks_tab(site: Site, page: gr.Blocks) -> None:
    """Draw the mask explorer."""
    methods = MethodControls(["attention"], general=False, automatic=False)
    chosen = {"attention": "gna"}
    with gr.Row(elem_classes="da-split"):
        with gr.Column(scale=4, min_width=320, elem_classes="da-form"):
            methods.draw_choices(chosen)
            with gr.Row():
                controls: Controls = {
                    name: gr.Number(value, label=label, min_width=80, elem_id=f"masks-{name}")
                    for name, label, value in (
                        ("frames", "Frames", 9),
                        ("rows", "Rows", 16),
                        ("columns", "Columns", 16),
                        ("text", "Text tokens", 0),
                    )
                }
            controls["query"] = gr.Textbox(
                "4, 7, 7",
                label="Token to look from",
                info="Frame, row, column from 0. Or click a place in the frames.",
                elem_id="query-token",
            )
            with gr.Group():
                controls["set_density"] = gr.Checkbox(
                    True, label="Choose how much attention to keep", elem_id="masks-set-density"
                )
                controls["density"] = gr.Slider(
                    0.05, 1, 0.3, step=0.05, label="Density: share of attention kept"
                )
            with gr.Accordion("Options of the method", open=False):
                gr.HTML(views.note("What is left empty is the method's own default."))
                methods.draw_options(chosen)
                for box, value in methods.small.items():
                    box.value = value
        with gr.Column(scale=7, min_width=320, elem_classes="da-stage"):
            shown = gr.HTML(elem_id="masks-result")
    methods.connect()
    controls |= methods.inputs

    def draw(values: dict[Any, Any]) -> str:
        given = {name: values[component] for name, component in controls.items()}
        try:
            return explore(site.settings, methods, given)
        except DitAccelError as error:
            return views.refusal(str(error))

    # One event for all of them, so that the last answer belongs to the last change.
    gr.on(
        [page.load, *(component.change for component in controls.values())],
        draw,
        set(controls.values()),
        shown,
        show_progress="hidden",
        api_visibility="private",
        trigger_mode="always_last",
    )


def explore(settings: AppSettings, methods: MethodControls, given: Mapping[str, Any]) -> str:
    """Return the HTML of a mask.

    Args:
        settings: bounds of the page.
        methods: which methods there are to choose from.
        given: values of the controls by name.

    Raises:
        DitAccelError: saying what is wrong and what to do.
    """
    layout = _layout(settings, given)
    names = methods.chosen(given)
    if not names:
        raise OptionError("no method is chosen: take one of the list.")
    method = resolve_method(
        names[0], **parse_options(names[0], methods.assignments(given), general=())
    )
    if not isinstance(method, StaticMethod):
        static = [name for name in list_methods() if issubclass(method_class(name), StaticMethod)]
        raise OptionError(
            f"what {names[0]} attends to does not follow from the grid alone, so there is no one "
            f"mask to draw: take one of {', '.join(static)}."
        )
    if given.get("set_density"):
        density = float(check_number("density", given.get("density"), 0, 1, whole=False) or 0)
        method = method.at_density(density, layout)
    token = _token(given.get("query"), layout.grid)
    _, height, width = layout.grid
    index = (token[0] * height + token[1]) * width + token[2]
    seen = pictures.seen_by(method, layout, index)
    small = layout.num_tokens <= MOST_TOKENS_DRAWN
    return views.explorer(
        blocks=pictures.block_picture(method, layout),
        tokens=pictures.token_picture(method, layout) if small else None,
        most=MOST_TOKENS_DRAWN,
        method=str(method),
        token=token,
        seen=int(seen.sum()),
        video=layout.video_length,
        view=pictures.png_uri(pictures.view_picture(seen, token, _clip(layout.grid))),
        columns=pictures.columns_of(layout.grid[0]),
    )


def _layout(settings: AppSettings, given: Mapping[str, Any]) -> TokenLayout:
    axes = [
        check_number(name, given.get(name), 1, settings.max_tokens) or 1
        for name in ("frames", "rows", "columns")
    ]
    text = check_number("text tokens", given.get("text"), 0, MOST_TEXT) or 0
    if math.prod(axes) > settings.max_tokens:
        raise OptionError(
            f"{' x '.join(map(str, axes))} are {math.prod(axes):,} tokens and this page draws "
            f"{settings.max_tokens:,}: take a smaller grid; `dit-accel show-mask` draws any."
        )
    return TokenLayout((axes[0], axes[1], axes[2]), text)


def _token(text: object, grid: Grid) -> tuple[int, int, int]:
    parts = [part.strip() for part in str(text or "").split(",")]
    if len(parts) != 3 or not all(part.isdecimal() and len(part) < 7 for part in parts):
        raise OptionError(
            "the token to look from is three numbers, frame, row and column, such as 4, 7, 7."
        )
    t, h, w = map(int, parts)
    for name, value, size in zip(("frame", "row", "column"), (t, h, w), grid, strict=True):
        if value >= size:
            raise OptionError(
                f"the token to look from has {name} {value}, and the grid has {size}, counted "
                f"from 0: take 0 to {size - 1}."
            )
    return t, h, w


def _clip(grid: Grid) -> torch.Tensor:
    """Return a drawn clip of a grid's proportions, ``[T, 3, h, w]`` in [0, 1]."""
    frames, rows, columns = grid
    scale = 128 / max(rows, columns)
    size = frames, max(1, round(rows * scale)), max(1, round(columns * scale))
    return (render([SCENE], size, seed=1)[0].permute(1, 0, 2, 3) + 1) / 2
