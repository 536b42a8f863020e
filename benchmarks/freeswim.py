"""What FreeSwim draws at sizes that a model was not trained for, and what its steps cost.

    python benchmarks/freeswim.py quality --output benchmarks/results/freeswim-quality-h100.json
    python benchmarks/freeswim.py step --output benchmarks/results/freeswim-step-h100.json
    python benchmarks/freeswim.py memory --output benchmarks/results/freeswim-memory-h100.json
    python benchmarks/freeswim.py quality --device cpu --prompts 1 --steps 2 --frames 9 --scales 2
    python benchmarks/freeswim.py step --device cpu --toy  # these two are trials

"quality" takes fixed prompts of the bundled model's world at multiples of its largest training
size, from the same seeds. A checker reads the prompted attributes off the clips, and whether each
thing is there once and nothing else is: things that repeat are what naive windows show. "drawn"
are clips that the world itself draws at that size: what the checker says of a perfect model. Times
are of whole pipeline calls, first stage and VAE included, after an untimed call of one step. A
picture sheet is written beside the output.

"step" times forwards of a Wan2.1-1.3B with random weights, a few of its layers scaled to all, and
takes from them the mean step with classifier-free guidance (a conditional and an unconditional
forward): dense, and FreeSwim with a full pass in one step of 2 and of 5. Where the name says "all
layers", all are measured, once: their peak memory is that of a real step.

"memory" runs one generation of two steps a stage, VAE included, with so much of the GPU's memory.

Rows that the output holds are kept; what failed is tried again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from freeswim_steps import SIZES, MemoryBench, StepBench, now, step_tasks, with_ratios
from PIL import Image, ImageDraw
from shared import generate_all
from torch import Tensor

from dit_accel import FreeSwim, accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.bench.measuring import Row, manifest, write_json
from dit_accel.bench.runs import ResultFile, run_tasks
from dit_accel.environment import pick_device
from dit_accel.generation import GenerationRequest
from dit_accel.highres.reference import window_tokens
from dit_accel.models import generation_defaults, load_pipeline
from dit_accel.world import clips
from dit_accel.world.clip_checker import find_repeats
from dit_accel.world.worlds import fixed_prompts, make_reader, shares_right

MODEL = "tiny-wan"
TRAINED = 256  # pixels of a side: the largest size that it was trained at
WINDOW = window_tokens(TRAINED // 16, "released")
WHOLE = (10_000, 10_000)  # a window larger than any grid

DRAWN, ENLARGED = "drawn", "enlarged"
DENSE, NAIVE = "dense", "windows, one stage"
QUALITY: dict[str, FreeSwim | None] = {
    DRAWN: None,
    ENLARGED: None,
    DENSE: None,
    NAIVE: None,
    "dense second stage": FreeSwim(override="none", window=WHOLE),
    "windows": FreeSwim(override="none"),
    "freeswim": FreeSwim(refresh_every=1, branches="both"),
    "freeswim, every 2": FreeSwim(refresh_every=2),
    "freeswim, every 5": FreeSwim(refresh_every=5),
    "freeswim, every 2, pooled": FreeSwim(refresh_every=2, pool_keys=2),
}
SHEET = ("drawn", "enlarged", "dense", "windows, one stage", "windows", "freeswim",
         "freeswim, every 2", "freeswim, every 5")  # fmt: skip
SHOWN, SIDE = 6, 160  # prompts on a sheet, and pixels of a picture


@dataclass
class QualityBench:
    """Generates prompts with one case at one multiple of the trained size, and reads the clips."""

    device: str
    dtype: str
    prompts: int
    batch: int
    changed: Row
    flow_shift: float
    tiles: Path

    def __post_init__(self) -> None:
        """Load the model and the prompts."""
        defaults = asdict(generation_defaults(MODEL))
        settings = {name: defaults[name] for name in ("steps", "guidance", "frames")} | self.changed
        self.entries = fixed_prompts(defaults["world"])[: self.prompts]
        self.requests = [
            GenerationRequest(
                prompt=entry["prompt"], seed=seed, height=TRAINED, width=TRAINED, **settings
            )
            for seed, entry in enumerate(self.entries)
        ]  # fmt: skip
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        self.pipe: Any = load_pipeline(MODEL, device=self.device, dtype=dtype)
        self.pipe.vae.enable_tiling()  # all alike, so that memory is no matter
        self.read = make_reader(defaults["world"], self.device)

    @torch.no_grad()
    def measure(self, task: Mapping[str, Any]) -> Row:
        """Return the attributes read, sharpness and time of one case."""
        size, case = TRAINED * task["scale"], task["case"]
        requests = [replace(request, height=size, width=size) for request in self.requests]
        rows: list[Row] = []
        tiles: list[Tensor] = []
        spent = 0.0
        try:
            self._attach(case, task["sigma"])
            if case not in (DRAWN, ENLARGED):
                generate_all(self.pipe, [replace(requests[0], steps=1)], 1)  # kernels are compiled
            for start in range(0, len(requests), self.batch):
                began = now(self.device)
                found = self._clips(case, requests[start : start + self.batch], start)
                spent += now(self.device) - began
                for frames, entry in zip(found, self.entries[start:], strict=False):
                    rows.append(self._read(frames, entry))
                    if len(tiles) < SHOWN:
                        tiles.append(frames[len(frames) // 2])
            report = {} if case in (DRAWN, ENLARGED, DENSE) else self._report()
        finally:
            restore_pipeline(self.pipe)
        self.tiles.mkdir(parents=True, exist_ok=True)
        _strip(tiles).save(self.tiles / _tile(task["scale"], case, task["sigma"]))
        return {"size": size, "seconds_per_clip": round(spent / len(rows), 3), **report} | (
            _summary(rows) | {"prompts": rows}
        )

    def _attach(self, case: str, sigma: float | None) -> None:
        method = QUALITY[case]
        if method is not None and sigma is not None:
            shift = {"sigma": sigma, "flow_shift": self.flow_shift}
            accelerate_pipeline(self.pipe, replace(method, **shift))
        elif case == NAIVE:
            options = {"window": (WINDOW, WINDOW), "dense_steps": 0, "min_tokens": 0}
            accelerate_pipeline(self.pipe, "sliding_window", guard=False, **options)

    def _clips(self, case: str, requests: Sequence[GenerationRequest], start: int) -> list[Tensor]:
        """Return clips ``[T, 3, H, W]`` in [0, 1]."""
        size = requests[0].height or TRAINED
        if case == DRAWN:
            frames = requests[0].frames or 1
            entries = self.entries[start : start + len(requests)]
            scenes = [clips.Scene.from_dict(entry) for entry in entries]
            drawn = [
                clips.render([scene], (frames, size, size), start + i, self.device)[0]
                for i, scene in enumerate(scenes)
            ]
            return [((clip + 1) / 2).transpose(0, 1) for clip in drawn]
        if case == ENLARGED:
            small = [replace(request, height=TRAINED, width=TRAINED) for request in requests]
            found = generate_all(self.pipe, small, len(small)).frames
            return [F.interpolate(clip, (size, size), mode="bilinear") for clip in found]
        return generate_all(self.pipe, requests, len(requests)).frames

    def _read(self, frames: Tensor, entry: Row) -> Row:
        marks = self.read(frames, entry)
        marks.pop("seen")
        pixels = frames.to(self.device, torch.float32).permute(0, 2, 3, 1)
        repeats = find_repeats(pixels, clips.Scene.from_dict(entry))
        sharp = {"sharpness": round(sharpness(frames), 3)}
        return {"prompt": entry["prompt"], "marks": {**marks, **repeats}, **sharp}

    def _report(self) -> Row:
        report = acceleration_report(self.pipe)
        return {
            "density": report.density,
            "block_density": report.block_density,
            "operators": sorted({call.operator for call in report.calls}),
            "kept_mib": round(report.cache_bytes / 2**20, 1),
            "notes": list(report.notes),
        }


def sharpness(frames: Tensor) -> float:
    """Return the mean magnitude of the Laplacian of the luma of ``[T, 3, H, W]``, in 1/255."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=frames.device)
    luma = torch.einsum("tchw,c->thw", frames.float(), weights)[:, None]
    kernel = luma.new_tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return float(F.conv2d(luma, kernel).abs().mean()) * 255


def _summary(rows: Sequence[Row]) -> Row:
    """Return the shares of right attributes, with a bootstrap interval over prompts."""
    marks = [row["marks"] for row in rows]
    flat = [[right for kind in mark.values() for right in kind] for mark in marks]
    sums = np.array([[sum(one), len(one)] for one in flat])
    picks = np.random.default_rng(0).integers(len(rows), size=(10_000, len(rows)))
    right, total = sums[picks].sum(1).T
    interval = np.percentile(right / total, [2.5, 97.5])
    mean = statistics.mean(row["sharpness"] for row in rows)
    return {
        "right": {name: round(share, 4) for name, share in shares_right(marks).items()},
        "right_interval": [round(float(x), 4) for x in interval],
        "sharpness": round(mean, 3),
    }


def _tile(scale: int, case: str, sigma: float | None) -> str:
    return f"{scale}x-{case}{'' if sigma is None else f'-{sigma}'}.png"


def _strip(pictures: Sequence[Tensor]) -> Image.Image:
    """Return pictures ``[3, H, W]`` one above the other."""
    small = [
        F.interpolate(picture[None].float(), (SIDE, SIDE), mode="area")[0] for picture in pictures
    ]
    pixels = (torch.cat(small, 1).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def write_sheets(results: ResultFile, tiles: Path) -> None:
    """Put the strips of a size and noise level side by side, a column for each case."""
    known = {(row["scale"], row["sigma"]) for row in results.rows if row["sigma"] is not None}
    for scale, sigma in sorted(known):
        names = [_tile(scale, case, None if QUALITY[case] is None else sigma) for case in SHEET]
        strips = [Image.open(tiles / name) for name in names if (tiles / name).exists()]
        if len(strips) < len(names):
            continue
        sheet = Image.new("RGB", (len(strips) * SIDE, strips[0].height + 12), "white")
        for column, (case, strip) in enumerate(zip(SHEET, strips, strict=True)):
            sheet.paste(strip, (column * SIDE, 12))
            ImageDraw.Draw(sheet).text((column * SIDE + 2, 0), case, fill="black")
        path = tiles.with_name(f"{tiles.name}-{scale}x-{sigma}.png")
        sheet.quantize(96).save(path, optimize=True)
        print(f"wrote {path}")


def _show(row: Row) -> None:
    hidden = ("prompts", "date", "commit", "notes", "trace")
    print(json.dumps({k: v for k, v in row.items() if k not in hidden}), flush=True)


def run_quality(args: argparse.Namespace, about: Row, device: str) -> Row:
    """Measure what is missing; return a summary."""
    batch = args.batch or (1 if device == "cpu" else 8)
    changed = {name: getattr(args, name) for name in ("steps", "frames")}
    changed = {name: value for name, value in changed.items() if value is not None}
    settings = {"prompts": args.prompts, "dtype": args.dtype, **changed}
    settings |= {"flow_shift": args.flow_shift, "model": MODEL, "trained": TRAINED}
    results = ResultFile("freeswim-quality", about, settings, args.output, args.force)
    tiles = (args.output or Path("freeswim-quality.json")).with_suffix("")
    tasks = [
        {"scale": scale, "case": case, "sigma": sigma if QUALITY[case] is not None else None}
        for sigma in args.sigma
        for scale in args.scales
        for case in args.cases
    ]
    if not all(results.has(task) for task in tasks):
        bench = QualityBench(
            device, args.dtype, args.prompts, batch, changed, args.flow_shift, tiles
        )
        run_tasks(bench, tasks, results, show=_show)
    write_sheets(results, tiles)

    names = ("right", "right_interval", "sharpness", "seconds_per_clip", "failed")
    return {
        f"{row['scale']}x, {row['case']}, sigma {row['sigma']}": {
            name: row[name] for name in names if name in row
        }
        for row in results.rows
    }


def run_step(args: argparse.Namespace, about: Row, device: str) -> Row:
    """Measure what is missing; return a summary."""
    settings = {"dtype": args.dtype, "repeats": args.repeats}
    results = ResultFile("freeswim-step", about, settings, args.output, args.force)
    dtype = ("float32" if device == "cpu" else "bfloat16") if args.dtype == "auto" else args.dtype
    bench = StepBench(device, dtype, args.repeats)
    run_tasks(bench, list(step_tasks(args)), results, show=_show)
    if args.output is not None:
        write_json({**results.content, "rows": with_ratios(results.rows)}, args.output)
    hidden = ("prompts", "date", "commit", "operators")
    return {
        f"{row['size']}, {row['case']}, offload {row['offload']}": {
            k: v for k, v in row.items() if k not in hidden
        }
        for row in with_ratios(results.rows)
    }


def run_memory(args: argparse.Namespace, about: Row, device: str) -> Row:
    """Measure what is missing; return a summary."""
    dtype = "bfloat16" if args.dtype == "auto" else args.dtype
    results = ResultFile("freeswim-memory", about, {"dtype": dtype}, args.output, args.force)
    task = {"size": args.size, "limit_gib": args.limit_gib, "steps": 2}
    run_tasks(MemoryBench(device, dtype), [task], results, show=_show)
    return {"rows": results.rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("quality", "step", "memory"))
    parser.add_argument("--output", type=Path, help="a .json; without it nothing is kept")
    parser.add_argument("--commit", help="of this code; asked of git by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--force", action="store_true", help="start the output again")
    quality = parser.add_argument_group("quality")
    quality.add_argument("--prompts", type=int, default=16, help="the first so many of 64")
    quality.add_argument("--batch", type=int, help="prompts at once; 8 on a GPU, 1 on a CPU")
    for name in ("steps", "frames"):
        quality.add_argument(f"--{name}", type=int, help="the model's own by default")
    quality.add_argument("--cases", nargs="+", default=list(QUALITY), choices=QUALITY)
    quality.add_argument("--scales", type=int, nargs="+", default=[2, 3])
    quality.add_argument("--sigma", type=float, nargs="+", default=[FreeSwim.sigma])
    quality.add_argument("--flow-shift", type=float, default=9.0, help="of the second stage")
    step = parser.add_argument_group("step")
    step.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    step.add_argument("--whole", nargs="*", default=["1088p81"], help="sizes with all layers, too")
    step.add_argument("--layers", type=int, default=4, help="of 30, scaled to all")
    step.add_argument("--repeats", type=int, default=2)
    step.add_argument("--toy", action="store_true", help="a small model, to try this out")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--limit-gib", type=float, default=24, help="of the GPU's memory")
    memory.add_argument("--size", default="1088p81", choices=SIZES)
    args = parser.parse_args()
    device = pick_device(args.device)
    about = manifest(args.commit)
    run = {"quality": run_quality, "step": run_step, "memory": run_memory}[args.part]
    print(json.dumps(run(args, about, device), indent=1))


if __name__ == "__main__":
    main()
