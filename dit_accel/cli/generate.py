"""``dit-accel generate``: a prompt to a video or an image, if asked for dense and accelerated."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table

from dit_accel.cli.options import parse_options, pick_dtype
from dit_accel.cli.output import plain_warnings, print_json, progress_bars, quieten_libraries
from dit_accel.errors import OptionError

if TYPE_CHECKING:
    from dit_accel.generation import GenerationRequest, Result


Methods = Annotated[
    list[str] | None,
    typer.Option(
        help="See `dit-accel methods`; several of different kinds as a,b. [default: radial]",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Outputs:
    """The files that one command writes: OUTPUT and others beside it."""

    main: Path

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
        return [*pictures, self.beside("report.json"), self.beside("report.txt")]


def generate(
    prompt: Annotated[str, typer.Argument(help="What to generate.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="An .mp4, or a .png for images.")],
    model: Annotated[
        str, typer.Option(help="A bundled model, a folder, or a hub id (org/name).")
    ] = "tiny-wan",
    method: Methods = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="An option, e.g. density=0.3. Repeatable.", metavar="NAME=VALUE"
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Generate densely too, and compare.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the video.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto picks one.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, float16 or bfloat16; auto: float32 on a CPU.")
    ] = "auto",
    parallel: Annotated[
        str | None,
        typer.Option(
            help="Under torchrun: ulysses=N, ring=N, cfg=2, or several with commas.",
            metavar="SPLIT",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing outputs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Generate PROMPT with an accelerated pipeline, and write a report beside OUTPUT.

    Several GPUs share one generation under
    `torchrun --nproc-per-node N -m dit_accel.cli generate ... --parallel SPLIT`.

    --compare generates it densely too (OUTPUT.dense.mp4) and reports both times, the achieved
    density and the PSNR between the two. Settings that are left out are the model's own.
    """
    from dit_accel.files import check_outputs
    from dit_accel.generation import generate_accelerated
    from dit_accel.models import generation_defaults, load_pipeline
    from dit_accel.parallel.session import ranks_of

    quieten_libraries()
    methods = ",".join(method or ["radial"])
    chosen = parse_options(methods, options or [])
    outputs = Outputs(output)
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
    from dit_accel.files import write_frames, write_text

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
    return report


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
