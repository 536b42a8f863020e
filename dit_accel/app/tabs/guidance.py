"""Guidance by perturbation: a map of the model's heads, which ones to guide by, and the effect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from dit_accel.acceleration import family_of
from dit_accel.app import views
from dit_accel.app.jobs import Job
from dit_accel.app.options import Controls, MethodControls
from dit_accel.app.settings import check_number
from dit_accel.app.site import Site, connect_run, run_buttons
from dit_accel.app.tabs.generate import GenerationTab
from dit_accel.app.work import check_order
from dit_accel.cli.options import method_hints
from dit_accel.environment import pick_device
from dit_accel.errors import DitAccelError, OptionError
from dit_accel.guidance.heads import Head, model_identity, settle_heads
from dit_accel.headhunt.hunting import HeadHunt, hunt_heads
from dit_accel.headhunt.search import SearchPlan
from dit_accel.models import generation_defaults, pipeline_outline

START = "5:0, 5:1"
FIELD = "guidance-heads"
MOST_PROMPTS = 50


def guidance_tab(site: Site, page: gr.Blocks) -> None:
    """Draw the tab for perturbation guidance."""
    shown = gr.HTML(elem_id="head-map", render=False)
    GenerationTab(
        site,
        "guidance",
        # Some guidances are shown queries and keys by an attention method, "dense" will do.
        MethodControls(["guidance", "attention"], leave_out=("heads", "layers"), general=False),
        {"guidance": "softpag", "attention": "dense"},
        compare="Generate without guidance too, and compare",
        run="guided",
        baseline="unguided",
        density=False,
        extra=lambda tab: _head_controls(site, tab, shown),
        footer=lambda tab: _measuring(site, tab, shown),
        assign=_heads_or_layers,
    ).draw(page)


def _head_controls(site: Site, tab: GenerationTab, shown: Any) -> Controls:
    """Draw the map and the field that it writes into."""
    heads = gr.Textbox(
        START,
        label="Heads",
        elem_id=FIELD,
        info="Pairs layer:head. Guidances of whole layers take the layers alone.",
    )
    model = tab.controls["model"]
    shown.value = _map(site, model.value)
    shown.render()
    model.change(
        lambda chosen: _map(site, chosen),
        model,
        shown,
        show_progress="hidden",
        api_visibility="private",
    )
    return {"heads": heads}


def _heads_or_layers(given: Mapping[str, Any], names: list[str]) -> list[str]:
    """Return the option that says which heads, or which layers, are perturbed."""
    text = str(given.get("heads") or "").strip()
    for name in names:
        options = method_hints(name)
        if "heads" in options:
            return [f"heads={_pairs(text)}"]
        if "layers" in options:
            layers = sorted({layer for layer, _ in settle_heads(_pairs(text))[0]})
            return ["layers=" + ",".join(map(str, layers))]
    return []


def _pairs(text: str) -> str:
    """Return pairs as the options take them; anything else might name a file."""
    parts = [part.strip() for part in text.replace(";", ",").split(",") if part.strip()]
    if not parts:
        raise OptionError("no head is chosen: press some in the map, or write pairs such as 5:0.")
    for part in parts:
        layer, colon, head = part.partition(":")
        if not (colon and layer.isdecimal() and head.isdecimal()):
            raise OptionError(f"heads={part[:40]!r}: write layer:head, such as 5:0, 5:1.")
    return ",".join(dict.fromkeys(parts))


def _map(site: Site, model: object, gains: dict[Head, float] | None = None) -> str:
    try:
        outline = pipeline_outline(site.settings.check_model(model))
        if outline is None:
            return views.note(
                "The map of a hub model can't be drawn before it is loaded: write pairs."
            )
        about = model_identity(family_of(outline), outline.transformer)
    except DitAccelError as error:
        return views.refusal(str(error))
    return views.head_map(about["layers"], about["heads"], FIELD, gains)


def _measuring(site: Site, tab: GenerationTab, shown: Any) -> None:
    """Draw what measures each head's worth, by generating with it alone."""
    with gr.Accordion("Measure what each head is worth", open=False):
        gr.HTML(
            views.note(
                "Generates each prompt once for every head with the size and steps chosen above, "
                "and colours the map by how much more of the prompt came out. For bundled models; "
                "few steps and frames keep it short."
            )
        )
        prompts = gr.Number(2, label="Prompts", elem_id="measure-prompts")
        buttons = run_buttons("Measure heads", "measure", variant="secondary")
        status = gr.HTML(elem_id="measure-status")
    controls = tab.controls

    def prepare(values: dict[Any, Any]) -> Callable[[Job], Any]:
        given = {name: values[component] for name, component in controls.items()}
        count = check_number("prompts", values[prompts], 1, MOST_PROMPTS)
        return _hunt(site, given, count or 1)

    connect_run(
        site,
        buttons,
        status,
        [*controls.values(), prompts],
        [shown],
        prepare,
        lambda values, gains: {shown: _map(site, values[controls["model"]], gains)},
    )


def _hunt(site: Site, given: dict[str, Any], prompts: int) -> Callable[[Job], dict[Head, float]]:
    """Return the work that measures the gain of each head."""
    order = check_order(site.settings, given, "dense", [])
    if generation_defaults(order.model).world is None:
        raise OptionError(
            "only bundled models are measured here, because their prompts can be checked: use "
            "`dit-accel headhunt` for others."
        )
    request = order.request
    hunt = HeadHunt(
        model=order.model,
        objective="following",
        steps=request.steps,
        guidance=request.guidance,
        frames=request.frames,
        height=request.height,
        width=request.width,
        batch=4,
        count=prompts,
        plan=SearchPlan(rounds=1, per_round=1),
        device=pick_device(),
    )

    def work(job: Job) -> dict[Head, float]:
        with site.studio.pipeline(order.model, job) as pipe:
            found = hunt_heads(
                pipe,
                hunt,
                watch=lambda state: job.report("measuring heads", state.done, state.total),
            )
        return {trial.head: trial.gain for trial in found.search.rounds[0].trials}

    return work
