"""``report.html``: clips side by side, tables and plots, in one page beside the clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from dit_accel.eval.candidates import DENSE
from dit_accel.eval.measures import METRICS, value_of
from dit_accel.eval.results import deltas, samples_of
from dit_accel.files import IMAGE_SUFFIX, write_text

Row = dict[str, Any]

PLOTS = (
    ("speedup", "speed-up over dense", "psnr_db"),
    ("computed_density", "computed share of pairs", "psnr_db"),
    ("speedup", "speed-up over dense", "following"),
)
"""Pairs of what is drawn over what: key in the summary, its title, metric."""

WIDTH, HEIGHT, MARGIN = 380, 260, 44


@dataclass(frozen=True)
class Point:
    """One candidate in a plot, at pixels from the upper left."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Plot:
    """A scatter plot with its axes' ticks as pairs of pixel and text."""

    title: str
    across: str
    points: Sequence[Point]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]


def write_report(results: Row, path: Path) -> None:
    """Write the page at ``path``, in the run's folder.

    Args:
        results: what `build_results` returns.
        path: a .html.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(
        results=results,
        labels=list(results["methods"]),
        metrics={name: METRICS[name] for name in _measured(results)},
        prompts=_prompts(results),
        plots=[plot for plot in (_plot(results, *about) for about in PLOTS) if plot],
        image=IMAGE_SUFFIX,
        dense=DENSE,
        size={"width": WIDTH, "height": HEIGHT, "margin": MARGIN},
    )
    write_text(path, page)


def _measured(results: Row) -> list[str]:
    return [m for m in METRICS if any(m in line for line in results["summary"])]


def _prompts(results: Row) -> list[Row]:
    """Return, for each prompt and seed, its samples by label and how they differ from dense."""
    by_label = {label: samples_of(results["rows"], label) for label in results["methods"]}
    dense = by_label.get(DENSE, {})
    to_dense = {
        (label, metric): deltas(metric, samples, dense)
        for label, samples in by_label.items()
        for metric in METRICS
    }
    prompts: dict[tuple[int, int], Row] = {}
    for row in results["rows"]:
        key = row["index"], row["seed"]
        about = {"index": key[0], "seed": key[1], "prompt": row["prompt"], "samples": {}}
        prompt = prompts.setdefault(key, about)
        label = row["method"]
        prompt["samples"][label] = {
            "clip": row["clip"],
            "values": {metric: value_of(row, metric) for metric in METRICS},
            "deltas": {m: to_dense[label, m][key] for m in METRICS if key in to_dense[label, m]},
        }
    return [prompts[key] for key in sorted(prompts)]


def _plot(results: Row, across: str, title: str, metric: str) -> Plot | None:
    """Return a metric of every candidate over something else, or None if nothing has both."""
    found = []
    for line in results["summary"]:
        x = line["speed"].get(across, line.get(across))
        if line["method"] != DENSE and x is not None and metric in line:
            found.append((line["method"], x, line[metric]["mean"], *line[metric]["interval"]))
    if not found:
        return None
    x_axis = Axis.over([x for _, x, *_ in found], MARGIN, WIDTH - 12)
    y_axis = Axis.over([y for _, _, *ys in found for y in ys], HEIGHT - MARGIN, 12)
    points = [
        Point(label, x_axis.at(x), y_axis.at(mean), y_axis.at(low), y_axis.at(high))
        for label, x, mean, low, high in found
    ]
    return Plot(METRICS[metric][0], title, points, x_axis.ticks(), y_axis.ticks())


@dataclass(frozen=True)
class Axis:
    """Maps values from ``low`` to ``high`` to pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> Axis:
        """Return an axis with room around all values."""
        low, high = min(values), max(values)
        room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
        return cls(low - room, high + room, start, end)

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, number: int = 5) -> list[tuple[float, str]]:
        """Return evenly spaced ticks."""
        step = (self.high - self.low) / (number + 1)
        values = [self.low + step * (i + 1) for i in range(number)]
        return [(self.at(value), f"{value:.3g}") for value in values]
