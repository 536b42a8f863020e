"""``dit-accel eval score`` and ``eval export-vbench``: videos that exist already."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dit_accel.cli.output import print_json, progress_bars, quieten_libraries
from dit_accel.errors import BackboneError, OptionError, did_you_mean

if TYPE_CHECKING:
    from dit_accel.eval.backbones import Backbone
    from dit_accel.eval.clips import Clip

SOME_FAILED = 1  # exit code
GROUP_TITLES = {"quality": "Quality", "semantic": "Semantic"}

Prompts = Annotated[
    Path | None,
    typer.Option(help="A .json with the prompt of each file name; else the names hold them."),
]


def score(
    folder: Annotated[Path, typer.Argument(help='Videos such as "a red circle-0.mp4".')],
    dimensions: Annotated[
        str | None,
        typer.Option(help="Names with commas; else all whose networks are here."),
    ] = None,
    backbones: Annotated[
        list[str] | None,
        typer.Option(
            "--backbone",
            metavar="NAME=MODULE:FUNCTION",
            help="A network of your own: the function makes it on a device. MODULE may be a .py.",
        ),
    ] = None,
    prompts: Prompts = None,
    world: Annotated[
        str | None, typer.Option(help="clips or pictures: whose checker reads prompt following.")
    ] = None,
    dense: Annotated[
        Path | None, typer.Option(help="The dense run's videos, under the same names.")
    ] = None,
    convention: Annotated[
        str, typer.Option(help="How fidelity to them is computed: ours, svg, teacache, ...")
    ] = "ours",
    official: Annotated[
        Path | None,
        typer.Option(help="VBench's own ..._eval_results.json, for dimensions not measured here."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto picks one.")] = "auto",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A .json.")] = None,
    vbench_output: Annotated[
        Path | None, typer.Option(help="A .json in the layout of VBench's own results.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing outputs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Score videos: VBench's dimensions, proxies, fidelity to dense, prompt following.

    A video that can't be read is named and the rest goes on; the exit code is then 1.
    """
    from dit_accel.environment import pick_device
    from dit_accel.eval.clips import find_clips
    from dit_accel.eval.scoring import Scoring, as_official, score_clips
    from dit_accel.eval.vbench import read_values
    from dit_accel.files import check_outputs, write_text

    outputs = [path for path in (output, vbench_output) if path is not None]
    for path in outputs:
        if path.suffix.lower() != ".json":
            raise OptionError(f"output {str(path)!r} must end in .json.")
    check_outputs(outputs, force=force)
    if dense is not None and not dense.is_dir():
        raise OptionError(f"--dense {str(dense)!r} is no folder.")
    clips = find_clips(folder, prompts=prompts)
    chosen = pick_device(device)
    scoring = Scoring(
        dimensions=dimensions.split(",") if dimensions else None,
        backbones=_make_backbones(backbones or [], chosen),
        world=world,
        dense=dense,
        convention=convention,
        official=read_values(official) if official else {},
        device=chosen,
    )
    quieten_libraries()
    with progress_bars() as progress:
        result = score_clips(clips, scoring, progress=progress)
    if output is not None:
        write_text(output, json.dumps(result, indent=1, allow_nan=False) + "\n")
    if vbench_output is not None:
        write_text(vbench_output, json.dumps(as_official(result), indent=1) + "\n")
    if as_json:
        print_json(result)
    else:
        _show(result, outputs)
    if result["problems"]:
        raise typer.Exit(SOME_FAILED)


def export_vbench(
    folder: Annotated[Path, typer.Argument(help="Of a run of `dit-accel eval`, or with videos.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="An empty or new folder.")],
    method: Annotated[
        str | None, typer.Option(help="Of a run: this method's videos; else all, a folder each.")
    ] = None,
    prompts: Prompts = None,
) -> None:
    """Copy videos under VBench's names, with the list of prompts that its own tool reads."""
    from dit_accel.eval.clips import RESULTS_FILE, find_clips, find_run_clips
    from dit_accel.eval.export import export_clips

    groups: dict[Path, list[Clip]] = {}
    if (folder / RESULTS_FILE).is_file():
        found = find_run_clips(folder)
        if method is not None and method not in found:
            raise OptionError(f"no method {method!r} in this run.{did_you_mean(method, found)}")
        names = [method] if method is not None else list(found)
        groups = {output / name if method is None else output: found[name] for name in names}
    elif method is not None:
        raise OptionError(f"--method: {str(folder)!r} is no run, it has no {RESULTS_FILE}.")
    else:
        groups[output] = find_clips(folder, prompts=prompts)
    console, problems = Console(), []
    for target, clips in groups.items():
        command, failed = export_clips(clips, target)
        problems += failed
        _say(console, f"wrote {len(clips) - len(failed)} videos to {target}. To score them:")
        _say(console, f"    {command}")
    _complain_of(problems)
    if problems:
        raise typer.Exit(SOME_FAILED)


def _make_backbones(given: list[str], device: str) -> dict[str, Backbone]:
    """Return the networks of ``NAME=MODULE:FUNCTION`` options."""
    import torch

    from dit_accel.eval.backbones import BACKBONES

    made: dict[str, Backbone] = {}
    for text in given:
        name, equals, place = text.partition("=")
        module, colon, function = place.rpartition(":")
        if not (equals and colon and module and function):
            raise OptionError(f"--backbone {text!r} must be NAME=MODULE:FUNCTION.")
        if name not in BACKBONES:
            raise OptionError(f"unknown backbone {name!r}.{did_you_mean(name, BACKBONES)}")
        make = getattr(_import(module), function, None)
        if not callable(make):
            raise OptionError(f"--backbone {text!r}: {module!r} has no function {function!r}.")
        made[name] = make(torch.device(device))
    return made


def _import(module: str) -> Any:
    """Return a module by its name, or by its .py file."""
    if not module.endswith(".py"):
        try:
            return importlib.import_module(module)
        except ImportError as error:
            raise BackboneError(f"--backbone: {module!r} can't be imported: {error}") from error
    if not Path(module).is_file():
        raise OptionError(f"--backbone: there is no file {module!r}.")
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    loaded = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(loaded)  # type: ignore[union-attr]
    return loaded


def _show(result: dict[str, Any], outputs: list[Path]) -> None:
    """Print the result for people."""
    from dit_accel.eval.vbench import SCALES, measured_of

    console = Console()
    values, counted = result["values"], result["counted"]
    table = Table("measure", "value", "videos")
    ours = [name for name in SCALES if name in values]
    for name in [*ours, *(name for name in values if name not in SCALES)]:
        table.add_row(name, f"{values[name]:.4f}", str(counted.get(name, "VBench's tool")))
    table.add_section()
    for group, title in GROUP_TITLES.items():
        there, needed = measured_of(values, group)  # type: ignore[arg-type]
        score = result["scores"].get(group)
        shown = "-" if score is None else f"{score:.4f}"
        table.add_row(f"{title} ({there}/{needed} dimensions)", shown, "")
    if "total" in result["scores"]:
        table.add_row("Total", f"{result['scores']['total']:.4f}", "")
    for kind in ("fidelity", "following"):
        table.add_section()
        measured = [row[kind] for row in result["rows"] if kind in row]
        for name, value in result[kind].items():
            table.add_row(name, f"{value:.4f}", str(sum(name in row for row in measured)))
    console.print(table)
    if result["left_out"]:
        names = ", ".join(result["left_out"])
        _say(console, f"not measured: {names}. Name one with --dimensions to see what it needs.")
    for path in outputs:
        _say(console, f"wrote {path}")
    _complain_of(result["problems"])


def _complain_of(problems: list[str]) -> None:
    for problem in problems:
        _say(Console(stderr=True), f"failed: {problem}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
