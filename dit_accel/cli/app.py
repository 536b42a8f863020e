"""``dit-accel app``: the page in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dit_accel.cli.output import quieten_libraries


def app(
    host: Annotated[
        str, typer.Option(help="Address to listen on; this computer alone by default.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 7860,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for results; files are served from it.")
    ] = Path("outputs/app"),
    model: Annotated[
        list[str] | None,
        typer.Option(help="A folder or hub id to offer beside the bundled models. Repeatable."),
    ] = None,
    allow_any_model: Annotated[
        bool, typer.Option("--allow-any-model", help="Load any hub id that is typed in the page.")
    ] = False,
    max_side: Annotated[int, typer.Option(help="Most pixels along a side.")] = 2048,
    max_frames: Annotated[int, typer.Option(help="Most frames.")] = 161,
    max_steps: Annotated[int, typer.Option(help="Most denoising steps.")] = 100,
    max_waiting: Annotated[int, typer.Option(help="Most requests in line.")] = 8,
) -> None:
    """Open a page to generate, compare, look at masks, guide by heads, enlarge and evaluate.

    One request runs at a time; only the bundled models and those of --model can be chosen.
    """
    from dit_accel.app import AppSettings, serve

    quieten_libraries()
    settings = AppSettings(
        host=host,
        port=port,
        output=output,
        models=tuple(model or ()),
        allow_any_model=allow_any_model,
        max_side=max_side,
        max_frames=max_frames,
        max_steps=max_steps,
        max_waiting=max_waiting,
    )
    console = Console()

    def ready(address: str) -> None:
        console.print(f"Open {address} in a browser. Stop with Ctrl+C.", highlight=False)
        console.print(f"Results are kept in {output}.", markup=False, highlight=False)
        if not settings.is_local:
            console.print(
                f"warning: whoever can reach {host} can use this page; it asks for no password.",
                markup=False,
                highlight=False,
            )

    serve(settings, ready)
