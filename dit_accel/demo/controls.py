"""The controls on the left of the page; those of methods are made from their dataclasses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, get_args, get_origin

import gradio as gr

from dit_accel.cli.options import GENERAL, describe, method_hints, names_of
from dit_accel.errors import DitAccelError
from dit_accel.kinds import KINDS
from dit_accel.models import generation_defaults, list_models
from dit_accel.registry import list_methods, method_class

PROMPT = "a large red circle moving right on a blue background"
PUBLISHED = "as published"
HELP = {
    "dense_steps": "First steps that stay dense: a number, or a share such as 0.25.",
    "dense_layers": "First layers that stay dense.",
    "min_tokens": "Videos of fewer tokens stay dense.",
    "backend": "Who computes sparse attention: auto, torch, triton, ...",
    "precision": "8-bit attention on a GPU: fp8, int8_fp8 or int8.",
}
SETTINGS = {
    "steps": "Steps",
    "guidance": "Guidance",
    "frames": "Frames",
    "height": "Height, pixels",
    "width": "Width, pixels",
}

Controls = dict[str, Any]
"""Components of the page by name."""


def request_controls() -> Controls:
    """Return the controls for what to generate, with the first bundled model's settings."""
    models = list_models()
    model = models[0] if models else None
    values = recommended(model) if model else [None] * len(SETTINGS)
    controls: Controls = {
        "model": gr.Dropdown(
            models,
            value=model,
            label="Model",
            info="One of these, a hub id (org/name) or a folder.",
            allow_custom_value=True,
        ),
        "prompt": gr.Textbox(PROMPT, label="Prompt", lines=2),
        **{kind: _method_control(kind) for kind in KINDS if list_methods(kind)},
    }
    with gr.Group():
        controls["set_density"] = gr.Checkbox(
            False, label="Set the density", info="Share of attention to keep, where sparse."
        )
        controls["density"] = gr.Slider(0.05, 1, 0.5, step=0.05, label="Density", visible=False)
    controls["set_density"].change(
        lambda on: gr.update(visible=on),
        controls["set_density"],
        controls["density"],
        show_progress="hidden",
        api_visibility="private",
    )
    with gr.Row():
        for (name, label), value in zip(SETTINGS.items(), values, strict=True):
            precision = None if name == "guidance" else 0
            controls[name] = gr.Number(value, label=label, precision=precision, min_width=130)
        controls["seed"] = gr.Number(0, label="Seed", precision=0, min_width=130)
    controls["compare"] = gr.Checkbox(True, label="Generate densely too, and compare")
    return controls


def chosen_methods(given: Mapping[str, Any]) -> str:
    """Return the names of the methods that the controls' values choose, with commas."""
    return ",".join(given[kind] for kind in KINDS if given.get(kind))


def option_controls(methods: str) -> Controls:
    """Return a control for each option of the methods, and for those of every attention method.

    They are named as `accelerate_pipeline` takes them: an option that two methods have is
    "method.option".
    """
    boxes: Controls = {}
    names = names_of(methods)
    owners = Counter(option for method in names for option in method_hints(method))
    for method in names:
        cls = method_class(method)
        gr.Markdown(f"**{method}**: {cls.paper or cls.summary()}")
        hints = method_hints(method)
        for option in fields(cls):
            if option.init and option.name not in GENERAL:  # the density has a slider of its own
                name = option.name if owners[option.name] == 1 else f"{method}.{option.name}"
                boxes[name] = _option_control(name, hints[option.name], option.default)
        if cls.kind == "attention":
            for name in GENERAL:
                if name != "density":
                    info = HELP.get(name)
                    boxes[name] = gr.Textbox("", label=name, info=info, placeholder=PUBLISHED)
    return boxes


def _method_control(kind: str) -> Any:
    names, label = list_methods(kind), "Method" if kind == "attention" else kind.capitalize()
    if kind == "attention":
        return gr.Dropdown(names, value="radial", label=label)
    return gr.Dropdown([("none", ""), *names], value="", label=label)


def _option_control(name: str, hint: Any, default: Any) -> Any:
    usual = "" if default is MISSING else f"; usually {default}"
    info = f"{describe(hint)}{usual}"
    if hint is bool or get_origin(hint) is Literal:
        values = ["true", "false"] if hint is bool else [str(value) for value in get_args(hint)]
        return gr.Dropdown([(PUBLISHED, ""), *values], value="", label=name, info=info)
    return gr.Textbox("", label=name, info=info, placeholder=PUBLISHED)


def recommended(model: str) -> list[Any]:
    """Return the settings that a model recommends; None leaves one to its pipeline."""
    try:
        defaults = generation_defaults(model)
    except DitAccelError as error:
        raise gr.Error(str(error), title="No such model", print_exception=False) from error
    return [getattr(defaults, name) for name in SETTINGS]
