"""What the page's Generate buttons do, without the page: clips, pictures, figures and code."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from torch import nn

from dit_accel.acceleration import restore_pipeline
from dit_accel.app import pictures
from dit_accel.app.jobs import Job
from dit_accel.app.settings import AppSettings, check_number
from dit_accel.app.snippet import snippet
from dit_accel.app.store import Store
from dit_accel.bench.measuring import free_memory
from dit_accel.choosing.automatic import PROMPTS, probe_for
from dit_accel.choosing.settings import Setting
from dit_accel.cli.options import parse_options
from dit_accel.environment import describe_device, pick_device
from dit_accel.files import IMAGE_SUFFIX, VIDEO_SUFFIX, write_frames
from dit_accel.generation import (
    BUDGETS,
    Generation,
    GenerationRequest,
    Result,
    generate_accelerated,
    makes_video,
    pipeline_arguments,
)
from dit_accel.guard.records import GuardReport, finite_or_none
from dit_accel.models import generation_defaults, load_pipeline, pipeline_outline
from dit_accel.registry import method_class
from dit_accel.report import AccelerationReport
from dit_accel.world.worlds import unknown_words

SETTINGS = ("steps", "guidance", "frames", "height", "width")
"""Settings of a request that a model recommends."""
USUALLY_TRIED, MOST_TRIED = 4, PROMPTS
"""Prompts on which settings are tried for a budget."""


@dataclass(frozen=True)
class Order:
    """A checked request: what to generate, with what, and how.

    Attributes:
        model: a bundled model, or one that the page may load.
        methods: names of methods with commas.
        options: keyword arguments for `accelerate_pipeline`.
        request: what to generate, with every setting that is known before the model is loaded.
        compare: whether to generate it without the methods too.
        tried: prompts on which settings are tried, if the options hold a budget.
    """

    model: str
    methods: str
    options: Mapping[str, Any]
    request: GenerationRequest
    compare: bool
    tried: int = USUALLY_TRIED


def check_order(
    settings: AppSettings,
    given: dict[str, Any],
    methods: str,
    assignments: list[str],
    wishes: Mapping[str, Any] | None = None,
) -> Order:
    """Return what the page asks for, if it can be done, as far as that shows without the weights.

    Args:
        settings: bounds of the page.
        given: values of its controls by name.
        methods: names with commas.
        assignments: options of these, as ``name=value``.
        wishes: further options: a budget, the guard.

    Raises:
        DitAccelError: saying what is wrong and what to do.
    """
    model = settings.check_model(given.get("model"))
    numbers = settings.check_request(given)
    options = {**parse_options(methods, assignments), **(wishes or {})}
    tried = check_number("prompts to try", given.get("tried"), 1, MOST_TRIED) or USUALLY_TRIED
    defaults = generation_defaults(model)
    missing = {name: getattr(defaults, name) for name in SETTINGS if numbers[name] is None}
    request = GenerationRequest(**{**numbers, **missing})
    settings.check_volume(request.height, request.width, request.frames)
    outline = pipeline_outline(model)
    if outline is not None:
        if not makes_video(type(outline)):
            request = replace(request, frames=None)
        pipeline_arguments(outline, request)
    return Order(model, methods, options, request, bool(given.get("compare")), tried)


class Studio:
    """Loads one pipeline at a time and generates with it; only one job may use it at once.

    Args:
        store: takes the results.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._model: str | None = None
        self._pipe: Any = None

    def generate(self, job: Job, order: Order) -> str:
        """Do what was ordered and return the result's name in the store.

        Raises:
            DitAccelError: if the model can't be loaded or accelerated so.
            Cancelled: if the job was cancelled.
        """
        with self.pipeline(order.model, job) as pipe:
            options = dict(order.options)
            if BUDGETS & options.keys():
                options["probe"] = probe_for(pipe, order.request, order.tried)
            result = generate_accelerated(
                pipe,
                order.request,
                order.methods,
                options,
                compare=order.compare,
                progress=job.report,
            )
            job.report("writing the files", 0, 1)
            return self._keep(pipe, order, result)

    @contextmanager
    def pipeline(self, model: str, job: Job) -> Iterator[Any]:
        """Yield a model's pipeline, which ``job`` can stop at any transformer call; restore it.

        Raises:
            DitAccelError: if the model can't be loaded.
        """
        pipe = self._load(model, job)
        parts = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
        hooks = [
            part.register_forward_pre_hook(job.stop_if_cancelled)
            for part in parts
            if isinstance(part, nn.Module)
        ]
        try:
            yield pipe
        finally:
            for hook in hooks:
                hook.remove()
            restore_pipeline(pipe)

    def clean_up(self) -> None:
        """Free what a job that failed or was cancelled left behind, the loaded model included."""
        self._model = self._pipe = None
        free_memory()

    def _load(self, model: str, job: Job) -> Any:
        if model != self._model:
            self.clean_up()  # make room first
            job.report(f"loading {model}", 0, 1)
            self._pipe = load_pipeline(model, device=pick_device(), safetensors_only=True)
            self._model = model
        job.stop_if_cancelled()
        return self._pipe

    def _keep(self, pipe: Any, order: Order, result: Result) -> str:
        name, folder = self.store.begin()
        defaults, prompt = generation_defaults(order.model), order.request.prompt
        suffix = VIDEO_SUFFIX if makes_video(type(pipe)) else IMAGE_SUFFIX
        files = {"accelerated": folder / f"accelerated{suffix}"}
        write_frames(files["accelerated"], result.accelerated.frames, defaults.fps)
        files["poster"] = folder / "poster.png"
        pictures.write_poster(files["poster"], result.accelerated.frames)
        scale = None
        if result.dense is not None:
            files["dense"] = folder / f"dense{suffix}"
            write_frames(files["dense"], result.dense.frames, defaults.fps)
            files["difference"] = folder / f"difference{suffix}"
            heat, scale = pictures.difference(result.accelerated.frames, result.dense.frames)
            write_frames(files["difference"], heat, defaults.fps)
        if result.report.calls:
            files["report"] = folder / "report.png"
            result.report.save_picture(files["report"])
        chosen = chosen_content(result.report) if order.methods == "auto" else None
        methods, options, why = settled(order, result.report)
        code = snippet(pipe, order.model, methods, options, order.request, defaults.fps, why)
        files["code"] = folder / "generate.py"
        files["code"].write_text(code + "\n", encoding="utf-8")
        content = {
            "made": datetime.now().isoformat(timespec="seconds"),
            "model": order.model,
            "prompt": prompt,
            "unknown_words": unknown_words(defaults.world, prompt) if defaults.world else [],
            "methods": result.report.method,
            "options": {name: str(value) for name, value in order.options.items()},
            "settings": {
                name: getattr(order.request, name)
                for name in (*SETTINGS, "seed")
                if getattr(order.request, name) is not None
            },
            "video": suffix == VIDEO_SUFFIX,
            "files": {kind: path.name for kind, path in files.items()},
            "difference_scale": scale,
            "on_gpu": pipe.device.type == "cuda",
            "device": describe_device(str(pipe.device))["name"],
            "code": code,
            **figures(result),
            "report": report_content(result.report, chosen["told"] if chosen else ()),
            "chosen": chosen,
            "guard": guard_content(result.report.guard),
        }
        self.store.keep(name, content, files.values())
        return name


def figures(result: Result) -> dict[str, Any]:
    """Return the measured figures, ready for JSON; None where there is nothing to compare with."""

    def times(run: Generation | None) -> dict[str, float] | None:
        return None if run is None else {"total_s": run.total_s, "denoise_s": run.denoise_s}

    psnr = result.psnr_db
    return {
        "accelerated": times(result.accelerated),
        "dense": times(result.dense),
        "speedup": result.speedup,
        "denoise_speedup": result.denoise_speedup,
        "identical": psnr == float("inf"),
        "psnr_db": None if psnr == float("inf") else psnr,
        "computed": result.report.block_density,
        "blocks_skipped": result.report.blocks_skipped,
        "timing": result.timing,
    }


def table_content(table: Any, told: Collection[str] = ()) -> dict[str, Any]:
    """Return a rich table's title, headers, rows and remarks, but those ``told``, as texts."""
    return {
        "title": str(table.title or ""),
        "headers": [str(column.header) for column in table.columns],
        "rows": [
            list(map(str, row))
            for row in zip(*(column.cells for column in table.columns), strict=True)
        ],
        "remarks": [
            line for line in str(table.caption or "").splitlines() if line and line not in told
        ],
    }


def settled(order: Order, report: AccelerationReport) -> tuple[str, dict[str, Any], str]:
    """Return methods and options that repeat a run without choosing anew, and where they are from.

    A budget is replaced with what was chosen for it.
    """
    choice = report.choice
    if choice is None:
        return order.methods, dict(order.options), ""
    setting = Setting() if choice.chosen is None else choice.chosen.setting
    options = {**setting.options, **order.options}
    if all(method_class(name).kind != "attention" for name in setting.methods):
        options.pop("guard", None)  # it would have nothing to look at
    kept = {name: value for name, value in options.items() if name not in BUDGETS}
    return ",".join(setting.methods), kept, f"chosen for {choice.budget}"


def chosen_content(report: AccelerationReport) -> dict[str, Any]:
    """Return what ``method="auto"`` took and why, ready for JSON; the frontier if it was measured.

    "told" are the remarks of the report that say the same.
    """
    choice = report.choice
    if choice is None:
        return {"why": list(report.notes), "points": [], "told": list(report.notes)}
    points = list(choice.frontier)
    if choice.chosen is not None and choice.chosen not in points:
        points.append(choice.chosen)
    rows = [
        {
            "setting": str(point.setting),
            "speedup": point.speedup,
            "psnr_db": point.low_psnr,
            "error": point.mean_error,
            "taken": point == choice.chosen,
        }
        for point in points
    ]
    tried = f"{len(choice.points)} settings were tried, {len(choice.refused)} can't run or pay here"
    return {"why": [choice.why, tried], "points": rows, "told": choice.lines()}


def guard_content(guard: GuardReport | None) -> dict[str, Any] | None:
    """Return what the guard found, ready for JSON; None if it was off or had nothing to look at."""
    if guard is None or not guard.records:
        return None
    return {
        "probes": guard.probes,
        "trips": guard.trips,
        "repairs": guard.repairs,
        "not_finite": guard.not_finite,
        "worst": finite_or_none(guard.worst),
        "budget": guard.options.max_error,
    }


def report_content(report: AccelerationReport, told: Collection[str]) -> dict[str, Any]:
    """Return a report ready for JSON and for the page: its tables, steps by layers, and mask.

    Remarks that are ``told`` elsewhere are left out.
    """
    return {
        "tables": [table_content(table, told) for table in report.tables()],
        "policy": [[row.step, row.branch, row.marks] for row in report.policy],
        "mask": pictures.mask_of(report),
    }


def recommended(settings: AppSettings, model: object) -> list[Any]:
    """Return the settings that a model recommends; None leaves one to its pipeline.

    Raises:
        DitAccelError: if the page may not load it.
    """
    defaults = generation_defaults(settings.check_model(model))
    return [getattr(defaults, name) for name in SETTINGS]
