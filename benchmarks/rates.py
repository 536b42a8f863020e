"""Make `dit_accel/choosing/rates.json`, the cost model's table, from `benchmarks/results`.

    python benchmarks/rates.py

Fits the four coefficients of `choosing.times` to the rows of the methods benchmark, and those of
dense attention to the kernel benchmark, all relative errors counting alike. Prints how far the fits
are from their rows.
"""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
OUTPUT = Path(__file__).parents[1] / "dit_accel/choosing/rates.json"
NAMES = ("fixed_s", "per_token_s", "per_block_pair_s", "per_pair_s")
BLOCKS = {"pisa": 64}
"""Tokens per block where it is not 128."""
METHODS, DENSE = "methods-h200.json", "kernel-h100.json"
CARDS = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
"""They have the same multiprocessors, and attention waits for these and not for memory: dense
attention took up to 3 % longer on the H200."""
LONG = 16_000
"""Tokens from which the table serves."""


def fit(rows: list[tuple[list[float], float]]) -> tuple[np.ndarray, float]:
    """Return non-negative coefficients with the least relative error, and the worst error left."""
    features = np.array([[one / seconds for one in of] for of, seconds in rows])
    best, found = math.inf, np.zeros(features.shape[1])
    columns = range(features.shape[1])
    for count in range(1, features.shape[1] + 1):
        for chosen in combinations(columns, count):
            part = features[:, chosen]
            scale = part.max(0)
            values = np.linalg.lstsq(part / scale, np.ones(len(rows)), rcond=None)[0] / scale
            error = float(((part @ values - 1) ** 2).sum())
            if (values >= 0).all() and error < best - 1e-9:
                best, found = error, np.zeros(features.shape[1])
                found[list(chosen)] = values
    return found, float(np.abs(features @ found - 1).max())


def features(tokens: int, heads: int, head_size: int, density: float, block: int) -> list[float]:
    """Return what the coefficients are multiplied with."""
    blocks = math.ceil(tokens / block)
    return [1.0, tokens * heads, blocks**2 * heads, density * tokens**2 * head_size * heads]


def method_rows(name: str) -> dict[str, list[tuple[list[float], float]]]:
    """Return features and seconds of each method with its own options."""
    content = json.loads((RESULTS / name).read_text())
    heads, size = content["heads"], content["head_size"]
    found: dict[str, list[tuple[list[float], float]]] = {}
    for row in content["rows"]:
        method = row["method"]
        if "total_ms" in row and "," not in method:  # a comma: an option that is not the default
            block = BLOCKS.get(method, 128)
            what = features(row["tokens"], heads, size, row["achieved_density"], block)
            found.setdefault(method, []).append((what, row["total_ms"] / 1e3))
    return found


def kernel_rows(name: str, head_size: int) -> list[tuple[list[float], float]]:
    """Return features and seconds of cuDNN's dense attention."""
    content = json.loads((RESULTS / name).read_text())
    heads = content["settings"]["heads"]
    return [
        (features(row["tokens"], heads, head_size, 1.0, 128), row["ms"] / 1e3)
        for row in content["rows"]
        if row["contender"] == "cudnn" and row["head_size"] == head_size and "ms" in row
        and row["dtype"] == "bfloat16" and row["tokens"] >= LONG
    ]  # fmt: skip


def main() -> None:
    """Fit and write."""
    table = {}
    for name, rows in ({"dense": kernel_rows(DENSE, 128)} | method_rows(METHODS)).items():
        values, worst = fit(rows)
        table[name] = dict(zip(NAMES, (float(f"{v:.4g}") for v in values), strict=True))
        print(f"{name:20s} {len(rows)} rows, at most {worst:.1%} off")
    slower = np.mean([s / predicted(table["dense"], what) for what, s in kernel_rows(DENSE, 64)])
    card = {
        "made_from": [METHODS, DENSE],
        "head_sizes": {"128": 1.0, "64": round(float(slower), 4)},
        "methods": table,
    }
    OUTPUT.write_text(json.dumps({"cards": dict.fromkeys(CARDS, card)}, indent=1) + "\n")


def predicted(row: dict[str, float], what: list[float]) -> float:
    """Return the seconds of one row's features."""
    return sum(row[name] * one for name, one in zip(NAMES, what, strict=True))


if __name__ == "__main__":
    main()
