"""Whether a cache saves the time of the block calls that it skips, on Wan2.1-14B-sized steps.

Random weights in the real configuration, a few of its forty blocks, whole denoising loops of the
real pipeline with forced schedules (thresholds that always or never reuse), for dense and for
sparse attention. The time that skipping should save is the number of skipped calls times the median
time of one call, which CUDA events measure around every block of the loops without a cache.

    python benchmarks/cache_steps.py --output benchmarks/results/cache-steps-h100.json

One row a cache, written at once; a later run goes on where the file ends, tries failed rows again,
and measures the loop without a cache anew. By default about 80 s on an H100; `--sizes "720p x 81"
--attention radial` takes about as long.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.bench.architectures import load_architecture
from dit_accel.bench.measuring import guarded, manifest
from dit_accel.bench.runs import ResultFile

SIZES = {"720p x 81": (720, 1280, 81), "480p x 81": (480, 832, 81), "smoke": (64, 64, 5)}
FORCED: dict[str, dict[str, Any]] = {
    "first_block_cache": {"threshold": 1e9, "max_reuses": 2},
    "dual_block_cache": {"threshold": 1e9, "first_blocks": 2, "last_blocks": 1, "first_steps": 2},
    "magcache": {"ratios": (1.0, 1.0), "threshold": 1.0, "first_steps": 2},
    "taylorseer": {"interval": 3, "first_steps": 2},
    "profiling_cache": {"blocks": (0, 2, 3, 5), "longest": 26, "shortest": 26},
    "unconditional_cache": {"every": 3, "first_steps": 2},
}
"""Caches with options under which random weights decide nothing."""
ATTENTION: dict[str, dict[str, Any]] = {
    "dense": {},
    "radial": {"dense_steps": 0, "dense_layers": 0},
    "pisa": {"dense_steps": 0, "dense_layers": 0},
    "gna": {"dense_steps": 0, "dense_layers": 0},
}
WITHIN = 0.03
Row = dict[str, Any]
Key = tuple[str, str]  # size and attention


class StepBench:
    """Times loops of a pipeline of random weights."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self._pipe: WanPipeline | None = None
        self._without: dict[Key, tuple[float, float]] = {}

    @property
    def pipe(self) -> WanPipeline:
        """The pipeline, made when it is first needed."""
        if self._pipe is None:
            self._pipe = make_pipeline(self.args)
        return self._pipe

    def measure(self, task: Mapping[str, Any]) -> Row:
        """Time the loop with one cache, against that without."""
        key = task["size"], task["attention"]
        options = ATTENTION[task["attention"]]
        methods = [] if task["attention"] == "dense" else [task["attention"]]
        own = FORCED[task["cache"]] | {"min_steps": 0}
        try:
            if key not in self._without:
                if methods:
                    accelerate_pipeline(self.pipe, methods, guard=False, **options)
                self._without[key] = self._loop_without(key[0])
            whole, one = self._without[key]
            accelerate_pipeline(
                self.pipe, [*methods, task["cache"]], guard=False, **options, **{task["cache"]: own}
            )
            spent = min(
                loop_s(self.pipe, SIZES[key[0]], self.args.steps) for _ in range(self.args.repeats)
            )
            report = acceleration_report(self.pipe)
        finally:
            restore_pipeline(self.pipe)
        skipped = report.block_calls - sum(sum(step.ran) for step in report.steps)
        saved, expected = whole - spent, skipped * one
        return {
            "options": own,
            "block_calls": report.block_calls,
            "skipped": skipped,
            "loop_without_s": whole,
            "loop_s": spent,
            "block_ms": one * 1e3,
            "saved_s": saved,
            "expected_saved_s": expected,
            "saved_over_expected": saved / expected,
            "within_3_percent": abs(saved / expected - 1) <= WITHIN,
            "cache_gib": report.cache_bytes / 2**30,
            "density": report.density,
        }

    def _loop_without(self, size: str) -> tuple[float, float]:
        """Return the seconds of the loop without a cache, and of one block call in it."""
        calls: list[tuple[Any, Any]] = []

        def before(*_: Any) -> None:
            calls.append((_mark(), None))

        def after(*_: Any) -> None:
            calls[-1] = calls[-1][0], _mark()

        loop_s(self.pipe, SIZES[size], 2)  # kernels, first allocations
        hooks = []
        for block in self.pipe.transformer.blocks:
            hooks += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
        try:
            whole = min(loop_s(self.pipe, SIZES[size], self.args.steps) for _ in range(2))
        finally:
            for hook in hooks:
                hook.remove()
        return whole, statistics.median(_between(*call) for call in calls)


def make_pipeline(args: argparse.Namespace) -> WanPipeline:
    """Return a pipeline of a transformer with random weights and nothing else."""
    torch.manual_seed(0)
    config = {**load_architecture("wan2.1-14b").config, "num_layers": args.layers}
    if args.smoke:
        config |= {"num_attention_heads": 2, "ffn_dim": 256}
    torch.set_default_dtype(torch.float32 if args.smoke else torch.bfloat16)
    with torch.device("cpu" if args.smoke else "cuda"):
        transformer = WanTransformer3DModel(**config).eval()
    torch.set_default_dtype(torch.float32)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = WanPipeline(None, None, None, scheduler, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loop_s(pipe: WanPipeline, size: tuple[int, int, int], steps: int) -> float:
    """Run one denoising loop and return its seconds, first transformer call to the end."""
    height, width, frames = size
    device, dtype = pipe.transformer.device, pipe.transformer.dtype
    began: list[float] = []

    def begin(*_: Any) -> None:
        if not began:
            began.append(_now())

    hook = pipe.transformer.register_forward_pre_hook(begin)
    text = torch.randn(2, 1, 512, 4096, device=device, dtype=dtype)
    try:
        pipe(
            prompt_embeds=text[0],
            negative_prompt_embeds=text[1],
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=steps,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
    finally:
        hook.remove()
    return _now() - began[0]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _mark() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, stop: Any) -> float:
    if not torch.cuda.is_available():
        return stop - start
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def line(row: Row) -> str:
    """One row for a terminal."""
    text = f"{row['size']} {row['attention']:7s} {row['cache']:20s}"
    for name in ("refused", "failed"):
        if name in row:
            return f"{text} {name}: {row[name]}"
    return (
        f"{text} {row['skipped']} of {row['block_calls']} calls: {row['loop_without_s']:.2f} -> "
        f"{row['loop_s']:.2f} s, {row['saved_over_expected']:.3f} of expected"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6, help="6 or more")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=1, help="of a loop with a cache")
    parser.add_argument("--sizes", nargs="+", default=["480p x 81"], choices=SIZES)
    parser.add_argument(
        "--attention", nargs="+", default=["dense", "radial", "pisa"], choices=ATTENTION
    )
    parser.add_argument("--smoke", action="store_true", help="a narrow model on the CPU")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit")
    parser.add_argument("--force", action="store_true", help="start the file again")
    args = parser.parse_args()
    sizes = ["smoke"] if args.smoke else args.sizes
    settings: Row = {
        "what": "denoising loops with guidance, batch 1, random weights, forced schedules",
        "dtype": "float32" if args.smoke else "bfloat16",
        "layers_measured": args.layers,
        "layers_of_the_real_model": 40,
        "steps": args.steps,
    }
    results = ResultFile("cache-steps", manifest(args.commit), settings, args.output, args.force)
    bench = StepBench(args)
    for size, attention, cache in product(sizes, args.attention, FORCED):
        task = {"size": size, "attention": attention, "cache": cache}
        if not results.has(task):
            print(line(results.add(task, guarded(bench.measure, task))), flush=True)
    rows = [row for row in results.rows if "saved_over_expected" in row]
    ratios = [row["saved_over_expected"] for row in rows]
    told = {
        "rows": len(rows),
        "within_3_percent": sum(row["within_3_percent"] for row in rows),
        "saved_over_expected": [min(ratios, default=None), max(ratios, default=None)],
        "not_measured": len(results.rows) - len(rows),
    }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
