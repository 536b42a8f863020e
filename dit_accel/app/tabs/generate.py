"""Generating with methods and without, side by side; the other generating tabs build on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from dit_accel.app import views
from dit_accel.app.jobs import Job
from dit_accel.app.options import AUTO, Controls, MethodControls, choice
from dit_accel.app.settings import AppSettings
from dit_accel.app.site import Site, connect_run, remembered, run_buttons
from dit_accel.app.tabs.choosing import ChoosingControls, is_by_hand, wishes
from dit_accel.app.work import SETTINGS, check_order, recommended
from dit_accel.errors import DitAccelError, OptionError
from dit_accel.kinds import KINDS
from dit_accel.models import list_models

PROMPT = "a large red circle moving right on a dark blue background"
START_MODEL = "tiny-wan"
LABELS = {
    "steps": "Steps",
    "guidance": "Guidance scale",
    "frames": "Frames",
    "height": "Height, pixels",
    "width": "Width, pixels",
}
ELSEWHERE = ("guidance", "resolution")
"""Kinds of methods that have a tab of their own."""


@dataclass
class GenerationTab:
    """A tab that generates.

    Attributes:
        site: that serves it.
        name: tells its components from those of other tabs.
        methods: its controls of methods.
        chosen: methods at the start, by kind.
        compare: label of the switch for a run without the methods.
        run: what to call the run with them.
        baseline: what to call the one without.
        enlarge: factor on the sizes that a model recommends.
        density: whether there is a slider for the density of attention methods.
        extra: draws further controls under the methods and returns them by name.
        footer: draws more under the form.
        assign: turns their values into further options ``name=value``.
        choosing: controls of who chooses the methods; None: they are chosen by hand.
    """

    site: Site
    name: str
    methods: MethodControls
    chosen: Mapping[str, str]
    compare: str
    run: str = "accelerated"
    baseline: str = "dense"
    enlarge: float = 1.0
    density: bool = True
    extra: Callable[[GenerationTab], Controls] = lambda tab: {}
    footer: Callable[[GenerationTab], None] = lambda tab: None
    assign: Callable[[Mapping[str, Any], list[str]], list[str]] = lambda given, names: []
    choosing: ChoosingControls | None = None
    controls: Controls = field(default_factory=dict)
    _by_hand: list[Any] = field(default_factory=list)

    def draw(self, page: gr.Blocks) -> None:
        """Draw the tab and connect everything."""
        with gr.Row(elem_classes="da-split"):
            with gr.Column(scale=4, min_width=320, elem_classes="da-form"):
                self._draw_request()
                buttons = run_buttons("Generate", self.name)
                self._draw_settings()
                self.footer(self)
            with gr.Column(scale=7, min_width=320, elem_classes="da-stage"):
                status = gr.HTML(elem_id=f"{self.name}-status")
                result = gr.HTML(views.empty(), elem_id=f"{self.name}-result")
                gallery = gr.HTML(elem_id=f"{self.name}-gallery")
                picked = gr.Textbox(
                    label="Chosen result", elem_id=f"{self.name}-picked", elem_classes="da-away"
                )
        names = gr.BrowserState([], storage_key=f"dit-accel-{self.name}", secret="results")
        self.methods.connect()
        if self.choosing is not None:
            self.choosing.connect(self._by_hand)
        self._connect_model()
        connect_run(
            self.site,
            buttons,
            status,
            [*self.controls.values(), names],
            [result, gallery, names],
            lambda values: self._prepare(self._by_name(values)),
            lambda values, made: self._finish(values[names], made, (result, gallery, names)),
        )
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(lambda known: views.gallery(self.site.kept(known)), names, gallery, **quiet)
        picked.change(self._show, picked, result, **quiet)

    def _draw_request(self) -> None:
        site, models = self.site, self.site.settings.offered
        model = start_model(site.settings)
        free = site.settings.allow_any_model
        self.controls["model"] = gr.Dropdown(
            models,
            value=model,
            label="Model",
            info="One of these, or the id of a hub model (org/name)." if free else None,
            allow_custom_value=free,
            filterable=free,
        )
        self.controls["prompt"] = gr.Textbox(
            PROMPT,
            label="Prompt",
            lines=2,
            max_lines=6,
            elem_id=f"{self.name}-prompt",
            info="The bundled models know coloured shapes that move on plain or patterned grounds.",
        )
        if self.choosing is not None:
            self.choosing.draw_way()
        with gr.Column(elem_classes="da-form", min_width=0) as by_hand:
            self.methods.draw_choices(self.chosen)
            self.controls |= self.extra(self)
            if self.density:
                self._draw_density()
        self._by_hand.append(by_hand)
        if self.choosing is not None:
            self.choosing.draw_guard()
            self.controls |= self.choosing.controls
        self.controls["compare"] = gr.Checkbox(True, label=self.compare)

    def _draw_density(self) -> None:
        with gr.Group():
            self.controls["set_density"] = gr.Checkbox(
                True, label="Choose how much attention to keep"
            )
            self.controls["density"] = gr.Slider(
                0.05, 1, 0.4, step=0.05, label="Density: share of attention kept, where sparse"
            )
        self.controls["set_density"].change(
            lambda on: gr.update(interactive=on),
            self.controls["set_density"],
            self.controls["density"],
            show_progress="hidden",
            api_visibility="private",
        )

    def _draw_settings(self) -> None:
        with gr.Accordion("Size, steps and seed", open=False), gr.Row():
            values = self._recommended(self.controls["model"].value)
            for name, value in zip(SETTINGS, values, strict=True):
                self.controls[name] = gr.Number(
                    value, label=LABELS[name], min_width=130, elem_id=f"{self.name}-{name}"
                )
            self.controls["seed"] = gr.Number(0, label="Seed", min_width=130)
        with gr.Accordion("Options of the methods", open=False) as options:
            gr.HTML(views.note("What is left empty is as published for the model."))
            self.methods.draw_options(self.chosen)
            for box, value in self.methods.small.items():
                box.value = value
        self.controls |= self.methods.inputs
        self._by_hand.append(options)

    def _connect_model(self) -> None:
        sizes, small = [self.controls[name] for name in SETTINGS], self.methods.small

        def settle(model: str) -> list[Any]:
            bundled = model in list_models()
            options = [value if bundled else "" for value in small.values()]
            return [*self._recommended(model), *options]

        self.controls["model"].change(
            settle,
            self.controls["model"],
            [*sizes, *small],
            show_progress="hidden",
            api_visibility="private",
        )

    def _recommended(self, model: object) -> list[Any]:
        try:
            values = recommended(self.site.settings, model)
        except DitAccelError:
            return [None] * len(SETTINGS)  # the button says why
        sizes = {"height", "width"} if self.enlarge != 1 else set()
        return [
            int(value * self.enlarge) if value is not None and name in sizes else value
            for name, value in zip(SETTINGS, values, strict=True)
        ]

    def _by_name(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        return {name: values[component] for name, component in self.controls.items()}

    def _prepare(self, given: dict[str, Any]) -> Callable[[Job], str]:
        wish = wishes(given)
        names: list[str] = [AUTO]
        assignments: list[str] = []
        if is_by_hand(given):
            names, assignments = self._methods_by_hand(given)
            if not self.chosen_kind(given, "attention"):
                wish.pop("guard", None)  # it would have nothing to look at
        order = check_order(self.site.settings, given, ",".join(names), assignments, wish)
        return lambda job: self.site.studio.generate(job, order)

    def _methods_by_hand(self, given: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        names = self.methods.chosen(given)
        if not names:
            raise OptionError("no method is chosen: take one of the list.")
        assignments = self.methods.assignments(given) + self.assign(given, names)
        if given.get("set_density") and self.chosen_kind(given, "attention"):
            assignments.append(f"density={given['density']}")
        return names, assignments

    def chosen_kind(self, given: Mapping[str, Any], kind: str) -> bool:
        """Whether a method of this kind is chosen that has a density."""
        return given.get(choice(kind)) not in (None, "", "dense")

    def _finish(self, known: object, made: str, outputs: tuple[Any, Any, Any]) -> dict[Any, Any]:
        result, gallery, names = outputs
        fresh = remembered(known, made)
        return {
            result: self._show(made),
            gallery: views.gallery(self.site.kept(fresh)),
            names: fresh,
        }

    def _show(self, name: str) -> Any:
        content = self.site.store.result(name)
        return (
            gr.skip() if content is None else views.result(name, content, self.run, self.baseline)
        )


def start_model(settings: AppSettings) -> str | None:
    """Return the model that is chosen at the start."""
    models = settings.offered
    return START_MODEL if START_MODEL in models else next(iter(models), None)


def generate_tab(site: Site, page: gr.Blocks) -> None:
    """Draw the tab for all kinds of methods that have none of their own."""
    kinds = [kind for kind in KINDS if kind not in ELSEWHERE]
    GenerationTab(
        site,
        "generate",
        MethodControls(kinds, automatic=False),
        {"attention": "gna"},
        compare="Generate densely too, and compare",
        choosing=ChoosingControls(),
    ).draw(page)
