"""Tables of `dit-accel eval` for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

Row = dict[str, Any]


def summary_table(results: Row) -> Table:
    """Return one row a candidate: closeness to dense, prompt following, and speed."""
    settings, manifest = results["settings"], results["manifest"]
    size = "x".join(str(settings[n]) for n in ("frames", "height", "width") if settings[n])
    caption = (
        f"{settings['samples']} samples of suite {settings['suite']}, {size or 'usual size'}, "
        f"{settings['steps']} steps; 95 % intervals over prompts; dense: "
        f"{manifest['dense_backend']}, on {settings['device_name']}, batches of {settings['batch']}"
    )
    table = Table(title=settings["model"], caption=caption)
    lines = results["summary"]
    shown = [column for column in _COLUMNS if any(column[1](line) for line in lines)]
    for name, _ in shown:
        table.add_column(name, justify="left" if name == "method" else "right")
    for line in lines:
        table.add_row(*(text(line) for _, text in shown))
    return table


def comparison_table(rows: Sequence[Row], runs: Sequence[Path]) -> Table:
    """Return one row for each method and metric that two runs share."""
    first, second = runs
    caption = f"first: {first}\nsecond: {second}\nsecond less first, 95 % interval over prompts"
    table = Table("method", "metric", "prompts", "first", "second", "difference", caption=caption)
    for row in rows:
        low, high = row["delta_interval"]
        table.add_row(
            row["method"],
            row["title"],
            str(row["prompts"]),
            f"{row['first']:.4g}",
            f"{row['second']:.4g}",
            f"{row['delta']:+.4g} ({low:+.4g} to {high:+.4g})",
        )
    return table


def _measured(metric: str, form: str, scale: float = 1.0) -> Any:
    def text(line: Row) -> str:
        if metric not in line:
            return ""
        low, high = line[metric]["interval"]
        mean = format(line[metric]["mean"] * scale, form)
        return f"{mean} ({format(low * scale, form)}-{format(high * scale, form)})"

    return text


def _of(line: Row, *names: str, form: str) -> str:
    value: Any = line
    for name in names:
        value = value.get(name) if value else None
    return "" if value is None else form.format(value)


_COLUMNS = (
    ("method", lambda line: line["method"]),
    ("computed", lambda line: _of(line, "computed_density", form="{:.2f}")),
    ("PSNR, dB", _measured("psnr_db", ".1f")),
    ("SSIM", lambda line: _of(line, "ssim", "mean", form="{:.3f}")),
    ("follows, %", _measured("following", ".0f", 100)),
    ("s/sample", lambda line: _of(line, "speed", "generate_s", form="{:.3g}")),
    ("ms/step", lambda line: _of({"ms": _times(line, "step_s", 1e3)}, "ms", form="{:.3g}")),
    ("speed-up", lambda line: _of(line, "speed", "speedup", form="{:.2f}x")),
    ("GiB", lambda line: _of(line, "speed", "peak_memory_gib", form="{:.1f}")),
    ("J/sample", lambda line: _of(line, "speed", "energy_j", form="{:.0f}")),
)


def _times(line: Row, name: str, factor: float) -> float | None:
    value = line["speed"].get(name)
    return None if value is None else value * factor
