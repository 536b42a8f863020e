"""How near the cost model's predictions are to the times that it predicts.

    python benchmarks/cost_model.py --models wan2.1-14b flux.1-dev --output cost-model.json
    python benchmarks/cost_model.py --models wan2.1-14b --size toy --device cpu
    python benchmarks/cost_model.py --models tiny-wan --device cpu  # whole generations

Architectures (`dit-accel bench step`'s, random weights, a few layers): one stock forward is timed,
then each method's forward is predicted from it, by the shipped table and by measuring the attention
call alone, and timed. Bundled models: whole generations of one prompt, with a method past the dense
first quarter, and with a cache that reuses at fixed intervals. "off" is predicted / measured - 1.

One JSON, written after each row; rows that it holds are kept.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dit_accel.acceleration import (
    accelerate_pipeline,
    acceleration_report,
    family_of,
    restore_pipeline,
)
from dit_accel.bench.architectures import load_architecture
from dit_accel.bench.measuring import free_memory, guarded, manifest, median_ms
from dit_accel.bench.runs import ResultFile
from dit_accel.calibration import calls_for
from dit_accel.choosing.cost import CostModel, Workload
from dit_accel.choosing.forecast import heads_of
from dit_accel.choosing.settings import Setting, blocks_of
from dit_accel.choosing.times import AttentionTimes, Place
from dit_accel.choosing.trials import Prediction, Trials
from dit_accel.environment import pick_device
from dit_accel.errors import DensityUnreachableError
from dit_accel.generation import GenerationRequest
from dit_accel.models import generation_defaults, list_models, load_pipeline
from dit_accel.registry import resolve_method
from dit_accel.world.worlds import fixed_prompts

Row = dict[str, Any]
METHODS = ("gna", "pisa", "psa", "rectified", "radial")
CACHE = "taylorseer"
SHOWN = ("model", "size", "method", "density", "measured_ms", "off_table", "off_measured", "failed",
         "refused")  # fmt: skip


class Bench:
    """Measures rows; the model of the last one is kept for the next."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, pick_device(args.device)
        self.dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        self._key: Any = None

    def measure(self, task: Mapping[str, Any]) -> Row:
        """Predict and time one forward or one generation."""
        if task["model"] in list_models():
            return self._generation(task)
        return self._forward(task)

    def _forward(self, task: Mapping[str, Any]) -> Row:
        if self._key != (task["model"], task["size"]):
            self._load(task)
        method = resolve_method(task["method"], **task["options"])
        density = task["density"]
        try:
            at = method.at_density(density, self.place.layout)
        except DensityUnreachableError as error:
            density = error.least
            at = method.at_density(density, self.place.layout)
        row: Row = {"dense_ms": self.dense_s * 1e3, "reached": density}
        work = Workload(self.place, self.layers)
        for source, times in (
            ("table", AttentionTimes(measuring=False)),
            ("measured", AttentionTimes(table={})),
        ):
            told = CostModel(work, self.dense_s, times).forward_s(at)
            row[f"predicted_{source}_ms"] = None if told is None else told * 1e3
        given = {"dense_steps": 0, "dense_layers": 0, "min_tokens": 0, "density": density}
        try:
            accelerate_pipeline(self.pipe, method, guard=False, **given)
            self.forward()
            row["measured_ms"] = self._time()
            report = acceleration_report(self.pipe)
            row["block_density"] = report.block_density
            row["operators"] = sorted({call.operator for call in report.calls})
        finally:
            restore_pipeline(self.pipe)
        return row | offs(row)

    def _load(self, task: Mapping[str, Any]) -> None:
        self.pipe = self.inputs = None
        free_memory()
        torch.manual_seed(0)
        model = load_architecture(task["model"]).at(task["size"])
        self.pipe = model.build(self.device, self.dtype, self.args.layers)
        self.inputs = model.inputs(task["size"], self.device, self.dtype)
        family = family_of(self.pipe)
        layout = family.read_inputs(self.pipe.transformer, dict(self.inputs)).layouts[0]
        heads = heads_of(self.pipe.transformer)
        self.place = Place(layout, *heads, 1, self.dtype, torch.device(self.device))
        self.layers = len(family.attention_layers(self.pipe.transformer))
        self.forward()
        self.dense_s = self._time() / 1e3
        self._key = task["model"], task["size"]

    def forward(self) -> Any:
        """Run the transformer once."""
        return self.pipe.transformer(**self.inputs)[0]

    def _time(self) -> float:
        if self.device == "cpu":  # others use the machine, too: the fastest of some runs
            return min(median_ms(self.forward, 1, 0, self.device) for _ in range(self.args.repeats))
        return median_ms(self.forward, self.args.repeats, 1, self.device)

    def _generation(self, task: Mapping[str, Any]) -> Row:
        if self._key != task["model"]:
            self.pipe = load_pipeline(task["model"], device=self.device, dtype=self.dtype)
            self.trials = self._trials(task["model"])
            self._key = task["model"]
        if task["method"] == CACHE:
            setting = Setting((CACHE,), {CACHE: dict(task["options"])})
        else:
            own = {"dense_steps": 0.25, "dense_layers": 0, "min_tokens": 0}
            own |= {"density": task["density"], task["method"]: dict(task["options"])}
            setting = Setting((task["method"],), own)
        runs = []
        for _ in range(self.args.repeats):
            self.trials._points.clear()
            point = self.trials.measure(setting)
            if point is None:
                return {"refused": "; ".join(self.trials.refused.values())}
            runs.append(point)
        point = min(runs, key=lambda run: run.seconds)
        predict = self.trials.predict
        told = predict.model.speedup(None, run=point.blocks_run) if point.blocks_run else None
        told = point.predicted if told is None else told
        dense_ms = self.trials.dense.seconds * 1e3
        row = {
            "dense_ms": dense_ms,
            "blocks_run": point.blocks_run,
            "block_density": point.density,
            "predicted_measured_ms": None if told is None else dense_ms / told,
            "measured_ms": point.seconds * 1e3,
        }
        return row | offs(row)

    def _trials(self, model: str) -> Trials:
        defaults = generation_defaults(model)
        given = {name: getattr(self.args, name) for name in ("steps", "frames", "height", "width")}
        settings = {
            name: getattr(defaults, name) if value is None else value
            for name, value in given.items()
        }
        prompt = fixed_prompts(defaults.world)[0]["prompt"]
        request = GenerationRequest(prompt=prompt, guidance=defaults.guidance, **settings)
        told = Prediction(AttentionTimes())
        trials = Trials(self.pipe, calls_for(self.pipe, [request]), decode=False, predict=told)
        seen = trials.look()
        first = trials.dense.seconds  # which pays for allocations
        for _ in range(self.args.repeats):
            again = trials._generate()
            if again.seconds < trials.dense.seconds:
                trials._dense = again
        dense_s = seen.dense_s * trials.dense.seconds / first
        told.model = CostModel(Workload(seen.place, seen.layers, seen.steps), dense_s, told.times)
        return trials


def offs(row: Row) -> Row:
    """Return how far each prediction is off."""
    return {
        name.replace("predicted", "off").removesuffix("_ms"): value / row["measured_ms"] - 1
        for name, value in row.items()
        if name.startswith("predicted") and value is not None
    }


def tasks_of(args: argparse.Namespace) -> list[Row]:
    """Return what to measure."""
    tasks: list[Row] = []
    for model in args.models:
        generations = model in list_models()
        size = "own" if generations else args.size or next(iter(load_architecture(model).sizes))
        for density in args.density:
            for method in args.methods:
                small = generations or size == "toy"
                options = blocks_of(method, 32) if small else {}
                task = {"model": model, "size": size, "method": method, "density": density}
                tasks.append({**task, "options": options})
        if generations:
            task = {"model": model, "size": size, "method": CACHE, "density": None}
            tasks.append({**task, "options": {"interval": 3}})
    return tasks


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["wan2.1-14b"])
    parser.add_argument("--size", help="of the architectures; each one's first by default")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--density", type=float, nargs="+", default=[0.15, 0.3])
    parser.add_argument("--layers", type=int, default=4, help="of an architecture")
    parser.add_argument("--repeats", type=int, default=3)
    for name in ("steps", "frames", "height", "width"):
        parser.add_argument(f"--{name}", type=int, help="of generations; the model's by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, help="begin no row after this long")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--commit")
    parser.add_argument("--force", action="store_true", help="start the file again")
    args = parser.parse_args()
    started = time.monotonic()
    settings = {name: getattr(args, name) for name in ("layers", "steps", "frames", "height")}
    results = ResultFile("cost_model", manifest(args.commit), settings, args.output, args.force)
    bench = Bench(args)
    with torch.no_grad():
        for task in tasks_of(args):
            if results.has(task):
                continue
            if args.seconds is not None and time.monotonic() - started > args.seconds:
                print("out of time, the rest is left for a later run")
                break
            row = results.add(task, guarded(bench.measure, task))
            keep = (
                "model",
                "size",
                "method",
                "density",
                "measured_ms",
                "off_table",
                "off_measured",
            )
            print({k: row.get(k) for k in (*keep, "failed", "refused") if k in row}, flush=True)
    worst: Row = {}
    for row in results.rows:
        for source in ("table", "measured"):
            if f"off_{source}" in row:
                off = abs(row[f"off_{source}"])
                key = f"{row['model']} {row['size']} {source}"
                worst[key] = round(max(off, worst.get(key, 0.0)), 4)
    print(json.dumps({"largest_error": worst, "within_ten_percent": {
        key: off <= 0.1 for key, off in worst.items()}}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
