"""``dit-accel headhunt``: find the attention heads whose perturbation serves an objective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group
from rich.table import Table

from dit_accel.cli.caching import AsJson, Device, Dtype, Frames, Height, Model, Steps, Width
from dit_accel.cli.options import parse_value, pick_dtype
from dit_accel.cli.output import plain_warnings, print_json, quieten_libraries
from dit_accel.errors import OptionError

if TYPE_CHECKING:
    from dit_accel.headhunt.hunting import Found, HeadHunt
    from dit_accel.headhunt.objectives import Entry
    from dit_accel.headhunt.processes import Processes
    from dit_accel.headhunt.search import SearchState, Trial, Watch

SHOWN = 8
"""Heads of the running round that are shown."""

Output = Annotated[
    Path, typer.Option("--output", "-o", help="A .json, for --method softpag --set heads=.")
]
ObjectiveName = Annotated[
    str,
    typer.Option(
        help="following, style, style:dark, pickscore, clip_text, clip_image:FILE, aesthetic, "
        "dimension:NAME."
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(help="A text file, one prompt a line. Left out: drawn for bundled models."),
]
Limit = Annotated[int | None, typer.Option(help="How many prompts; all of the file, or 20 drawn.")]
Seeds = Annotated[int, typer.Option(help="Noises for each prompt.")]
FirstSeed = Annotated[int, typer.Option(help="Of the noises, and of drawn prompts.")]
Rounds = Annotated[int, typer.Option(help="How often heads are chosen.")]
PerRound = Annotated[int, typer.Option(help="Heads chosen in each round.")]
Halving = Annotated[
    int | None,
    typer.Option(help="Try all heads on so many prompts first, then half on twice as many."),
]
Layers = Annotated[str | None, typer.Option(help="Only heads of these layers, e.g. 6,7,8.")]
Candidates = Annotated[
    str | None, typer.Option(help="Only these heads (layer:head), e.g. 6:0,6:1.")
]
Strength = Annotated[float, typer.Option(help="Of the perturbation, 0 to 1.")]
Scale = Annotated[float, typer.Option(help="Of the guidance by perturbation.")]
Perturbation = Annotated[str, typer.Option(help="identity, uniform or query_mean.")]
Scope = Annotated[str, typer.Option(help="joint, or image alone.")]
Guidance = Annotated[float, typer.Option(help="The pipeline's own guidance scale; 1 turns it off.")]
Batch = Annotated[int, typer.Option(help="Prompts generated at once.")]
JournalPath = Annotated[
    Path | None,
    typer.Option(help="A .jsonl of all scores. Left out: beside OUTPUT, with its name."),
]
HeatMap = Annotated[
    Path | None, typer.Option(help="A .png of what each head is worth, layers by heads.")
]
Force = Annotated[bool, typer.Option("--force", help="Start again: replace outputs and journal.")]


def headhunt(
    output: Output,
    objective: ObjectiveName = "following",
    model: Model = "tiny-sd3",
    prompts: Prompts = None,
    limit: Limit = None,
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    rounds: Rounds = 1,
    per_round: PerRound = 6,
    halving: Halving = None,
    layers: Layers = None,
    candidates: Candidates = None,
    strength: Strength = 0.5,
    scale: Scale = 3.0,
    perturbation: Perturbation = "identity",
    scope: Scope = "joint",
    guidance: Guidance = 1.0,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    batch: Batch = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    journal: JournalPath = None,
    heatmap: HeatMap = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Search the attention heads that improve generations when they are guided by (HeadHunter).

    Each round tries every head on top of those chosen so far, and adds the best. A search that was
    cut short goes on with its journal, which also serves more rounds. Several processes share the
    work: accelerate launch --num_processes 4 -m dit_accel headhunt ...
    """
    from dit_accel.environment import pick_device
    from dit_accel.guidance.heads import settle_heads
    from dit_accel.headhunt.hunting import HeadHunt
    from dit_accel.headhunt.processes import Processes
    from dit_accel.headhunt.search import SearchPlan

    quieten_libraries()
    journal = output.with_suffix(".jsonl") if journal is None else journal
    _check_outputs(output, heatmap, journal, force)
    processes = Processes()
    place = processes.device(pick_device(device))
    hunt = HeadHunt(
        model=model, objective=objective,
        prompts=None if prompts is None else _read_prompts(prompts),
        count=limit, seeds=seeds, first_seed=first_seed,
        plan=SearchPlan(rounds=rounds, per_round=per_round, halving=halving),
        candidates=None if candidates is None else settle_heads(candidates)[0],
        layers=None if layers is None else _numbers(layers),
        strength=strength, scale=scale,
        perturbation=perturbation,  # type: ignore[arg-type]  # checked there
        scope=scope,  # type: ignore[arg-type]
        guidance=guidance, steps=steps, frames=frames, height=height, width=width,
        batch=batch, device=place, dtype=pick_dtype(dtype),
    )  # fmt: skip
    found = _search(hunt, journal, processes, force)
    if processes.is_main:
        _finish(found, output, heatmap, as_json)


def _search(hunt: HeadHunt, journal: Path, processes: Processes, force: bool) -> Found:
    """Load what the search needs, the model last, and search."""
    from dit_accel.headhunt.hunting import hunt_heads
    from dit_accel.models import load_pipeline

    objective = hunt.make_objective()
    _check_size(hunt, hunt.entries(objective))
    objective.load(hunt.device)
    if force and processes.is_main:
        journal.unlink(missing_ok=True)
    processes.wait()
    with plain_warnings(), _display(shown=processes.is_main) as watch:
        pipe = load_pipeline(hunt.model, device=hunt.device, dtype=hunt.dtype)
        return hunt_heads(
            pipe, hunt, objective=objective, journal=journal, processes=processes, watch=watch
        )


def _check_outputs(output: Path, heatmap: Path | None, journal: Path, force: bool) -> None:
    """Refuse what can't be written, and to replace what did not come from this journal."""
    from dit_accel.files import IMAGE_SUFFIX, check_outputs

    wanted = [(output, ".json"), (journal, ".jsonl")]
    wanted += [] if heatmap is None else [(heatmap, IMAGE_SUFFIX)]
    for path, suffix in wanted:
        if path.suffix.lower() != suffix:
            raise OptionError(f"output {str(path)!r} must end in {suffix}.")
    # With a journal, outputs are what an earlier run of the same search wrote.
    check_outputs([path for path, _ in wanted], force=force or journal.exists())


def _check_size(hunt: HeadHunt, entries: list[Entry]) -> None:
    """Refuse what the model's pipeline can't make, before its weights are loaded."""
    from dit_accel.generation import pipeline_arguments
    from dit_accel.models import pipeline_outline

    outline = pipeline_outline(hunt.model)
    if outline is not None:
        pipeline_arguments(outline, hunt.requests(entries)[0])


def _read_prompts(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"prompts {str(path)!r} can't be read: {error}.") from error
    return tuple(line.strip() for line in lines if line.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found: tuple[int, ...] = parse_value(text, tuple[int, ...])
    except ValueError:
        raise OptionError(f"--layers {text!r}: write block numbers, such as 6,7,8.") from None
    return found


@contextmanager
def _display(*, shown: bool) -> Iterator[Watch]:
    """Yield a callback that shows the progress and the best heads of the round."""
    from rich.live import Live
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bars = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    task = bars.add_task("generations", total=None)
    console = Console(stderr=True, quiet=not shown)
    with Live(bars, console=console, refresh_per_second=4) as live:

        def watch(state: SearchState) -> None:
            bars.update(task, completed=state.done, total=state.total)
            live.update(Group(bars, _round_table(state)))

        yield watch


def _round_table(state: SearchState) -> Table:
    title = f"round {state.round + 1}; chosen: {_pairs(state.chosen) or 'none yet'}"
    return _trials_table(state.trials[:SHOWN], title, f"without guidance {state.plain:.4f}")


def _trials_table(trials: tuple[Trial, ...], title: str, caption: str) -> Table:
    table = Table("head", "score", "gain", "prompts", title=title, caption=caption)
    for trial in trials:
        layer, head = trial.head
        scores = f"{trial.score:.4f}", f"{trial.gain:+.4f}"
        table.add_row(f"{layer}:{head}", *scores, str(trial.prompts))
    return table


def _finish(found: Found, output: Path, heatmap: Path | None, as_json: bool) -> None:
    """Write and print what was found."""
    from dit_accel.headhunt.heatmap import write_heat_map

    file, search = found.head_file(), found.search
    file.write(output)
    if heatmap is not None:
        write_heat_map(found, heatmap)
    if as_json:
        print_json({"heads": file.heads, **file.found})
        return
    console = Console()
    for number, one in enumerate(search.rounds, 1):
        title = f"round {number}: {found.hunt.objective}"
        caption = f"together {one.score:.4f}, without guidance {search.plain:.4f}"
        console.print(_trials_table(one.trials[: found.hunt.plan.per_round], title, caption))
    lines = ["heads: " + _pairs(search.heads), f"wrote {output}"]
    if search.best.score <= search.plain:
        lines.insert(1, "these heads are no better than no guidance on these prompts")
    lines += [] if heatmap is None else [f"wrote {heatmap}"]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _pairs(heads: tuple[tuple[int, int], ...]) -> str:
    return ",".join(f"{layer}:{head}" for layer, head in heads)
