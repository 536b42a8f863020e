"""Where the commands print: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from dit_accel.errors import QualityWarning, SpeedWarning, UnknownWordsWarning

if TYPE_CHECKING:
    from dit_accel.generation import Progress


def complain(error: Exception) -> None:
    """Print why a request is refused, on one line."""
    message = " ".join(str(error).split())
    Console(stderr=True).print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print each warning of dit-accel on one line, without the code that gave it."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, UnknownWordsWarning | QualityWarning | SpeedWarning):
                console = Console(stderr=True)
                console.print(f"warning: {message}", markup=False, highlight=False, soft_wrap=True)
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def quieten_libraries() -> None:
    """Leave progress to our own bars, and spare users what no one here can act on."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def print_json(value: Any) -> None:
    """Print JSON for programs."""
    print(json.dumps(value, indent=2, allow_nan=False))


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Yield a callback that shows one bar per stage while the block runs."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bars = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
    tasks: dict[str, Any] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total or None)
        bars.update(tasks[stage], completed=done)

    with bars:
        yield show
