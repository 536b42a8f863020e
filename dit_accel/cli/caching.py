"""``dit-accel profile`` and ``dit-accel calibrate``: what caches need to know of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dit_accel.cli.options import GuardError, GuardSwitch, guard_options, parse_options, pick_dtype
from dit_accel.cli.output import plain_warnings, print_json, progress_bars, quieten_libraries
from dit_accel.errors import OptionError

if TYPE_CHECKING:
    from dit_accel.calibration import Calibration
    from dit_accel.generation import GenerationRequest

Model = Annotated[str, typer.Option(help="A bundled model, a folder, or a hub id (org/name).")]
Prompts = Annotated[
    Path | None,
    typer.Option(help="A text file, one prompt a line. Left out: a bundled model's fixed ones."),
]
Limit = Annotated[int | None, typer.Option(help="Only the first so many prompts.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Frames = Annotated[int | None, typer.Option(help="Frames of the videos.")]
Height = Annotated[int | None, typer.Option(help="Height in pixels.")]
Width = Annotated[int | None, typer.Option(help="Width in pixels.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto picks one.")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16; auto: float32 on a CPU.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="A .json.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
CacheOrAuto = Annotated[
    str | None,
    typer.Option(help="A cache whose strength to choose, or auto; see `methods`."),
]
TargetSpeedup = Annotated[
    float | None,
    typer.Option(help="Skip this much, counted in block calls; with auto, in time."),
]
MinPsnr = Annotated[float | None, typer.Option(help="With auto: stay so near to dense, in dB.")]
MaxError = Annotated[
    float | None, typer.Option(help="Skip all that keeps the latents this near to dense.")
]
ProbeS = Annotated[
    float | None,
    typer.Option(help="With auto: seconds for trying settings; what was found by then is taken."),
]
Fit = Annotated[
    bool, typer.Option("--fit", help="Fit TeaCache's coefficients and MagCache's ratios.")
]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option of the cache. Repeatable.", metavar="NAME=VALUE"),
]


def profile(
    output: Output,
    model: Model = "tiny-wan",
    prompts: Prompts = None,
    limit: Limit = 4,
    mask: Annotated[
        str,
        typer.Option(help="How to find the foreground: colour, motion, sam2 (fetches weights)."),
    ] = "colour",
    rows: Annotated[int, typer.Option(help="Query tokens asked in each frame.")] = 512,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Annotated[bool, typer.Option("--force", help="Start an existing output again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find the blocks that look at the background, for `profiling_cache`.

    Generates prompts densely; small sizes and few frames are enough. A run that was cut short
    goes on where --output ends. Then: --method profiling_cache --set profile=OUTPUT; named
    profile.json in the model's folder, it is found there by itself.
    """
    from dit_accel.environment import pick_device
    from dit_accel.models import load_pipeline
    from dit_accel.profiler import profile_model

    quieten_libraries()
    _check_output(output, resumable=True)
    requests = _requests(model, prompts, limit, steps, frames, height, width, guidance)
    place, precision = pick_device(device), pick_dtype(dtype)
    if force:
        output.unlink(missing_ok=True)
    with plain_warnings(), progress_bars() as progress:
        pipe = load_pipeline(model, device=place, dtype=precision)
        found = profile_model(
            pipe,
            requests,
            model=model,
            output=output,
            mask=mask,
            per_frame=rows,
            progress=progress,
        )
    if as_json:
        print_json(found.to_dict())
        return
    background = found.background_blocks(0.6)
    table = Table("block", "attention on the foreground", "of the lowest 60 %")
    for block, share in enumerate(found.foreground):
        table.add_row(str(block), f"{share:.3f}", "yes" if block in background else "")
    _finish(table, output)


def calibrate(
    output: Output,
    method: CacheOrAuto = None,
    target_speedup: TargetSpeedup = None,
    min_psnr: MinPsnr = None,
    max_error: MaxError = None,
    probe_s: ProbeS = None,
    fit: Fit = False,
    options: Options = None,
    model: Model = "tiny-wan",
    prompts: Prompts = None,
    limit: Limit = 4,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    guard: GuardSwitch = None,
    guard_error: GuardError = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: AsJson = False,
) -> None:
    """Choose a cache's strength on this model by a short probe, and fit what caches need.

    --method auto tries attention methods, caches and pairs of them instead: OUTPUT serves
    `generate --calibration` and `accelerate_pipeline(calibration=...)`, for other budgets, too.

    OUTPUT holds options by method; those of other methods stay when it is replaced. Named
    caching.json in the model's folder, it is found there by itself.
    """
    from dit_accel.caching.brought import made_for, read_calibration
    from dit_accel.calibration import calibrate_cache, calls_for
    from dit_accel.environment import pick_device
    from dit_accel.files import check_outputs, write_text
    from dit_accel.fitting import fit_model
    from dit_accel.models import load_pipeline

    quieten_libraries()
    _check_goals(method, fit, options, {"--min-psnr": min_psnr, "--probe-s": probe_s})
    own = parse_options(method, options or [], general=()) if method else {}
    own |= guard_options(guard, guard_error)
    _check_output(output)
    check_outputs([output], force=force)
    requests = _requests(model, prompts, limit, steps, frames, height, width, guidance)
    place, precision = pick_device(device), pick_dtype(dtype)
    if method == "auto":
        budget = {"min_psnr": min_psnr, "max_error": max_error, "target_speedup": target_speedup}
        how = {"general": own, "probe_s": probe_s}
        return _choose(output, model, requests, (place, precision), budget, how, as_json)
    found: Calibration | None = None
    with plain_warnings(), progress_bars() as progress:
        pipe = load_pipeline(model, device=place, dtype=precision)
        kept = read_calibration(output, pipe) if output.exists() else {}
        by_method = fit_model(pipe, requests, progress=progress) if fit else {}
        if method is not None:
            found = calibrate_cache(
                pipe,
                method,
                calls_for(pipe, requests),
                target_speedup=target_speedup,
                max_error=max_error,
                options={**_tuples(by_method.get(method, {})), **own},
                progress=progress,
            )
            by_method[method] = found.options
    result: dict[str, Any] = {
        "model": model,
        "made_for": made_for(pipe),
        "prompts": len(requests),
        "options": {**kept, **by_method},
    }
    if found is not None:
        result["calibration"] = found.to_dict()
    write_text(output, json.dumps(result, indent=1) + "\n")
    if as_json:
        print_json(result)
        return
    _finish(_curve(found) if found else None, output)


def _check_goals(
    method: str | None,
    fit: bool,
    options: list[str] | None,
    of_auto: dict[str, float | None],
) -> None:
    if method == "auto":
        if fit or options:
            raise OptionError("--method auto takes neither --fit nor --set: give --fit alone.")
    elif given := [name for name, value in of_auto.items() if value is not None]:
        raise OptionError(f"{given[0]} goes with --method auto.")
    if method is None and not fit:
        raise OptionError("nothing to do: give --method with a goal, or --fit, or both.")


def _choose(
    output: Path,
    model: str,
    requests: list[GenerationRequest],
    where: tuple[str, Any],
    budget: dict[str, float | None],
    how: dict[str, Any],
    as_json: bool,
) -> None:
    """Try settings for a budget, and write what was measured.

    Args:
        output: a .json.
        model: its name.
        requests: what to try settings on.
        where: device and dtype.
        budget: by its fields.
        how: further arguments of `calibrate_auto`.
        as_json: whether to print JSON.
    """
    from dit_accel.calibration import calls_for
    from dit_accel.choosing.automatic import calibrate_auto
    from dit_accel.choosing.budget import USUAL_PSNR, Budget
    from dit_accel.models import load_pipeline

    asked = Budget(**budget) if any(budget.values()) else Budget(min_psnr=USUAL_PSNR)
    with plain_warnings(), progress_bars() as progress:
        pipe = load_pipeline(model, device=where[0], dtype=where[1])
        calls = calls_for(pipe, requests)
        made = calibrate_auto(pipe, asked, calls, progress=progress, **how)
    made.save(output)
    if as_json:
        print_json(made.choice.to_dict())
        return
    table = Table("setting", "speed-up", "nine prompts in ten", "error", "", title=made.choice.why)
    for point in made.choice.frontier:
        psnr = "" if point.low_psnr is None else f"{point.low_psnr:.1f} dB"
        mark = "chosen" if point == made.choice.chosen else ""
        speedup, error = f"{point.speedup:.2f}x", f"{point.mean_error:.4f}"
        table.add_row(str(point.setting), speedup, psnr, error, mark)
    _finish(table, output)


def _curve(found: Calibration) -> Table:
    """Return the curve for people."""
    table = Table("strength", "block calls", "error of the latents", "", title=found.method)
    for point in found.curve:
        mark = "chosen" if point == found.chosen else ""
        table.add_row(f"{point.strength:g}", f"{point.speedup:.2f}x", f"{point.error:.4f}", mark)
    return table


def _finish(table: Table | None, output: Path) -> None:
    console = Console()
    if table is not None:
        console.print(table)
    console.print(f"wrote {output}", markup=False, highlight=False, soft_wrap=True)


def _check_output(output: Path, resumable: bool = False) -> None:
    from dit_accel.files import check_outputs

    if output.suffix.lower() != ".json":
        raise OptionError(f"output {str(output)!r} must end in .json.")
    if resumable:
        check_outputs([output], force=True)


def _requests(
    model: str,
    prompts: Path | None,
    limit: int | None,
    steps: int | None,
    frames: int | None,
    height: int | None,
    width: int | None,
    guidance: float | None,
) -> list[GenerationRequest]:
    """Return the prompts of a file, or a bundled model's, with the model's settings."""
    from dit_accel.generation import GenerationRequest
    from dit_accel.models import generation_defaults
    from dit_accel.world.worlds import fixed_prompts

    defaults = generation_defaults(model)
    if prompts is not None:
        try:
            lines = prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"prompts {str(prompts)!r} can't be read: {error}.") from error
        texts = [line.strip() for line in lines if line.strip()]
    elif defaults.world is not None:
        texts = [entry["prompt"] for entry in fixed_prompts(defaults.world)]
    else:
        raise OptionError(f"model {model!r} brings no prompts: give --prompts FILE.")
    given: dict[str, Any] = {"steps": steps, "frames": frames, "height": height, "width": width}
    given["guidance"] = guidance
    settings = {
        name: getattr(defaults, name) if value is None else value for name, value in given.items()
    }
    return [
        GenerationRequest(prompt=text, seed=seed, **settings)
        for seed, text in enumerate(texts[:limit])
    ]


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
