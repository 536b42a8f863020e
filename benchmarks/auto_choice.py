"""Whether ``method="auto"`` keeps its promise: held-out prompts within the budget, and how fast.

    python benchmarks/auto_choice.py --models tiny-wan tiny-hunyuan tiny-flux tiny-sd3

For budgets of 25, 30 and 35 dB: settings are tried on a few prompts, one is chosen, and 32 prompts
that took no part are generated with it. "within" is the share of these that reach the budget; at
least nine in ten are promised. The fixed prompts stand in order of what they hold, so that those
tried and those held out are every second one each: both hold some of everything. They are generated
one by one: a cache that decides by what it sees decides for a batch as a whole, so that its prompts
would tell no more than one. Beside it the best fixed setting that a grid search finds on the
held-out prompts themselves: the fastest with nine in ten within the budget, over every method at
every value of a coarse grid, and over pairs of an attention method and a cache. A method whose
strongest value isn't faster than dense is left at that. Speed-ups are of the denoising loop, dense
and accelerated warmed up alike; what is compared at the end, the choice and the fastest of the grid
that keep to the budget, is timed once more in turns, for on short loops the fastest of many
measurements is mostly the luckiest.

One JSON file a model, written after each row; rows that it holds are kept, so that ``--seconds``
ends a run early and a later one goes on: the calibrations and their held-out runs come first, then
the grid, and the comparison.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shared import Prompts, Row, add_machine_and_files, add_sizes, load, options_of

from dit_accel import accelerate_pipeline, restore_pipeline
from dit_accel.bench.measuring import guarded, manifest
from dit_accel.bench.runs import ResultFile
from dit_accel.calibration import PipelineCall, calls_for, generators
from dit_accel.choosing.automatic import lines_for
from dit_accel.choosing.budget import WORTHWHILE, Budget
from dit_accel.choosing.choice import Point, choose
from dit_accel.choosing.cost import CostModel, Workload
from dit_accel.choosing.search import Search
from dit_accel.choosing.settings import Setting, together
from dit_accel.choosing.times import AttentionTimes
from dit_accel.choosing.trials import Prediction, Trials
from dit_accel.environment import pick_device
from dit_accel.errors import OptionError
from dit_accel.generation import timed_call

BUDGETS = (30.0, 25.0, 35.0)
PROMISED = 0.9
PAIRS = 12
"""Pairs of the grid that are measured for each budget: the fastest that may keep to it."""
CONTENDERS, ROUNDS, TIMED = 2, 3, 4
"""Settings of the grid that are timed once more for each budget, the fastest and those that run the
fewest blocks; in how many rounds, and on how many prompts."""


class ModelBench:
    """Calibrates on some prompts of a model and measures settings on others."""

    def __init__(self, model: str, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.device = pick_device(args.device)
        prompts = Prompts.of(model, args)
        self.tried = spread(prompts.requests[1::2], args.tried)
        self.held_out = spread(prompts.requests[::2], args.prompts)
        self.settings = {
            **prompts.settings,
            "tried": args.tried,
            "held_out": args.prompts,
            "alternating": True,
            "batch": 1,
            "dtype": args.dtype,
        }
        self._pipe: Any = None
        self._trials: dict[str, Trials] = {}
        self._generated = 0

    @property
    def pipe(self) -> Any:
        """The pipeline, loaded when first needed."""
        if self._pipe is None:
            self._pipe = load(self.model, self.args.dtype, self.device)
        return self._pipe

    def trials(self, name: str) -> Trials:
        """Return the trials on the "tried" or the "held_out" prompts."""
        if name not in self._trials:
            told, calls = Prediction(AttentionTimes()), calls_for(self.pipe, getattr(self, name))
            trials = Trials(self.pipe, calls, predict=told, progress=self._count)
            seen = trials.look()
            work = Workload(seen.place, seen.layers, seen.steps)
            told.model = CostModel(work, seen.dense_s, told.times)
            self._trials[name] = trials
        return self._trials[name]

    def _count(self, what: str, done: int, total: int) -> None:
        self._generated += 1

    def lines(self) -> list[Any]:
        """Return what is chosen from, by "auto" and by the grid search alike."""
        layout = self.trials("held_out").look().place.layout
        return lines_for(self.pipe, ["auto"], layout, {}, {})

    def choose(self, task: Mapping[str, Any]) -> Row:
        """Calibrate for a budget, choose, and generate the held-out prompts so."""
        budget, trials = Budget(min_psnr=task["budget"]), self.trials("tried")
        before, generated = len(trials.points), self._generated
        began, trials.hopeless = time.monotonic(), budget.hopeless
        search = Search(budget, self.lines(), trials.measure, trials.predict)
        choice = choose(search.run(), budget, {**trials.refused, **search.idle}, [])
        row: Row = {
            "calibration_s": round(time.monotonic() - began, 1),
            "trials": len(search.points),
            "new_trials": len(trials.points) - before,
            "generations": self._generated - generated,
            "why": choice.why,
            "frontier": [str(point) for point in choice.frontier],
            "not_run": dict(choice.refused),
        }
        if choice.chosen is None:
            return row | {"setting": None, "speedup": 1.0, "within": 1.0}
        row |= {"setting": asdict(choice.chosen.setting), "tried": _row(choice.chosen)}
        return row | self.held(choice.chosen.setting, task["budget"])

    def held(self, setting: Setting, budget: float | None = None) -> Row:
        """Generate the held-out prompts with a setting."""
        point = self.trials("held_out").measure(setting)
        if point is None:
            raise OptionError(f"{setting} does not run here")
        within = None if budget is None else share_within(point.psnr_db, budget)
        return {**_row(point), "within": within}

    def grid(self, task: Mapping[str, Any]) -> Row:
        """Measure a setting of the grid on the held-out prompts."""
        return self.held(_setting(task["grid"]))

    def compare(self, task: Mapping[str, Any], rows: list[Row]) -> Row:
        """Time what was chosen for a budget in turns with the fastest of the grid within it."""
        budget = task["compared"]
        (chosen,) = (row for row in rows if row.get("budget") == budget)
        good = keeping_to(budget, rows)
        fastest = sorted(good, key=lambda row: -row["speedup"])[:CONTENDERS]
        leanest = sorted(good, key=lambda row: row["blocks_run"] or 1.0)[:CONTENDERS]
        told = [row["grid"] for row in fastest + leanest]
        if chosen.get("setting") is not None:
            told.append(chosen["setting"])
        settings = {str(setting): setting for setting in map(_setting, told)}
        return {"chosen": chosen.get("name"), "speedups": self.in_turns(settings)}

    def in_turns(self, settings: Mapping[str, Setting]) -> dict[str, float]:
        """Return the speed-ups of settings, by the shortest time that each prompt ever took.

        What else a machine does only adds to a time.
        """
        calls = calls_for(self.pipe, spread(self.held_out, min(TIMED, len(self.held_out))))
        times: dict[str, list[list[float]]] = {name: [] for name in ("dense", *settings)}
        for _ in range(ROUNDS):
            for name, of_setting in times.items():
                if name in settings:
                    setting = settings[name]
                    accelerate_pipeline(self.pipe, list(setting.methods), **setting.options)
                try:
                    of_setting.append(self._loops_s(calls))
                finally:
                    restore_pipeline(self.pipe)
        dense_s, *others = (sum(map(min, zip(*each, strict=True))) for each in times.values())
        return {name: round(dense_s / s, 4) for name, s in zip(settings, others, strict=True)}

    def _loops_s(self, calls: Sequence[PipelineCall]) -> list[float]:
        """Return the seconds of the calls' denoising loops, warmed up."""
        seconds = []
        for call in ({**calls[0], "num_inference_steps": 2}, *calls):
            arguments = {k: v for k, v in call.items() if k not in ("generator", "output_type")}
            noise = generators(call["generator"])
            _, clock = timed_call(self.pipe, arguments, noise, output_type="latent")
            seconds.append(clock.denoise_s)
        return seconds[1:]


def _row(point: Point) -> Row:
    return {
        "name": str(point.setting),
        "speedup": point.speedup,
        "predicted": point.predicted,
        "density": point.density,
        "blocks_run": point.blocks_run,
        "psnr_db": [round(one, 3) for one in point.psnr_db],
        "mean_error": point.mean_error,
        "seconds": point.seconds,
    }


def keeping_to(budget: float, rows: list[Row]) -> list[Row]:
    """Return the rows of the grid that keep to a budget and are faster than dense."""
    grid = [row for row in rows if "grid" in row and "psnr_db" in row]
    fast = [row for row in grid if row["speedup"] >= WORTHWHILE]
    return [row for row in fast if share_within(row["psnr_db"], budget) >= PROMISED]


def share_within(psnr_db: Any, budget: float) -> float:
    """Return the share of prompts that reach a budget."""
    return sum(one >= budget for one in psnr_db) / len(psnr_db)


def spread(requests: Sequence[Any], count: int) -> list[Any]:
    """Return ``count`` of the requests, evenly spaced.

    Raises:
        OptionError: if there are not so many.
    """
    if not 1 <= count <= len(requests):
        raise OptionError(f"{count} prompts can't be had: there are {len(requests)} of a kind.")
    return [requests[index * len(requests) // count] for index in range(count)]


def singles(bench: ModelBench, rows: list[Row], offset: int | None) -> Iterator[Setting]:
    """Yield a part of the grid of single methods.

    That is each one's strongest value, and with an offset every fourth of those methods whose
    strongest value pays: what is weaker is slower.
    """
    trials = bench.trials("held_out")
    speedups = {_setting(row["grid"]).key: row["speedup"] for row in rows if "psnr_db" in row}
    for line in bench.lines():
        strongest = line.at(-1)
        told = speedups.get(strongest.key, trials.predict(strongest))
        if told is not None and told < WORTHWHILE:
            continue
        if offset is None:
            yield strongest
        else:
            yield from (line.at(index) for index in range(offset, len(line.values), 4))


def _setting(told: Mapping[str, Any]) -> Setting:
    return Setting(tuple(told["methods"]), told["options"])


def pairs(rows: list[Row], budget: float) -> list[Setting]:
    """Return the pairs that may be the fastest within a budget, by what their members did alone."""
    found: dict[str, list[Row]] = {"attention": [], "cache": []}
    for row in rows:
        if "grid" in row and "psnr_db" in row and len(row["grid"]["methods"]) == 1:
            kind = "attention" if "density" in row["grid"]["options"] else "cache"
            if row["speedup"] >= WORTHWHILE:
                found[kind].append(row)
    expected = []
    for one in found["attention"]:
        for other in found["cache"]:
            both = zip(one["psnr_db"], other["psnr_db"], strict=True)
            psnr = [-10 * math.log10(10 ** (-a / 10) + 10 ** (-b / 10)) for a, b in both]
            if share_within(psnr, budget - 1) >= PROMISED:
                expected.append((one["speedup"] * other["speedup"], one["grid"], other["grid"]))
    expected.sort(key=lambda pair: -pair[0])
    made = [list(map(_setting, pair[1:])) for pair in expected]
    return [together(*pair) for pair in made[:PAIRS]]


def measure_model(model: str, args: argparse.Namespace) -> Row:
    """Make the missing rows of one model and return all of its file."""
    started = time.monotonic()
    bench, name = ModelBench(model, args), Path(model).name
    output = args.output / f"auto-{name}.json"
    about = manifest(args.commit)
    results = ResultFile("auto", about, bench.settings, output, args.force)
    results.content["model"] = name

    def run(measure: Any, task: Row) -> bool:
        if results.has(task):
            return True
        if args.seconds is not None and time.monotonic() - started > args.seconds:
            print(f"{name}: out of time, the rest is left for a later run")
            return False
        row = results.add(task, guarded(measure, task))
        print(name, line(row), flush=True)
        return True

    todo = [(bench.choose, {"budget": budget}) for budget in args.budgets]
    if not all(run(*task) for task in todo):
        return results.content
    for stage in () if args.no_grid else (None, 0, 2, "pairs", 1, 3):
        settings: list[Setting] = []
        if isinstance(stage, str):
            for budget in args.budgets:
                settings += pairs(results.rows, budget)
        else:
            settings += singles(bench, [row for row in results.rows if "grid" in row], stage)
        for setting in settings:
            # As it reads back from the file, so that a later run knows it.
            if not run(bench.grid, {"grid": json.loads(json.dumps(asdict(setting)))}):
                return results.content
    for budget in args.budgets:
        if not run(partial(bench.compare, rows=results.rows), {"compared": budget}):
            return results.content
    return results.content


def line(row: Row) -> str:
    """One row for a terminal."""
    budget = row.get("budget", row.get("compared"))
    text = "grid" if budget is None else f"{budget:g} dB"
    for trouble in ("refused", "failed"):
        if isinstance(row.get(trouble), str):
            return f"{text} {trouble}: {row[trouble]}"
    if "speedups" in row:
        return f"{text}, in turns: {row['speedups']}"
    if row.get("setting", True) is None:
        return f"{text}: {row['why']}"
    low = sorted(row["psnr_db"])[len(row["psnr_db"]) // 10]
    share = "" if row["within"] is None else f", {row['within']:.0%} within"
    return f"{text}: {row['name']}: {row['speedup']:.2f}x, nine in ten over {low:.1f} dB{share}"


def summary(contents: list[Row]) -> Row:
    """Return for each model and budget the share within, the speed-up and the grid's best."""
    found: Row = {}
    for content in contents:
        compared = {row["compared"]: row for row in content["rows"] if "speedups" in row}
        for row in content["rows"]:
            if "budget" not in row or "within" not in row:
                continue
            of_model = found.setdefault(content["model"], {})
            of_model[f"{row['budget']:g}"] = {
                "chosen": row.get("name", "dense"),
                "within": row["within"],
                "promise_kept": row["within"] >= PROMISED,
                "speedup": round(row["speedup"], 3),
                "generations": row["generations"],
                **_beside(row, content["rows"], compared.get(row["budget"])),
            }
    return found


def _beside(row: Row, rows: list[Row], compared: Row | None) -> Row:
    """Return the best of the grid for a budget, timed in turns with what was chosen."""
    if compared is None:
        return {}
    speedups = compared["speedups"]
    good = {str(_setting(each["grid"])) for each in keeping_to(row["budget"], rows)}
    best = max(good & set(speedups), key=lambda name: speedups[name], default=None)
    best_speedup = speedups[best] if best else 1.0
    speedup = speedups.get(row.get("name"), 1.0)
    return {
        "in_turns": speedup,
        "best_of_grid": best,
        "best_in_turns": best_speedup,
        "of_best": round(speedup / best_speedup, 3),
        "grid_rows": sum("grid" in each and "psnr_db" in each for each in rows),
    }


def main() -> None:
    """Measure and write."""
    parser = options_of(__doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS), help="dB")
    parser.add_argument("--prompts", type=int, default=32, help="held out, at most 32")
    parser.add_argument("--tried", type=int, default=16, help="at most 32")
    parser.add_argument("--no-grid", action="store_true", help="go no further with the grid")
    parser.add_argument("--seconds", type=float, help="begin no row of a model after this long")
    add_sizes(parser)
    add_machine_and_files(parser, dtype="float32")
    args = parser.parse_args()
    with torch.no_grad():
        contents = list(map(partial(measure_model, args=args), args.models))
    print(json.dumps(summary(contents), indent=1))


if __name__ == "__main__":
    main()
