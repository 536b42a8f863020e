"""Whether a cache saves the time of the block calls that it skips, on Wan2.1-14B-sized steps.

Random weights in the real configuration, a few of its forty blocks, whole denoising loops of the
real pipeline with forced schedules (thresholds that always or never reuse). The time that skipping
should save is the number of skipped calls times the time of one call, which CUDA events measure
around every block of a loop without a cache; both for dense and for sparse attention.

    python benchmarks/cache_steps.py --output benchmarks/results/cache-steps-h200.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.bench.architectures import load_architecture
from dit_accel.bench.measuring import manifest, write_json

SIZES = {"720p x 81": (720, 1280, 81), "480p x 81": (480, 832, 81), "smoke": (64, 64, 5)}
FORCED: dict[str, dict[str, Any]] = {
    "first_block_cache": {"threshold": 1e9, "max_reuses": 2},
    "dual_block_cache": {"threshold": 1e9, "first_blocks": 2, "last_blocks": 1, "first_steps": 2},
    "magcache": {"ratios": (1.0, 1.0), "threshold": 1.0, "first_steps": 2},
    "taylorseer": {"interval": 3, "first_steps": 2},
    "profiling_cache": {"blocks": (0, 2, 3, 5, 6), "longest": 16, "shortest": 16},
    "unconditional_cache": {"every": 3, "first_steps": 2},
}
"""Caches with options under which random weights decide nothing."""
ATTENTION: dict[str, dict[str, Any]] = {
    "dense": {},
    "radial": {"dense_steps": 0, "dense_layers": 0},
    "gna": {"dense_steps": 0, "dense_layers": 0},
}
Row = dict[str, Any]


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


def block_s(pipe: WanPipeline, size: tuple[int, int, int], steps: int) -> float:
    """Return the median seconds of one block call over a loop."""
    calls: list[tuple[Any, Any]] = []

    def before(*_: Any) -> None:
        calls.append((_mark(), None))

    def after(*_: Any) -> None:
        calls[-1] = calls[-1][0], _mark()

    hooks = []
    for block in pipe.transformer.blocks:
        hooks += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    loop_s(pipe, size, steps)
    for hook in hooks:
        hook.remove()
    return statistics.median(_between(*call) for call in calls)


def measure(pipe: WanPipeline, size: str, attention: str, args: argparse.Namespace) -> list[Row]:
    """Time the loop with one kind of attention, without a cache and with each."""
    rows: list[Row] = []
    options = ATTENTION[attention]
    methods = [] if attention == "dense" else [attention]
    if methods:
        accelerate_pipeline(pipe, methods, **options)
    loop_s(pipe, SIZES[size], 2)
    whole = min(loop_s(pipe, SIZES[size], args.steps) for _ in range(args.repeats))
    one = block_s(pipe, SIZES[size], args.steps)
    for cache, own in FORCED.items():
        accelerate_pipeline(pipe, [*methods, cache], **options, **{cache: {**own, "min_steps": 0}})
        loop_s(pipe, SIZES[size], 3)
        spent = min(loop_s(pipe, SIZES[size], args.steps) for _ in range(args.repeats))
        report = acceleration_report(pipe)
        skipped = report.block_calls - sum(sum(step.ran) for step in report.steps)
        saved, expected = whole - spent, skipped * one
        row = {
            "size": size,
            "attention": attention,
            "cache": cache,
            "options": own,
            "block_calls": report.block_calls,
            "skipped": skipped,
            "loop_without_s": whole,
            "loop_s": spent,
            "block_ms": one * 1e3,
            "saved_s": saved,
            "expected_saved_s": expected,
            "saved_over_expected": saved / expected,
            "within_3_percent": abs(saved / expected - 1) <= 0.03,
            "cache_gib": report.cache_bytes / 2**30,
        }
        rows.append(row)
        print(
            f"{size} {attention:7s} {cache:20s} {skipped} of {report.block_calls} calls: "
            f"{whole:.2f} -> {spent:.2f} s, {row['saved_over_expected']:.3f} of expected",
            flush=True,
        )
    restore_pipeline(pipe)
    return rows


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", default=["720p x 81", "480p x 81"], choices=SIZES)
    parser.add_argument("--attention", nargs="+", default=list(ATTENTION), choices=ATTENTION)
    parser.add_argument("--smoke", action="store_true", help="a narrow model on the CPU")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit")
    args = parser.parse_args()
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
    rows: list[Row] = []
    for size in args.sizes:
        for attention in args.attention:
            rows += measure(pipe, size, attention, args)
    result: Row = {
        "manifest": {} if args.smoke else manifest(args.commit),
        "what": "denoising loops with guidance, batch 1, bf16, random weights, forced schedules",
        "layers_measured": args.layers,
        "layers_of_the_real_model": 40,
        "steps": args.steps,
        "rows": rows,
    }
    write_json(result, args.output)


if __name__ == "__main__":
    main()
