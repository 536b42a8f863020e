"""Write the README's tables from benchmarks/results/, and the break-even plot.

python benchmarks/readme_tables.py           # rewrite; first summary.json (benchmarks/summary.py)
python benchmarks/readme_tables.py --plot    # also break-even.svg; needs matplotlib (extra bench)
python benchmarks/readme_tables.py --check   # fail if the README is out of date

What `dit-accel bench` measured is read from summary.json, the rest from the studies' own files.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from summary import summary_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOT = RESULTS / "break-even.svg"
HEADLINE_MODEL, HEADLINE_SIZES = "wan2.1-14b", ("720p81", "480p81")
KERNELS = "kernel.bf16"
PEERS = {"flex": "FlexAttention", "flash_attn_4": "flash-attn-4", "cudnn": "cuDNN dense"}
RATIOS = {"vs_cudnn": "ours / cuDNN", "vs_fa4": "ours / flash-attn-4"}
METHODS_FILES = "methods-*.json"
QUALITY_FILES = "eval-*.json"
FIDELITY_FILES = "fidelity-*.json"
CACHING_FILES = "caching-*.json"
FIDELITY_METHODS = (
    "radial", "radial + remainder", "gna", "gna + remainder", "psa", "rectified",
    "rectified, no neighbours", "pisa",
)  # fmt: skip
EQUAL_DB = 100  # how the study of caches writes that two outputs are equal
Row = dict[str, Any]


def main() -> None:
    """Rewrite the README, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--plot", action="store_true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    rows = summary_rows()
    if arguments.plot:
        plot(rows)
    old = readme.read_text(encoding="utf-8")
    new = with_tables(old, rows)
    if arguments.check and new != old:
        sys.exit("README.md is out of date: run python benchmarks/readme_tables.py")
    readme.write_text(new, encoding="utf-8")


def with_tables(text: str, rows: dict[str, Row]) -> str:
    """Return the README with its tables as they should be; ``rows`` are those of the summary."""
    tables = {"headline": headline(rows), "kernels": kernels(rows)}
    # Not every machine has measured these yet: what is missing leaves its place in the README.
    if others := steps(rows):
        tables["steps"] = others
    if any(RESULTS.glob(METHODS_FILES)):
        tables["methods"] = methods()
    if any(RESULTS.glob(QUALITY_FILES)):
        tables["quality"] = quality()
    if any(RESULTS.glob(FIDELITY_FILES)):
        tables["fidelity"] = fidelity()
    if any(RESULTS.glob(CACHING_FILES)):
        tables["caching"] = caching()
    for name, table in tables.items():
        pattern = rf"(<!-- table:{name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, t=table: m[1] + t + m[2], text, flags=re.DOTALL)
    return text


def summary_rows() -> dict[str, Row]:
    """Return the rows of the summary by what their keys have in common."""
    rows: dict[str, Row] = {}
    for key, value in json.loads(summary_text()).items():
        prefix, name = key.rsplit(".", 1)
        rows.setdefault(prefix, {})[name] = value
    return rows


def headline(rows: dict[str, Row]) -> str:
    """Return forwards of one model, dense and sparse."""
    return step_table(rows, [f"step.{HEADLINE_MODEL}.{size}." for size in HEADLINE_SIZES])


def steps(rows: dict[str, Row]) -> str:
    """Return forwards of all other models and sizes that were measured."""
    headlines = tuple(f"step.{HEADLINE_MODEL}.{size}." for size in HEADLINE_SIZES)
    others = {
        prefix.removesuffix("stock")
        for prefix in rows
        if prefix.startswith("step.")
        and prefix.endswith(".stock")
        and not prefix.startswith(headlines)
    }
    return step_table(rows, sorted(others)) if others else ""


def step_table(rows: dict[str, Row], places: Iterable[str]) -> str:
    """Return a line for each way of attending, the slowest first, by model and size.

    What was measured on another machine than the newest stock forward is left out.
    """
    found = [
        (place, prefix.removeprefix(place), row)
        for place in places
        for prefix, row in sorted(rows.items(), key=lambda item: -item[1].get("forward_s", 0))
        if prefix.startswith(place)
        and not prefix.endswith("stock-cudnn")
        and row["file"] == rows[f"{place}stock"]["file"]
    ]
    optional = {"vs_compiled": "over compiled", "amdahl": "Amdahl's bound"}
    shown = {k: v for k, v in optional.items() if any(k in row for *_, row in found)}
    cells = [
        [
            _place(place),
            what,
            f"{row.get('attended_density', 1):.2f}",
            f"{row['forward_s']:.2f} s",
            f"{row['vs_eager']:.2f}x" if "vs_eager" in row else "",
            *(f"{row[name]:.2f}x" if name in row else "" for name in shown),
        ]
        for place, what, row in found
    ]
    layers = " and ".join(sorted({row["layers"] for *_, row in found}))
    note = (
        f"One forward past the dense steps, {_gpus(row for *_, row in found)}, bf16; random "
        f'weights, {layers} layers measured and scaled to all; "stock" is diffusers with torch\'s '
        f"choice of dense attention. {sources(row for *_, row in found)}\n"
    )
    columns = ["model and size", "attention", "density", "forward", "speed-up", *shown.values()]
    return markdown(columns, cells) + note


def kernels(rows: dict[str, Row]) -> str:
    """Return TFLOP/s on attended pairs, bf16 and head size 128, and where sparse stops to pay."""
    found = {
        (int(tokens), float(density)): row
        for prefix, row in rows.items()
        if (parts := re.fullmatch(rf"{KERNELS}\.(\d+)\.([\d.]+)", prefix))
        for tokens, density in [parts.groups()]
    }
    peers = {k: v for k, v in PEERS.items() if any(f"tflops_{k}" in row for row in found.values())}
    ratios = {k: v for k, v in RATIOS.items() if any(k in row for row in found.values())}
    cells = [
        [
            f"{tokens:,}",
            f"{density:g}",
            row["ours"],
            f"{row['tflops']:.0f}",
            *(f"{row[f'tflops_{name}']:.0f}" if f"tflops_{name}" in row else "" for name in peers),
            *(f"{row[name]:.2f}" if name in row else "" for name in ratios),
        ]
        for (tokens, density), row in sorted(found.items(), key=_by_length)
    ]
    columns = ["tokens", "density", "ours", "TFLOP/s", *peers.values(), *ratios.values()]
    about = list(found.values())
    note = (
        f"TFLOP/s on attended pairs, {_gpus(about)}, bf16, 8 heads of 128, random lists of whole "
        f"128-token blocks. {sources(about)}\n"
    )
    points = break_even_points(rows)
    if points:
        told = "; ".join(
            f"{name} {', '.join(f'{density:.2f} at {n:,} tokens' for n, density in line)}"
            for name, line in points.items()
        )
        note += f"\nFaster than dense below a density of: {told}.\n"
    if PLOT.exists():
        note += f"\n![Density below which sparse wins](benchmarks/results/{PLOT.name})\n"
    return markdown(columns, cells) + note


def break_even_points(rows: dict[str, Row]) -> dict[str, list[tuple[int, float]]]:
    """Return, for each operator, lengths and the densities below which it beats dense there."""
    points: dict[str, list[tuple[int, float]]] = {}
    for prefix, row in rows.items():
        if parts := re.fullmatch(rf"{KERNELS}\.(\d+)\.break_even", prefix):
            for name in ("hopper", "triton", "flash_attn_4", "flex"):
                if row.get(name) is not None:
                    points.setdefault(name, []).append((int(parts[1]), row[name]))
    return {name: sorted(line) for name, line in points.items()}


def plot(rows: dict[str, Row]) -> None:
    """Draw density below which sparse attention wins, over the length, a line an operator."""
    import matplotlib

    matplotlib.use("Agg")
    # Nothing in the file may depend on when it was drawn.
    matplotlib.rcParams["svg.hashsalt"] = "dit-accel"
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, line in break_even_points(rows).items():
        panel.plot(*zip(*line, strict=True), marker="o", label=name.replace("_", "-"))
    panel.set(xlabel="tokens", ylabel="density", ylim=(0, 1.02), xscale="log")
    panel.set_title("Sparse attention is faster than dense below")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(PLOT, metadata={"Date": None})
    plt.close(figure)


def _by_length(item: tuple[tuple[int, float], Row]) -> tuple[int, float]:
    (tokens, density), _ = item
    return tokens, -density


def _place(place: str) -> str:
    """Write "step.wan2.1-14b.720p81." for people."""
    model, size = place.removeprefix("step.").rstrip(".").rsplit(".", 1)
    if video := re.fullmatch(r"(\d+p)(\d+)", size):
        return f"{model}, {video[1]} x {video[2]} frames"
    return f"{model}, {size} x {size}"


def _gpus(rows: Iterable[Row]) -> str:
    return " and ".join(dict.fromkeys(row["gpu"] for row in rows))


def sources(rows: Iterable[Row]) -> str:
    """Say which files rows come from, with date and commit."""
    found = dict.fromkeys((row["file"], row["date"][:10], row["commit"]) for row in rows)
    links = (
        f"[`{file}`](benchmarks/results/{file}) {date}, commit {_short(commit)}"
        for file, date, commit in found
    )
    return "; ".join(links) + "."


def _short(commit: str) -> str:
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]{28}", r"\1", commit)


def quality() -> str:
    """Return what each method costs on each bundled model, from the runs of standard.py."""
    files = [load(path.name) for path in sorted(RESULTS.glob(QUALITY_FILES))]
    rows = []
    for data in files:
        dense = data["summary"][0]
        for line in data["summary"][1:]:
            low, high = line["psnr_db"]["interval"]
            less, more = line["following"]["delta_interval"]
            rows.append(
                [
                    data["settings"]["model"],
                    _with_count(line, dense["samples"]),
                    f"{line['computed_density']:.2f}",
                    f"{line['psnr_db']['mean']:.1f} dB ({low:.1f} to {high:.1f})",
                    f"{line['ssim']['mean']:.3f}",
                    f"{line['following']['mean']:.0%} ({less * 100:+.0f} to {more * 100:+.0f})",
                    f"{dense['following']['mean']:.0%}",
                    f"{line['speed']['speedup']:.2f}x",
                ]
            )
    settings, dense = files[0]["settings"], files[0]["manifest"]["dense_backend"]
    note = (
        f"{settings['samples']} prompts a model, same noise, blocks of few tokens, first quarter "
        f"of the steps dense, batches of {settings['batch']} on one {settings['device_name']}; "
        f"dense is {dense}. Behind the @ is the density asked for, or the least within reach; "
        '"computed" counts all calls, dense ones as 1. "Follows" is the share of prompted '
        "attributes that a checker finds, with its difference to dense in points. 95 % bootstrap "
        "intervals over prompts. The bundled models are too small for sparse attention to pay: "
        f"speed is in the tables below. {' '.join(source(data) for data in files)}\n"
    )
    columns = ["model", "method", "computed", "PSNR to dense", "SSIM", "follows", "dense follows"]
    return markdown([*columns, "speed-up"], rows) + note


def _with_count(line: Row, samples: int) -> str:
    """Return a method's name, and of how many prompts it speaks, if not of all."""
    few = line["samples"] < samples
    return f"{line['method']} ({line['samples']} prompts)" if few else str(line["method"])


def methods() -> str:
    """Return what each method's attention takes, choosing included, at density .15."""
    files = sorted(
        (load(path.name) for path in RESULTS.glob(METHODS_FILES)),
        key=lambda data: data["manifest"]["date"],
    )
    measured = {  # a later file's rows replace those of an earlier one
        (row["tokens"], row["density"], row["method"]): row
        for data in files
        for row in data["rows"]
        if "speedup" in row and (row["density"] == 0.15 or "reaches" in row)
    }
    data = files[-1]
    rows = [
        [
            f"{row['tokens']:,}",
            row["method"],
            row["operator"],
            f"{row['achieved_density']:.2f}",
            f"{row['choosing_of_dense']:.1%}",
            f"{row['total_ms']:.1f} ms",
            f"{row['cudnn_dense_ms']:.1f} ms",
            f"{row['speedup']:.2f}x",
        ]
        for row in sorted(measured.values(), key=lambda row: row["tokens"])
    ]
    note = (
        f"One attention call on one {data['manifest']['gpu']}, bf16, {data['heads']} heads of "
        f"{data['head_size']}; density .15 asked, methods that can't reach it at their least; "
        '"choosing" is statistics, importance and selection, as a share of dense time. '
        f"{' '.join(map(source, files))}\n"
    )
    columns = [
        "tokens",
        "method",
        "kernel",
        "density",
        "choosing",
        "in all",
        "cuDNN dense",
        "speed-up",
    ]
    return markdown(columns, rows) + note


def fidelity() -> str:
    """Return PSNR to dense at equal achieved density, a column for each density."""
    files = [load(path.name) for path in sorted(RESULTS.glob(FIDELITY_FILES))]
    asked = sorted(
        {row["density"] for data in files for row in data["rows"] if row["density"] != "least"},
        reverse=True,
    )
    rows = []
    for data in files:
        found = {(row["method"], row["density"]): row for row in data["rows"]}
        for name in FIDELITY_METHODS:
            measured = [found.get((name, density), {}) for density in asked]
            if any("psnr_db" in row for row in measured):
                rows.append([data["model"], name, *map(_fidelity_cell, measured)])
    settings = files[0]["settings"]
    note = (
        "PSNR in dB / SSIM to dense attention's own output, at equal density over the sparse "
        "calls (choosing included, met within 10 %; a dash: out of the method's reach; empty: not "
        "measured; * SSIM with windows padded by reflection, as torchmetrics has it). "
        f"{settings['prompts']} prompts, same noise, first quarter of the steps dense, blocks of "
        f"{settings['block']} tokens. {' '.join(source(data) for data in files)}\n"
    )
    plot = RESULTS / "fidelity.svg"
    if plot.exists():
        note = f"![PSNR against density](benchmarks/results/{plot.name})\n\n" + note
    return markdown(["model", "method", *(f"density {d}" for d in asked)], rows) + note


def caching() -> str:
    """Return what each cache costs and gains at the middle one of its strengths, by model."""
    files = [load(path.name) for path in sorted(RESULTS.glob(CACHING_FILES))]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for data in files:
        measured = [row for row in data["rows"] if "psnr_db" in row and row["cache"] != "none"]
        for row in measured:
            strengths = sorted({r["strength"] for r in measured if r["cache"] == row["cache"]})
            if row["strength"] == strengths[len(strengths) // 2]:
                place = cells.setdefault((row["attention"], row["cache"]), {})
                place[data["model"]] = _caching_cell(row)
    models = [data["model"] for data in files]
    rows = [
        [
            cache if attention == "none" else f"{cache} + {attention}",
            *(found.get(m, "") for m in models),
        ]
        for (attention, cache), found in sorted(cells.items(), key=_alone_first)
    ]
    settings = files[0]["settings"]
    note = (
        "PSNR to the dense output, the share of block calls that ran, and how many times faster "
        f"the denoising loop was, all prompts in a batch on one {files[0]['manifest']['gpu']}; "
        "empty: not measured, or out of the sparse method's reach. The middle of three strengths "
        "each: about half of the block calls, where a cache skips whole blocks. "
        f"{settings['prompts']} prompts, same noise; beside a sparse method the first quarter of "
        f"the steps is dense. {' '.join(source(data) for data in files)}\n"
    )
    plot = RESULTS / "caching.svg"
    if plot.exists():
        note = f"![PSNR against speed-up](benchmarks/results/{plot.name})\n\n" + note
    return markdown(["cache", *models], rows) + note


def _alone_first(item: tuple[tuple[str, str], Any]) -> tuple[bool, str, str]:
    (attention, cache), _ = item
    return attention != "none", attention, cache


def _caching_cell(row: dict[str, Any]) -> str:
    if row["psnr_db"] >= EQUAL_DB:
        return "nothing to skip"
    return f"{row['psnr_db']:.1f} dB, {row.get('share_run', 1):.0%}, {row['speedup']:.2f}x"


def _fidelity_cell(row: dict[str, Any]) -> str:
    if "psnr_db" not in row:
        return "-" if "unreachable" in row else ""
    decibels = "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
    if "ssim" in row:
        return f"{decibels} / {row['ssim']:.3f}"
    return f"{decibels} / {row['ssim_padded']:.3f}*"


def load(name: str) -> dict[str, Any]:
    """Read one result."""
    return json.loads((RESULTS / name).read_text()) | {"file": name}


def source(data: dict[str, Any]) -> str:
    """Say where a table comes from."""
    about = data.get("manifest") or data["environment"]
    date = about.get("date", "")[:10]
    return f"[`{data['file']}`](benchmarks/results/{data['file']}) {date}".strip() + "."


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """Lay out a table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


if __name__ == "__main__":
    main()
