"""``dit-accel eval``: what a model's generations are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dit_accel.cli import eval_run, scoring
from dit_accel.cli.options import parse_options, pick_dtype
from dit_accel.cli.output import plain_warnings, print_json, progress_bars, quieten_libraries
from dit_accel.errors import OptionError

app = typer.Typer(no_args_is_help=True)
app.callback(invoke_without_command=True)(eval_run.run)
app.command("compare")(eval_run.compare)
app.command("check")(eval_run.check)
app.command("score")(scoring.score)
app.command("export-vbench")(scoring.export_vbench)


@app.command("follow")
def follow(
    model: Annotated[str, typer.Option(help="A bundled model.")] = "tiny-wan",
    prompts: Annotated[
        int | None, typer.Option(help="Only the first so many of the fixed prompts.")
    ] = None,
    method: Annotated[str, typer.Option(help="See `dit-accel methods`.")] = "dense",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="An option, e.g. density=0.3. Repeatable.", metavar="NAME=VALUE"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the videos.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    batch: Annotated[int, typer.Option(help="Prompts generated at once.")] = 4,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto picks one.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, float16 or bfloat16; auto: float32 on a CPU.")
    ] = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .json; prompts it holds are kept.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="A .png with small pictures of all generations.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Start existing outputs again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Generate a model's fixed prompts, and count how many of their attributes come out.

    The i-th prompt starts from seed i. A checker that knows the drawn world reads colours, shapes
    and so on off the generations. A run that was cut short goes on where --output ends.
    """
    from dit_accel.environment import pick_device
    from dit_accel.eval.following import FollowingRun, measure_following
    from dit_accel.files import IMAGE_SUFFIX, check_outputs

    quieten_libraries()
    for path, suffix in ((output, ".json"), (sheet, IMAGE_SUFFIX)):
        if path is not None and path.suffix.lower() != suffix:
            raise OptionError(f"output {str(path)!r} must end in {suffix}.")
    check_outputs([path for path in (output, sheet) if path is not None], force=True)
    run = FollowingRun(
        model=model,
        prompts=prompts,
        steps=steps,
        frames=frames,
        height=height,
        width=width,
        guidance=guidance,
        batch=batch,
        method=method,
        options=parse_options(method, options or []),
        device=pick_device(device),
        dtype=pick_dtype(dtype),
    )
    with plain_warnings(), progress_bars() as progress:
        result = measure_following(
            run, output=output, sheet=sheet, restart=force, progress=progress
        )
    if as_json:
        print_json(result)
        return
    console = Console()
    console.print(_table(result))
    for path in (output, sheet):
        if path is not None:
            console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def _table(result: dict[str, Any]) -> Table:
    """Return the shares for people."""
    prompts = len(result["rows"])
    caption = f"{result['settings']['model']}, {prompts} prompts"
    table = Table("attribute", "right", "of", caption=caption)
    marks = [row["marks"] for row in result["rows"]]
    following = dict(result["following"])
    total = following.pop("attributes")
    for kind, share in following.items():
        count = total if kind == "all" else sum(len(mark.get(kind, [])) for mark in marks)
        table.add_row(kind, f"{share:.1%}", str(count), end_section=kind == "all")
    return table
