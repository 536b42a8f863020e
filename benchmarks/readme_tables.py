"""Write the README's tables from the JSON files in benchmarks/results/.

python benchmarks/readme_tables.py           # rewrite
python benchmarks/readme_tables.py --check   # fail if the README is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEAD_SIZE = 128
METHODS_FILES = "methods-h*.json"
FIDELITY_FILES = "fidelity-*.json"
FIDELITY_METHODS = (
    "radial", "radial + remainder", "gna", "gna + remainder", "psa", "rectified",
    "rectified, no neighbours", "pisa",
)  # fmt: skip


def main() -> None:
    """Rewrite the README, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    old = new = readme.read_text()
    tables = {"headline": headline(), "kernels": kernels(), "quality": quality()}
    # Not every machine has measured these yet: what is missing leaves its place in the README.
    if any(RESULTS.glob(METHODS_FILES)):
        tables["methods"] = methods()
    if any(RESULTS.glob(FIDELITY_FILES)):
        tables["fidelity"] = fidelity()
    for name, table in tables.items():
        pattern = rf"(<!-- table:{name} -->\n).*?(<!-- end -->)"
        new = re.sub(pattern, lambda m, t=table: m[1] + t + m[2], new, flags=re.DOTALL)
    if check and new != old:
        sys.exit("README.md is out of date: run python benchmarks/readme_tables.py")
    readme.write_text(new)


def headline() -> str:
    """Return one forward of a Wan2.1-14B-sized transformer, dense and sparse.

    The file also has dense attention by cuDNN asked for by name, which is a hair slower.
    """
    data = load("wan14b-forward-h200.json")
    rows = [
        [
            row["size"] + " frames",
            row["attention"],
            f"{row['density']:.2f}",
            f"{row['forward_40_layers_s']:.2f} s",
            f"{row['speedup_over_best_dense']:.2f}x",
        ]
        for row in data["rows"]
        if not row["compiled_blocks"] and row["attention"] != "dense: cuDNN"
    ]
    note = (
        f"One forward past the dense steps on one {data['manifest']['gpu']}, bf16, eager; random "
        f"weights, {data['layers_measured']} of {data['layers_of_the_real_model']} layers "
        f"measured and scaled to all. {source(data)}\n"
    )
    return markdown(["Wan2.1-14B at", "attention", "density", "forward", "speed-up"], rows) + note


def kernels() -> str:
    """Return TFLOP/s on attended pairs."""
    data = load("kernels-h200.json")
    rows = [
        [
            f"{row['tokens']:,}",
            str(row["density"]),
            f"{row['block_sparse']['tflops']:.0f}",
            f"{row['flex']['tflops']:.0f}",
            f"{row['cudnn_dense']['tflops']:.0f}",
            f"{row['of_cudnn_dense_rate']:.2f}",
        ]
        for row in data["rows"]
        if row["head_size"] == HEAD_SIZE
    ]
    heads = data["rows"][0]["heads"]
    note = (
        f"TFLOP/s on attended pairs, {data['manifest']['gpu']}, bf16, {heads} heads of "
        f"{HEAD_SIZE}, random lists of whole 128-token blocks. {source(data)}\n"
    )
    columns = ["tokens", "density", "ours (Triton)", "FlexAttention", "cuDNN dense", "ours / cuDNN"]
    return markdown(columns, rows) + note


def quality() -> str:
    """Return PSNR against dense per method and density, over the fixed prompts."""
    data = load("quality-cpu.json")
    rows = []
    for row in data["summary"]:
        if row["refused"]:
            rows.append([row["method"], str(row["density"]), "out of reach", "", "", ""])
            continue
        low, high = row["psnr_interval"]
        rows.append(
            [
                row["method"],
                str(row["density"]),
                f"{row['block_density']:.2f}",
                f"{row['psnr_db']:.1f} dB ({low:.1f} to {high:.1f})",
                f"{row['following']:.0%} ({row['dense_following']:.0%})",
                f"{row['speedup']:.2f}x",
            ]
        )
    settings = data["settings"]
    note = (
        f"tiny-wan, {settings['frames']} frames of {settings['width']}x{settings['height']}, "
        f"{settings['steps']} steps, guidance {settings['guidance']}, "
        f"{data['summary'][0]['prompts']} prompts, {settings['device']['cores']} CPU cores; "
        'bootstrap 95 % intervals; "follows" is the share of prompted attributes that a checker '
        f"finds (dense in brackets). {data.get('remark', '')} {source(data)}\n"
    )
    columns = ["method", "density asked", "over all calls", "PSNR to dense", "follows", "speed-up"]
    return markdown(columns, rows) + note


def methods() -> str:
    """Return what each method's attention takes, choosing included, at density .15."""
    data = load(max(RESULTS.glob(METHODS_FILES)).name)
    rows = [
        [
            f"{row['tokens']:,}",
            row["method"],
            f"{row['achieved_density']:.2f}",
            f"{row['choosing_of_dense']:.1%}",
            f"{row['total_ms']:.1f} ms",
            f"{row['cudnn_dense_ms']:.1f} ms",
            f"{row['speedup']:.2f}x",
        ]
        for row in sorted(data["rows"], key=lambda row: row["tokens"])
        if "speedup" in row and (row["density"] == 0.15 or "reaches" in row)
    ]
    note = (
        f"One attention call on one {data['manifest']['gpu']}, bf16, {data['heads']} heads of "
        f"{data['head_size']}; density .15 asked, methods that can't reach it at their least; "
        '"choosing" is statistics, importance and selection, as a share of dense time. '
        f"{source(data)}\n"
    )
    columns = ["tokens", "method", "density", "choosing", "in all", "cuDNN dense", "speed-up"]
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
        "calls (choosing included, met within 10 %; a dash: out of the method's reach). "
        f"{settings['prompts']} prompts, same noise, first quarter of the steps dense, blocks of "
        f"{settings['block']} tokens. {' '.join(source(data) for data in files)}\n"
    )
    plot = RESULTS / "fidelity.svg"
    if plot.exists():
        note = f"![PSNR against density](benchmarks/results/{plot.name})\n\n" + note
    return markdown(["model", "method", *(f"density {d}" for d in asked)], rows) + note


def _fidelity_cell(row: dict[str, Any]) -> str:
    if "ssim" not in row:
        return "-"
    decibels = "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
    return f"{decibels} / {row['ssim']:.3f}"


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
