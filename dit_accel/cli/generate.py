"""``dit-accel generate``: a prompt to a video or an image, if asked for dense and accelerated."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table

from dit_accel.cli.options import (
    GuardError,
    GuardSwitch,
    guard_options,
    names_of,
    parse_options,
    pick_dtype,
)
from dit_accel.cli.output import plain_warnings, print_json, progress_bars, quieten_libraries
from dit_accel.errors import OptionError

if TYPE_CHECKING:
    from dit_accel.generation import GenerationRequest, Result


Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="An .mp4, or a .png for images. [default: outputs/..., named after PROMPT]",
        show_default=False,
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        help="See `dit-accel methods`; several of different kinds as a,b, or with a budget those "
        "to choose among. [default: radial, or auto with a budget]",
        show_default=False,
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option, e.g. density=0.3. Repeatable.", metavar="NAME=VALUE"),
]
ReportPicture = Annotated[
    Path | None, typer.Option(help="A .png of layers by steps: density, error, operator.")
]
Model = Annotated[str, typer.Option(help="A bundled model, a folder, or a hub id (org/name).")]
MinPsnr = Annotated[
    float | None, typer.Option(help="Choose settings that stay so near to dense, in dB.")
]
MaxError = Annotated[float | None, typer.Option(help="The same, in relative L1 of the latents.")]
TargetSpeedup = Annotated[
    float | None, typer.Option(help="Choose settings that are so many times faster.")
]
ProbeS = Annotated[
    float | None,
    typer.Option(help="Seconds for trying settings; what was found by then is taken."),
]
CalibrationFile = Annotated[
    Path | None, typer.Option(help="A file of `calibrate --method auto`: nothing is tried.")
]
Compare = Annotated[bool, typer.Option("--compare", help="Generate densely too, and compare.")]
Parallel = Annotated[
    str | None,
    typer.Option(
        help="Under torchrun: ulysses=N, ring=N, cfg=2, or several with commas.", metavar="SPLIT"
    ),
]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16; auto: float32 on a CPU.")]


@dataclass(frozen=True)
class Outputs:
    """The files that one command writes: OUTPUT and others beside it."""

    main: Path
    picture: Path | None = None
    """Of the report, where it was asked for."""

    def beside(self, name: str) -> Path:
        """Return e.g. ``out.report.json`` for ``out.mp4``."""
        return self.main.with_name(f"{self.main.stem}.{name}")

    @property
    def dense(self) -> Path:
        """The dense video or image that OUTPUT is compared with."""
        return self.beside(f"dense{self.main.suffix}")

    def all(self, compare: bool) -> list[Path]:
        """Return every file that will be written."""
        pictures = [self.main, self.dense] if compare else [self.main]
        drawn = [] if self.picture is None else [self.picture]
        return [*pictures, self.beside("report.json"), self.beside("report.txt"), *drawn]


def generate(
    prompt: Annotated[str, typer.Argument(help="What to generate.", show_default=False)],
    output: Output = None,
    model: Model = "tiny-wan",
    method: Methods = None,
    options: Options = None,
    min_psnr: MinPsnr = None,
    max_error: MaxError = None,
    target_speedup: TargetSpeedup = None,
    probe_s: ProbeS = None,
    calibration: CalibrationFile = None,
    compare: Compare = False,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the video.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto picks one.")] = "auto",
    dtype: Dtype = "auto",
    guard: GuardSwitch = None,
    guard_error: GuardError = None,
    report_picture: ReportPicture = None,
    parallel: Parallel = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing outputs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Generate PROMPT with an accelerated pipeline, and write a report beside OUTPUT.

    Several GPUs share one generation under
    `torchrun --nproc-per-node N -m dit_accel.cli generate ... --parallel SPLIT`.

    --compare generates it densely too (OUTPUT.dense.mp4) and reports both times, the achieved
    density and the PSNR between the two. Settings that are left out are the model's own. With
    --min-psnr, --max-error or --target-speedup settings are tried first, on other prompts or noise;
    what was measured is kept for the next time.
    """
    from dit_accel.choosing.automatic import probe_for
    from dit_accel.files import check_outputs
    from dit_accel.generation import generate_accelerated
    from dit_accel.models import generation_defaults, load_pipeline
    from dit_accel.parallel.session import ranks_of

    quieten_libraries()
    budget = {"min_psnr": min_psnr, "max_error": max_error, "target_speedup": target_speedup}
    wish = _wish(budget, probe_s, calibration)
    methods = ",".join(method or ["auto" if wish else "radial"])
    own = parse_options(methods, options or [], alternatives=bool(wish))
    chosen = {**own, **wish, **guard_options(guard, guard_error)}
    output = output or _named_after(prompt, model)
    outputs = Outputs(output, report_picture)
    _check_picture(report_picture, methods)
    check_outputs(outputs.all(compare), force=force)
    settings = {"steps": steps, "guidance": guidance, "frames": frames}
    settings |= {"height": height, "width": width}
    request = _request(model, prompt, negative, seed, settings)
    precision, fps = pick_dtype(dtype), generation_defaults(model).fps
    _check_suffix(output, model)

    with plain_warnings(), ranks_of(parallel, device) as ranks, progress_bars() as bars:
        tell = bars if ranks.first else _silent
        tell(f"loading {model}", 0, 1)
        pipe = ranks.spread(load_pipeline(model, device=ranks.device, dtype=precision))
        tell(f"loading {model}", 1, 1)
        if wish and calibration is None:
            chosen["probe"] = probe_for(pipe, request)
        result = generate_accelerated(
            pipe, request, methods, chosen, compare=compare, progress=tell
        )
        result = replace(result, report=ranks.report(result.report))
        if not ranks.first:
            return
        tell("writing", 0, 1)
        report = _write(outputs, result, fps, model, request, ranks.device)
        tell("writing", 1, 1)
    if as_json:
        print_json(report)
        return
    _tell(result, outputs.all(compare))


def _wish(
    budget: dict[str, float | None], probe_s: float | None, calibration: Path | None
) -> dict[str, Any]:
    """Return what is asked for, once its numbers are known to be possible."""
    from dit_accel.choosing.automatic import check_probe_s
    from dit_accel.choosing.budget import Budget

    Budget(**budget)
    check_probe_s(probe_s)
    if probe_s is not None and not any(budget.values()):
        raise OptionError(
            "--probe-s limits how long settings are tried for a budget: give one, such as "
            "--min-psnr 30."
        )
    wish = {**budget, "probe_s": probe_s, "calibration": calibration}
    return {name: value for name, value in wish.items() if value is not None}


def _tell(result: Result, written: list[Path]) -> None:
    """Print the report for people, and which files were written."""
    console = Console()
    console.print(_summary(result))
    for path in written:
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def _request(
    model: str,
    prompt: str,
    negative: str | None,
    seed: int,
    settings: dict[str, Any],
) -> GenerationRequest:
    """Return what to generate, what is left out as the model likes it."""
    from dit_accel.generation import GenerationRequest, pipeline_arguments
    from dit_accel.models import generation_defaults, pipeline_outline

    defaults = generation_defaults(model)
    for name, value in settings.items():
        settings[name] = getattr(defaults, name) if value is None else value
    request = GenerationRequest(prompt=prompt, negative_prompt=negative, seed=seed, **settings)
    outline = pipeline_outline(model)
    if outline is not None:
        pipeline_arguments(outline, request)  # refuses what this pipeline can't make
    return request


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Show no progress: rank 0 does."""


def _write(
    outputs: Outputs,
    result: Result,
    fps: int,
    model: str,
    request: GenerationRequest,
    device: str,
) -> dict[str, Any]:
    """Write all files and return the report."""
    from dit_accel.environment import environment
    from dit_accel.files import replacing, write_frames, write_text

    written = outputs.all(result.dense is not None)
    report = {
        "model": model,
        "request": asdict(request),
        **result.to_dict(),
        "environment": environment(device),
        "outputs": [str(path) for path in written],
    }
    write_frames(outputs.main, result.accelerated.frames, fps)
    if result.dense is not None:
        write_frames(outputs.dense, result.dense.frames, fps)
    write_text(outputs.beside("report.json"), json.dumps(report, indent=2, allow_nan=False))
    write_text(outputs.beside("report.txt"), _as_text(result))
    if outputs.picture is not None:
        with replacing(outputs.picture) as partial:
            result.report.save_picture(partial)
    return report


def _check_picture(picture: Path | None, methods: str) -> None:
    from dit_accel.files import IMAGE_SUFFIX
    from dit_accel.registry import method_class

    if picture is None:
        return
    if picture.suffix.lower() != IMAGE_SUFFIX:
        raise OptionError(f"report picture {str(picture)!r} must end in {IMAGE_SUFFIX}.")
    kinds = {
        "attention" if name == "auto" else method_class(name).kind for name in names_of(methods)
    }
    if not kinds & {"attention", "resolution"}:
        raise OptionError(
            f"--report-picture shows attention calls, and {methods!r} leaves attention alone."
        )


def _named_after(prompt: str, model: str) -> Path:
    from dit_accel.files import IMAGE_SUFFIX, VIDEO_SUFFIX
    from dit_accel.generation import makes_video
    from dit_accel.models import pipeline_class

    words = re.findall(r"[a-z0-9]+", prompt.lower())
    suffix = VIDEO_SUFFIX if makes_video(pipeline_class(model)) else IMAGE_SUFFIX
    return Path("outputs", ("-".join(words)[:60].strip("-") or "generated") + suffix)


def _check_suffix(output: Path, model: str) -> None:
    from dit_accel.files import IMAGE_SUFFIX, VIDEO_SUFFIX
    from dit_accel.generation import makes_video
    from dit_accel.models import pipeline_class

    if output.suffix.lower() not in (VIDEO_SUFFIX, IMAGE_SUFFIX):
        raise OptionError(f"output {str(output)!r} must end in {VIDEO_SUFFIX} or {IMAGE_SUFFIX}.")
    pipeline = pipeline_class(model)
    kind, suffix = ("videos", VIDEO_SUFFIX) if makes_video(pipeline) else ("images", IMAGE_SUFFIX)
    if output.suffix.lower() != suffix:
        raise OptionError(f"{pipeline.__name__} makes {kind}: output must end in {suffix}.")


def _summary(result: Result) -> Group:
    """Return the report for people."""
    table = Table("", "seconds in all", "denoising", caption=result.timing)
    for name, run in (("dense", result.dense), (result.report.method, result.accelerated)):
        if run is not None:
            table.add_row(name, f"{run.total_s:.2f}", f"{run.denoise_s:.2f}")
    if result.dense is not None:
        table.add_row("speed-up", f"{result.speedup:.2f}x", f"{result.denoise_speedup:.2f}x")
        table.add_row("PSNR", f"{result.psnr_db:.2f} dB", "")
    return Group(result.report, table)


def _as_text(result: Result) -> str:
    console = Console(width=100, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(_summary(result))
    return capture.get()
