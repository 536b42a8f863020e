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


def main() -> None:
    """Rewrite the README, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    old = new = readme.read_text()
    tables = {"headline": headline(), "kernels": kernels(), "quality": quality()}
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
