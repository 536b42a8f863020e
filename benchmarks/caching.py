"""What each cache gains and costs on the trained models: alone, and with sparse attention.

    python benchmarks/caching.py --models tiny-wan tiny-hunyuan tiny-flux tiny-sd3
    python benchmarks/caching.py --models tiny-wan tiny-hunyuan tiny-flux tiny-sd3 --plot

Sixteen fixed prompts of each model's world, all in one batch on a GPU, from the same noise:
densely, and with every cache at three strengths, alone and together with a sparse method. Strengths
of caches that count block calls are those, found by a short probe of four prompts, at which about
70, 50 and 35 % of the calls run, as far as the cache goes; the others have their usual ones. Block
calls are counted and compared with the closed form that the cache's rule and decisions give. Time
is that of one denoising loop; the dense one is the median of three.

One JSON file a model, written after each row. A row that fails says so and the run goes on; a later
run keeps the rows that are there and tries the failed ones again. Caches alone come first, then
each at its middle strength with the sparse methods (Radial and PISA; GNA and PISA for pictures),
then the other strengths: `--seconds` ends a model's run early without losing what matters most.
PSNR and SSIM compare frames, "latent" is the relative L1 error of the final latents. `--plot`
measures nothing: it draws what the files hold.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fidelity import BLOCK, SCHEDULE
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
from torch import nn

from dit_accel import accelerate_pipeline, acceleration_report, list_methods, restore_pipeline
from dit_accel.bench.measuring import guarded, manifest
from dit_accel.bench.runs import ResultFile
from dit_accel.caching.base import Cache
from dit_accel.caching.profile import Profile
from dit_accel.caching.profiling import ProfilingCache, refresh_steps
from dit_accel.caching.stack import StackCache
from dit_accel.calibration import CacheProbe, Goal, calls_for
from dit_accel.environment import pick_device
from dit_accel.errors import OptionError
from dit_accel.eval.fidelity import psnr, relative_l1, ssim
from dit_accel.generation import GenerationRequest
from dit_accel.registry import method_class
from dit_accel.report import AccelerationReport

SHARES = (0.7, 0.5, 0.35)  # of the block calls that run, weak to strong
PROBE_PROMPTS = 4
OPTIONS: dict[str, Row] = {
    "dual_block_cache": {"first_blocks": 1, "last_blocks": 1, "first_steps": 1},
    "profiling_cache": {"longest": 16, "shortest": 8},
}
"""What suits models of few blocks and generations of few steps; all else is as usual."""
ATTENTION: dict[str, Row] = {
    "none": {},
    "radial": {"density": 0.6, "radial": {"block_size": BLOCK}},
    "pisa": {"density": 0.3, "pisa": {"block_size": BLOCK}},
}
OF_PICTURES: dict[str, Row] = {
    "none": {},
    "gna": {"gna": {"window": (1.0, 0.5, 0.5), "block_size": BLOCK}},
    "pisa": {"pisa": {"density": 0.3, "block_size": BLOCK}},
}
"""Radial attends a single frame densely. Text is a third of the tokens or more, always exact, so
densities are those of the pairs of picture tokens."""
KINDS = list(dict.fromkeys((*ATTENTION, *OF_PICTURES)))
WITHOUT_BLOCK_CALLS = ("pab", "remainder_cache", "unconditional_cache")
"""Caches that skip something else, or whole passes: they have their usual strengths."""


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


def closed_form(cache: Cache, report: AccelerationReport, blocks: int) -> int:
    """Return the block calls that follow from the cache's rule and its full steps."""
    steps = report.steps
    if isinstance(cache, ProfilingCache):
        if cache.profile is not None:
            listed = Profile.load(cache.profile).background_blocks(cache.fraction)
            cache = replace(cache, blocks=listed, profile=None)
        total = len({step.step for step in steps})
        first = cache.limits(total).first
        uniform = refresh_steps(total, first, cache.interval, cache.interval)
        shrinking = refresh_steps(total, first, cache.longest, cache.shortest)
        spared = 0
        for run in cache.scope(blocks):
            refreshed = uniform if run.start < cache.uniform_below else shrinking
            spared += len(run) * sum(step.step not in refreshed for step in steps)
        return len(steps) * blocks - spared
    full = sum(bool(step.why) for step in steps)
    if isinstance(cache, StackCache):
        skipped = sum(map(len, cache.scope(blocks)))
    else:
        skipped = blocks if cache.name == "unconditional_cache" else 0
    return full * blocks + (len(steps) - full) * (blocks - skipped)


class ModelBench:
    """Measures the rows of one model; the pipeline is loaded and run densely when first needed."""

    def __init__(self, model: str, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.device = pick_device(args.device)
        prompts = Prompts.of(model, args)
        self.requests = prompts.requests[: args.prompts]
        self.batch = args.batch or (1 if self.device == "cpu" else len(self.requests))
        attention = OF_PICTURES if prompts.world == "pictures" else ATTENTION
        self.settings = {
            **prompts.settings,
            "prompts": len(self.requests),
            "batch": self.batch,
            "dtype": args.dtype,
            "shares": SHARES,
            "options": OPTIONS,
            "attention": attention,
            "schedule": SCHEDULE,
        }
        self.attention = {
            kind: options for kind, options in attention.items() if kind in args.attention
        }
        self.pipe: Any = None
        self.dense: Clips = Clips([], [])
        self.dense_loop_s = math.nan
        self._warm: set[str] = set()

    def prepare(self) -> None:
        """Load the pipeline and generate densely."""
        if self.pipe is not None:
            return
        self.pipe = load(self.model, self.args.dtype, self.device)
        repeats = 1 if self.device == "cpu" else 3
        if repeats > 1:
            self._generate([replace(request, steps=4) for request in self.requests])
        loops = []
        for _ in range(repeats):
            self.dense, seconds = self._generate(self.requests)
            loops.append(seconds)
        self.dense_loop_s = statistics.median(loops)

    def probe(self, task: Mapping[str, Any]) -> Row:
        """Return three strengths of a cache, and the curve that they were found on."""
        self.prepare()
        name = task["probe"]
        few = calls_for(self.pipe, self.requests[:PROBE_PROMPTS], self.batch)
        probe = CacheProbe(self.pipe, name, few, {name: OPTIONS.get(name, {})})
        found = [probe.search(Goal(target_speedup=1 / share))[1] for share in SHARES]
        strongest = max(probe.curve, key=lambda point: (point.speedup, -point.strength))
        chosen = list(dict.fromkeys((point or strongest).strength for point in found))
        return {"strengths": chosen, "curve": [asdict(point) for point in probe.curve]}

    def measure(self, task: Mapping[str, Any]) -> Row:
        """Generate all prompts with one cache at one strength and one kind of attention."""
        self.prepare()
        name, attention = task["cache"], task["attention"]
        chosen = [attention] if attention != "none" else []
        options: Row = self.attention[attention] | SCHEDULE if chosen else {}
        try:
            if attention not in self._warm and self.device != "cpu":
                if chosen:
                    accelerate_pipeline(self.pipe, chosen, guard=False, **options)
                self._generate([replace(request, steps=4) for request in self.requests])
                self._warm.add(attention)
            if name != "none":
                strength = {method_class(name).strength: task["strength"]}  # type: ignore[attr-defined]
                chosen, options = (
                    [*chosen, name],
                    options | {name: OPTIONS.get(name, {}) | strength},
                )
            accelerate_pipeline(self.pipe, chosen, guard=False, **options)
            clips, loop_s = self._generate(self.requests)
            report = acceleration_report(self.pipe)
        finally:
            restore_pipeline(self.pipe)
        return {
            "loop_s": loop_s,
            "dense_loop_s": self.dense_loop_s,
            "speedup": self.dense_loop_s / loop_s,
            "block_density": report.block_density,
            "cache_mib": report.cache_bytes / 2**20,
            "notes": list(report.notes),
            **_counts(report),
            **self._compare(clips),
        }

    def _generate(self, requests: Sequence[GenerationRequest]) -> tuple[Clips, float]:
        with loop_clock(self.pipe) as loops:
            clips = generate_all(self.pipe, requests, self.batch)
        return clips, sum(loops)

    def _compare(self, clips: Clips) -> Row:
        if not all(bool(latents.isfinite().all()) for latents in clips.latents):
            raise RuntimeError("the final latents are not finite")
        frames = list(zip(clips.frames, self.dense.frames, strict=True))
        latents = zip(clips.latents, self.dense.latents, strict=True)
        each: dict[str, list[float]] = {
            # Frames that are equal count as 100 dB.
            "psnr_db": [min(psnr(*pair), 100.0) for pair in frames],
            "ssim": [_ssim(*pair) for pair in frames],
            "latent": [relative_l1(*pair) for pair in latents],
        }
        each = {name: [round(v, 5) for v in values] for name, values in each.items()}
        means: Row = {
            name: None if any(map(math.isnan, values)) else float(np.mean(values))
            for name, values in each.items()
        }
        picks = np.random.default_rng(0).integers(len(frames), size=(10_000, len(frames)))
        sampled = np.asarray(each["psnr_db"])[picks].mean(1)
        means["psnr_interval"] = np.percentile(sampled, [2.5, 97.5]).round(3).tolist()
        return means | {"psnr_db_each": each["psnr_db"], "latent_each": each["latent"]}


def _ssim(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the SSIM, NaN where what it needs is not installed."""
    try:
        return ssim(first, second)
    except OptionError:
        return math.nan


def _counts(report: AccelerationReport) -> Row:
    """Return what the cache left out, if there is one."""
    cache = next((method for method in report.methods if isinstance(method, Cache)), None)
    if cache is None or not report.steps:
        return {}
    run = sum(sum(step.ran) for step in report.steps)
    blocks = max(len(step.ran) for step in report.steps)
    return {
        "block_calls": report.block_calls,  # of the last batch
        "block_calls_run": run,
        "closed_form": closed_form(cache, report, blocks),
        "share_run": run / report.block_calls,
        "attention_reused": sum(step.attention_reused for step in report.steps),
    }


def tasks_of(
    args: argparse.Namespace, kinds: Sequence[str], strengths: Mapping[str, Sequence[float]]
) -> list[Row]:
    """Return what to measure, what matters most first."""
    combined = [kind for kind in kinds if kind != "none"]
    bare = [("none", None, attention) for attention in combined]
    middle, others = [], []
    for attention, name in product(combined, args.caches):
        if name == "remainder_cache" and attention == "pisa":
            continue  # it goes with static methods only
        for strength in strengths.get(name, ()):
            among = middle if strength == _middle(strengths[name]) else others
            among.append((name, strength, attention))
    alone = [
        (name, strength, "none")
        for name in args.caches
        for strength in strengths.get(name, ())
        if name != "remainder_cache" and "none" in kinds
    ]
    keys = [*alone, *bare, *middle, *([] if args.middle_only else others)]
    return [dict(zip(("cache", "strength", "attention"), key, strict=True)) for key in keys]


def _middle(values: Sequence[float]) -> float:
    return values[len(values) // 2]


def measure_model(model: str, args: argparse.Namespace) -> Row:
    """Make the missing rows of one model and return all of its file."""
    started = time.monotonic()
    name = Path(model).name
    bench = ModelBench(model, args)
    output = args.output / f"caching-{name}.json"
    results = ResultFile("caching", manifest(args.commit), bench.settings, output, args.force)
    results.content["model"] = name
    for cache in args.caches:
        if cache not in WITHOUT_BLOCK_CALLS and not results.has({"probe": cache}):
            row = results.add({"probe": cache}, guarded(bench.probe, {"probe": cache}))
            told = row.get("strengths") or row.get("refused") or row.get("failed")
            print(f"{name} {cache} strengths: {told}", flush=True)
    strengths = {cache: method_class(cache).strengths for cache in WITHOUT_BLOCK_CALLS}  # type: ignore[attr-defined]
    strengths |= {row["probe"]: row["strengths"] for row in results.rows if "strengths" in row}
    todo = [
        task for task in tasks_of(args, list(bench.attention), strengths) if not results.has(task)
    ]
    for number, task in enumerate(todo):
        if args.seconds is not None and time.monotonic() - started > args.seconds:
            print(f"{name}: out of time, {len(todo) - number} rows left for a later run")
            break
        began = time.monotonic()
        measured = guarded(bench.measure, task)
        row = results.add(task, measured | {"spent_s": round(time.monotonic() - began, 2)})
        print(name, line(row), flush=True)
    return results.content


def line(row: Row) -> str:
    """One row for a terminal."""
    text = f"{row['attention']:7s} {row['cache']:20s} {row['strength'] or 0:<8.4g}"
    for name in ("refused", "failed"):
        if name in row:
            return f"{text} {name}: {row[name]}"
    calls = ""
    if "block_calls" in row:
        agrees = "" if row["block_calls_run"] == row["closed_form"] else "  NOT THE CLOSED FORM"
        calls = f" {row['share_run']:.0%} of {row['block_calls']} block calls{agrees}"
    likeness = "" if row["ssim"] is None else f" SSIM {row['ssim']:.3f}"
    return (
        f"{text} {row['speedup']:.2f}x PSNR {row['psnr_db']:.1f} dB{likeness} "
        f"latent {row['latent']:.3f}{calls} ({row['spent_s']} s)"
    )


def summary(contents: Sequence[Row]) -> Row:
    """Return, for each model, the best row that runs at most half of the block calls."""
    found: Row = {}
    for content in contents:
        rows = [row for row in content["rows"] if "psnr_db" in row]
        alone = [row for row in rows if row["attention"] == "none"]
        halved = [row for row in alone if row.get("share_run", 1) <= 0.5]
        best = max(halved, key=lambda row: row["psnr_db"], default=None)
        keep = ("cache", "strength", "share_run", "psnr_db", "ssim", "latent", "speedup")
        found[content["model"]] = {
            "rows": len(rows),
            "not_measured": Counter(
                f"{row.get('probe') or row['cache']}: {row.get('refused') or row['failed']}"
                for row in content["rows"]
                if "refused" in row or "failed" in row
            ),
            "not_the_closed_form": sum(
                row.get("block_calls_run") != row.get("closed_form") for row in rows
            ),
            "best_at_half_the_calls": best and {name: best[name] for name in keep},
            "target_met": best is not None and best["psnr_db"] >= 30,
        }
    return found


STYLES = {"none": "-", "radial": "--", "gna": "--", "pisa": ":"}


def plot(contents: Sequence[Row], output: Path) -> None:
    """PSNR against measured speed-up: one panel a model, one line a cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(contents), figsize=(5.5 * len(contents), 4.5), squeeze=False, layout="constrained"
    )
    caches = sorted(
        {row["cache"] for content in contents for row in content["rows"] if "cache" in row}
    )
    for content, panel in zip(contents, panels[0], strict=True):
        measured = [row for row in content["rows"] if "psnr_db" in row]
        for (index, cache), style in product(enumerate(caches), STYLES):
            rows = [r for r in measured if (r["cache"], r["attention"]) == (cache, style)]
            rows.sort(key=lambda r: r["speedup"])
            if rows:
                panel.plot(
                    [r["speedup"] for r in rows],
                    [r["psnr_db"] for r in rows],
                    color=plt.get_cmap("tab20")(2 * index % 20 + index // 10),
                    linestyle=STYLES[style],
                    marker="o",
                    markersize=4,
                    label=cache if style == "none" else None,
                )
        panel.axhline(30, color="0.7", linewidth=0.8)
        panel.set(title=content["model"], xlabel="speed-up of the denoising loop")
        panel.set_ylabel("PSNR to dense, dB")
        panel.grid(alpha=0.3)
    panels[0][-1].legend(fontsize=7, title="- alone  -- radial, gna  : pisa")
    figure.savefig(output.with_suffix(".png"), dpi=120)
    figure.savefig(output.with_suffix(".svg"))
    plt.close(figure)


def main() -> None:
    parser = options_of(__doc__)
    caches = list_methods("cache")
    parser.add_argument("--caches", nargs="*", default=caches, choices=caches)
    parser.add_argument("--attention", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--middle-only", action="store_true", help="combined at one strength only")
    parser.add_argument("--seconds", type=float, help="begin no row of a model after this long")
    parser.add_argument("--prompts", type=int, default=16, help="the first so many of 64")
    parser.add_argument("--batch", type=int, help="prompts at once; all on a GPU, 1 on a CPU")
    add_sizes(parser)
    parser.add_argument("--plot", action="store_true", help="draw caching.png and .svg only")
    add_machine_and_files(parser)
    args = parser.parse_args()
    if args.plot:
        files = [args.output / f"caching-{Path(model).name}.json" for model in args.models]
        plot([json.loads(file.read_text()) for file in files], args.output / "caching")
        return
    with torch.no_grad():
        contents = list(map(partial(measure_model, args=args), args.models))
    print(json.dumps(summary(contents), indent=1))


if __name__ == "__main__":
    main()
