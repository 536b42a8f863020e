"""How often a choice by some prompts keeps its promise for others, from rows of `auto_choice.py`.

    python benchmarks/auto_replay.py benchmarks/results/auto-tiny-sd3.json

Needs no model: the grid's settings with their PSNR for 32 prompts are split by chance, the search
of ``method="auto"`` runs on one part, and what it chooses is judged by the other. Pairs that are
not in the grid count as not to be run. With ``--count-blocks`` a setting's speed-up is that of the
block calls that it spared, which no other program on the machine changes; attention settings spare
none. Prints, for each number of prompts tried and each budget: the mean share within it, how often
that share was nine in ten or more, the speed-up over that of the fastest setting that a grid search
on the other part finds, how many settings were tried, and how many generations that took where
prompts are generated one by one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_accel.choosing.budget import WORTHWHILE, Budget
from dit_accel.choosing.choice import Point, choose
from dit_accel.choosing.search import Search
from dit_accel.choosing.settings import Line, Setting
from dit_accel.choosing.trials import MOST_DB
from dit_accel.registry import method_class

DRAWS = 300


class Measured(NamedTuple):
    """A setting of the grid."""

    setting: Setting
    speedup: float
    psnr_db: np.ndarray


def read(path: Path, count_blocks: bool = False) -> dict[str, Measured]:
    """Return the grid's settings by their keys; one that changes nothing has no PSNR.

    Args:
        path: a file of `auto_choice.py`.
        count_blocks: whether speed-ups are those in block calls.
    """
    found = {}
    for row in json.loads(path.read_text())["rows"]:
        if "grid" in row and "psnr_db" in row:
            setting = Setting(tuple(row["grid"]["methods"]), row["grid"]["options"])
            psnr_db = np.array([MOST_DB if one is None else one for one in row["psnr_db"]])
            speedup = 1 / (row["blocks_run"] or 1.0) if count_blocks else row["speedup"]
            found[setting.key] = Measured(setting, speedup, psnr_db)
    return found


def lines(grid: Mapping[str, Measured]) -> list[Line]:
    """Return the lines that single methods of the grid lie on."""
    found: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for one in grid.values():
        if len(one.setting.methods) == 1:
            (name,), options = one.setting.methods, dict(one.setting.options)
            own = dict(options.pop(name))
            attention = method_class(name).kind == "attention"
            knob = "density" if attention else getattr(method_class(name), "strength", "")
            value = (options if attention else own).pop(knob)
            line = {"method": name, "knob": knob, "own": own, "general": options}
            found.setdefault(json.dumps(line, sort_keys=True), (line, []))[1].append(value)
    return [
        Line(values=tuple(sorted(values, reverse=line["knob"] == "density")), **line)
        for line, values in found.values()
    ]


def replay(grid: Mapping[str, Measured], tried: int, target: float) -> tuple[float, ...]:
    """Return how often it is kept, and means of: share within, of best, trials, generations."""
    generator = np.random.default_rng(0)
    budget, on = Budget(min_psnr=target), lines(grid)
    shares: list[float] = []
    of_best: list[float] = []
    trials: list[int] = []
    generations: list[int] = []
    for _ in range(DRAWS):
        order = generator.permutation(len(next(iter(grid.values())).psnr_db))
        ours, others = order[:tried], order[tried:]

        def measure(setting: Setting, to_beat: float, ours: Any = ours) -> Point | None:
            one = grid.get(setting.key)
            if one is None:
                return None
            psnr_db = one.psnr_db[ours].tolist()
            for ran in range(1, tried + 1):
                if budget.hopeless(psnr_db[:ran], [], one.speedup, tried, to_beat):
                    break
            return Point(setting, 1.0, one.speedup, tuple(psnr_db[:ran]), (0.0,) * ran)

        search = Search(budget, on, measure, lambda setting: None)
        chosen = choose(search.run(), budget, {}, []).chosen
        good = [one for one in grid.values() if np.mean(one.psnr_db[others] >= target) >= 0.9]
        best = max([one.speedup for one in good if one.speedup >= WORTHWHILE], default=1.0)
        reached = (
            np.full(1, MOST_DB) if chosen is None else grid[chosen.setting.key].psnr_db[others]
        )
        shares.append(float(np.mean(reached >= target)))
        of_best.append((1.0 if chosen is None else chosen.speedup) / best)
        trials.append(len(search.points))
        generations.append(sum(len(point.psnr_db) for point in search.points))
    kept = np.mean([share >= 0.9 for share in shares])
    return float(kept), *(float(np.mean(of)) for of in (shares, of_best, trials, generations))


def main() -> None:
    """Replay and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--tried", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--budgets", type=float, nargs="+", default=[25, 30, 35])
    parser.add_argument("--count-blocks", action="store_true", help="speed-ups in block calls")
    args = parser.parse_args()
    for path in args.files:
        grid = read(path, args.count_blocks)
        for tried in args.tried:
            for budget in args.budgets:
                kept, share, of_best, trials, generations = replay(grid, tried, budget)
                print(
                    f"{path.stem}, {tried} tried, {budget:g} dB: {share:.1%} within, kept in "
                    f"{kept:.0%} of the draws, {of_best:.2f} of the best fixed setting's speed-up, "
                    f"{trials:.0f} settings, {generations:.0f} generations"
                )


if __name__ == "__main__":
    main()
