"""How close every method stays to dense attention at equal achieved density.

    python benchmarks/fidelity.py --models tiny-wan tiny-hunyuan --study --plot

Sixteen fixed prompts of each model's world, from the same noise. The protocol is one for all
methods, because published schedules would hide what is compared: the first quarter of the steps is
dense, no layer is, blocks have 32 tokens (the models have some thousand). Densities are shares of
pairs computed in the sparse calls, choosing included, and met within 10 %; a method that can't is
"unreachable", with the nearest densities that it has. Nothing is timed here.

One JSON file a model, written after each row; rows that it holds are kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from torch import Tensor

from dit_accel import GNA, accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.call import TokenLayout
from dit_accel.environment import environment, pick_device
from dit_accel.errors import DensityUnreachableError, OptionError
from dit_accel.eval.fidelity import psnr, relative_l1, ssim
from dit_accel.files import write_text
from dit_accel.generation import GenerationRequest
from dit_accel.methods.base import AttentionMethod, StaticMethod
from dit_accel.plan import BlockSparsePlan
from dit_accel.registry import resolve_method
from dit_accel.report import AccelerationReport
from dit_accel.world.worlds import make_reader, shares_right

BLOCK = 32
TOLERANCE = 0.1
SCHEDULE: Row = {"dense_steps": 0.25, "dense_layers": 0, "min_tokens": 0}
BLOCKS: Row = {"psa": {"query_block": BLOCK, "key_block": BLOCK}}
METHODS: dict[str, Row] = {
    "radial": {},
    "radial + remainder": {"remainder": "pooled"},
    "gna": {},
    "gna + remainder": {"remainder": "pooled"},
    "sliding_window": {},
    "sliding_window + remainder": {"remainder": "pooled"},
    "psa": {},
    "rectified": {},
    "rectified, no neighbours": {"neighbours": False},
    "pisa": {},
}
STUDY: dict[str, Row] = {
    "rectified, not gain-aware": {"gain_aware": False},
    "rectified, no neighbours, not gain-aware": {"neighbours": False, "gain_aware": False},
    "rectified, raster, not gain-aware": {"order": "raster", "gain_aware": False},
    "pisa, first order": {"terms": 1},
    "pisa, zeroth order": {"terms": 0},
    "pisa, covariance": {"covariance_weighted": True},
    "pisa, no covariance": {"covariance_weighted": False},
    "pisa, raster, first order": {"order": "raster", "terms": 1},
    "pisa, raster, zeroth order": {"order": "raster", "terms": 0},
    "pisa, patches, first order": {"order": "patches", "terms": 1},
    "pisa, patches, zeroth order": {"order": "patches", "terms": 0},
    "psa, 2 samples": {"samples_per_block": 2},
    "psa, 8 samples": {"samples_per_block": 8},
    "psa, 16 samples": {"samples_per_block": 16},
    "psa, levels of ends": {"mode": "top_k"},
    "psa, raster": {"order": "raster"},
    "psa, plans serve 4 steps": {"refresh_every": 4},
    "rectified, no neighbours, plans serve 4 steps": {"neighbours": False, "refresh_every": 4},
    "pisa, plans serve 4 steps": {"refresh_every": 4},
}
"""Variants for decisions: measured at `STUDY_DENSITIES` only."""
STUDY_DENSITIES = (0.25, 0.15)
ALSO_PLOTTED = ("psa, 8 samples", "rectified, not gain-aware")


def method_of(name: str) -> tuple[str, Row]:
    """Return a row's method and its options."""
    method = name.split(" ")[0].rstrip(",")
    return method, {**BLOCKS.get(method, {"block_size": BLOCK}), **({**METHODS, **STUDY}[name])}


def probe_layout(pipe: Any, request: GenerationRequest, extra: Row | None = None) -> TokenLayout:
    """Return the tokens of an attention call, as a sparse plan of one step tells."""
    try:
        accelerate_pipeline(pipe, GNA(block_size=BLOCK), **SCHEDULE | {"dense_steps": 0})
        generate_all(pipe, [replace(request, steps=1)], 1, extra)
        plans = [call.plan for call in acceleration_report(pipe).calls]
        return next(plan.layout for plan in plans if isinstance(plan, BlockSparsePlan))
    finally:
        restore_pipeline(pipe)


def at_density(
    name: str, density: float, layout: TokenLayout
) -> tuple[AttentionMethod, float | None]:
    """Return a method and the density to ask of it, None if its options have been set for it.

    Raises:
        DensityUnreachableError: if nothing within `TOLERANCE` was found.
    """
    method_name, options = method_of(name)
    method = resolve_method(method_name, **options)
    if not isinstance(method, StaticMethod):
        try:
            method.at_density(density, layout)
        except DensityUnreachableError as error:
            if error.least > density * (1 + TOLERANCE):
                raise
            return method, error.least
        return method, density
    # The patterns of few blocks have few densities: ask for more than the target, too.
    found: dict[float, StaticMethod] = {}
    least = 1.0
    for factor in (1, 1.03, 1.06, 1.09, 0.95, 1.3, 2, 0.7):
        try:
            one = method.at_density(min(density * factor, 0.999), layout)
            found[one.block_density(layout)] = one
        except DensityUnreachableError as error:
            least = min(least, error.least)
    if isinstance(method, GNA) and not _near(found, density):
        frames, height, width = layout.grid
        for t in range(1, frames + 1):
            for side in range(1, max(height, width) + 1):
                window = t, min(side, height), min(side, width)
                one = replace(method, window=window)
                found[one.block_density(layout)] = one
    if not _near(found, density):
        nearest = [least, *found]
        below = [d for d in nearest if d < density]
        above = [d for d in nearest if d > density]
        message = f"nearest are {[max(below, default=None), min(above, default=None)]}"
        raise DensityUnreachableError(message, least)
    best = min(found, key=lambda d: abs(d - density))
    return found[best], None


def _near(found: Row | dict[float, Any], density: float) -> bool:
    return any(abs(d - density) <= TOLERANCE * density for d in found)


def measure(pipe: Any, name: str, density: float | str, context: Context) -> Row:
    """Generate with one method at one density and compare with dense."""
    row: Row = {"method": name, "density": density}
    try:
        if density == "least":
            try:
                at_density(name, 1e-3, context.layout)
                raise OptionError("any density can be reached")
            except DensityUnreachableError as error:
                density = error.least
        method, asked = at_density(name, float(density), context.layout)
        accelerate_pipeline(pipe, method, density=asked, guard=False, **SCHEDULE)
        clips = generate_all(pipe, context.requests, context.batch, context.extra)
        report = acceleration_report(pipe)
    except DensityUnreachableError as error:
        return row | {"unreachable": str(error), "least": error.least}
    except Exception as error:
        traceback.print_exc()
        return row | {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
    finally:
        restore_pipeline(pipe)
    row |= densities(report)
    row["options"] = report.options
    row["met"] = abs(row["sparse_density"] - float(density)) <= TOLERANCE * float(density)
    row["prompts"] = [context.compare(i, clips) for i in range(len(context.requests))]
    return row | summarise(row["prompts"])


def densities(report: AccelerationReport) -> Row:
    """Return the computed shares over all calls (dense ones count as 1) and over sparse ones."""
    sparse = [call for call in report.calls if not call.reason]
    return {
        "all_density": report.block_density,
        "sparse_density": float(np.mean([call.block_density for call in sparse])),
        "sparse_attended": float(np.mean([call.density for call in sparse])),
        "operators": sorted({call.operator for call in sparse}),
    }


def summarise(prompts: Sequence[Row]) -> Row:
    """Return means over the prompts, and bootstrap 95 % intervals of the PSNR."""
    means: Row = {}
    for name in ("psnr_db", "ssim", "latents_relative_l1", "following", "dense_following"):
        # A PSNR of None is infinite: the clips are equal.
        values = [row[name] for row in prompts if row[name] is not None]
        means[name] = float(np.mean(values)) if values else None
        if name == "psnr_db" and values:
            picks = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
            sampled = np.asarray(values)[picks].mean(1)
            means["psnr_interval"] = np.percentile(sampled, [2.5, 97.5]).tolist()
    return means


@dataclass(frozen=True)
class Context:
    """What all rows of one model share."""

    requests: list[GenerationRequest]
    entries: list[Row]
    batch: int
    layout: TokenLayout
    dense: Clips
    dense_follows: list[float]
    read: Any
    extra: Row

    def compare(self, index: int, clips: Clips) -> Row:
        """Measure one prompt against dense."""
        frames, dense = clips.frames[index], self.dense.frames[index]
        decibels = psnr(frames, dense)
        return {
            "prompt": self.requests[index].prompt,
            "seed": self.requests[index].seed,
            "psnr_db": None if math.isinf(decibels) else decibels,
            "ssim": ssim(frames, dense),
            "latents_relative_l1": relative_l1(clips.latents[index], self.dense.latents[index]),
            "following": follows(self.read, frames, self.entries[index]),
            "dense_following": self.dense_follows[index],
        }


def follows(read: Any, frames: Tensor, entry: Row) -> float:
    """Return the share of an entry's attributes that ``read`` finds in its frames."""
    return shares_right([read(frames, entry)])["all"]


def measure_model(model: str, args: argparse.Namespace) -> Row:
    """Make the missing rows of one model and return all of its file."""
    device = pick_device(args.device)
    prompts = Prompts.of(model, args)
    entries, requests = prompts.entries[: args.prompts], prompts.requests[: args.prompts]
    stem = Path(model).name
    content: Row = {"model": stem, "settings": {**prompts.settings, "prompts": len(requests)}}
    content["settings"] |= {
        "text_tokens": args.text_tokens,
        "block": BLOCK,
        "tolerance": TOLERANCE,
        "dtype": args.dtype,
        **SCHEDULE,
    }
    content |= {"environment": environment(device), "commit": args.commit, "rows": []}
    output = args.output / f"fidelity-{stem}.json"
    if output.exists() and not args.force:
        earlier = json.loads(output.read_text())
        if earlier["settings"] != content["settings"]:
            raise OptionError(f"{output} has other settings: give another --output, or --force.")
        content["rows"] = [row for row in earlier["rows"] if "failed" not in row]
    done = {(row["method"], row["density"]) for row in content["rows"]}
    todo = [(name, density) for density in args.density for name in args.methods]
    todo += [("radial", "least")] if "radial" in args.methods else []
    if args.study:
        todo += [(name, density) for name in STUDY for density in STUDY_DENSITIES]
    todo = [key for key in todo if key not in done]
    if not todo:
        return content

    pipe = load(model, args.dtype, device)
    batch = args.batch or (4 if device == "cpu" else 16)
    extra = {} if args.text_tokens is None else {"max_sequence_length": args.text_tokens}
    layout = probe_layout(pipe, requests[0], extra)
    content["layout"] = {**asdict(layout), "tokens": layout.num_tokens}
    dense = generate_all(pipe, requests, batch, extra)
    read = make_reader(prompts.world, device)
    dense_follows = [follows(read, *pair) for pair in zip(dense.frames, entries, strict=True)]
    context = Context(requests, entries, batch, layout, dense, dense_follows, read, extra)
    for name, density in todo:
        start = time.perf_counter()
        row = measure(pipe, name, density, context)
        row["spent_s"] = round(time.perf_counter() - start, 1)
        content["rows"].append(row)
        write_text(output, json.dumps(content, indent=1, allow_nan=False) + "\n")
        print(stem, line(row), flush=True)
    del pipe, context, dense
    gc.collect()
    return content


def line(row: Row) -> str:
    """One row for a terminal."""
    text = f"{row['method']:46s} {row['density']!s:5s} "
    for key in ("unreachable", "failed"):
        if key in row:
            return text + f"{key}: {row[key]}"
    psnr_db = math.inf if row["psnr_db"] is None else row["psnr_db"]
    return text + (
        f"sparse {row['sparse_density']:.3f} all {row['all_density']:.3f} PSNR {psnr_db:5.2f} dB "
        f"SSIM {row['ssim']:.3f} L1 {row['latents_relative_l1']:.3f} follows "
        f"{row['following']:.0%} ({row['dense_following']:.0%}) {row['spent_s']} s"
        + ("" if row["met"] else "  DENSITY MISSED")
    )


def plot(contents: Sequence[Row], output: Path) -> None:
    """PSNR against achieved density: one panel a model, one line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(contents), figsize=(5.5 * len(contents), 4.5), squeeze=False, layout="constrained"
    )
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(map(_base, METHODS)))}
    for content, panel in zip(contents, panels[0], strict=True):
        for name in (*METHODS, *ALSO_PLOTTED):
            rows = [r for r in content["rows"] if r["method"] == name and r.get("psnr_db")]
            rows.sort(key=lambda r: r["sparse_density"])
            if rows:
                base = _base(name)
                panel.plot(
                    [r["sparse_density"] for r in rows],
                    [r["psnr_db"] for r in rows],
                    color=colours[base],
                    linestyle="-" if name == base else "--",
                    marker="o" if name == base else "s",
                    markersize=4,
                    label=name,
                )
        panel.set(title=content["model"], xlabel="achieved density of sparse calls", xscale="log")
        panel.set_xlim(0.09, 1)
        panel.set_ylabel("PSNR to dense, dB")
        panel.set_xticks([0.1, 0.15, 0.25, 0.5], ["0.1", "0.15", "0.25", "0.5"], minor=False)
        panel.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        panel.grid(alpha=0.3)
    panels[0][-1].legend(fontsize=7)
    figure.savefig(output.with_suffix(".png"), dpi=120)
    figure.savefig(output.with_suffix(".svg"))
    plt.close(figure)


def _base(name: str) -> str:
    return name.split(" ")[0].rstrip(",")


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--density", type=float, nargs="*", default=[0.25, 0.15, 0.5, 0.1])
    parser.add_argument("--study", action="store_true", help="also the variants for decisions")
    parser.add_argument("--plot", action="store_true", help="also fidelity.png and .svg")
    parser.add_argument("--prompts", type=int, default=16, help="the first so many of 64")
    parser.add_argument("--batch", type=int, help="prompts at once; 16 on a GPU, 4 on a CPU")
    add_sizes(parser)
    parser.add_argument(
        "--text-tokens", type=int, help="the pipeline's max_sequence_length; its own by default"
    )
    add_machine_and_files(parser)
    args = parser.parse_args()
    with torch.no_grad():
        contents = list(map(partial(measure_model, args=args), args.models))
    if args.plot:
        plot(contents, args.output / "fidelity")


if __name__ == "__main__":
    main()
