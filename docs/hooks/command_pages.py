"""The reference of the command line, read off the commands themselves."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from dit_accel.cli import app


def command_reference() -> str:
    """Return a section for each command: what it does, its arguments and options."""
    return "\n".join(_sections(typer.main.get_command(app), "dit-accel"))


def _sections(command: Any, path: str) -> Iterator[str]:
    nested = getattr(command, "commands", {})
    if not nested or command.params[1:]:
        yield _section(command, path)
    for name, inner in nested.items():
        yield from _sections(inner, f"{path} {name}")


def _section(command: Any, path: str) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join([path, *(a.name.upper() for a in arguments), "[OPTIONS]"])
    # A line break in a docstring is no line break on the page; examples keep theirs.
    text = inspect.cleandoc(command.help or "").replace("\b\n", "")
    rows = ["| option | meaning | default |", "| --- | --- | --- |"]
    for parameter in command.params:
        if parameter.name != "help" and not getattr(parameter, "hidden", False):
            rows.append(_row(parameter))
    table = "\n".join(rows) if len(rows) > 2 else ""
    return f"## {path}\n\n```sh\n{usage}\n```\n\n{text}\n\n{table}\n"


def _row(parameter: Any) -> str:
    is_argument = parameter.param_type_name == "argument"
    names = [parameter.name.upper()] if is_argument else parameter.opts
    shown = ", ".join(f"`{name}`" for name in names)
    meaning = re.sub(r"\s+", " ", getattr(parameter, "help", None) or "").replace("|", "or")
    default = parameter.default
    # Typer's mark for "no default" is an object of its own, which is none of these.
    told = f"`{default}`" if isinstance(default, str | int | float | Path) else ""
    if parameter.required:
        told = "required"
    elif default is False or default == "":
        told = ""
    return f"| {shown} | {meaning} | {told} |"
