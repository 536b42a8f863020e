"""How often a choice by some prompts keeps its promise for others, from rows of `auto_choice.py`.

    python benchmarks/auto_replay.py benchmarks/results/auto-tiny-sd3.json

Needs no model: the grid's settings with their PSNR for 32 prompts are split by chance, the fastest
setting within the budget is chosen by one part, and judged by the other. Prints, for each number of
prompts tried and each budget: the mean share within it, how often that share was nine in ten or
more, and the speed-up over that of the fastest setting that a grid search on the other part finds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dit_accel.choosing.budget import WORTHWHILE, low_quantile
from dit_accel.choosing.trials import MOST_DB

DRAWS = 300


class Measured(NamedTuple):
    """A setting of the grid."""

    speedup: float
    psnr_db: np.ndarray


def read(path: Path) -> list[Measured]:
    """Return the grid's settings; one that changes nothing has no PSNR."""
    found = []
    for row in json.loads(path.read_text())["rows"]:
        if "grid" in row and "psnr_db" in row:
            psnr_db = np.array([MOST_DB if one is None else one for one in row["psnr_db"]])
            found.append(Measured(row["speedup"], psnr_db))
    return found


def fastest(settings: list[Measured]) -> Measured:
    """Return the fastest one, dense if none is worthwhile."""
    worthwhile = [one for one in settings if one.speedup >= WORTHWHILE]
    dense = Measured(1.0, np.full(len(settings[0].psnr_db) if settings else 32, MOST_DB))
    return max(worthwhile, key=lambda one: one.speedup, default=dense)


def replay(settings: list[Measured], tried: int, budget: float) -> tuple[float, float, float]:
    """Return the mean share within the budget, how often it is kept, and the share of the best."""
    generator = np.random.default_rng(0)
    shares, kept, of_best = [], [], []
    for _ in range(DRAWS):
        order = generator.permutation(len(settings[0].psnr_db))
        ours, others = order[:tried], order[tried:]
        chosen = fastest([s for s in settings if low_quantile(s.psnr_db[ours].tolist()) >= budget])
        best = fastest([s for s in settings if np.mean(s.psnr_db[others] >= budget) >= 0.9])
        shares.append(np.mean(chosen.psnr_db[others] >= budget))
        kept.append(shares[-1] >= 0.9)
        of_best.append(chosen.speedup / best.speedup)
    return float(np.mean(shares)), float(np.mean(kept)), float(np.mean(of_best))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--tried", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--budgets", type=float, nargs="+", default=[25, 30, 35])
    args = parser.parse_args()
    for path in args.files:
        settings = read(path)
        for tried in args.tried:
            for budget in args.budgets:
                share, kept, of_best = replay(settings, tried, budget)
                print(
                    f"{path.stem}, {tried} tried, {budget:g} dB: {share:.1%} within, kept in "
                    f"{kept:.0%} of the draws, {of_best:.2f} of the best fixed setting's speed-up"
                )


if __name__ == "__main__":
    main()
