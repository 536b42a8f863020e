"""The flat summary of result files: one number to a key, such as ``kernel.bf16.75600.0.25.vs_fa4``.

Beside the numbers, each row has its date, commit, GPU and file under the same prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from dit_accel.bench.measuring import Row
from dit_accel.bench.pipeline import with_speedups
from dit_accel.bench.step import STOCK, with_ratios

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
OURS = ("hopper", "triton", "torch")
USUAL_HEAD_SIZE = 128
PEER_KEYS = {
    "cudnn": "vs_cudnn", "sdpa": "vs_sdpa", "flash-attn-4": "vs_fa4",
    "flash-attn-4-dense": "vs_fa4_dense", "flash-attn-2": "vs_fa2", "flex": "vs_flex",
    "sage": "vs_sage", "natten": "vs_natten",
}  # fmt: skip
Entries = dict[str, Any]


def summarise(results: Mapping[str, Mapping[str, Any]]) -> Entries:
    """Return the summary of result files, by file name; of two measurements the newer counts.

    Trials without a GPU say nothing about speed and are left out.
    """
    found: dict[str, Entries] = {}
    for name, content in results.items():
        if content.get("kind") not in _KINDS or content["manifest"].get("trial"):
            continue
        for prefix, row in _KINDS[content["kind"]](content["rows"]):
            about = {name: row.pop(name, None) for name in ("date", "commit")}
            about |= {"gpu": content["manifest"]["gpu"], "file": name}
            older = found.get(prefix)
            if older is None or older["date"] <= about["date"]:
                found[prefix] = {**row, **about}
    return {
        f"{prefix}.{name}": round(value, 4) if isinstance(value, float) else value
        for prefix in sorted(found)
        for name, value in found[prefix].items()
    }


def kernel_rows(rows: Sequence[Row]) -> Iterator[tuple[str, Entries]]:
    """Yield a row for each size, kind of lists and density: rates, and ours over each peer's.

    Rates are compared by what they are of the dense baseline's that was timed in turns with them.
    Ours is the fastest of our operators there.
    """
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if "tflops" in row:
            key = tuple(row[name] for name in ("dtype", "head_size", "tokens", "lists", "density"))
            groups.setdefault(key, {})[row["contender"]] = row
    for (dtype, head_size, tokens, lists, density), sparse in groups.items():
        if lists == "dense":
            continue
        size = dtype, head_size, tokens
        found = {**groups.get((*size, "dense", 1.0), {}), **sparse}
        ours = [found[name] for name in OURS if name in found]
        if not ours:
            continue
        rate = _of_baseline if any("of_baseline_rate" in row for row in found.values()) else _tflops
        best = max(ours, key=rate)
        entries: Entries = {"ours": best["contender"], "tflops": best["tflops"], "ms": best["ms"]}
        if "baseline_ms" in best:
            entries["speedup"] = best["baseline_ms"] / best["ms"]  # over dense, in time
        for name, row in found.items():
            if name in PEER_KEYS:
                entries[PEER_KEYS[name]] = rate(best) / rate(row)
            entries[f"tflops_{name.replace('-', '_')}"] = row["tflops"]
        entries |= {"date": best["date"], "commit": best["commit"]}
        yield f"{_kernel_size(*size, lists)}.{density:g}", entries
    yield from _break_even(groups)


def _kernel_size(dtype: str, head_size: int, tokens: int, lists: str = "random") -> str:
    """Return the first part of a kernel's key; usual head size and lists go without saying."""
    kind = SHORT[dtype] + (f"-d{head_size}" if head_size != USUAL_HEAD_SIZE else "")
    kind += f"-{lists}" if lists != "random" else ""
    return f"kernel.{kind}.{tokens}"


def step_rows(rows: Sequence[Row]) -> Iterator[tuple[str, Entries]]:
    """Yield a row for each forward that was timed."""
    stock_peak = {
        (row["model"], row["size"], row["compiled"]): row.get("peak_gib")
        for row in rows
        if row["attention"] == STOCK
    }
    for row in with_ratios(rows):
        if "measured_ms" not in row:
            continue
        what = row["attention"] + ("" if row["density"] is None else f"-{row['density']:g}")
        what += f"-{row['precision']}" if row.get("precision") else ""
        what += "-compiled" if row["compiled"] else ""
        copied = ("forward_s", "attended_density", "block_density", "vs_eager", "vs_compiled",
                  "amdahl", "peak_gib")  # fmt: skip
        entries = {name: row[name] for name in copied if row.get(name) is not None}
        for part, spent in row.get("breakdown_ms", {}).items():
            if part != "total":
                entries[f"{part}_share"] = spent / row["breakdown_ms"]["total"]
        peak = stock_peak.get((row["model"], row["size"], row["compiled"]))
        if peak and row.get("peak_gib"):
            entries["peak_of_stock"] = row["peak_gib"] / peak
        entries["layers"] = f"{row['layers_measured']} of {row['layers_of_model']}"
        entries |= {"date": row["date"], "commit": row["commit"]}
        yield f"step.{row['model']}.{row['size']}.{what}", entries


def pipeline_rows(rows: Sequence[Row]) -> Iterator[tuple[str, Entries]]:
    """Yield a row for each generation that was timed."""
    for row in with_speedups(rows):
        if "total_s" not in row:
            continue
        copied = ("total_s", "mean_density", "psnr_db", "vs_dense", "loop_vs_dense")
        entries = {name: row[name] for name in copied if row.get(name) is not None}
        entries |= {"date": row["date"], "commit": row["commit"]}
        what = row["method"] + ("" if row["density"] is None else f"-{row['density']:g}")
        what += "" if row["block_size"] is None else f"-b{row['block_size']}"
        yield f"pipeline.{row['model'].split('/')[-1]}.{what}", entries


def break_even(times: Sequence[tuple[float, float]]) -> float | None:
    """Return the density below which sparse attention takes less time than dense.

    Args:
        times: pairs of density and time in units of the dense time.

    Returns:
        The highest density if it is faster at all of them; None if at none, or not at the low
        ones. Between two densities the time is taken to be linear.
    """
    points = sorted(times)
    winning = [point for point in points if point[1] < 1]
    if not winning:
        return None
    if len(winning) == len(points):
        return points[-1][0]
    for (low, below), (high, above) in pairwise(points):
        if below < 1 <= above:
            return low + (high - low) * (1 - below) / (above - below)
    return None


def _break_even(groups: Mapping[tuple[Any, ...], Mapping[str, Row]]) -> Iterator[Any]:
    """Yield a row for each size with the break-even of each sparse contender."""
    sizes: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
    for (*size, _), found in groups.items():
        for name, row in found.items():
            if row["lists"] != "dense" and "baseline_ms" in row and name != "natten":
                sizes.setdefault(tuple(size), {}).setdefault(name, []).append(row)
    for place, contenders in sizes.items():
        entries: Entries = {}
        for name, rows in contenders.items():
            if len(rows) > 1:
                times = [(row["density"], row["ms"] / row["baseline_ms"]) for row in rows]
                entries[name.replace("-", "_")] = break_even(times)
        if entries:
            last = max((row for rows in contenders.values() for row in rows), key=_date)
            entries |= {"date": last["date"], "commit": last["commit"]}
            yield f"{_kernel_size(*place)}.break_even", entries


def _of_baseline(row: Row) -> float:
    """Rate in units of the baseline's, which itself is the one without a ratio."""
    return float(row.get("of_baseline_rate", 1.0))


def _tflops(row: Row) -> float:
    return float(row["tflops"])


def _date(row: Row) -> str:
    return str(row["date"])


_KINDS = {"kernel": kernel_rows, "step": step_rows, "pipeline": pipeline_rows}
