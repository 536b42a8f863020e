"""Whether densities per layer and head beat one density for all, at equal cost.

    python benchmarks/per_head_density.py --models tiny-wan tiny-hunyuan tiny-flux tiny-sd3

For each attention method and density: 16 prompts with one density for all heads, then with the same
mean density shared out by error curves that were measured on other prompts. The budget is what the
uniform run computed in its sparse calls, so that both cost the same; the rows hold both densities,
and those that are not alike are marked, and left out of the summary.
Protocol as in `fidelity.py`: the first quarter of the steps dense, no layer, blocks of 32 tokens,
the same noise. One JSON file a model, written after each row; rows that it holds are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fidelity import BLOCKS, SCHEDULE, at_density, densities, probe_layout
from shared import (
    Clips,
    Prompts,
    Row,
    add_machine_and_files,
    add_sizes,
    generate_all,
    load,
    options_of,
)

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.bench.measuring import guarded, manifest
from dit_accel.bench.runs import ResultFile
from dit_accel.calibration import calls_for
from dit_accel.environment import pick_device
from dit_accel.eval.fidelity import psnr, relative_l1
from dit_accel.per_head.curves import HeadCurves, measure_curves
from dit_accel.per_head.sharing import at_one_density, per_head_method, shared_out
from dit_accel.registry import resolve_method

COSTS_ALIKE = 1.02
"""Densities this near are of one cost. Where layers see other tokens than the first (SD3's second
attention has no text), a window may be cheaper there than any that a head can be given."""
METHODS = ("pisa", "psa", "gna", "gna + remainder", "rectified", "radial", "radial + remainder",
           "sliding_window", "sliding_window + remainder")  # fmt: skip


class ModelBench:
    """Measures the rows of one model; the pipeline is loaded and run densely when first needed."""

    def __init__(self, model: str, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.device = pick_device(args.device)
        prompts = Prompts.of(model, args)
        self.requests = prompts.requests[: args.prompts]
        self.others = prompts.requests[-args.calibrated :]
        self.batch = args.batch or (1 if self.device == "cpu" else len(self.requests))
        self.settings = {
            **prompts.settings,
            "prompts": args.prompts,
            "calibrated": args.calibrated,
            "dtype": args.dtype,
            "schedule": SCHEDULE,
            "latents_only": args.latents_only,
            "always": args.always,
        }
        self.pipe: Any = None
        self.curves: dict[str, HeadCurves] = {}

    def prepare(self) -> None:
        """Load the pipeline and generate densely."""
        if self.pipe is None:
            self.pipe = load(self.model, self.args.dtype, self.device)
            self.layout = probe_layout(self.pipe, self.requests[0])
            self.dense = self._generate()

    def measure(self, task: Mapping[str, Any]) -> Row:
        """Generate with one density for all, and with the same shared out."""
        self.prepare()
        name = task["method"]
        method, asked = at_density(name, task["density"], self.layout)
        row: Row = {}
        uniform = self._run(row, "uniform", method, asked)
        if name not in self.curves:
            began = time.monotonic()
            calls = calls_for(self.pipe, self.others, len(self.others))
            self.curves[name] = measure_curves(self.pipe, _base(name), calls)
            row["curves_s"] = round(time.monotonic() - began, 1)
        budget = row["uniform"]["sparse_density"]
        given = _base(name), self.curves[name], min(budget + 1e-6, 1.0)
        errors = [share(*given)[0] for share in (at_one_density, shared_out)]
        row["predicted_gain_db"] = round(
            10 * math.log10(max(errors[0], 1e-12) / max(errors[1], 1e-12)), 2
        )
        shared = shared_out(*given)[1] if self.args.always else per_head_method(*given)
        per_head = self._run(row, "per_head", shared, None)
        row["densities"] = shared.densities
        for what in ("psnr_db", "latent"):
            gain = np.asarray(per_head[what]) - np.asarray(uniform[what])
            picks = np.random.default_rng(0).integers(len(gain), size=(10_000, len(gain)))
            interval = np.percentile(gain[picks].mean(1), [2.5, 97.5]).round(4).tolist()
            row |= {f"{what}_gain": float(gain.mean()), f"{what}_gain_interval": interval}
        return row

    def _run(self, row: Row, name: str, method: Any, density: float | None) -> Row:
        try:
            accelerate_pipeline(self.pipe, method, density=density, guard=False, **SCHEDULE)
            clips = self._generate()
            report = acceleration_report(self.pipe)
        finally:
            restore_pipeline(self.pipe)
        each = self._compare(clips)
        row[name] = densities(report)
        row[name] |= {what: float(np.mean(values)) for what, values in each.items()}
        row[name]["each"] = {what: np.round(values, 4).tolist() for what, values in each.items()}
        return each

    def _generate(self) -> Clips:
        extra = {"output_type": "latent"} if self.args.latents_only else None
        if extra is None:
            return generate_all(self.pipe, self.requests, self.batch)
        from dit_accel.calibration import run_latents

        clips = Clips([], [])
        for call in calls_for(self.pipe, self.requests, self.batch):
            clips.latents.extend(run_latents(self.pipe, call).float())
        return Clips(clips.latents, clips.latents)

    def _compare(self, clips: Clips) -> Row:
        frames = zip(clips.frames, self.dense.frames, strict=True)
        latents = zip(clips.latents, self.dense.latents, strict=True)
        return {
            "psnr_db": [min(_psnr(*pair), 100.0) for pair in frames],
            "latent": [relative_l1(*pair) for pair in latents],
        }


def _psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """PSNR of frames in [0, 1]; of latents where these stand for frames, over their own range."""
    low, high = float(second.min()), float(second.max())
    if low < 0 or high > 1:
        first, second = ((x - low) / (high - low) for x in (first, second))
    return psnr(first.clamp(0, 1), second)


def _base(name: str) -> Any:
    """Return a row's method without a density."""
    method = name.split(" ")[0]
    options = BLOCKS.get(method, {"block_size": 32})
    remainder = {"remainder": "pooled"} if "remainder" in name else {}
    return resolve_method(method, **options, **remainder)


def measure_model(model: str, args: argparse.Namespace) -> Row:
    """Make the missing rows of one model and return all of its file."""
    started = time.monotonic()
    bench, name = ModelBench(model, args), Path(model).name
    output = args.output / f"per-head-{name}.json"
    about = manifest(args.commit)
    results = ResultFile("per_head", about, bench.settings, output, args.force)
    results.content["model"] = name
    tasks = [{"method": m, "density": d} for d in args.density for m in args.methods]
    for task in tasks:
        if results.has(task):
            continue
        if args.seconds is not None and time.monotonic() - started > args.seconds:
            print(f"{name}: out of time, the rest is left for a later run")
            break
        began = time.monotonic()
        row = guarded(bench.measure, task)
        row = results.add(task, row | {"spent_s": round(time.monotonic() - began, 1)})
        print(name, line(row), flush=True)
    return results.content


def costs_alike(row: Row) -> bool:
    """Return whether sharing out cost no more than one density for all."""
    uniform, shared = (row[kind]["sparse_density"] for kind in ("uniform", "per_head"))
    return bool(shared <= COSTS_ALIKE * uniform)


def line(row: Row) -> str:
    """One row for a terminal."""
    text = f"{row['method']:26s} {row['density']:<5g}"
    for name in ("refused", "failed"):
        if name in row:
            return f"{text} {name}: {row[name]}"
    one, other = row["uniform"], row["per_head"]
    text += "" if costs_alike(row) else " NOT AT EQUAL COST"
    low, high = row["psnr_db_gain_interval"]
    return (
        f"{text} density {one['sparse_density']:.3f} / {other['sparse_density']:.3f}, PSNR "
        f"{one['psnr_db']:.2f} -> {other['psnr_db']:.2f} dB ({row['psnr_db_gain']:+.2f}, "
        f"{low:+.2f} to {high:+.2f}), latent {one['latent']:.4f} -> {other['latent']:.4f}, "
        f"predicted {row['predicted_gain_db']:+.2f} dB"
    )


def summary(contents: list[Row]) -> Row:
    """Return the gains by model, method and density."""
    return {
        content["model"]: {
            f"{row['method']} {row['density']:g}": [
                round(row["psnr_db_gain"], 2),
                *row["psnr_db_gain_interval"],
            ]
            for row in content["rows"]
            if "psnr_db_gain" in row and costs_alike(row)
        }
        for content in contents
    }


def main() -> None:
    """Measure and write."""
    parser = options_of(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--density", type=float, nargs="+", default=[0.25, 0.15])
    parser.add_argument("--prompts", type=int, default=16, help="the first so many of 64")
    parser.add_argument("--calibrated", type=int, default=4, help="the last so many of 64")
    parser.add_argument("--batch", type=int, help="prompts at once; all on a GPU, 1 on a CPU")
    parser.add_argument("--always", action="store_true", help="share out also where it pays little")
    parser.add_argument("--latents-only", action="store_true", help="decode nothing: a trial")
    parser.add_argument("--seconds", type=float, help="begin no row of a model after this long")
    add_sizes(parser)
    add_machine_and_files(parser)
    args = parser.parse_args()
    with torch.no_grad():
        contents = list(map(partial(measure_model, args=args), args.models))
    print(json.dumps(summary(contents), indent=1))


if __name__ == "__main__":
    main()
