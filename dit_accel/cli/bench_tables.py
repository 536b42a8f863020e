"""The tables of ``dit-accel bench``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

Rows = Sequence[dict[str, Any]]
_UNTOLD = ("date", "commit", "trace", "options", "tuning", "acceleration", "rejected_operators")


def line(row: dict[str, Any]) -> str:
    """Say on one line what a row holds."""
    told = {name: value for name, value in row.items() if value is not None}
    return ", ".join(f"{k} {_cell(v)}" for k, v in told.items() if k not in _UNTOLD)


def troubles(rows: Rows, names: Sequence[str]) -> list[str]:
    """Say which tasks, told by the fields ``names``, were not measured, and why."""
    found = []
    for row in rows:
        if reason := row.get("failed") or row.get("refused"):
            what = ", ".join(f"{name} {row[name]}" for name in names if row[name] is not None)
            found.append(f"not measured: {what}: {' '.join(str(reason).split())}")
    return found


def kernel_table(rows: Rows) -> Table:
    """Ours beside the peers, a line for each size, kind of lists and density."""
    from dit_accel.bench.summary import PEER_KEYS, kernel_rows

    told = [{"case": key.removeprefix("kernel."), **row} for key, row in kernel_rows(rows)]
    columns = ("case", "ours", "ms", "tflops", "speedup", *PEER_KEYS.values(), "hopper", "triton",
               "torch", "flex", "flash_attn_4")  # fmt: skip
    caption = (
        "tflops: on attended pairs; vs: ours over a peer's, per pair; speedup: of the time, over "
        "dense; break_even: density below which each is faster than dense"
    )
    return _table(columns, told, caption)


def step_table(rows: Rows) -> Table:
    """One line for each forward."""
    from dit_accel.bench.step import with_ratios

    told = []
    for row in with_ratios(rows):
        parts = row.get("breakdown_ms")
        shares = {f"in_{k}": f"{v / parts['total']:.0%}" for k, v in parts.items()} if parts else {}
        mode = "compiled" if row["compiled"] else "eager"
        told.append({**row, **shares, "mode": mode, "asked": row["density"]})
    columns = ("model", "size", "mode", "attention", "asked", "precision", "reaches",
               "block_density", "forward_s", "vs_eager", "vs_compiled", "amdahl", "in_attention",
               "in_matmul", "in_rest", "peak_gib")  # fmt: skip
    return _table(columns, told, "amdahl: the bound over dense in the same mode, at this density")


def pipeline_table(rows: Rows) -> Table:
    """One line for each kind of generation."""
    from dit_accel.bench.pipeline import with_speedups

    columns = ("model", "method", "density", "reaches", "mean_density", "total_s", "denoise_s",
               "vs_dense", "loop_vs_dense", "psnr_db")  # fmt: skip
    return _table(columns, with_speedups(rows), "vs_dense: how many times faster than dense")


def tune_table(rows: Rows) -> Table:
    """One line for each setting, the fastest first."""
    told = [
        {**row, "config": ", ".join(f"{name}={value}" for name, value in row["config"].items())}
        for row in sorted(rows, key=lambda row: -row.get("tflops", 0))
    ]
    columns = ("kernel", "dtype", "head_size", "density", "config", "ms", "tflops")
    return _table(columns, told, "fastest first")


def _table(columns: Sequence[str], rows: Rows, caption: str) -> Table:
    """Lay out the rows that were measured, without empty columns."""
    measured = [row for row in rows if "failed" not in row and "refused" not in row]
    shown = [name for name in columns if any(row.get(name) is not None for row in measured)]
    table = Table(*shown, caption=caption)
    for row in measured:
        table.add_row(*(_cell(row.get(name)) for name in shown))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
