"""What the quality guard costs: single attention calls, and steps of a published configuration.

    python benchmarks/guard_overhead.py --output FILE.json

Calls: random block lists, with the guard and without in turns, for a call that is probed and one
that is only looked through for NaN and infinity; beside dense attention. Steps: forwards of a model
with random weights, every layer sparse, as many as the guard has phases, in turns without the
guard, with one that only looks, and with the guard as it comes. The budget is boundless, so nothing
is repaired: what is measured is the price of watching. Run it alone: times of short calls are the
processor's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dit_accel import QualityGuard, accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.bench.architectures import TOY, load_architecture
from dit_accel.bench.cases import make_case
from dit_accel.bench.measuring import Row, alternating_ms, free_memory, manifest
from dit_accel.bench.runs import ResultFile, run_tasks
from dit_accel.call import AttentionCall
from dit_accel.environment import pick_device
from dit_accel.guard.engine import SHORT, Guard
from dit_accel.operators import choose_operator, make_operators
from dit_accel.tracking import Moment

WATCHING = QualityGuard(max_error=1e9)
LOOKING = replace(WATCHING, layers=())


class OverheadBench:
    """Times calls and steps with the guard and without."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.dtype = torch.bfloat16 if device != "cpu" else torch.float32

    @torch.no_grad()
    def measure(self, task: Mapping[str, Any]) -> Row:
        """Return the times of a task of `tasks`."""
        free_memory()
        return self._calls(task) if task["what"] == "call" else self._steps(task)

    def _calls(self, task: Mapping[str, Any]) -> Row:
        case = make_case(
            task["tokens"], task["heads"], 128, task["density"], self.device, self.dtype
        )
        plan, qkv = case.plan, case.qkv
        operator = choose_operator("auto", make_operators(), plan, qkv[0]).operator
        call = AttentionCall(plan.layout, step=0, num_steps=50)

        def sparse() -> Any:
            return operator.run(*qkv, plan, scale=None, return_lse=False)[0]

        def watched(guard: Guard) -> Any:
            guard.begin()
            return guard.check(qkv, sparse(), call, 0, None, lambda *heads: heads[0])[0]

        probing, looking = Guard(WATCHING), Guard(LOOKING)
        heads_first = [x.transpose(1, 2) for x in qkv]
        runs = [
            sparse,
            lambda: watched(probing),
            lambda: watched(looking),
            lambda: F.scaled_dot_product_attention(*heads_first),
        ]
        plain, probed, looked, dense = alternating_ms(runs, self.repeats, 2, self.device)
        return {
            "operator": operator.name,
            "sparse_ms": round(plain, 3),
            "probed_ms": round(probed, 3),
            "looked_ms": round(looked, 3),
            "dense_ms": round(dense, 3),
            "probe_of_dense": round((probed - plain) / dense, 5),
            "look_of_dense": round((looked - plain) / dense, 5),
        }

    def _steps(self, task: Mapping[str, Any]) -> Row:
        model = load_architecture(task["model"]).at(task["size"])
        layers = min(task["layers"] or model.layers, model.layers)
        pipe = model.build(self.device, self.dtype, layers)
        inputs = model.inputs(task["size"], self.device, self.dtype)
        settings = {"dense_steps": 0, "dense_layers": 0, "min_tokens": 0}
        settings |= {"density": task["density"]}
        if task["size"] == TOY:
            settings |= {"block_size": 32, "density": 0.8}

        # Short sequences are probed a quarter as often on a GPU.
        short = torch.device(self.device).type == "cuda" and model.tokens(task["size"]) < SHORT
        phases = WATCHING.every * (4 if short else 1)

        def forwards(guard: QualityGuard | bool) -> Callable[[int], None]:
            """Return what runs so many forwards of the pipeline, accelerated anew."""
            accelerate_pipeline(pipe, task["method"], **settings, guard=guard)
            runtime, step = pipe._dit_accel.runtime, 0

            def run(count: int) -> None:
                nonlocal step
                for _ in range(count):
                    with runtime.tracker.hold(Moment(step, 10**6, "cond", 0)):
                        pipe.transformer(**inputs)
                    step += 1

            return run

        # One pipeline holds one acceleration, so turns are taken by accelerating anew each time.
        # The first forward plans, tunes and probes every layer: it warms up.
        times: dict[str, list[float]] = {"off": [], "looking": [], "on": []}
        for _ in range(self.repeats):
            for name, guard in zip(times, (False, LOOKING, WATCHING), strict=True):
                run = forwards(guard)
                run(1)
                times[name] += alternating_ms([partial(run, phases)], 1, 0, self.device)
        report = acceleration_report(pipe)
        restore_pipeline(pipe)
        off, looking, on = (sorted(of)[len(of) // 2] for of in times.values())
        return {
            "layers_measured": layers,
            "steps": phases,
            "tokens": model.tokens(task["size"]),
            "sparse_density": report.sparse_density,
            "operators": sorted({call.operator for call in report.calls}),
            "off_ms": round(off, 3),
            "looking_ms": round(looking, 3),
            "on_ms": round(on, 3),
            "look_overhead": round(looking / off - 1, 5),
            "overhead": round(on / off - 1, 5),
        }


def tasks(device: str) -> Iterator[Row]:
    """Yield what is to be measured; small cases on a CPU, which only try the script out."""
    if torch.device(device).type == "cpu":
        yield {"what": "call", "tokens": 2000, "heads": 2, "density": 0.25}
        yield _step("wan2.1-14b", TOY, 0.5, 0)
        return
    for tokens, heads in ((75_600, 40), (32_760, 12), (4096, 24)):
        yield {"what": "call", "tokens": tokens, "heads": heads, "density": 0.25}
    yield _step("flux.1-dev", "1024", 0.6, 0)
    yield _step("wan2.1-1.3b", "480p81", 0.3, 0)
    yield _step("wan2.1-14b", "720p81", 0.3, 4)


def _step(model: str, size: str, density: float, layers: int) -> Row:
    """Return a task of forwards; 0 layers are all of the model's."""
    what = {"what": "step", "model": model, "size": size, "method": "gna"}
    return what | {"density": density, "layers": layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", help="of which steps are measured, and no calls")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, required=True, help="a .json")
    parser.add_argument("--commit")
    args = parser.parse_args()
    device = pick_device(args.device)
    settings = {"repeats": args.repeats, "every": WATCHING.every, "rows": WATCHING.rows}
    results = ResultFile("guard overhead", manifest(args.commit), settings, args.output)
    bench = OverheadBench(device, args.repeats)
    models = args.models
    wanted = [task for task in tasks(device) if models is None or task.get("model") in models]
    run_tasks(bench, wanted, results, show=lambda row: print(line(row), flush=True))
    shown = ("tokens", "operator", "probe_of_dense", "look_of_dense")
    shown += ("model", "size", "look_overhead", "overhead")
    print(json.dumps([{k: row[k] for k in shown if k in row} for row in results.rows]))


def line(row: Row) -> str:
    """Return a row for a terminal."""
    if "overhead" in row:
        return (
            f"{row['model']} {row['size']}: {row['off_ms']} -> {row['on_ms']} ms, "
            f"{row['overhead']:+.2%}, only looking {row['look_overhead']:+.2%}"
        )
    if "probed_ms" in row:
        return (
            f"{row['tokens']} tokens, {row['operator']}: sparse {row['sparse_ms']} ms, probed "
            f"{row['probed_ms']}, looked through {row['looked_ms']}, dense {row['dense_ms']}; "
            f"{row['probe_of_dense']:+.2%} and {row['look_of_dense']:+.2%} of dense"
        )
    return f"{row}: {row.get('refused') or row.get('failed')}"


if __name__ == "__main__":
    main()
