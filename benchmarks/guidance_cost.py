"""What a perturbed pass adds to a step, against the share of layers that it runs.

    python benchmarks/guidance_cost.py --output FILE.json

Blocks below the first perturbed one run once for both passes, so a pass that is perturbed from
layer l of L on should add (L - l) / L. Timed are single forwards without classifier-free guidance,
plain and guided in turns, of published configurations with random weights and a part of their
blocks. One head of layer l is perturbed; more of them cost nearly the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.acceleration import family_of
from dit_accel.bench.architectures import load_architecture
from dit_accel.bench.measuring import Row, alternating_ms, free_memory, manifest
from dit_accel.bench.runs import ResultFile, run_tasks
from dit_accel.environment import pick_device

STARTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""First perturbed layer, as a share of the last one's number."""


class CostBench:
    """Times guided and plain forwards of two equal transformers in turns."""

    def __init__(self, device: str, layers: int, repeats: int) -> None:
        self.device, self.layers, self.repeats = device, layers, repeats
        self._made: tuple[Any, ...] = ()

    @torch.no_grad()
    def measure(self, task: Mapping[str, Any]) -> Row:
        """Return times and shares of a task of `tasks`."""
        plain, guided, inputs = self._pipes(task["model"], task["size"])
        blocks = len(family_of(guided).blocks(guided.transformer))
        first = round(task["start"] * (blocks - 1))
        accelerate_pipeline(guided, "softpag", heads=[(first, 0)])
        try:
            runs = [lambda p=p: p.transformer(**inputs)[0] for p in (plain, guided)]
            times = alternating_ms(runs, self.repeats, 3, self.device)
            ran = acceleration_report(guided).perturbed[-1].ran
        finally:
            restore_pipeline(guided)
        return {
            "layers_of_model": blocks,
            "first_layer": first,
            "plain_ms": round(times[0], 3),
            "guided_ms": round(times[1], 3),
            "added": round(times[1] / times[0] - 1, 4),
            "predicted": round(sum(ran) / blocks, 4),
        }

    def _pipes(self, name: str, size: str) -> tuple[Any, ...]:
        """Return two equal pipelines and the inputs of a forward; the last ones are kept."""
        if self._made[:2] != (name, size):
            self._made = ()
            free_memory()
            model = load_architecture(name).at(size)
            dtype = torch.bfloat16 if self.device != "cpu" else torch.float32
            layers = min(self.layers, model.layers)
            pipes = [model.build(self.device, dtype, layers) for _ in range(2)]
            inputs = model.inputs(size, self.device, dtype)
            self._made = (name, size, *pipes, inputs)
        return self._made[2:]


def tasks(models: list[str], size: str) -> Iterator[Row]:
    """Yield what is to be measured."""
    for model in models:
        for start in STARTS:
            yield {"model": model, "size": size, "start": start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["flux.1-dev", "sd3.5-large"])
    parser.add_argument("--size", default="1024", help="as in `dit-accel bench step`, or toy")
    parser.add_argument(
        "--layers", type=int, default=12, help="blocks to build, kinds in proportion"
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, required=True, help="a .json")
    parser.add_argument("--commit")
    args = parser.parse_args()
    device = pick_device(args.device)
    settings = {"layers": args.layers, "repeats": args.repeats}
    results = ResultFile("guidance cost", manifest(args.commit), settings, args.output)
    bench = CostBench(device, args.layers, args.repeats)
    run_tasks(bench, tasks(args.models, args.size), results, show=lambda row: print(line(row)))
    shown = [row for row in results.rows if "added" in row]
    print(json.dumps([[r["model"], r["first_layer"], r["added"], r["predicted"]] for r in shown]))


def line(row: Row) -> str:
    """Return a row for a terminal."""
    if "added" not in row:
        return f"{row['model']} {row['start']}: {row.get('refused') or row.get('failed')}"
    return (
        f"{row['model']} {row['size']}, layer {row['first_layer']} of {row['layers_of_model']}: "
        f"{row['plain_ms']} -> {row['guided_ms']} ms, {row['added']:+.1%} for a share of "
        f"{row['predicted']:.1%}"
    )


if __name__ == "__main__":
    main()
