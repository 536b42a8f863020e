"""The page itself: controls on the left, what came of them on the right.

The controls of methods are made from their dataclasses, so that a new one appears by itself.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from dit_accel.demo.controls import (
    PUBLISHED,
    SETTINGS,
    Controls,
    chosen_methods,
    option_controls,
    recommended,
    request_controls,
)
from dit_accel.demo.runner import Outcome, Runner
from dit_accel.errors import DitAccelError
from dit_accel.files import VIDEO_SUFFIX
from dit_accel.generation import GenerationRequest, Result
from dit_accel.kinds import KINDS
from dit_accel.policy import LEGEND, policy_text

INTRO = """# dit-accel
Sparse attention makes video generation faster, at some cost in fidelity. See how much of each."""
MAX_WAITING = 8


def build_page(runner: Runner | None = None) -> gr.Blocks:
    """Return the page; it serves one request at a time and lets others wait."""
    runner = runner or Runner()
    with gr.Blocks(title="dit-accel", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(INTRO)
        with gr.Row():
            left, right = gr.Column(scale=2, min_width=330), gr.Column(scale=5, min_width=330)
        with right:
            outputs = _outputs()
        with left:
            controls = request_controls()
            button = gr.Button("Generate", variant="primary")
            with gr.Accordion("Options of the methods, schedule and backend", open=False):
                gr.Markdown(f"What is left empty is {PUBLISHED} for the model.")

                kinds = [kind for kind in KINDS if kind in controls]

                @gr.render(inputs=[controls[kind] for kind in kinds])
                def options(*methods: str) -> None:
                    own = option_controls(chosen_methods(dict(zip(kinds, methods, strict=True))))

                    # gradio finds the default and passes the progress bar of this request.
                    def press(
                        values: dict[Any, Any],
                        progress: gr.Progress = gr.Progress(),  # noqa: B008
                    ) -> dict[Any, Any]:
                        given = {name: values[box] for name, box in {**controls, **own}.items()}
                        outcome = generate(runner, given, list(own), progress)
                        shown = present(outcome)
                        return {outputs[name]: update for name, update in shown.items()}

                    button.click(
                        press,
                        {*controls.values(), *own.values()},
                        list(outputs.values()),
                        show_progress_on=outputs["figures"],
                        concurrency_id="generate",
                        concurrency_limit=1,
                        api_visibility="private",
                    )

        controls["model"].change(
            recommended,
            controls["model"],
            [controls[name] for name in SETTINGS],
            show_progress="hidden",
            api_visibility="private",
        )
    return page.queue(max_size=MAX_WAITING)


def generate(
    runner: Runner, given: dict[str, Any], options: list[str], progress: Any = None
) -> Outcome:
    """Serve one press of the button.

    Args:
        runner: who does it.
        given: values of all controls by name.
        options: which of them are options of the methods.
        progress: a ``gr.Progress``.

    Raises:
        gr.Error: in words for the page, if the request can't be served.
    """
    assignments = [f"{name}={given[name]}" for name in options if given[name]]
    if given["set_density"]:
        assignments.append(f"density={given['density']}")

    def show(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress((done, total), desc=stage, unit="steps")

    try:
        request = GenerationRequest(
            prompt=given["prompt"],
            seed=given["seed"] or 0,
            **{name: given[name] for name in SETTINGS},
        )
        return runner.run(
            given["model"] or "",
            chosen_methods(given),
            assignments,
            request,
            compare=given["compare"],
            progress=show,
        )
    except DitAccelError as error:
        raise gr.Error(str(error), title="This can't be done", print_exception=False) from error


def present(outcome: Outcome) -> dict[str, Any]:
    """Return what to show in each of the page's outputs."""
    result, report = outcome.result, outcome.result.report
    runs = {"dense": (outcome.dense, result.dense)}
    runs["accelerated"] = outcome.accelerated, result.accelerated
    shown: dict[str, Any] = {}
    for name, (path, run) in runs.items():
        words = report.method if name == "accelerated" else name
        label = f"{words}, {run.total_s:.1f} s" if run else words
        video = path is None or path.suffix == VIDEO_SUFFIX
        for kind, visible in (("video", video), ("image", not video)):
            value = path if visible else None
            shown[f"{name}_{kind}"] = gr.update(value=value, label=label, visible=visible)
    table = report.tables()[0]
    rows = [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]
    shown["figures"] = figures(result)
    headers = [str(column.header) for column in table.columns]
    shown["report"] = gr.update(
        value={"headers": headers, "data": rows}, label=str(table.title), visible=True
    )
    shown["remarks"] = str(table.caption or "")
    if report.steps:
        shown["remarks"] += f"\n\n{LEGEND}\n\n```\n{policy_text(report.policy)}\n```"
    shown["mask"] = gr.update(value=outcome.mask, visible=outcome.mask is not None)
    shown["code"] = outcome.code
    return shown


def figures(result: Result) -> str:
    """Return the measured figures as Markdown."""
    report, runs = result.report, {result.report.method: result.accelerated}
    done = []
    if report.block_density is not None:
        done.append(f"density {report.block_density:.3f}")
    if report.blocks_skipped is not None:
        done.append(f"{report.blocks_skipped:.1%} of blocks skipped")
    head = " · ".join(done)
    speedups = ""
    if result.dense is not None:
        runs = {"dense": result.dense, **runs}
        psnr = "equal to dense" if result.psnr_db == float("inf") else f"{result.psnr_db:.1f} dB"
        head = f"{result.speedup:.2f}x the speed of dense · PSNR {psnr} · {head}"
        speedups = f"|speed-up|{result.speedup:.2f}x|{result.denoise_speedup:.2f}x|"
    rows = [f"|{name}|{run.total_s:.2f} s|{run.denoise_s:.2f} s|" for name, run in runs.items()]
    table = "\n".join(["||in all|denoising|", "|:--|--:|--:|", *rows, speedups])
    notes = f"Times: {result.timing}."
    if report.block_density is not None:
        notes += (
            f" Over all calls, dense ones included, {report.block_density:.1%} of the pairs of "
            f"tokens were computed and {report.density:.1%} attended."
        )
    return f"### {head}\n\n{table}\n\n{notes}"


def _outputs() -> Controls:
    outputs: Controls = {}
    with gr.Row():
        for name in ("dense", "accelerated"):
            with gr.Column(min_width=240):
                outputs[f"{name}_video"] = gr.Video(
                    label=name, autoplay=True, loop=True, interactive=False
                )
                outputs[f"{name}_image"] = gr.Image(label=name, visible=False, interactive=False)
    outputs["figures"] = gr.Markdown("Press Generate.", min_height=120)
    with gr.Tabs():
        with gr.Tab("What was done"):
            outputs["report"] = gr.Dataframe(interactive=False, wrap=True, visible=False)
            outputs["remarks"] = gr.Markdown()
        with gr.Tab("Mask"):
            outputs["mask"] = gr.Image(show_label=False, interactive=False, visible=False)
        with gr.Tab("Python"):
            outputs["code"] = gr.Code(language="python", label="Makes the accelerated clip again")
    return outputs
