"""What each cache gains and costs on the trained models: alone, and with sparse attention.

    python benchmarks/caching.py --models tiny-wan tiny-hunyuan tiny-flux tiny-sd3 --plot

Sixteen fixed prompts of each model's world, from the same noise, densely and with every cache at
three strengths, each alone and together with a sparse method. Block calls are counted and compared
with the closed form that the cache's decisions give; time is that of the denoising loops, one run
each after a warm-up. One JSON file a model, written after each row; rows that it holds are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from fidelity import BLOCK, BLOCKS, Clips, Context, generate_all, probe_layout, summarise
from torch import nn

from dit_accel import accelerate_pipeline, acceleration_report, list_methods, restore_pipeline
from dit_accel.caching.base import Cache
from dit_accel.caching.profiling import ProfilingCache, refresh_steps
from dit_accel.caching.stack import StackCache
from dit_accel.environment import environment, pick_device
from dit_accel.errors import DitAccelError, OptionError
from dit_accel.files import write_text
from dit_accel.generation import GenerationRequest
from dit_accel.models import generation_defaults, load_pipeline
from dit_accel.registry import method_class
from dit_accel.report import AccelerationReport
from dit_accel.world.worlds import fixed_prompts, make_reader

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]

OPTIONS: dict[str, Row] = {"dual_block_cache": {"first_blocks": 2, "first_steps": 0.15}}
"""What suits models of few blocks; all else is as usual."""
ATTENTION: dict[str, Row] = {
    "none": {},
    "radial": {"density": 0.6, "radial": {"block_size": BLOCK}},
    "pisa": {"density": 0.3, "pisa": BLOCKS.get("pisa", {"block_size": BLOCK})},
}
SCHEDULE: Row = {"dense_steps": 0.25, "dense_layers": 0, "min_tokens": 0}


@contextmanager
def loop_clock(pipe: Any) -> Iterator[list[float]]:
    """Collect the seconds of every denoising loop, from its first transformer call to its end."""
    loops: list[float] = []
    began: list[float] = []
    step = pipe.scheduler.step

    def begin(*_: Any) -> None:
        if not began:
            began.append(_now())

    def stepped(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        if pipe.scheduler.step_index == len(pipe.scheduler.timesteps):
            loops.append(_now() - began.pop())
        return result

    parts = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    hooks = [m.register_forward_pre_hook(begin) for m in parts if isinstance(m, nn.Module)]
    pipe.scheduler.step = stepped
    try:
        yield loops
    finally:
        del pipe.scheduler.step
        for hook in hooks:
            hook.remove()


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def closed_form(cache: Cache | None, report: AccelerationReport, blocks: int) -> int:
    """Return the block calls that follow from the cache's rule and its full steps."""
    steps = report.steps
    if isinstance(cache, ProfilingCache):
        total = len({step.step for step in steps})
        first = cache.limits(total).first
        uniform = refresh_steps(total, first, cache.interval, cache.interval)
        shrinking = refresh_steps(total, first, cache.longest, cache.shortest)
        below = [run.start < cache.uniform_below for run in cache.scope(blocks)]
        spared = 0
        for run, is_uniform in zip(cache.scope(blocks), below, strict=True):
            refreshed = uniform if is_uniform else shrinking
            spared += len(run) * sum(step.step not in refreshed for step in steps)
        return len(steps) * blocks - spared
    full = sum(bool(step.why) for step in steps)
    if isinstance(cache, StackCache):
        skipped = sum(map(len, cache.scope(blocks)))
    else:
        skipped = blocks if cache is not None and cache.name == "unconditional_cache" else 0
    return full * blocks + (len(steps) - full) * (blocks - skipped)


def measure(pipe: Any, key: tuple[str, float | None, str], context: Context, dense_s: float) -> Row:
    """Generate all prompts with one cache at one strength and one kind of attention."""
    name, strength, attention = key
    row: Row = {"cache": name, "strength": strength, "attention": attention}
    options: Row = {}
    chosen = []
    if attention != "none":
        chosen.append(attention)
        options |= ATTENTION[attention] | SCHEDULE
    if name != "none":
        cls = method_class(name)
        chosen.append(name)
        options[name] = OPTIONS.get(name, {}) | {cls.strength: strength}  # type: ignore[attr-defined]
    try:
        accelerate_pipeline(pipe, chosen, **options)
        generate_all(pipe, [replace(context.requests[0], steps=9)], 1, context.extra)
        with loop_clock(pipe) as loops:
            clips = generate_all(pipe, context.requests, context.batch, context.extra)
        report = acceleration_report(pipe)
        caches = [method for method in report.methods if isinstance(method, Cache)]
    except DitAccelError as error:
        return row | {"refused": str(error)}
    except Exception as error:
        traceback.print_exc()
        return row | {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
    finally:
        restore_pipeline(pipe)
    row |= {
        "loop_s": sum(loops),
        "speedup": dense_s / sum(loops),
        "block_density": report.block_density,
        "cache_mib": report.cache_bytes / 2**20,
        "notes": list(report.notes),
    }
    if caches:
        run = sum(sum(step.ran) for step in report.steps)
        blocks = max(len(step.ran) for step in report.steps)
        row |= {
            "block_calls": report.block_calls,  # of the last batch
            "block_calls_run": run,
            "closed_form": closed_form(caches[0], report, blocks),
            "call_speedup": report.block_calls / max(run, 1),
            "attention_reused": sum(step.attention_reused for step in report.steps),
        }
    row["prompts"] = [context.compare(i, clips) for i in range(len(context.requests))]
    return row | summarise(row["prompts"])


def keys(args: argparse.Namespace) -> list[tuple[str, float | None, str]]:
    """Return what to measure: the caches, and sparse attention without any."""
    found: list[tuple[str, float | None, str]] = [("none", None, a) for a in args.attention]
    for name, attention in product(args.caches, args.attention):
        if name == "remainder_cache" and attention != "radial":
            continue  # it goes with static methods only
        strengths: tuple[float, ...] = method_class(name).strengths  # type: ignore[attr-defined]
        found += [(name, strength, attention) for strength in strengths]
    return [key for key in found if key != ("none", None, "none")]


def measure_model(model: str, args: argparse.Namespace) -> Row:
    """Make the missing rows of one model and return all of its file."""
    device = pick_device(args.device)
    defaults = asdict(generation_defaults(model))
    del defaults["fps"]
    world = defaults.pop("world")
    if world is None:
        raise OptionError(f"{model} belongs to no drawn world: nothing reads what it draws.")
    given = {name: getattr(args, name) for name in ("steps", "frames", "height", "width")}
    settings: Row = {**defaults, **{name: v for name, v in given.items() if v is not None}}
    entries = fixed_prompts(world)[: args.prompts]
    requests = [
        GenerationRequest(prompt=entry["prompt"], seed=seed, **settings)
        for seed, entry in enumerate(entries)
    ]
    batch = args.batch or (1 if device == "cpu" else 4)
    content: Row = {
        "model": Path(model).name,
        "settings": {**settings, "prompts": len(requests), "batch": batch, "dtype": args.dtype},
        "attention": ATTENTION,
        "environment": environment(device),
        "commit": args.commit,
        "rows": [],
    }
    output = args.output / f"caching-{Path(model).name}.json"
    if output.exists() and not args.force:
        earlier = json.loads(output.read_text())
        if earlier["settings"] != content["settings"]:
            raise OptionError(f"{output} has other settings: give another --output, or --force.")
        # What was refused is quick to try again: the model may bring its numbers by now.
        content["rows"] = [row for row in earlier["rows"] if "psnr_db" in row]
    done = {(row["cache"], row["strength"], row["attention"]) for row in content["rows"]}
    todo = [key for key in keys(args) if key not in done]
    if not todo:
        return content
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    pipe = load_pipeline(model, device=device, dtype=dtype)
    layout = probe_layout(pipe, requests[0])
    generate_all(pipe, [replace(requests[0], steps=2)], 1)
    with loop_clock(pipe) as loops:
        dense: Clips = generate_all(pipe, requests, batch)
    content["dense_loop_s"] = sum(loops)
    context = Context(requests, entries, batch, layout, dense, make_reader(world, device), {})
    for key in todo:
        row = measure(pipe, key, context, content["dense_loop_s"])
        content["rows"].append(row)
        write_text(output, json.dumps(content, indent=1, allow_nan=False) + "\n")
        print(content["model"], line(row), flush=True)
    return content


def line(row: Row) -> str:
    """One row for a terminal."""
    text = f"{row['cache']:20s} {row['strength']!s:6s} {row['attention']:7s}"
    for name in ("refused", "failed"):
        if name in row:
            return f"{text} {name}: {row[name]}"
    decibels = math.inf if row["psnr_db"] is None else row["psnr_db"]
    calls = ""
    if "block_calls" in row:
        agrees = "" if row["block_calls_run"] == row["closed_form"] else "  NOT THE CLOSED FORM"
        calls = f" {row['block_calls_run']} of {row['block_calls']} block calls{agrees}"
    return (
        f"{text} {row['speedup']:.2f}x PSNR {decibels:.1f} dB SSIM {row['ssim']:.3f} "
        f"L1 {row['latents_relative_l1']:.3f}{calls}"
    )


def plot(contents: Sequence[Row], output: Path) -> None:
    """PSNR against measured speed-up: one panel a model, one line a cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(contents), figsize=(5.5 * len(contents), 4.5), squeeze=False, layout="constrained"
    )
    caches = list(dict.fromkeys(row["cache"] for content in contents for row in content["rows"]))
    for content, panel in zip(contents, panels[0], strict=True):
        for index, (cache, style) in enumerate(product(caches, ATTENTION)):
            rows = [r for r in content["rows"] if (r["cache"], r["attention"]) == (cache, style)]
            rows = sorted((r for r in rows if r.get("psnr_db")), key=lambda r: r["speedup"])
            if rows:
                panel.plot(
                    [r["speedup"] for r in rows],
                    [r["psnr_db"] for r in rows],
                    color=f"C{index // len(ATTENTION)}",
                    linestyle={"none": "-", "radial": "--", "pisa": ":"}[style],
                    marker="o",
                    markersize=4,
                    label=cache if style == "none" else None,
                )
        panel.axhline(30, color="0.7", linewidth=0.8)
        panel.set(title=content["model"], xlabel="speed-up of the denoising loop")
        panel.set_ylabel("PSNR to dense, dB")
        panel.grid(alpha=0.3)
    panels[0][-1].legend(fontsize=7, title="- alone  -- radial  : pisa")
    figure.savefig(output.with_suffix(".png"), dpi=120)
    figure.savefig(output.with_suffix(".svg"))
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    caches = list_methods("cache")
    parser.add_argument("--models", nargs="+", default=["tiny-wan"], help="names or folders")
    parser.add_argument("--caches", nargs="*", default=caches, choices=caches)
    parser.add_argument("--attention", nargs="+", default=list(ATTENTION), choices=ATTENTION)
    parser.add_argument("--prompts", type=int, default=16, help="the first so many of 64")
    parser.add_argument("--batch", type=int, help="prompts at once; 4 on a GPU, 1 on a CPU")
    for name in ("steps", "frames", "height", "width"):
        parser.add_argument(f"--{name}", type=int, help="the model's own by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--plot", action="store_true", help="also caching.png and .svg")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    parser.add_argument("--commit")
    parser.add_argument("--force", action="store_true", help="start the files again")
    args = parser.parse_args()
    with torch.no_grad():
        contents = [measure_model(model, args) for model in args.models]
    if args.plot:
        plot(contents, args.output / "caching")


if __name__ == "__main__":
    main()
