"""How near the cost model's predictions are to the times that it predicts.

    python benchmarks/cost_model.py --models wan2.1-14b flux.1-dev --output cost-model.json
    python benchmarks/cost_model.py --models tiny-wan tiny-flux wan2.1-14b --size toy --device cpu

Steps: of architectures (`dit-accel bench step`'s, random weights, a few layers) and of bundled
models one dense forward is timed, each method's forward is predicted from it, by the shipped table
and by measuring the attention call alone, and timed, with the quality guard and without. Dense is
the accelerated pipeline in its dense steps, as `accelerate_pipeline` finds it; the stock forward
stands beside it. The guard is let find nothing wrong: what it would repair can't be foretold.

Generations of bundled models: one prompt, with the first method past the dense first quarter, and
with a cache that reuses at fixed intervals.

"off" is predicted / measured - 1. What belongs together takes turns for some rounds, of which the
fastest count on a CPU, the median on a GPU. On a CPU with one thread (OMP_NUM_THREADS=1) times are
the processor's, which other programs enter the least. One JSON, written after each row; rows that
it holds are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
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
from dit_accel.bench.measuring import free_memory, guarded, manifest
from dit_accel.bench.runs import ResultFile
from dit_accel.calibration import calls_for, run_latents
from dit_accel.choosing.cost import CostModel, Workload
from dit_accel.choosing.settings import blocks_of
from dit_accel.choosing.times import AttentionTimes, Place, attention_key, heads_of, measure_seconds
from dit_accel.environment import pick_device
from dit_accel.errors import DensityUnreachableError
from dit_accel.generation import GenerationRequest
from dit_accel.guard.options import QualityGuard
from dit_accel.models import generation_defaults, list_models, load_pipeline
from dit_accel.registry import resolve_method
from dit_accel.session import arguments_by_name
from dit_accel.world.worlds import fixed_prompts

Row = dict[str, Any]
METHODS = ("gna", "pisa", "psa", "rectified", "radial")
CACHE = "taylorseer"
STEP, GENERATION = "step", "generation"
SHOWN = ("model", "size", "method", "density", "of", "guard", "measured_ms", "off_table",
         "off_measured", "failed", "refused")  # fmt: skip
LOOKING = QualityGuard(max_error=1e9)
DENSE_STEPS = 0.25
ENOUGH_S = 0.2


class Bench:
    """Measures rows; the model of the last one is kept for the next."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, pick_device(args.device)
        self.dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        alone = self.device == "cpu" and torch.get_num_threads() == 1
        self.clock = time.process_time if alone else time.perf_counter
        # Others use a CPU, too: the fastest runs had the least of that.
        self.best = min if self.device == "cpu" else statistics.median
        self._key: Any = None
        self.forwards = 0  # of the generation that ran last

    def measure(self, task: Mapping[str, Any]) -> Row:
        """Predict and time one forward or one generation."""
        if self._key != (task["model"], task["size"]):
            self._load(task)
        return self._step(task) if task["of"] == STEP else self._generation(task)

    def _load(self, task: Mapping[str, Any]) -> None:
        self.pipe = self.inputs = None
        free_memory()
        torch.manual_seed(0)
        if task["model"] in list_models():
            self.pipe = load_pipeline(task["model"], device=self.device, dtype=self.dtype)
            self.pipe.set_progress_bar_config(disable=True)
            self.call = self._call_of(task["model"])
            self.inputs = self._inputs()
        else:
            model = load_architecture(task["model"]).at(task["size"])
            self.pipe = model.build(self.device, self.dtype, self.args.layers)
            self.inputs = model.inputs(task["size"], self.device, self.dtype)
        family, transformer = family_of(self.pipe), self.pipe.transformer
        layout = family.read_inputs(transformer, dict(self.inputs)).layouts[0]
        batch, heads = len(self.inputs["hidden_states"]), heads_of(transformer)
        self.place = Place(layout, *heads, batch, self.dtype, torch.device(self.device))
        self.layers = len(family.attention_layers(transformer))
        self._key = task["model"], task["size"]

    def _call_of(self, model: str) -> Mapping[str, Any]:
        defaults = generation_defaults(model)
        given = {name: getattr(self.args, name) for name in ("steps", "frames", "height", "width")}
        settings = {
            name: getattr(defaults, name) if value is None else value
            for name, value in given.items()
        }
        prompt = fixed_prompts(defaults.world)[0]["prompt"]
        request = GenerationRequest(prompt=prompt, guidance=defaults.guidance, **settings)
        return calls_for(self.pipe, [request])[0]

    def _inputs(self) -> Row:
        """Return what the pipeline gives its transformer in the first step."""
        found: list[Row] = []

        def note(module: Any, args: Any, kwargs: Any) -> None:
            found.append(arguments_by_name(module, args, kwargs))

        hook = self.pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
        try:
            run_latents(self.pipe, {**self.call, "num_inference_steps": 1})
        finally:
            hook.remove()
        return found[0]

    def _forward(self) -> Any:
        return self.pipe.transformer(**self.inputs)[0]

    def _generate(self) -> Any:
        self.forwards = 0

        def count(*_: Any) -> None:
            self.forwards += 1

        hook = self.pipe.transformer.register_forward_pre_hook(count)
        try:
            return run_latents(self.pipe, self.call)
        finally:
            hook.remove()

    def _timed(self, run: Callable[[], Any], accelerated: Row | None) -> float:
        """Return the seconds of a run; short ones are repeated.

        Before it come two forwards, or a generation of two steps: the first forward plans and
        allocates, and in the first of each guidance branch the guard looks at all layers.
        """
        if accelerated is not None:
            accelerate_pipeline(self.pipe, **accelerated)
        spent: list[float] = []
        try:
            if run == self._generate:
                run_latents(self.pipe, {**self.call, "num_inference_steps": 2})
            else:
                for _ in range(2):
                    run()
            while not spent or (sum(spent) < ENOUGH_S and len(spent) < 20):
                self._synchronize()
                start = self.clock()
                run()
                self._synchronize()
                spent.append(self.clock() - start)
            return self.best(spent)
        finally:
            if accelerated is not None:
                self.report = acceleration_report(self.pipe)
            restore_pipeline(self.pipe)

    def _in_turn(self, of: Mapping[str, Callable[[], float]]) -> dict[str, float]:
        """Return the seconds of all that belongs together, over rounds of them."""
        rounds = [{name: run() for name, run in of.items()} for _ in range(self.args.repeats)]
        return {name: self.best([row[name] for row in rounds]) for name in of}

    def _synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def _method(self, task: Mapping[str, Any]) -> tuple[Any, float]:
        """Return the method at the task's density, or at the least that it reaches."""
        method, density = resolve_method(task["method"], **task["options"]), task["density"]
        try:
            return method.at_density(density, self.place.layout), density
        except DensityUnreachableError as error:
            return method.at_density(error.least, self.place.layout), error.least

    def _given(self, task: Mapping[str, Any]) -> Row:
        method, density = self._method(task)
        given = {"dense_steps": 0, "dense_layers": 0, "min_tokens": 0, "density": density}
        return {"method": method, "guard": LOOKING if task["guard"] else False, **given}

    def _calls(self, method: Any, guard: QualityGuard | None) -> dict[str, Callable[[], float]]:
        """Return what measures the attention calls, past what is kept of earlier ones."""
        return {
            "call_dense": lambda: measure_seconds(None, self.place, guard, self.clock),
            "call": lambda: measure_seconds(method, self.place, guard, self.clock),
        }

    def _sources(
        self, method: Any, guard: QualityGuard | None, found: Mapping[str, float]
    ) -> dict[str, AttentionTimes]:
        """Return what knows a call's time: the shipped table, and what was just measured."""
        table, measured = AttentionTimes(measuring=False), AttentionTimes(False, guard, {})
        measured._known = {
            attention_key(None, self.place, guard): found["call_dense"],
            attention_key(method, self.place, guard): found["call"],
        }
        for times in (table, measured):
            times._read.add(self.place.card)  # nothing from the user's cache folder
        return {"table": table, "measured": measured}

    def _step(self, task: Mapping[str, Any]) -> Row:
        given = self._given(task)
        method, guard = given["method"], given["guard"] or None
        dense = {**given, "min_tokens": self.place.layout.video_length + 1}
        found = self._in_turn(
            {
                "stock": partial(self._timed, self._forward, None),
                "dense": partial(self._timed, self._forward, dense),
                **self._calls(method, guard),
                "measured": partial(self._timed, self._forward, given),
            }
        )
        row, work = _in_ms(found), Workload(self.place, self.layers)
        for source, times in self._sources(method, guard, found).items():
            told = CostModel(work, found["dense"], times).forward_s(method)
            row |= {} if told is None else {f"predicted_{source}_ms": told * 1e3}
        operators = sorted({call.operator for call in self.report.calls})
        return offs(row) | {"reached": given["density"], "operators": operators}

    def _generation(self, task: Mapping[str, Any]) -> Row:
        cached = task["method"] == CACHE
        given: Row = {"method": CACHE, **task["options"]}
        if not cached:
            given = {**self._given(task), "dense_steps": DENSE_STEPS}
        method, guard = None if cached else given["method"], given.get("guard") or None
        runs = {} if cached else self._calls(method, guard)
        runs["dense"] = partial(self._timed, self._generate, None)
        runs["measured"] = partial(self._timed, self._generate, given)
        found = self._in_turn(runs)
        self._generate()  # densely, to count
        steps = self.pipe.num_timesteps
        work = Workload(self.place, self.layers, steps, self.forwards // steps)
        row, run = _in_ms(found), 1 - (self.report.blocks_skipped or 0.0)
        sources = {"measured": AttentionTimes(False)}
        for source, times in (sources if cached else self._sources(method, guard, found)).items():
            model = CostModel(work, found["dense"] / self.forwards, times)
            told = model.generation_s(method, dense_steps=DENSE_STEPS, run=run)
            row |= {} if told is None else {f"predicted_{source}_ms": told * 1e3}
        return offs(row)


def _in_ms(found: Mapping[str, float]) -> Row:
    return {f"{name}_ms": seconds * 1e3 for name, seconds in found.items()}


def offs(row: Row) -> Row:
    """Add how far each prediction is off."""
    told = {name: value for name, value in row.items() if name.startswith("predicted")}
    return row | {
        name.replace("predicted", "off").removesuffix("_ms"): value / row["measured_ms"] - 1
        for name, value in told.items()
    }


def tasks_of(args: argparse.Namespace) -> list[Row]:
    """Return what to measure."""
    tasks: list[Row] = []
    for model in args.models:
        bundled = model in list_models()
        size = "own" if bundled else args.size or next(iter(load_architecture(model).sizes))
        where = {"model": model, "size": size}
        for density in args.density:
            for method in args.methods:
                options = blocks_of(method, 32) if bundled or size == "toy" else {}
                task = {**where, "method": method, "density": density, "options": options}
                looks = [look == "on" for look in args.guard]
                tasks += [{**task, "of": STEP, "guard": guard} for guard in looks]
        if bundled and args.generations:
            task = {**where, "of": GENERATION, "guard": False}
            method, density = args.methods[0], args.density[0]
            options = blocks_of(method, 32)
            tasks.append({**task, "method": method, "density": density, "options": options})
            tasks.append({**task, "method": CACHE, "density": None, "options": {"interval": 3}})
    return tasks


def summary(rows: list[Row]) -> Row:
    """Return the largest error by model, size and source, and what holds within ten percent."""
    by: dict[str, list[float]] = {}
    for row in rows:
        for source in ("table", "measured"):
            if f"off_{source}" in row:
                key = f"{row['model']} {row['size']} {row['of']} {source}"
                by.setdefault(key, []).append(abs(row[f"off_{source}"]))
    return {
        "largest_error": {key: round(max(found), 4) for key, found in by.items()},
        "within_ten_percent": {
            key: f"{sum(off <= 0.1 for off in found)} of {len(found)}" for key, found in by.items()
        },
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["wan2.1-14b"])
    parser.add_argument("--size", help="of the architectures; each one's first by default")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--density", type=float, nargs="+", default=[0.15, 0.3])
    parser.add_argument("--layers", type=int, default=4, help="of an architecture")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--guard", nargs="+", default=["on", "off"], choices=["on", "off"])
    parser.add_argument("--generations", action="store_true", help="of bundled models, too")
    for name in ("steps", "frames", "height", "width"):
        parser.add_argument(f"--{name}", type=int, help="of bundled models; its own by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, help="begin no row after this long")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--commit")
    parser.add_argument("--force", action="store_true", help="start the file again")
    args = parser.parse_args()
    started = time.monotonic()
    bench = Bench(args)
    settings = {name: getattr(args, name) for name in ("layers", "steps", "frames", "height")}
    about = manifest(args.commit, threads=torch.get_num_threads(), clock=bench.clock.__name__)
    results = ResultFile("cost_model", about, settings, args.output, args.force)
    with torch.no_grad():
        for task in tasks_of(args):
            if results.has(task):
                continue
            if args.seconds is not None and time.monotonic() - started > args.seconds:
                print("out of time, the rest is left for a later run")
                break
            row = results.add(task, guarded(bench.measure, task))
            print({name: row[name] for name in SHOWN if name in row}, flush=True)
    print(json.dumps(summary(results.rows), indent=1))


if __name__ == "__main__":
    main()
