"""Options as a table, from a dataclass and what its docstrings say of them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from dit_accel.cli.options import describe
from dit_accel.registry import method_class

ENTRY = re.compile(r"^(\w+(?:, \w+)*): ")
SECTIONS = ("Args:", "Attributes:")


def option_table(name: str) -> str:
    """Return a Markdown table of a method's options."""
    return dataclass_table(method_class(name))


def options_of(place: str) -> str:
    """Return the table of a dataclass given as "module:Class"."""
    module, _, name = place.partition(":")
    return dataclass_table(getattr(importlib.import_module(module), name))


def dataclass_table(cls: type) -> str:
    """Return a Markdown table of a dataclass's fields."""
    hints = get_type_hints(cls)
    rows = ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
    # Options of its own come before those that its kind has in common.
    own = [*inspect.get_annotations(cls)]
    place = {name: position for position, name in enumerate(own)}
    for field in sorted(fields(cls), key=lambda field: place.get(field.name, len(own))):
        if field.init:
            default = "required" if _required(field) else f"`{_default(field)!r}`"
            # A bar would end the cell.
            kind = describe(hints[field.name]).replace("|", "or")
            meaning = meaning_of(cls, field.name)
            rows.append(f"| `{field.name}` | {kind} | {default} | {meaning} |")
    return "\n".join(rows) + "\n" if len(rows) > 2 else "It has no options of its own.\n"


def meaning_of(cls: type, option: str) -> str:
    """Return what the class that introduces an option says of it; empty if nobody does."""
    found = ""
    for owner in cls.__mro__:
        if owner is object:
            continue
        for text in (_described(owner).get(option), _beside_field(owner).get(option)):
            # "see `StackCache`" sends the reader to a class further up, which comes next.
            if text and (not found or found.startswith("see ")):
                found = text
    return found


def _described(cls: type) -> dict[str, str]:
    """Return the entries of a docstring's sections of options, names with commas taken apart."""
    found: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in inspect.cleandoc(cls.__dict__.get("__doc__") or "").splitlines():
        if not line.startswith(" "):
            inside = line in SECTIONS if line else inside
            continue
        text = line.strip()
        if not inside:
            continue
        if len(line) - len(line.lstrip()) == 4 and (entry := ENTRY.match(text)):
            names, text = entry[1].split(", "), text[entry.end() :]
        for name in names:
            found[name] = f"{found.get(name, '')} {text}".strip()
    return found


def _beside_field(cls: type) -> dict[str, str]:
    """Return what stands under a field as a string, or behind it as a comment."""
    if not inspect.get_annotations(cls):
        return {}
    source = textwrap.dedent(inspect.getsource(cls))
    lines, body = source.splitlines(), ast.parse(source).body[0].body  # type: ignore[attr-defined]
    found = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        comment = lines[node.lineno - 1][node.end_col_offset or 0 :].strip()
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[node.target.id] = " ".join(inspect.cleandoc(after.value.value).split())
        elif comment.startswith("#"):
            found[node.target.id] = comment.lstrip("# ")
    return found


def _required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _default(field: Any) -> Any:
    return field.default if field.default is not MISSING else field.default_factory()
