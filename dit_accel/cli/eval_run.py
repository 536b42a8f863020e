"""``dit-accel eval``: generate a suite densely and by methods, measure, and report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dit_accel.cli.eval_tables import comparison_table, summary_table
from dit_accel.cli.options import GENERAL, method_hints, names_of, parse_options, pick_dtype
from dit_accel.cli.output import plain_warnings, print_json, progress_bars, quieten_libraries
from dit_accel.errors import OptionError, did_you_mean

if TYPE_CHECKING:
    from dit_accel.eval.candidates import Candidate
    from dit_accel.eval.comparing import Comparison


Model = Annotated[str, typer.Option(help="A bundled model, a folder, or a hub id (org/name).")]
Methods = Annotated[str, typer.Option(help="a,b,...; a+b together. Dense is always there.")]
SuiteName = Annotated[
    str, typer.Option(help="smoke, standard, world, or a file of prompts (.txt, .json).")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder; what it holds is kept. [default: runs/...]"),
]
Prompts = Annotated[int | None, typer.Option(help="Only the first so many of the suite.")]
Densities = Annotated[
    str | None, typer.Option(help="Shares of pairs, a,b,...; published options by default.")
]
BlockSize = Annotated[
    int | None, typer.Option(help="Tokens per block; the methods' own by default.")
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="An option of all methods that have it, or method.option=value. Repeatable.",
        metavar="NAME=VALUE",
    ),
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Frames = Annotated[int | None, typer.Option(help="Frames of the videos.")]
Height = Annotated[int | None, typer.Option(help="Height in pixels.")]
Width = Annotated[int | None, typer.Option(help="Width in pixels.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.")]
BatchSize = Annotated[
    int | None, typer.Option(help="Prompts generated at once; bundled models: 4, others: 1.")
]
Repeats = Annotated[int, typer.Option(help="Timed generations of each batch.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto picks one.")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16; auto: float32 on a CPU.")]
Commit = Annotated[str | None, typer.Option(help="Commit to record; asked of git by default.")]
Force = Annotated[bool, typer.Option("--force", help="Start the folder again.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Run = Annotated[Path, typer.Argument(help="A run's folder or results.json.", show_default=False)]


def run(
    context: typer.Context,
    model: Model = "tiny-wan",
    methods: Methods = "radial,gna,psa,rectified,pisa",
    suite: SuiteName = "smoke",
    output: Output = None,
    prompts: Prompts = None,
    density: Densities = None,
    block_size: BlockSize = None,
    options: Options = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    batch: BatchSize = None,
    repeats: Repeats = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    commit: Commit = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Generate a suite densely and by methods from the same noise, measure, and report.

    Writes results.json, report.html and the clips. A run that was cut short goes on where it
    stopped. Several GPUs: accelerate launch --multi_gpu -m dit_accel eval ... (on CPUs: torchrun).
    Ends with code 1 if a sample failed; each is named.
    """
    if context.invoked_subcommand is not None:
        return
    from dit_accel.eval.results import RESULTS_FILE
    from dit_accel.eval.runner import REPORT_FILE, EvalRun, run_evaluation
    from dit_accel.eval.share import join_processes
    from dit_accel.eval.suites import load_suite
    from dit_accel.models import generation_defaults

    quieten_libraries()
    candidates = _candidates(methods, density, block_size, options or [])
    world = generation_defaults(model).world
    chosen = load_suite(suite, world, prompts)
    folder = output or Path("runs") / f"{Path(model).name}-{chosen.name}"
    precision = pick_dtype(dtype)
    share, place = join_processes(device)
    what = EvalRun(
        model=model,
        suite=chosen,
        candidates=candidates,
        steps=steps,
        frames=frames,
        height=height,
        width=width,
        guidance=guidance,
        batch=batch if batch is not None else (4 if world else 1),
        repeats=repeats,
        device=place,
        dtype=precision,
    )
    bars = progress_bars() if share.first else nullcontext(None)
    with plain_warnings(), bars as progress:
        results = run_evaluation(
            what, folder, share=share, restart=force, commit=commit, progress=progress
        )
    if results is None:
        return
    if as_json:
        print_json({name: value for name, value in results.items() if name != "rows"})
    else:
        console = _console()
        console.print(summary_table(results))
        line = f"wrote {folder / REPORT_FILE} and {RESULTS_FILE}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    _end(results["problems"])


def compare(first: Run, second: Run, as_json: AsJson = False) -> None:
    """Compare two runs, prompt by prompt, on what they share. Code 1 if anything is left out."""
    from dit_accel.eval.comparing import compare_runs
    from dit_accel.eval.results import read_results

    _show(compare_runs(read_results(first), read_results(second)), (first, second), as_json)


def check(
    run: Run,
    against: Annotated[Path, typer.Option("--against", help="The run that sets the standard.")],
    max_psnr_drop: Annotated[float, typer.Option(help="dB, in the mean of a method.")] = 0.5,
    max_ssim_drop: Annotated[float | None, typer.Option(help="Likewise; any by default.")] = None,
    max_following_drop: Annotated[
        float | None, typer.Option(help="Of the share of attributes; any by default.")
    ] = None,
    max_slowdown: Annotated[
        float | None, typer.Option(help="Share of the time per sample; any by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that RUN is hardly worse than a baseline, for continuous integration.

    Code 1, and a line for each reason, if a method lost more than allowed, or the run lacks
    methods or prompts that the baseline has.
    """
    from dit_accel.eval.comparing import Limits, check_run
    from dit_accel.eval.results import read_results

    limits = Limits(
        psnr_drop=max_psnr_drop,
        ssim_drop=max_ssim_drop,
        following_drop=max_following_drop,
        slowdown=max_slowdown,
    )
    _show(check_run(read_results(run), read_results(against), limits), (against, run), as_json)


def _show(comparison: Comparison, runs: tuple[Path, Path], as_json: bool) -> None:
    if as_json:
        print_json(asdict(comparison))
    else:
        _console().print(comparison_table(comparison.rows, runs))
    _end(comparison.problems)


def _end(problems: Sequence[str]) -> None:
    """Name what went wrong, and end with code 1 if anything did."""
    console = Console(stderr=True)
    for problem in problems:
        console.print(f"problem: {problem}", markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)


def _candidates(
    methods: str, density: str | None, block_size: int | None, assignments: Sequence[str]
) -> tuple[Candidate, ...]:
    """Return what to compare, as far as can be checked without a model."""
    from dit_accel.eval.candidates import DENSE, make_candidates
    from dit_accel.methods.base import check_density
    from dit_accel.registry import method_class

    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise OptionError("--methods is empty: name some; see `dit-accel methods`.")
    for name in names:
        for member in name.split("+"):
            method_class(member)
    if block_size is not None and block_size < 1:
        raise OptionError(f"block_size={block_size} must be at least 1.")
    densities = _numbers("--density", density, float)
    for share in densities:
        check_density(share)
    options = _options_by_method([name for name in names if name != DENSE], assignments)
    return make_candidates(names, densities=densities, block_size=block_size, options=options)


def _options_by_method(
    methods: Sequence[str], assignments: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Give each method the options that are its own; refuse those that are nobody's."""
    valid = {name: _option_names(name) for name in methods}
    for assignment in assignments:
        option = _option_of(assignment)
        if not any(option in names for names in valid.values()):
            everyone = {name for names in valid.values() for name in names}
            raise OptionError(
                f"--set {assignment!r}: no method here has that option."
                f"{did_you_mean(option, everyone)}"
            )
    return {
        name: parse_options(
            name.replace("+", ","),
            [_without_owner(a) for a in assignments if _option_of(a) in valid[name]],
        )
        for name in methods
    }


def _option_names(method: str) -> set[str]:
    from dit_accel.registry import method_class

    found: set[str] = set()
    for name in names_of(method.replace("+", ",")):
        own = method_hints(name)
        found |= {*own, *(f"{name}.{option}" for option in own)}
        if method_class(name).kind == "attention":
            found |= {*GENERAL, *(f"{name}.{option}" for option in GENERAL)}
    return found


def _without_owner(assignment: str) -> str:
    """Return ``density=0.3`` for ``radial.density=0.3``: there it is no method's own option."""
    owner, _, rest = assignment.partition(".")
    return rest if _option_of(rest) in GENERAL and "=" not in owner else assignment


def _option_of(assignment: str) -> str:
    return assignment.partition("=")[0].strip().replace("-", "_")


def _numbers(option: str, text: str | None, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        raise OptionError(f"{option} {text!r}: write numbers separated by commas.") from None


def _console() -> Console:
    """A pipe has no width: leave room for all columns."""
    return Console(width=None if Console().is_terminal else 160)
