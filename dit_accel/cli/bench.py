"""``dit-accel bench``: how fast kernels, forwards and generations are on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from dit_accel.cli.bench_tables import (
    kernel_table,
    line,
    pipeline_table,
    step_table,
    troubles,
    tune_table,
)
from dit_accel.cli.options import pick_dtype
from dit_accel.cli.output import print_json, quieten_libraries
from dit_accel.errors import OperatorUnavailableError, OptionError, did_you_mean

if TYPE_CHECKING:
    from dit_accel.bench.isolated import Bench
    from dit_accel.bench.runs import ResultFile

app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)
T = TypeVar("T")

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="A .json; rows that it holds are kept.")
]
Force = Annotated[bool, typer.Option("--force", help="Start an existing output again.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str, typer.Option(help="cuda or cpu; auto picks one. A CPU is for trials.")]
Commit = Annotated[str | None, typer.Option(help="Commit to record; asked of git by default.")]
Timeout = Annotated[float, typer.Option(help="Seconds until a row is given up; 0: never.")]


@app.command("kernel")
def kernel(
    tokens: Annotated[str, typer.Option(help="Lengths, separated by commas.")] = (
        "75600,32760,118800,16384,4096"
    ),
    density: Annotated[str, typer.Option(help="Shares of key tiles visited.")] = "0.25,0.1,0.5,1",
    head_size: Annotated[str, typer.Option(help="Channels per head.")] = "128,64",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    lists: Annotated[str, typer.Option(help="random, band or masked.")] = "random",
    operators: Annotated[
        str | None, typer.Option(help="Ours and peers to measure; all that pay by default.")
    ] = None,
    heads: Annotated[int, typer.Option(help="Number of heads.")] = 8,
    device: Device = "auto",
    timeout: Timeout = 300,
    output: Output = None,
    force: Force = False,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Attention alone, per attended pair: our operators beside the peers that are installed.

    Each result is checked against float64 before it is timed, in turns with the dense baseline. A
    row that fails or runs out of memory says so, and the run goes on.
    """
    from dit_accel.bench.cases import LISTS
    from dit_accel.bench.contenders import baseline_name, default_contenders, make_contenders
    from dit_accel.bench.kernel import KernelBench, kernel_tasks

    place = _device(device)
    known = make_contenders()
    chosen, left_out = default_contenders(place)
    if operators:
        chosen, left_out = _known("--operators", _names(operators), list(known)), {}
        for name in chosen:
            if reason := known[name].why_not_here(place):
                raise OperatorUnavailableError(f"--operators {name!r} can't run here: {reason}.")
    tasks = kernel_tasks(
        tokens=_numbers("--tokens", tokens, int),
        densities=_shares(density),
        head_sizes=_numbers("--head-size", head_size, int),
        dtypes=[_dtype(name) for name in _names(dtype)],
        lists=_known("--lists", _names(lists), LISTS),
        contenders=chosen,
    )
    about = {
        "dense_backend": f"{baseline_name(place)}, in torch's SDPA",
        "trial": place == "cpu",
        "not_measured": left_out,
    }
    bench, settings = KernelBench(place, _positive("--heads", heads)), {"heads": heads}
    keeping = _Keeping(output, force, commit, timeout, as_json)
    _run("kernel", bench, list(tasks), keeping, kernel_table, settings=settings, about=about)


@app.command("step")
def step(
    model: Annotated[
        str | None, typer.Option(help="Bundled architectures, separated by commas; all by default.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Sizes such as 720p81; all of a model by default; or toy.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="See `dit-accel methods`; all by default.")
    ] = None,
    density: Annotated[
        str | None, typer.Option(help="Shares of pairs; published options by default.")
    ] = None,
    mode: Annotated[str, typer.Option(help="eager, compiled or both.")] = "eager,compiled",
    precision: Annotated[
        str, typer.Option(help="Of sparse attention's products: none, fp8, int8_fp8, int8.")
    ] = "none",
    layers: Annotated[
        int | None, typer.Option(help="Measure so many layers and scale; all by default.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and inputs.")] = "bfloat16",
    device: Device = "auto",
    timeout: Timeout = 900,
    output: Output = None,
    force: Force = False,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """One forward of real architectures with random weights, densely and by each method.

    With the share of self-attention, matrix products and the rest, the peak of memory, and what
    Amdahl's law allows at that density. Every step and layer is sparse.
    """
    from dit_accel.bench.architectures import TOY, list_architectures, load_architecture
    from dit_accel.bench.step import StepBench, step_tasks
    from dit_accel.environment import environment
    from dit_accel.kernels.precision import PRECISIONS
    from dit_accel.registry import list_methods

    quieten_libraries()
    place = _device(device)
    models = _known("--model", _names(model) or list_architectures(), list_architectures())
    sizes = _names(size)
    for name in models:
        architecture = load_architecture(name)
        for one in sizes:
            architecture.at(one).with_layers(layers)
    attention = list_methods("attention")
    precisions = _known("--precision", _names(precision), ("none", *PRECISIONS))
    modes = _known("--mode", _names(mode), ("eager", "compiled"))
    tasks = step_tasks(
        models=models,
        sizes=sizes or None,
        methods=_known("--method", _names(method) or attention, attention),
        densities=_shares(density) if density else [None],
        modes=[name == "compiled" for name in modes],
        layers=layers,
        precisions=[None if name == "none" else name for name in precisions],
    )
    trial = place == "cpu" or TOY in sizes
    about = {"dense_backend": environment()["dense_backend"], "trial": trial}
    keeping = _Keeping(output, force, commit, timeout, as_json)
    bench = StepBench(place, _dtype(dtype))
    _run("step", bench, list(tasks), keeping, step_table, settings={"dtype": dtype}, about=about)


@app.command("pipeline")
def pipeline(
    model: Annotated[
        str | None, typer.Option(help="Models, separated by commas; the bundled ones by default.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="See `dit-accel methods`; all by default.")
    ] = None,
    density: Annotated[
        str | None, typer.Option(help="Shares of pairs; published options by default.")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens per block; the methods' own by default.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to generate.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed generations of each kind.")] = 3,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto: the model's choice.")] = "auto",
    device: Device = "auto",
    timeout: Timeout = 0,
    output: Output = None,
    force: Force = False,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Whole generations, densely and by each method, with the PSNR between the two.

    Names joined by + go together, such as radial+first_block_cache.
    """
    from dit_accel.bench.pipeline import PipelineBench, pipeline_tasks
    from dit_accel.environment import environment
    from dit_accel.models import list_models, locate_model
    from dit_accel.registry import list_methods

    quieten_libraries()
    place = _device(device)
    models = _names(model) or list_models()
    for name in models:
        locate_model(name)
    pick_dtype(dtype)
    methods = _names(method) or list_methods("attention")
    for name in methods:
        _known("--method", name.split("+"), list_methods())
    tasks = pipeline_tasks(
        models=models,
        methods=methods,
        densities=_shares(density) if density else [None],
        block_size=block_size,
    )
    bench = PipelineBench(
        place, None if dtype == "auto" else dtype, steps, _positive("--repeats", repeats), prompt
    )
    settings = {"dtype": dtype, "steps": steps, "repeats": repeats, "prompt": prompt}
    about = {"dense_backend": environment()["dense_backend"], "device": place}
    keeping = _Keeping(output, force, commit, timeout, as_json)
    _run("pipeline", bench, list(tasks), keeping, pipeline_table, settings=settings, about=about)


@app.command("tune")
def tune(
    head_size: Annotated[str, typer.Option(help="Channels per head.")] = "128,64",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    quick: Annotated[bool, typer.Option("--quick", help="Try only a few settings.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Store nothing.")] = False,
    device: Device = "auto",
    timeout: Timeout = 120,
    output: Output = None,
    force: Force = False,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Find the fastest settings of our kernels on this card, and keep them in the cache folder.

    A setting must beat the built-in one by 2 %. `dit-accel doctor` tells what is in use.
    """
    import torch

    from dit_accel.bench.tune import TOKENS, TuneBench, best_settings, built_in_setting, tune_tasks
    from dit_accel.tuning_file import save_tuning

    place = _device(device)
    if place != "cuda" and not dry_run:
        raise OptionError("only a CUDA card can be tuned; --dry-run tries it out on a CPU.")
    length = TOKENS if place == "cuda" else 256
    bench = TuneBench(place, length, 8 if place == "cuda" else 1)
    tasks = list(
        tune_tasks(
            place,
            head_sizes=_numbers("--head-size", head_size, int),
            dtypes=[_dtype(name) for name in _names(dtype)],
            quick=quick,
        )
    )
    if not tasks:
        raise OperatorUnavailableError("none of our kernels runs here: see `dit-accel doctor`.")

    def finish(results: ResultFile) -> list[str]:
        tuning = best_settings(
            results.rows, lambda row: built_in_setting(row, place, length), length
        )
        lines = [f"{key}: {config}" for key, config in tuning.block_sparse.items()]
        lines += [f"{key}: {config}" for key, config in tuning.hopper.items()]
        if not lines:
            return ["no setting could be measured; nothing was stored"]
        if not dry_run:
            path = save_tuning(torch.device(place), tuning)
            lines.append(f"wrote {path}" if path else "no cache folder: nothing was stored")
        return lines

    about = {"dense_backend": None, "trial": place == "cpu"}
    keeping = _Keeping(output, force, commit, timeout, as_json)
    settings = {"tokens": length}
    _run("tune", bench, tasks, keeping, tune_table, settings=settings, about=about, finish=finish)


@dataclass(frozen=True)
class _Keeping:
    """The options that all benches share."""

    output: Path | None
    force: bool
    commit: str | None
    timeout: float
    as_json: bool


def _run(
    kind: str,
    bench: Bench,
    tasks: Sequence[dict[str, Any]],
    keeping: _Keeping,
    table: Callable[[Sequence[dict[str, Any]]], Table],
    *,
    settings: dict[str, Any],
    about: dict[str, Any],
    finish: Callable[[ResultFile], list[str]] = lambda results: [],
) -> None:
    """Measure what the output does not hold yet, and print all of it.

    Args:
        kind: of bench.
        bench: measures.
        tasks: what to measure.
        keeping: the shared options.
        table: lays the rows out.
        settings: in which an output must agree to be gone on with.
        about: what else the manifest says.
        finish: is called at the end, and returns lines to print.
    """
    from dit_accel.bench.measuring import manifest
    from dit_accel.bench.runs import ResultFile, run_tasks
    from dit_accel.files import check_outputs

    if not tasks:
        raise OptionError("nothing to measure: an option that lists what to measure is empty.")
    output = keeping.output
    if output is not None:
        if output.suffix.lower() != ".json":
            raise OptionError(f"output {str(output)!r} must end in .json.")
        check_outputs([output], force=True)
    about = manifest(keeping.commit, **about)
    results = ResultFile(kind, about, settings, output, keeping.force)
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    left = sum(not results.has(task) for task in tasks)
    count = itertools.count(1)
    run_tasks(
        bench,
        tasks,
        results,
        timeout_s=keeping.timeout or None,
        show=lambda row: progress.print(f"{next(count)}/{left} {line(row)}", markup=False),
    )
    lines = finish(results)
    if keeping.as_json:
        print_json(results.content)
        return
    # A pipe has no width: leave room for all columns.
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table(results.rows))
    lines += troubles(results.rows, list(tasks[0]))
    lines += [f"not measured: {who}: {why}" for who, why in about.get("not_measured", {}).items()]
    for text in [*lines, *([f"wrote {output}"] if output else [])]:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _device(name: str) -> str:
    from dit_accel.environment import pick_device

    place = pick_device(name)
    if place not in ("cuda", "cpu"):
        raise OptionError(f"--device {name!r}: benches run on cuda or cpu.")
    return place


def _dtype(name: str) -> str:
    if pick_dtype(name) is None:
        raise OptionError("--dtype auto: name one of float32, float16, bfloat16.")
    return name


def _names(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _known(option: str, names: Sequence[str], valid: Sequence[str]) -> list[Any]:
    for name in names:
        if name not in valid:
            raise OptionError(f"{option} {name!r} is unknown.{did_you_mean(name, valid)}")
    return list(names)


def _numbers(option: str, text: str, kind: Callable[[str], T]) -> list[T]:
    try:
        numbers = [kind(part) for part in _names(text)]
    except ValueError:
        raise OptionError(f"{option} {text!r}: write numbers separated by commas.") from None
    if not numbers or any(number <= 0 for number in numbers):  # type: ignore[operator]
        raise OptionError(f"{option} {text!r}: give numbers above 0.")
    return numbers


def _shares(text: str) -> list[float]:
    from dit_accel.methods.base import check_density

    shares = _numbers("--density", text, float)
    for share in shares:
        check_density(share)
    return shares


def _positive(option: str, number: int) -> int:
    if number < 1:
        raise OptionError(f"{option} {number} must be at least 1.")
    return number
