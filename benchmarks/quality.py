"""What each method costs in quality at a density: fidelity to dense, prompt following, and time.

    python benchmarks/quality.py --methods radial,gna --density .5 .3 --prompts 8

Every prompt is generated densely and with every method from the same noise, timed once each; the
first run of each kind follows one of a single step. Rows are written as they are made, and those
that the output holds are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.cli.options import parse_options
from dit_accel.environment import describe_device, environment, pick_device
from dit_accel.errors import DensityUnreachableError, DitAccelError, OptionError
from dit_accel.files import write_text
from dit_accel.generation import GenerationRequest, Result, at_once, generate
from dit_accel.models import generation_defaults, load_pipeline
from dit_accel.world.worlds import fixed_prompts, make_reader, shares_right

RESULTS = Path(__file__).parent / "results"
COLUMNS = {
    "psnr_db": "PSNR, dB",
    "block_density": "density",  # of all calls; dense ones count as 1
    "speedup": "speed-up",
    "denoise_speedup": "in loop",
    "following": "follows",
    "dense_following": "dense",
}
Row = dict[str, Any]


def compare(
    pipe: Any, request: GenerationRequest, dense: Any, method: str, options: Row, warm: bool
) -> Result | str:
    """Generate with a method; return the result, or why this density can't be reached."""
    try:
        if not warm:
            accelerate_pipeline(pipe, method, **at_once(method, options))
            generate(pipe, replace(request, steps=1))
        accelerate_pipeline(pipe, method, **options)
        return Result(generate(pipe, request), acceleration_report(pipe), dense)
    except DensityUnreachableError as error:
        return str(error)
    finally:
        restore_pipeline(pipe)


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Return the means of each method and density, and the 95 % bootstrap interval of PSNR."""
    summary = []
    for method, density in dict.fromkeys((row["method"], row["density"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["density"]) == (method, density)]
        line: Row = {"method": method, "density": density, "prompts": len(mine)}
        line["refused"] = sum("refused" in row for row in mine)
        for name in COLUMNS:
            # A PSNR of None is infinite: the clips are equal.
            values = [row[name] for row in mine if row.get(name) is not None]
            line[name] = float(np.mean(values)) if values else None
            if name == "psnr_db" and values:
                picks = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
                means = np.asarray(values)[picks].mean(1)
                line["psnr_interval"] = np.percentile(means, [2.5, 97.5]).tolist()
        summary.append(line)
    return summary


def run(args: argparse.Namespace) -> Row:
    """Make the missing rows and return all that is in the output."""
    device = pick_device(args.device)
    pairs = list(product(args.methods.split(","), args.density))
    options = {(m, d): parse_options(m, [f"density={d}", *args.set]) for m, d in pairs}
    defaults = asdict(generation_defaults(args.model))
    del defaults["fps"]
    world = defaults.pop("world")
    if world is None:
        raise OptionError(f"{args.model} belongs to no drawn world: nothing reads what it draws.")
    settings: Row = {"model": args.model, "set": args.set, **defaults}
    settings["device"] = describe_device(device)
    content: Row = {"settings": settings, "environment": environment(device), "rows": []}
    output = args.output or RESULTS / f"quality-{torch.device(device).type}.json"
    if output.exists() and not args.force:
        content = json.loads(output.read_text())
        if content["settings"] != settings:
            raise OptionError(f"{output} has other settings: give another --output, or --force.")
    done = {(row["seed"], row["method"], row["density"]) for row in content["rows"]}

    entries = fixed_prompts(world)[: args.prompts]
    todo = [(seed, *pair) for seed in range(len(entries)) for pair in pairs]
    todo = [key for key in todo if key not in done]
    pipe, read = load_pipeline(args.model, device=device), make_reader(world, device)
    request = dense = None
    warm: set[tuple[str, float]] = set()
    for seed, method, density in track(todo, "prompts x methods", console=Console(stderr=True)):
        if request is None or request.seed != seed:
            request = GenerationRequest(prompt=entries[seed]["prompt"], seed=seed, **defaults)
            if not warm:
                generate(pipe, replace(request, steps=1))
            dense = generate(pipe, request)
            dense_following = shares_right([read(dense.frames, entries[seed])])["all"]
        pair = method, density
        row: Row = {"prompt": request.prompt, "seed": seed, "method": method, "density": density}
        result = compare(pipe, request, dense, method, options[pair], pair in warm)
        warm.add(pair)
        if isinstance(result, str):
            row["refused"] = result
        else:
            report = result.to_dict()
            row |= {n: report[n] for n in ("psnr_db", "speedup", "denoise_speedup")}
            row["block_density"] = result.report.block_density
            row["attended_density"] = result.report.density
            marks = read(result.accelerated.frames, entries[seed])
            row["following"] = shares_right([marks])["all"]
            row["dense_following"] = dense_following
        content["rows"].append(row)
        content["summary"] = summarise(content["rows"])
        write_text(output, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-wan")
    parser.add_argument("--methods", default="radial,gna,sliding_window", help="a,b,...")
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="for all")
    parser.add_argument("--prompts", type=int, default=8, help="the first so many of 64")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/quality-*.json")
    parser.add_argument("--force", action="store_true", help="start the output again")
    try:
        content = run(parser.parse_args())
    except DitAccelError as error:
        sys.exit(f"error: {error}")
    shown = Table("method", "asked", *COLUMNS.values())
    for line in content.get("summary", []):
        cells = ["-" if line[name] is None else f"{line[name]:.2f}" for name in COLUMNS]
        shown.add_row(line["method"], str(line["density"]), *cells)
    Console().print(shown)


if __name__ == "__main__":
    main()
