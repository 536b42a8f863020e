"""What was measured of a method: the README's tables by their rows, and the studies' own files."""

from __future__ import annotations

import json
import re
from typing import Any

import readme_tables  # of benchmarks/, which docs_build.py puts on the path

Row = dict[str, Any]
NOTHING = "Nothing has been measured of it yet: there is no row in `benchmarks/results/`.\n"


def measured(name: str, kind: str) -> str:
    """Return the section of a method's page that shows its rows."""
    found = {
        "attention": _attention,
        "cache": _cache,
        "guidance": _guidance,
        "resolution": lambda _: _resolution(),
    }[kind](name)
    return found or NOTHING


def table(name: str) -> str:
    """Return one of the README's tables."""
    rows = readme_tables.summary_rows()
    made = {
        "headline": lambda: readme_tables.headline(rows),
        "kernels": lambda: readme_tables.kernels(rows),
        "steps": lambda: readme_tables.steps(rows),
        "methods": readme_tables.methods,
        "fidelity": readme_tables.fidelity,
        "caching": readme_tables.caching,
        "caches_alone": _caches_alone,
    }
    if name == "quality" and not any(readme_tables.RESULTS.glob(readme_tables.QUALITY_FILES)):
        return "Not measured yet.\n"
    return (made | {"quality": readme_tables.quality})[name]()


def value(key: str) -> Any:
    """Return a number of summary.json."""
    return json.loads((readme_tables.RESULTS / "summary.json").read_text())[key]


def _attention(name: str) -> str:
    sections = {
        "Whole forwards": _all_steps(),
        "One attention call": readme_tables.methods(),
        "How near to dense": readme_tables.fidelity(),
    }
    parts = []
    for title, full in sections.items():
        if rows := _rows_of(full, 1, name):
            head, note = _head_and_note(full)
            parts.append(f"### {title}\n\n{head}{rows}\n{note}")
    return "\n".join(parts)


def _all_steps() -> str:
    """Return the forwards of all models and sizes in one table, the headline's first."""
    rows = readme_tables.summary_rows()
    stock = [key.removesuffix("stock") for key in rows if re.match(r"step\..*\.stock$", key)]
    first = f"step.{readme_tables.HEADLINE_MODEL}."
    return readme_tables.step_table(rows, sorted(stock, key=lambda key: not key.startswith(first)))


def _caches_alone() -> str:
    """Return the table of caches without the rows of those beside a sparse method."""
    lines = readme_tables.caching().splitlines(keepends=True)
    return "".join(line for line in lines if not re.match(r"\| \w+ \+ ", line))


def _cache(name: str) -> str:
    """Return a cache's rows: on the bundled models, and in loops of a large model's size."""
    return "\n".join(filter(None, (_cache_on_models(name), _cache_in_loops(name))))


def _cache_on_models(name: str) -> str:
    lines, files = [], []
    for path in sorted(readme_tables.RESULTS.glob(readme_tables.CACHING_FILES)):
        data = readme_tables.load(path.name)
        rows = [r for r in data["rows"] if r.get("cache") == name and "psnr_db" in r]
        rows.sort(key=lambda row: (row["attention"] != "none", row["attention"], row["strength"]))
        lines += [_cache_line(data["model"], row) for row in rows]
        files.append(data)
    if not lines:
        return ""
    columns = ["model", "beside", "strength", "blocks run", "PSNR to dense", "SSIM", "speed-up"]
    note = (
        f"{files[0]['settings']['prompts']} prompts in a batch on one "
        f"{files[0]['manifest']['gpu']}, same noise; the speed-up is the denoising loop's against "
        "the same loop without the cache and without the sparse method. "
        f"{' '.join(map(readme_tables.source, files))}\n"
    )
    return "### On the bundled models\n\n" + readme_tables.markdown(columns, lines) + note


def _cache_in_loops(name: str) -> str:
    data = readme_tables.load("cache-steps-h100.json")
    lines = [
        [
            row["size"],
            "" if row["attention"] == "dense" else row["attention"],
            f"{row['skipped']} of {row['block_calls']}",
            f"{row['loop_without_s']:.1f} s",
            f"{row['loop_s']:.1f} s",
            f"{row['saved_over_expected']:.0%}",
            f"{row['cache_gib']:.2f} GiB",
        ]
        for row in data["rows"]
        if row.get("cache") == name and "loop_s" in row
    ]
    if not lines:
        return ""
    times = ["loop without", "loop with", "saved of expected"]
    columns = ["size", "beside", "blocks skipped", *times, "kept"]
    settings = data["settings"]
    note = (
        f"Loops of {settings['steps']} steps with guidance of {settings['layers_measured']} of "
        f"Wan2.1-14B's {settings['layers_of_the_real_model']} blocks, random weights, forced "
        f"schedules, {data['manifest']['gpu']}: whether skipped blocks save their time. They say "
        f"nothing on quality. {readme_tables.source(data)}\n"
    )
    text = readme_tables.markdown(columns, lines)
    return f"### In loops of a large model's size\n\n{text}{note}"


def _cache_line(model: str, row: Row) -> list[str]:
    equal = row["psnr_db"] >= readme_tables.EQUAL_DB
    return [
        model,
        "" if row["attention"] == "none" else row["attention"],
        f"{row['strength']:.3g}",
        f"{row['share_run']:.0%}" if "share_run" in row else "all",
        "equal" if equal else f"{row['psnr_db']:.1f} dB",
        f"{row['ssim']:.3f}",
        f"{row['speedup']:.2f}x",
    ]


def _guidance(name: str) -> str:
    """Return what a search for heads found, and what an added pass takes."""
    return "\n".join(filter(None, (_searched(name), _added_pass() if name == "softpag" else "")))


def _searched(name: str) -> str:
    files = [
        readme_tables.load(path.name)
        for path in sorted(readme_tables.RESULTS.glob("headhunt-tiny-*.json"))
    ]
    rows = [
        [
            data["settings"]["model"],
            target["target"],
            f"{held['guidance']:g}",
            case,
            f"{held['conditions']['none']['score']:.1%}",
            f"{found['score']:.1%}",
        ]
        for data in files
        for target in data["targets"]
        for held in target["held_out"]
        for case, found in held["conditions"].items()
        if found["method"] == name
    ]
    if not rows:
        return ""
    columns = ["model", "for", "guidance scale", "what", "without it", "with it"]
    settings = files[0]["settings"]
    note = (
        f"Share of attributes that come out, {settings['height']} x {settings['width']}, "
        f"{settings['steps']} steps, on 64 prompts that the search did not see. "
        f"{' '.join(readme_tables.source(data) for data in files)}\n"
    )
    return "### Searched heads and layers\n\n" + readme_tables.markdown(columns, rows) + note


def _added_pass() -> str:
    data = readme_tables.load("guidance-cost-h100.json")
    rows = [
        [
            row["model"],
            f"{row['first_layer']} of {row['layers_of_model']}",
            f"{row['plain_ms']:.1f} ms",
            f"{row['guided_ms']:.1f} ms",
            f"{row['added']:+.0%}",
            f"{row['predicted']:+.0%}",
        ]
        for row in data["rows"]
    ]
    columns = ["model", "first perturbed block", "plain", "guided", "added", "by its blocks"]
    note = (
        f"One forward at 1024 x 1024 without classifier-free guidance, random weights, "
        f"{data['settings']['layers']} blocks, one head perturbed, {data['manifest']['gpu']}. "
        "Blocks below the first perturbed one run once for both passes. "
        f"{readme_tables.source(data)}\n"
    )
    return "### What the added pass takes\n\n" + readme_tables.markdown(columns, rows) + note


def _resolution() -> str:
    """Return FreeSwim's two studies: what a step takes, and what comes out."""
    steps = readme_tables.load("freeswim-step-h100.json")
    dense = {r["size"]: r["dense_step_s"] for r in steps["rows"] if r["case"] == "dense"}
    lines = [
        [
            re.sub(r"(\d+)p(\d+)", r"\1p, \2 frames", row["size"]),
            f"{row['tokens']:,}",
            row["case"] + (", offloaded" if row["offload"] else ""),
            f"{dense[row['size']]:.1f} s",
            *(_beside(row[f"step_every_{n}_s"], dense[row["size"]]) for n in (1, 2, 5)),
            f"{row['kept_gib_all_layers']:.1f} GiB",
        ]
        for row in steps["rows"]
        if row["case"] != "dense"
    ]
    columns = ["size", "tokens", "case", "dense", "every step", "every 2", "every 5", "kept"]
    text = readme_tables.markdown(columns, lines) + (
        f"A step of Wan2.1-1.3B's size with classifier-free guidance on one "
        f"{steps['manifest']['gpu']}; four layers measured and scaled to all. Columns say in how "
        f"many steps a full pass runs. {readme_tables.source(steps)}\n\n"
    )
    quality = readme_tables.load("freeswim-quality-h100.json")
    lines = [
        [
            f"{row['scale']}x",
            row["case"],
            f"{row['right']['all']:.0%}",
            f"{row['sharpness']:.2f}",
            f"{row['seconds_per_clip']:.2f} s",
        ]
        for row in quality["rows"]
    ]
    columns = ["of the trained size", "case", "attributes right", "sharpness", "time per clip"]
    return text + readme_tables.markdown(columns, lines) + (
        f"tiny-wan, {quality['settings']['prompts']} prompts; \"drawn\" is the drawn clip itself, "
        f'"enlarged" the first stage\'s clip made larger. {readme_tables.source(quality)}\n'
    )  # fmt: skip


def _beside(seconds: float, dense: float) -> str:
    return f"{seconds:.1f} s ({dense / seconds:.1f}x)"


def _rows_of(markdown: str, column: int, name: str) -> str:
    """Return the rows of a Markdown table that are about a method."""
    found = []
    for line in markdown.splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        about = cells[column] if len(cells) > column else ""
        if re.split(r"[ ,\-]", about)[0] == name:
            found.append(line + "\n")
    return "".join(found)


def _head_and_note(markdown: str) -> tuple[str, str]:
    """Return the two lines that begin a Markdown table, and what follows the table."""
    lines = markdown.splitlines(keepends=True)
    after = [line for line in lines if not line.startswith(("|", "!"))]
    return "".join(lines[:2]), "".join(after).strip() + "\n"


OVERVIEW_STEPS = {
    "wan2.1-14b.720p81": "Wan 14B, 720p",
    "hunyuanvideo.720p129": "HunyuanVideo, 720p",
    "flux.1-dev.4096": "FLUX, 4096 x 4096",
}
OVERVIEW_METHODS = ("gna", "rectified", "pisa", "psa", "radial", "gna + remainder")
OVERVIEW_DENSITY = 0.25


def overview() -> str:
    """Return speed-ups of whole forwards beside PSNR on the bundled models, a row a method."""
    steps = readme_tables.summary_rows()
    studies = [
        readme_tables.load(path.name)
        for path in sorted(readme_tables.RESULTS.glob(readme_tables.FIDELITY_FILES))
    ]
    lines = []
    for name in OVERVIEW_METHODS:
        line = [f"[`{name}`](methods/{name.split()[0]}.md)"]
        for place in OVERVIEW_STEPS:
            row = steps.get(f"step.{place}.{name}-0.15", {})
            line.append(f"{row['vs_eager']:.2f}x" if row else "")
        for study in studies:
            found = {(row["method"], row["density"]): row for row in study["rows"]}
            row = found.get((name, OVERVIEW_DENSITY), {})
            line.append("-" if "unreachable" in row else _decibels(row))
        lines.append(line)
    models = [f"{study['model']}, dB" for study in studies]
    columns = ["method", *OVERVIEW_STEPS.values(), *models]
    note = (
        f"Left: how many times faster one forward is past the dense steps, density .15 asked, on "
        f"one {steps['step.wan2.1-14b.720p81.stock']['gpu']}, against diffusers as it is. Right: "
        f"PSNR to dense in dB at density {OVERVIEW_DENSITY:g} over the sparse calls. Empty: not "
        "measured in this form; a dash: out of the method's reach there.\n"
    )
    return readme_tables.markdown(columns, lines) + note


def _decibels(row: Row) -> str:
    return f"{row['psnr_db']:.1f}" if row.get("psnr_db") else ""
