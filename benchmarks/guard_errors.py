"""How far sparse attention is from dense on the trained models, and what the guard makes of it.

    python benchmarks/guard_errors.py --output FILE.json

Each model and method generates one prompt three times: densely, with a guard that only measures
(every head of every sparse call), and with the default guard. Settings are the published ones, or a
density. The default ``max_error`` of `QualityGuard` was chosen from this table.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dit_accel import QualityGuard, accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.bench.measuring import Row, manifest
from dit_accel.bench.runs import ResultFile, run_tasks
from dit_accel.environment import pick_device
from dit_accel.errors import QualityWarning
from dit_accel.eval.fidelity import psnr
from dit_accel.generation import GenerationRequest, generate
from dit_accel.models import generation_defaults, load_pipeline

PROMPTS = {
    "tiny-wan": "a red ball rolls to the right",
    "tiny-hunyuan": "a red ball rolls to the right",
    "tiny-sd3": "a red circle on a blue background",
    "tiny-flux": "a red circle on a blue background",
}
MEASURING = QualityGuard(max_error=1e9, every=1, action="report")
SHARES = (0.5, 0.9, 0.99, 1.0)


class ErrorBench:
    """Generates with each setting; the model of the last task is kept for the next."""

    def __init__(self, device: str, steps: int) -> None:
        self.device, self.steps = device, steps
        self._model = ""

    @torch.no_grad()
    def measure(self, task: Mapping[str, Any]) -> Row:
        """Return errors and PSNRs of a task of `tasks`."""
        if self._model != task["model"]:
            self.pipe = load_pipeline(task["model"], device=self.device, dtype=torch.float32)
            self.dense = self._frames(task["model"])
            self._model = task["model"]
        given = {"density": task["density"], "min_tokens": 0}
        row: Row = {}
        for name, guard in (("unguarded", MEASURING), ("guarded", None)):
            accelerate_pipeline(self.pipe, task["method"], **given, guard=guard)
            try:
                frames = self._frames(task["model"])
                report = acceleration_report(self.pipe)
            finally:
                restore_pipeline(self.pipe)
            assert report.guard is not None
            if name == "unguarded":
                errors = [error for record in report.guard.records for error in record.errors]
                found = torch.tensor(errors or [0.0]).quantile(torch.tensor(SHARES)).tolist()
                row |= {"sparse_density": report.sparse_density, "calls": report.guard.probes}
                row["errors"] = dict(zip(map(str, SHARES), found, strict=True))
            decibels = psnr(frames, self.dense)
            row |= {
                f"{name}_psnr_db": round(decibels, 2) if decibels != float("inf") else None,
                f"{name}_density": report.density,
            }
        return row | {"trips": report.guard.trips, "repairs": report.guard.repairs}

    def _frames(self, model: str) -> torch.Tensor:
        usual = generation_defaults(model)
        sizes = {name: getattr(usual, name) for name in ("frames", "height", "width", "guidance")}
        request = GenerationRequest(prompt=PROMPTS[model], seed=0, steps=usual.steps, **sizes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QualityWarning)
            return generate(self.pipe, replace(request, steps=self.steps or usual.steps)).frames


def tasks(models: list[str]) -> Iterator[Row]:
    """Yield what is to be measured: published settings, and a density that is too low."""
    for model in models:
        for method in ("radial", "gna", "psa", "pisa", "rectified"):
            for density in (None, 0.3):
                yield {"model": model, "method": method, "density": density}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(PROMPTS), choices=list(PROMPTS))
    parser.add_argument("--steps", type=int, default=0, help="0: as many as the model's own")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, required=True, help="a .json")
    parser.add_argument("--commit")
    args = parser.parse_args()
    device = pick_device(args.device)
    settings = {"steps": args.steps, "max_error": QualityGuard().max_error, "seeds": [0]}
    results = ResultFile("guard errors", manifest(args.commit), settings, args.output)
    bench = ErrorBench(device, args.steps)
    run_tasks(bench, tasks(args.models), results, show=lambda row: print(line(row), flush=True))
    measured = [row for row in results.rows if "errors" in row]
    shown = ("model", "method", "density", "unguarded_psnr_db", "guarded_psnr_db", "trips")
    print(json.dumps([[row[k] for k in shown] + [row["errors"]["1.0"]] for row in measured]))


def line(row: Row) -> str:
    """Return a row for a terminal."""
    what = f"{row['model']} {row['method']} {row['density'] or 'published'}"
    if "errors" not in row:
        return f"{what}: {row.get('refused') or row.get('failed')}"
    errors = " ".join(f"{error:.3f}" for error in row["errors"].values())
    runs = [
        f"{name} {row[f'{name}_psnr_db']} dB at density {row[f'{name}_density']:.3f}"
        for name in ("unguarded", "guarded")
    ]
    return f"{what}: errors {errors}; {', '.join(runs)}, {row['trips']} trips"


if __name__ == "__main__":
    main()
