"""The command ``dit-accel``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from dit_accel.cli import app as app_command
from dit_accel.cli import bench, caching, evaluation, generate, headhunt, inspection
from dit_accel.cli.output import complain
from dit_accel.errors import DitAccelError, RankFailedError

app = typer.Typer(
    help="Fast diffusion transformers: generate, compare, measure, and look at what can run here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.generate)
app.command("app")(app_command.app)
app.add_typer(evaluation.app, name="eval")
app.add_typer(bench.app, name="bench")
app.command("profile")(caching.profile)
app.command("calibrate")(caching.calibrate)
app.command("headhunt")(headhunt.headhunt)
app.command("methods")(inspection.methods)
app.command("families")(inspection.families)
app.command("doctor")(inspection.doctor)
app.command("show-mask")(inspection.show_mask)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a refused request ends with one line and exit code 2."""
    try:
        app(args=None if arguments is None else list(arguments))
    except RankFailedError:
        sys.exit(2)  # the rank that failed has said why
    except DitAccelError as error:
        complain(error)
        sys.exit(2)
    except OSError as error:  # such as a full disk
        complain(error)
        sys.exit(1)
