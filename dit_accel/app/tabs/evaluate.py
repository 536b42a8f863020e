"""Running a suite densely and by methods, watching it, and opening its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from dit_accel.app import views
from dit_accel.app.jobs import Job
from dit_accel.app.options import Controls
from dit_accel.app.settings import check_choices, check_number
from dit_accel.app.site import Site, connect_run, run_buttons
from dit_accel.app.tabs.generate import LABELS, start_model
from dit_accel.app.work import SETTINGS, check_order, recommended, table_content
from dit_accel.cli.eval_tables import summary_table
from dit_accel.environment import pick_device
from dit_accel.errors import OptionError
from dit_accel.eval.candidates import DENSE, make_candidates
from dit_accel.eval.runner import REPORT_FILE, EvalRun, run_evaluation
from dit_accel.eval.suites import list_suites, load_suite
from dit_accel.methods.base import check_density
from dit_accel.models import generation_defaults
from dit_accel.registry import list_methods

START = ("gna", "pisa")
BATCH = 4


def evaluate_tab(site: Site, page: gr.Blocks) -> None:
    """Draw the tab for runs of the eval harness."""
    models = site.settings.offered
    start = start_model(site.settings)
    with gr.Row(elem_classes="da-split"):
        with gr.Column(scale=4, min_width=320, elem_classes="da-form"):
            controls: Controls = {
                "model": gr.Dropdown(
                    models, value=start, label="Model", filterable=False, elem_id="eval-model"
                ),
                "suite": gr.Dropdown(
                    list_suites(), value="smoke", label="Suite of prompts", filterable=False
                ),
                "prompts": gr.Number(2, label="Prompts, from the first on", elem_id="eval-prompts"),
                "methods": gr.CheckboxGroup(
                    _methods(),
                    value=list(START),
                    label="Methods; dense is always there",
                ),
                "density": gr.Textbox(
                    "0.4",
                    label="Densities of attention methods",
                    info="With commas; empty for published options.",
                    elem_id="eval-density",
                ),
            }
            buttons = run_buttons("Evaluate", "eval")
            with gr.Accordion("Size and steps", open=False), gr.Row():
                for name, value in zip(SETTINGS, recommended(site.settings, start), strict=True):
                    controls[name] = gr.Number(
                        value, label=LABELS[name], min_width=130, elem_id=f"eval-{name}"
                    )
                controls["block_size"] = gr.Number(32, label="Tokens per block", min_width=130)
        with gr.Column(scale=7, min_width=320, elem_classes="da-stage"):
            status = gr.HTML(elem_id="eval-status")
            result = gr.HTML(
                views.note(
                    "Generates every prompt densely and by each method from the same noise, "
                    "measures how near they come, and writes a report with the clips."
                ),
                elem_id="eval-result",
            )
    controls["model"].change(
        lambda model: recommended(site.settings, model),
        controls["model"],
        [controls[name] for name in SETTINGS],
        show_progress="hidden",
        api_visibility="private",
    )

    def prepare(values: dict[Any, Any]) -> Callable[[Job], Any]:
        return _work(site, {name: values[component] for name, component in controls.items()})

    connect_run(
        site,
        buttons,
        status,
        list(controls.values()),
        [result],
        prepare,
        lambda values, made: {result: views.evaluation(*made)},
    )


def _work(site: Site, given: Mapping[str, Any]) -> Callable[[Job], Any]:
    """Check an evaluation and return its work."""
    order = check_order(site.settings, {**given, "prompt": "any"}, "dense", [])
    methods = check_choices(
        "method",
        given.get("methods") or [],
        _methods(),
    )
    if not methods:
        raise OptionError("no method is chosen: tick some to compare with dense.")
    (suite_name,) = check_choices("suite", [str(given.get("suite"))], list_suites())
    count = check_number("prompts", given.get("prompts"), 1, site.settings.max_samples)
    suite = load_suite(suite_name, generation_defaults(order.model).world, count)
    candidates = make_candidates(
        methods,
        densities=_densities(str(given.get("density") or "")),
        block_size=check_number("block_size", given.get("block_size"), 1, 4096),
    )
    samples = len(suite.entries) * len(candidates)
    if samples > site.settings.max_samples:
        raise OptionError(
            f"{len(suite.entries)} prompts by {len(candidates)} candidates are {samples} "
            f"generations and this page makes {site.settings.max_samples}: take fewer prompts or "
            "methods, or use `dit-accel eval`."
        )
    request = order.request
    run = EvalRun(
        model=order.model,
        suite=suite,
        candidates=candidates,
        batch=BATCH if generation_defaults(order.model).world else 1,
        device=pick_device(),
        **{name: getattr(request, name) for name in SETTINGS},
    )

    def work(job: Job) -> Any:
        name, folder = site.store.begin()
        results = run_evaluation(run, folder, progress=job.report)
        if results is None:  # another process would return it, and there is none
            raise OptionError("the evaluation returned nothing: try again.")
        site.store.keep(
            name, {"report": REPORT_FILE}, (p for p in folder.rglob("*") if p.is_file())
        )
        return name, table_content(summary_table(results)), results["problems"]

    return work


def _methods() -> list[str]:
    """Return what can be compared with dense."""
    names = [*list_methods("attention"), *list_methods("cache")]
    return [name for name in names if name != DENSE]


def _densities(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise OptionError(
            f"densities {text[:40]!r}: write numbers in (0, 1] with commas, such as 0.3, 0.5."
        ) from None
    for density in found:
        check_density(density)
    return found
