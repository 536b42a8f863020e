"""The page's HTML: templates filled with plain data, everything escaped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dit_accel.app.jobs import Job
from dit_accel.policy import CACHED, DENSE

HERE = Path(__file__).parent
RESULTS = "results"
"""Where the page serves results, relative to it."""


def refusal(message: str, title: str = "This can't be done") -> str:
    """Say why a request is refused."""
    return _fill("refusal.html.j2", title=title, message=message)


def progress(job: Job, ahead: int) -> str:
    """Say how far a request is."""
    left = job.seconds_left
    share = job.done / job.total if job.state == "running" and job.total else None
    return _fill(
        "progress.html.j2",
        job=job,
        ahead=ahead,
        left=None if left is None else duration(left),
        percent=None if share is None or job.total == 1 else round(100 * share),
    )


def starting() -> str:
    """Say that a request is being checked."""
    return _fill("starting.html.j2")


def empty() -> str:
    """Say what will be here."""
    return _fill("empty.html.j2")


def cancelled() -> str:
    """Say that a request was cancelled."""
    return _fill("cancelled.html.j2")


def result(
    name: str, content: dict[str, Any], run: str = "accelerated", baseline: str = "dense"
) -> str:
    """Show a result.

    Args:
        name: in the store.
        content: what the store keeps of it.
        run: what to call the run with methods.
        baseline: what to call the one without.
    """
    return _fill(
        "result.html.j2",
        r=content,
        run=run,
        baseline=baseline,
        urls={kind: url(name, file) for kind, file in content["files"].items()},
        verdict=verdict(content),
        policy=policy(content["report"]["policy"]),
    )


def gallery(kept: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Show results to choose from, the newest first."""
    items = [
        {"name": name, "r": content, "poster": url(name, content["files"]["poster"])}
        for name, content in kept
    ]
    return _fill("gallery.html.j2", items=items)


def head_map(
    layers: int, heads: int, target: str, gains: dict[tuple[int, int], float] | None = None
) -> str:
    """Show a button for every head; pressing one writes it into the field called ``target``."""
    most = max(map(abs, gains.values()), default=0.0) if gains else 0.0
    return _fill(
        "heads.html.j2",
        layers=layers,
        heads=heads,
        target=target,
        gains={} if gains is None else gains,
        most=most or 1.0,
        measured=gains is not None,
    )


def explorer(**content: Any) -> str:
    """Show masks and what one token sees."""
    return _fill("explorer.html.j2", **content)


def method_note(names: Sequence[tuple[str, str, str]]) -> str:
    """Show (name, summary, paper) of the chosen methods."""
    return _fill("methods.html.j2", names=names)


def evaluation(name: str, summary: dict[str, Any], problems: Sequence[str]) -> str:
    """Show an evaluation's table and a link to its report."""
    report = url(name, "report.html")
    return _fill("evaluation.html.j2", table=summary, report=report, problems=problems)


def note(text: str) -> str:
    """Show a remark."""
    return _fill("note.html.j2", text=text)


def url(name: str, file: str) -> str:
    """Return where the page finds a file of a result."""
    return f"{RESULTS}/{name}/{quote(file)}"


def verdict(content: dict[str, Any]) -> dict[str, str] | None:
    """Put speed-up and PSNR into words; None where nothing was compared."""
    speedup, psnr = content["speedup"], content["psnr_db"]
    if speedup is None:
        return None
    if content["identical"]:
        likeness = "the same, pixel for pixel"
    elif psnr >= 40:
        likeness = "hard to tell apart"
    elif psnr >= 30:
        likeness = "small differences"
    elif psnr >= 20:
        likeness = "visible differences"
    else:
        likeness = "large differences"
    speed = "faster" if speedup >= 1.02 else "as fast" if speedup > 0.98 else "slower"
    return {"speed": speed, "likeness": likeness}


def policy(rows: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Turn a report's steps by layers into a picture per branch, layers down and steps across."""
    pictures = []
    for branch in dict.fromkeys(row[1] for row in rows):
        mine = [row for row in rows if row[1] == branch]
        cells = [
            {"x": x, "y": y, "kind": _kind(mark), "step": step, "mark": _words(mark)}
            for x, (step, _, marks) in enumerate(mine)
            for y, mark in enumerate(marks)
        ]
        layers = max((len(row[2]) for row in mine), default=0)
        pictures.append({"branch": branch, "cells": cells, "steps": len(mine), "layers": layers})
    return pictures


def duration(seconds: float) -> str:
    """Return seconds in words."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    if seconds < 3600:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def _kind(mark: str) -> str:
    return {DENSE: "dense", CACHED: "cached"}.get(mark, f"sparse{mark}")


def _words(mark: str) -> str:
    return {DENSE: "dense", CACHED: "from the cache"}.get(mark, f"sparse, density .{mark}")


def _fill(template: str, **content: Any) -> str:
    return _environment().get_template(template).render(**content)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    return environment
