"""What HeadHunter's heads are worth on a bundled model, and what a cheaper search loses.

    torchrun --nproc-per-node 15 benchmarks/headhunt.py --model tiny-sd3 --output FILE.json

For general quality and for each style, heads are searched on some prompts without classifier-free
guidance, as published. Strengths of the heads and scales of whole layers (PAG) are then chosen on
the same prompts, with and without classifier-free guidance, from as many values each. Other prompts
say what that was worth: against no guidance and against the best whole layer, paired by prompt and
noise, with bootstrap 95 % intervals. Cheaper searches give up hopeless heads early (successive
halving), and take half of the steps besides.

Pictures are smaller and take fewer steps than the bundled models recommend, because there they
follow nearly everything even without guidance; --size 256 --steps 20 shows that.

Everything is kept in journals beside FILE.json, and done once. One process is enough; more of them
share the candidates and the reading of pictures, which takes most of the time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel import accelerate_pipeline, restore_pipeline
from dit_accel.bench.measuring import manifest
from dit_accel.environment import pick_device
from dit_accel.eval.settings import ModelSettings
from dit_accel.files import write_text
from dit_accel.generation import generate_batch
from dit_accel.guidance.heads import HeadFile
from dit_accel.guidance.softpag import DEFAULT_STRENGTH
from dit_accel.headhunt.heatmap import write_heat_map
from dit_accel.headhunt.hunting import Found, HeadHunt, hunt_heads
from dit_accel.headhunt.objectives import Entry
from dit_accel.headhunt.objectives.drawn import Following, style_and_rest
from dit_accel.headhunt.processes import Processes
from dit_accel.headhunt.search import SearchPlan
from dit_accel.journal import Journal, as_read_back, refuse_other
from dit_accel.models import generation_defaults, load_pipeline
from dit_accel.world.pictures import STYLES
from dit_accel.world.worlds import Marks, sample_prompts, shares_right

Row = dict[str, Any]

GENERAL = "general"
SEARCH_SEED, HELD_OUT_SEED = 1_000, 2_000
SCALE = 3.0
STRENGTHS = (0.25, 0.5, 1.0)
LAYER_SCALES = tuple(SCALE * strength for strength in STRENGTHS)
PARTS = ("following", "style", "rest")
"""What is kept of a picture: all right attributes, whether the style is, and the others."""
DRAWS = 10_000


@dataclass(frozen=True)
class Condition:
    """Prompts generated in one way.

    Attributes:
        target: `GENERAL` or a style; prompts are drawn in it.
        held_out: whether they are others than those of the search.
        guidance: the pipeline's own.
        method: "none", "pag" or "softpag".
        options: of the method.
    """

    target: str
    held_out: bool
    guidance: float
    method: str = "none"
    options: tuple[tuple[str, Any], ...] = ()

    def described(self) -> Row:
        """Return what tells it from others, as JSON gives it back."""
        described: Row = as_read_back({**vars(self), "options": dict(self.options)})
        return described

    def __str__(self) -> str:
        """Return it for a terminal."""
        options = " ".join(f"{name}={value}" for name, value in self.options)
        where = "held out" if self.held_out else "search"
        return f"{self.target}, {where}, guidance {self.guidance:g}: {self.method} {options}"


class Bench:
    """Measures conditions, each once, on all processes."""

    def __init__(self, args: argparse.Namespace, processes: Processes) -> None:
        self.args, self.processes = args, processes
        self.device = processes.device(pick_device(args.device))
        self.settings = ModelSettings(
            model=args.model, steps=args.steps, height=args.size, width=args.size,
            batch=args.batch, device=self.device,
        )  # fmt: skip
        self.defaults = generation_defaults(args.model)
        self.checker = Following(None, self.defaults.world)
        self.checker.load(self.device if args.read_on == "device" else "cpu")
        self.pipe: Any = load_pipeline(args.model, device=self.device)
        self.journal = Journal(args.output.with_suffix(".conditions.jsonl"))
        about = {**self.settings.described(), "guidance": None, "prompts": args.prompts}
        about |= {"held_out": args.held_out, "scale": SCALE}
        rows = self.journal.rows()
        if rows:
            refuse_other(self.journal.path, rows[0]["settings"], as_read_back(about))
        processes.wait()
        if not rows and processes.is_main:
            self.journal.append([{"settings": about}])
        self.known: dict[str, dict[int, Marks]] = {}
        for row in rows[1:]:
            self._keep(row)
        processes.wait()

    def entries(self, condition: Condition) -> list[Entry]:
        """Return a condition's prompts; held-out ones are none of the search."""
        style = None if condition.target == GENERAL else condition.target
        args = self.args
        searched = sample_prompts("pictures", args.prompts, SEARCH_SEED, style)
        if not condition.held_out:
            return searched
        known = {entry["prompt"] for entry in searched}
        drawn = sample_prompts("pictures", args.held_out + len(known), HELD_OUT_SEED, style)
        return [entry for entry in drawn if entry["prompt"] not in known][: args.held_out]

    def measure(self, conditions: Sequence[Condition]) -> list[Row]:
        """Return what each condition's pictures show; those known already are not made again."""
        missing = [
            (condition, i)
            for condition in dict.fromkeys(conditions)
            for i in range(self.args.held_out if condition.held_out else self.args.prompts)
            if i not in self._known(condition)
        ]
        found = []
        for condition, group in groupby(self.processes.share(missing), key=lambda item: item[0]):
            found.append(self._measure(condition, [i for _, i in group]))
            self.journal.append([found[-1]])
        for row in self.processes.gather(found):
            self._keep(row)
        rows = [summary(self._known(condition)) for condition in conditions]
        if self.processes.is_main and missing:
            for condition, row in zip(conditions, rows, strict=True):
                print(f"{condition}: {row_score(condition.target, row):.3f}", flush=True)
        return rows

    def _known(self, condition: Condition) -> dict[int, Marks]:
        return self.known.setdefault(json.dumps(condition.described()), {})

    def _keep(self, row: Row) -> None:
        known = self.known.setdefault(json.dumps(row["condition"]), {})
        known.update(zip(row["prompts"], row["marks"], strict=True))

    @torch.no_grad()
    def _measure(self, condition: Condition, numbers: Sequence[int]) -> Row:
        began = time.perf_counter()
        entries = self.entries(condition)
        first = HELD_OUT_SEED if condition.held_out else SEARCH_SEED
        settings = replace(self.settings, guidance=condition.guidance)
        restore_pipeline(self.pipe)
        if condition.method != "none":
            accelerate_pipeline(self.pipe, condition.method, **dict(condition.options))
        marks = []
        for start in range(0, len(numbers), settings.batch):
            some = numbers[start : start + settings.batch]
            requests = [settings.request(entries[i]["prompt"], first + i) for i in some]
            frames = generate_batch(self.pipe, requests).frames.float()
            marks += self.checker.marks(frames, [entries[i] for i in some])
        restore_pipeline(self.pipe)
        for mark in marks:
            del mark["seen"]
        row: Row = {"condition": condition.described(), "prompts": list(numbers), "marks": marks}
        return row | {"spent_s": round(time.perf_counter() - began, 2)}


def summary(marks: dict[int, Marks]) -> Row:
    """Return `PARTS` of each prompt in order, and the shares of right attributes over all."""
    ordered = [marks[i] for i in sorted(marks)]
    parts = [(shares_right([mark])["all"], *style_and_rest(mark)) for mark in ordered]
    shares = {k: v for k, v in shares_right(ordered).items() if k not in ("all", "attributes")}
    return {**dict(zip(PARTS, map(list, zip(*parts, strict=True)), strict=True)), "shares": shares}


def scores(target: str, row: Row) -> np.ndarray:
    """Return the objective of each prompt, as the search has it."""
    if target == GENERAL:
        return np.asarray(row["following"])
    return (np.asarray(row["style"]) + np.asarray(row["rest"])) / 2


def row_score(target: str, row: Row) -> float:
    """Return the mean of `scores`."""
    return float(scores(target, row).mean())


def search(bench: Bench, target: str, name: str, plan: SearchPlan, steps: int) -> Found:
    """Search heads for a target, going on with what the journal of these steps holds."""
    args = bench.args
    hunt = HeadHunt(
        model=args.model,
        objective="following" if target == GENERAL else f"style:{target}",
        steps=steps, height=args.size, width=args.size, guidance=1.0, batch=args.batch,
        count=args.prompts, first_seed=SEARCH_SEED, plan=plan, strength=args.strength, scale=SCALE,
        device=bench.device,
    )  # fmt: skip
    objective = hunt.make_objective()
    objective.load(bench.device if args.read_on == "device" else "cpu")
    journal = args.output.with_suffix(f".{target}.{steps}.jsonl")
    found = hunt_heads(
        bench.pipe, hunt, objective=objective, journal=journal, processes=bench.processes
    )
    if bench.processes.is_main:
        gain = found.search.best.score - found.search.plain
        print(f"{target}, {name}: {found.search.heads} {gain:+.3f}, {found.seconds:.0f} s")
    return found


def tune(bench: Bench, target: str, found: Found, guidance: float) -> dict[str, Condition]:
    """Return no guidance, and the best layer and strength of heads on the search's prompts."""
    layers = [
        Condition(target, False, guidance, "pag", (("layers", (layer,)), ("scale", scale)))
        for layer in range(found.model["layers"])
        for scale in LAYER_SCALES
    ]
    heads = [
        Condition(target, False, guidance, "softpag", heads_options(found, strength))
        for strength in STRENGTHS
    ]
    none = Condition(target, False, guidance)
    rows = bench.measure([none, *layers, *heads])
    value = dict(
        zip([none, *layers, *heads], (row_score(target, row) for row in rows), strict=True)
    )
    return {
        "none": none,
        "layer": max(layers, key=value.__getitem__),
        "heads": max(heads, key=value.__getitem__),
    }


def heads_options(found: Found, strength: float) -> tuple[tuple[str, Any], ...]:
    """Return the options of `softpag` with the heads of a search."""
    return (("heads", found.search.heads), ("strength", strength), ("scale", SCALE))


def held_out(bench: Bench, target: str, guidance: float, chosen: dict[str, Condition]) -> Row:
    """Return what conditions chosen on the search's prompts are worth on others."""
    conditions = {name: replace(c, held_out=True) for name, c in chosen.items()}
    rows = dict(zip(conditions, bench.measure(list(conditions.values())), strict=True))
    result: Row = {"guidance": guidance, "prompts": len(rows["none"]["style"])}
    result["conditions"] = {
        name: {
            "method": conditions[name].method,
            "options": dict(conditions[name].options),
            "score": row_score(target, row),
            **{part: float(np.mean(row[part])) for part in PARTS},
            "shares": row["shares"],
        }
        for name, row in rows.items()
    }
    searched = [name for name in rows if name not in ("none", "layer")]
    pairs = [
        ("layer", "none"),
        *((name, other) for name in searched for other in ("none", "layer")),
    ]
    result["gains"] = {
        f"{name} over {other}": compared(target, rows[name], rows[other]) for name, other in pairs
    }
    return result


def compared(target: str, row: Row, other: Row) -> Row:
    """Return mean differences, paired by prompt, with bootstrap 95 % intervals."""
    found: Row = {}
    for part in ("score", *PARTS):
        one, two = (
            scores(target, r) if part == "score" else np.asarray(r[part]) for r in (row, other)
        )
        picks = np.random.default_rng(0).integers(len(one), size=(DRAWS, len(one)))
        low, high = np.percentile((one - two)[picks].mean(1), [2.5, 97.5])
        found[part] = {
            "mean": float((one - two).mean()),
            "interval": [float(low), float(high)],
            "better": int((one > two).sum()),
            "worse": int((one < two).sum()),
        }
    return found


def agreement(full: Found, cheap: Found, full_steps: int, cheap_steps: int) -> Row:
    """Return how alike two searches are, and what the cheap one saves."""
    gains = [{t.head: t.gain for t in f.search.rounds[0].trials} for f in (full, cheap)]
    heads = sorted(gains[0])
    ranks = [np.argsort(np.argsort([g[head] for head in heads])) for g in gains]
    common = set(full.search.heads) & set(cheap.search.heads)
    cost = cheap.search.generations * cheap_steps / (full.search.generations * full_steps)
    return {
        "heads": cheap.search.heads,
        "heads_of_full": full.search.heads,
        "in_common": len(common),
        "same_first_head": cheap.search.heads[0] == full.search.heads[0],
        "rank_correlation_round_1": float(np.corrcoef(ranks)[0, 1]),
        "cost": cost,
        "generations": cheap.search.generations,
        "steps": cheap_steps,
    }


def run_target(bench: Bench, target: str) -> Row:
    """Search, tune and measure one target."""
    args = bench.args
    plan = SearchPlan(rounds=args.rounds, per_round=args.per_round)
    halved = replace(plan, halving=max(1, args.prompts // 4))
    began = time.perf_counter()
    full = search(bench, target, "full", plan, args.steps)
    cheap = {"halving": (search(bench, target, "halving", halved, args.steps), args.steps)}
    if target in args.fewer_steps:
        name, steps = "halving, half the steps", max(1, args.steps // 2)
        cheap[name] = search(bench, target, name, halved, steps), steps
    result: Row = {
        "target": target,
        "heads": full.search.heads,
        "rounds": [[one.chosen, one.score] for one in full.search.rounds],
        "plain_score": full.search.plain,
        "generations": full.search.generations,
        "cheap": {name: agreement(full, one, args.steps, s) for name, (one, s) in cheap.items()},
        "held_out": [],
    }
    own = bench.defaults.guidance or 1.0
    chosen = {}
    for guidance in dict.fromkeys((1.0, own)):
        chosen = tune(bench, target, full, guidance)
        if guidance == 1.0:
            strength = dict(chosen["heads"].options)["strength"]
            for name, (one, _) in cheap.items():
                if set(one.search.heads) != set(full.search.heads):
                    options = heads_options(one, strength)
                    chosen[name] = Condition(target, False, guidance, "softpag", options)
        result["held_out"].append(held_out(bench, target, guidance, chosen))
    if args.heads and bench.processes.is_main:
        ship(args.heads, target, full, dict(chosen["heads"].options), result["held_out"])
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def ship(folder: Path, target: str, found: Found, options: Row, effect: list[Row]) -> None:
    """Write a set of heads with the strength chosen at the model's own guidance, and its effect."""
    file = found.head_file()
    measured = [
        {"guidance": one["guidance"], "prompts": one["prompts"], "gains": one["gains"]}
        for one in effect
    ]
    HeadFile(
        file.heads, file.model, file.perturbation, file.scope,
        options["strength"], options["scale"], {**file.found, "held_out": measured},
    ).write(folder / f"{target}.json")  # fmt: skip
    write_heat_map(found, folder / f"{target}.png")


def lines(result: Row) -> list[str]:
    """Return a target's result for a terminal."""
    found = [f"{result['target']}: heads {result['heads']}"]
    for one in result["held_out"]:
        values = ", ".join(f"{n} {c['score']:.3f}" for n, c in one["conditions"].items())
        found.append(f"  guidance {one['guidance']:g}, {one['prompts']} prompts: {values}")
        for name, gain in one["gains"].items():
            low, high = gain["score"]["interval"]
            found.append(f"    {name}: {gain['score']['mean']:+.3f} ({low:+.3f} to {high:+.3f})")
    for name, one in result["cheap"].items():
        found.append(
            f"  {name}: {one['cost']:.2f} of the cost, {one['in_common']} heads in common, rank "
            f"correlation {one['rank_correlation_round_1']:.2f}"
        )
    return found


def brief(results: Sequence[Row]) -> Row:
    """Return the gains of the heads with their intervals, by target and guidance."""
    found: Row = {}
    for result in results:
        for one in result["held_out"]:
            gains = {name: gain["score"] for name, gain in one["gains"].items() if "heads" in name}
            found[f"{result['target']}, guidance {one['guidance']:g}"] = {
                name: [round(gain["mean"], 4), *(round(x, 4) for x in gain["interval"])]
                for name, gain in gains.items()
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-sd3")
    targets = (GENERAL, *STYLES[1:])
    parser.add_argument("--targets", nargs="+", default=list(targets), choices=targets)
    parser.add_argument("--prompts", type=int, default=24, help="to search with")
    parser.add_argument("--held-out", type=int, default=64, help="prompts to measure with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-round", type=int, default=1)
    parser.add_argument("--strength", type=float, default=DEFAULT_STRENGTH, help="in the search")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--size", type=int, default=192, help="pixels a side")
    parser.add_argument(
        "--fewer-steps",
        nargs="*",
        default=[GENERAL],
        choices=targets,
        metavar="TARGET",
        help="targets of the search with half of the steps",
    )
    parser.add_argument("--batch", type=int, default=64, help="prompts at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--read-on", default="cpu", choices=("cpu", "device"))
    parser.add_argument("--heads", type=Path, help="folder for the sets of heads")
    parser.add_argument("--output", type=Path, required=True, help="a .json")
    parser.add_argument("--commit")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.heads:
        args.heads.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    processes = Processes()
    bench = Bench(args, processes)
    results = []
    for target in args.targets:
        results.append(run_target(bench, target))
        if not processes.is_main:
            continue
        content = {
            "manifest": manifest(args.commit),
            "settings": {**bench.settings.described(), "guidance": None},
            "search": {
                "prompts": args.prompts,
                "rounds": args.rounds,
                "per_round": args.per_round,
                "strength": args.strength,
                "scale": SCALE,
            },
            "processes": processes.count,
            "seconds": round(time.perf_counter() - began, 1),
            "targets": results,
        }
        write_text(args.output, json.dumps(content, indent=1, allow_nan=False) + "\n")
        print("\n".join(lines(results[-1])), flush=True)
    if processes.is_main:
        print(json.dumps({"seconds": content["seconds"], "gains": brief(results)}))


if __name__ == "__main__":
    main()
