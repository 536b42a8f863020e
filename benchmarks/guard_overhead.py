"""What the quality guard costs: single attention calls, and steps of a published configuration.

    python benchmarks/guard_overhead.py --output FILE.json

Calls: random block lists, with the guard and without in turns, for a call that is probed and one
that is only looked through for NaN and infinity; beside dense attention. Steps: forwards of a part
of a model's blocks with random weights, every layer sparse, as many as the guard has phases, with
the guard and without in turns. The budget is boundless, so nothing is repaired: what is measured is
the price of watching.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
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


class OverheadBench:
    """Times calls and steps with the guard and without."""

    def __init__(self, device: str, layers: int, repeats: int) -> None:
        self.device, self.layers, self.repeats = device, layers, repeats
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

        probing, looking = (Guard(replace(WATCHING, layers=layers)) for layers in (None, ()))
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
        layers = min(self.layers, model.layers)
        pipe = model.build(self.device, self.dtype, layers)
        inputs = model.inputs(task["size"], self.device, self.dtype)
        settings = {"dense_steps": 0, "dense_layers": 0, "min_tokens": 0}
        settings |= {"density": task["density"]}
        if task["size"] == TOY:
            settings |= {"block_size": 32, "density": 0.8}

        # Short sequences are probed a quarter as often on a GPU.
        short = torch.device(self.device).type == "cuda" and model.tokens(task["size"]) < SHORT
        phases = WATCHING.every * (4 if short else 1)

        def steps(guard: QualityGuard | bool) -> Any:
            """Return what runs the guard's phases once, on a pipeline accelerated anew."""
            accelerate_pipeline(pipe, task["method"], **settings, guard=guard)
            runtime, step = pipe._dit_accel.runtime, 0

            def run() -> None:
                nonlocal step
                for _ in range(phases):
                    with runtime.tracker.hold(Moment(step, 10**6, "cond", 0)):
                        pipe.transformer(**inputs)
                    step += 1

            return run

        # One pipeline holds one acceleration, so turns are taken by accelerating anew each time.
        # The first run plans, tunes and probes every layer: it warms up.
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(self.repeats):
            for on in (False, True):
                run = steps(WATCHING if on else False)
                run()
                times[on] += alternating_ms([run], 1, 0, self.device)
        report = acceleration_report(pipe)
        restore_pipeline(pipe)
        off, on = (sorted(times[key])[len(times[key]) // 2] for key in (False, True))
        return {
            "layers_measured": layers,
            "steps": phases,
            "tokens": model.tokens(task["size"]),
            "sparse_density": report.sparse_density,
            "operators": sorted({call.operator for call in report.calls}),
            "off_ms": round(off, 3),
            "on_ms": round(on, 3),
            "overhead": round(on / off - 1, 5),
        }


def tasks(device: str) -> Iterator[Row]:
    """Yield what is to be measured; small cases on a CPU, which only try the script out."""
    if torch.device(device).type == "cpu":
        yield {"what": "call", "tokens": 2000, "heads": 2, "density": 0.25}
        yield {"what": "step", "model": "wan2.1-14b", "size": TOY, "method": "gna", "density": 0.5}
        return
    for tokens, heads in ((75_600, 40), (32_760, 12), (4096, 24)):
        yield {"what": "call", "tokens": tokens, "heads": heads, "density": 0.25}
    steps = (
        ("wan2.1-14b", "720p81", 0.3),
        ("wan2.1-1.3b", "480p81", 0.3),
        ("flux.1-dev", "1024", 0.6),
    )
    for model, size, density in steps:
        yield {"what": "step", "model": model, "size": size, "method": "gna", "density": density}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="blocks to build")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, required=True, help="a .json")
    parser.add_argument("--commit")
    args = parser.parse_args()
    device = pick_device(args.device)
    settings = {"layers": args.layers, "repeats": args.repeats, "every": WATCHING.every}
    settings |= {"rows": WATCHING.rows}
    results = ResultFile("guard overhead", manifest(args.commit), settings, args.output)
    bench = OverheadBench(device, args.layers, args.repeats)
    run_tasks(bench, tasks(device), results, show=lambda row: print(line(row), flush=True))
    shown = ("tokens", "operator", "probe_of_dense", "look_of_dense", "model", "size", "overhead")
    print(json.dumps([{k: row[k] for k in shown if k in row} for row in results.rows]))


def line(row: Row) -> str:
    """Return a row for a terminal."""
    if "overhead" in row:
        return (
            f"{row['model']} {row['size']}: {row['off_ms']} -> {row['on_ms']} ms, "
            f"{row['overhead']:+.2%}"
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
