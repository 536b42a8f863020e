"""Goes through the tasks of a bench; rows are kept in a JSON that a later run goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dit_accel.bench.isolated import Bench, Direct, Isolated
from dit_accel.bench.measuring import Row, now, write_json
from dit_accel.errors import OptionError
from dit_accel.journal import as_read_back, refuse_other

SAME = ("gpu", "torch", "triton", "cudnn", "dense_backend", "seed")
"""Fields of a manifest in which a run must agree with the one it goes on with."""

Show = Callable[[Row], None]


class ResultFile:
    """Rows of one kind of bench, written to ``output`` after each; None keeps them in memory.

    Raises:
        OptionError: if the file is no result of this bench, or was made with other settings or on
            another machine, and ``restart`` is not given.
    """

    def __init__(
        self,
        kind: str,
        manifest: Row,
        settings: Row,
        output: Path | None = None,
        restart: bool = False,
    ) -> None:
        self.output = output
        settings = as_read_back(settings)
        self.content: Row = {"kind": kind, "manifest": manifest, "settings": settings, "rows": []}
        if output is not None and output.exists() and not restart:
            self.content = self._read(output)

    @property
    def rows(self) -> list[Row]:
        """All rows so far."""
        rows: list[Row] = self.content["rows"]
        return rows

    def has(self, task: Mapping[str, Any]) -> bool:
        """Whether ``task`` was measured; what failed or was refused is tried again."""
        return any(_is_of(row, task) and _worked(row) for row in self.rows)

    def add(self, task: Mapping[str, Any], measured: Row) -> Row:
        """Keep a row, in the place of a failed one of the same task, and write the file."""
        stamp = {"date": now(), "commit": self.content["manifest"]["commit"]}
        row = {**task, **measured, **stamp}
        self.content["rows"] = [old for old in self.rows if not _is_of(old, task)] + [row]
        self.write()
        return row

    def write(self) -> None:
        """Write the file, if there is one."""
        write_json(self.content, self.output)

    def _read(self, output: Path) -> Row:
        mine = self.content
        try:
            found: Row = json.loads(output.read_text(encoding="utf-8"))
            kind, about, settings = found["kind"], found["manifest"], found["settings"]
            rows = found["rows"]
        except (ValueError, TypeError, KeyError):
            raise OptionError(
                f"output {str(output)!r} is no result of `dit-accel bench`: give another name, or "
                "--force to replace it."
            ) from None
        refuse_other(output, {"kind of bench": kind}, {"kind of bench": mine["kind"]})
        same = {name: mine["manifest"].get(name) for name in SAME}
        refuse_other(output, {**about, **settings}, {**same, **mine["settings"]})
        return {**mine, "rows": rows}


def run_tasks(
    bench: Bench,
    tasks: Iterable[Mapping[str, Any]],
    results: ResultFile,
    *,
    timeout_s: float | None = None,
    show: Show = lambda row: None,
) -> None:
    """Measure what ``results`` does not hold yet, one row after the other.

    Args:
        bench: measures.
        tasks: JSON-ready mappings that tell the rows apart.
        results: gets the rows.
        timeout_s: seconds after which a task is given up, in a process of its own; None measures
            in this process, where nothing can be given up.
        show: is called with each row.
    """
    runner = Direct(bench) if timeout_s is None else Isolated(bench, timeout_s)
    try:
        for task in tasks:
            if not results.has(task):
                show(results.add(task, runner.measure(task)))
    finally:
        runner.close()


def _is_of(row: Row, task: Mapping[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in task.items())


def _worked(row: Row) -> bool:
    return "failed" not in row and "refused" not in row
