"""Published settings of each method for each model family.

The only place that names both a method and a family. A missing row is no error: the method's own
defaults and `DEFAULT` apply, so neither a new method nor a new family has to come here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from dit_accel.kinds import Method
from dit_accel.registry import method_class


@dataclass(frozen=True)
class Preset:
    """Options of a method and schedule for one family, and where they were published."""

    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    dense_steps: float | tuple[float, float] = 0.25
    dense_layers: int | tuple[int, ...] = 0
    min_tokens: int = 2048


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _caching_tables() -> Iterator[tuple[tuple[str, str], Preset]]:
    """Yield what was published for caches; too long to be written here."""
    text = (files("dit_accel") / "caching/data/published.json").read_text(encoding="utf-8")
    for variant, methods in json.loads(text).items():
        for method, row in methods.items():
            options = {name: _tuples(value) for name, value in row["options"].items()}
            yield (variant, method), Preset(row["source"], options)


DEFAULT = Preset("no published setting; dense for the first quarter, as most papers do")

PRESETS: Mapping[tuple[str, str], Preset] = MappingProxyType(
    {
        **dict(_caching_tables()),
        ("wan", "radial"): Preset(
            "Radial Attention, released Wan2.1-14B script: 12 of 50 steps, 1 layer, decay 0.2",
            {"decay": 0.2, "sink": True},
            dense_steps=0.24,
            dense_layers=1,
        ),
        ("wan2.2", "radial"): Preset(
            "Radial Attention, released Wan2.2-A14B script: 11 of 40 steps, 1 layer, decay 0.8",
            {"decay": 0.8, "sink": True, "block_size": 64},
            dense_steps=0.275,
            dense_layers=1,
        ),
        ("hunyuan_video", "radial"): Preset(
            "Radial Attention, released HunyuanVideo script: 12 of 50 steps, decay 0.95, no sink",
            {"decay": 0.95, "sink": False},
            dense_steps=0.24,
        ),
        ("hunyuan_video", "gna"): Preset(
            "GNA paper, HunyuanVideo 30x48x80: window 18x24x24, stride 16x8x8, 15 of 50 steps",
            {"window": (18 / 30, 24 / 48, 24 / 80), "stride": (16 / 18, 8 / 24, 8 / 24)},
            dense_steps=0.3,
        ),
        ("wan", "gna"): Preset(
            "GNA paper, Cosmos 16x44x80: window 16x32x48, stride 1x8x16, 12 of 35 steps",
            {"window": (1.0, 32 / 44, 48 / 80), "stride": (1, 8 / 32, 16 / 48)},
            dense_steps=0.34,
        ),
        ("wan2.2", "gna"): Preset(
            "GNA paper, Cosmos 16x44x80: window 16x32x48, stride 1x8x16, 12 of 35 steps",
            {"window": (1.0, 32 / 44, 48 / 80), "stride": (1, 8 / 32, 16 / 48)},
            dense_steps=0.34,
        ),
        ("flux", "gna"): Preset(
            "GNA paper, FLUX.1-dev 4K 256x256: window 80x80, stride 16x16, 9 of 28 steps",
            {"window": (1.0, 80 / 256, 80 / 256), "stride": (1, 16 / 80, 16 / 80)},
            dense_steps=9 / 28,
        ),
        ("wan", "psa"): Preset(
            "PSA, released Wan2.1-14B script: 15 of 50 steps",
            {"ends": (0.4, 0.5, 0.6, 0.8)},
            dense_steps=0.3,
        ),
        ("wan2.1-1.3b", "psa"): Preset(
            "PSA, released Wan2.1-1.3B script, balanced: 15 of 50 steps",
            {"ends": (0.5, 0.6, 0.7, 0.8), "similarity": (0.7, 0.65, 0.6)},
            dense_steps=0.3,
        ),
        ("wan2.2", "psa"): Preset(
            "PSA, released Wan2.2-A14B script: 12 of 40 steps",
            {"ends": (0.5, 0.6, 0.6, 0.8), "key_block": 32},
            dense_steps=0.3,
        ),
        ("wan2.2-5b", "psa"): Preset(
            "PSA, released Wan2.2-5B script: 15 of 50 steps",
            {"ends": (0.6, 0.7, 0.7, 0.8), "key_block": 32},
            dense_steps=0.3,
        ),
        ("wan", "rectified"): Preset(
            "Rectified SpaAttn, released Wan2.1-T2V-14B script: 5 of 50 steps, 2 layers",
            {"drop": 0.75, "cumulative": 0.3},
            dense_steps=0.1,
            dense_layers=2,
        ),
        ("wan2.1-14b-i2v", "rectified"): Preset(
            "Rectified SpaAttn, released Wan2.1-I2V-14B script: 2 layers",
            {"drop": 0.75, "cumulative": 0.3},
            dense_steps=0.0,
            dense_layers=2,
        ),
        ("wan2.2-5b", "rectified"): Preset(
            "Rectified SpaAttn, released Wan2.2-TI2V-5B script: 5 of 50 steps, 2 layers",
            {"drop": 0.75, "cumulative": 0.3},
            dense_steps=0.1,
            dense_layers=2,
        ),
        ("wan2.2", "rectified"): Preset(
            "Rectified SpaAttn, released Wan2.2-T2V-A14B script: 3 of 40 steps, 2 layers",
            {"drop": 0.85, "cumulative": 0.3},
            dense_steps=0.075,
            dense_layers=2,
        ),
        ("wan2.2-a14b-i2v", "rectified"): Preset(
            "Rectified SpaAttn, released Wan2.2-I2V-A14B script: 2 layers",
            {"drop": 0.85, "cumulative": 0.3},
            dense_steps=0.0,
            dense_layers=2,
        ),
        ("hunyuan_video", "rectified"): Preset(
            "Rectified SpaAttn, released HunyuanVideo script: nothing dense",
            {"drop": 0.8, "cumulative": 0.3},
            dense_steps=0.0,
        ),
        ("flux", "rectified"): Preset(
            "Rectified SpaAttn, released FLUX.1-dev 4K script: the last 20 of 57 layers",
            {"drop": 0.9, "cumulative": 0.3},
            dense_steps=0.0,
            dense_layers=tuple(range(37, 57)),
        ),
        ("wan", "pisa"): Preset(
            "PISA paper, Wan2.1-14B: 10 of 50 steps, 1 layer",
            {"density": 0.125},
            dense_steps=0.2,
            dense_layers=1,
        ),
        ("wan2.1-1.3b", "pisa"): Preset(
            "PISA paper, Wan2.1-1.3B: 15 of 50 steps, 1 layer",
            {"density": 0.125},
            dense_steps=0.3,
            dense_layers=1,
        ),
        ("hunyuan_video", "pisa"): Preset(
            "PISA paper, HunyuanVideo: 10 of 50 steps, 1 layer",
            {"density": 0.125},
            dense_steps=0.2,
            dense_layers=1,
        ),
        ("flux", "pisa"): Preset(
            "PISA, released FLUX.1-dev script: 4 layers",
            {"density": 0.15},
            dense_steps=0.0,
            dense_layers=4,
        ),
        ("wan", "freeswim"): Preset(
            "FreeSwim, released Wan2.1-1.3B script: flow shift 9 in the second stage",
            {"flow_shift": 9.0},
        ),
        ("wan2.1-14b", "freeswim"): Preset(
            "FreeSwim, released Wan2.1 script with the 14B model: trained for 720 x 1280",
            {"native_size": (720, 1280), "flow_shift": 9.0},
        ),
        ("sd3", "pisa"): Preset(
            "PISA paper, SD3.5 medium at 1024 x 1024: 70 % left out",
            {"density": 0.3},
            dense_steps=0.0,
        ),
    }
)


AUTO_ORDER = (
    "pisa", "psa", "gna", "rectified", "radial", "sliding_window", "easycache", "seacache",
    "dual_block_cache", "first_block_cache", "teacache", "magcache",
)  # fmt: skip
"""What ``method="auto"`` tries first: what stayed nearest to dense on the bundled models at equal
density (`benchmarks/results/fidelity-*.json`) or block calls (`caching-*.json`)."""

CAREFUL = {"density": 0.25, "dense_steps": 0.25}
"""What ``method="auto"`` takes at least, where nothing was tried: denser than what is published."""


def auto_method(*variants: str) -> tuple[str, dict[str, Any], str]:
    """Return the method to take where nothing was tried, `accelerate_pipeline`'s options, and why.

    It is the first of `AUTO_ORDER` with a published setting for one of these variants, at no less
    than `CAREFUL`.
    """
    for method in AUTO_ORDER:
        preset = preset_for(*variants, method=method)
        if preset is DEFAULT or "density" not in preset.options:
            continue
        steps = preset.dense_steps
        first, last = steps if isinstance(steps, tuple) else (steps, 0.0)
        general = {
            "density": max(CAREFUL["density"], preset.options["density"]),
            "dense_steps": (max(CAREFUL["dense_steps"], first), last),
        }
        why = (
            f"nearest to dense of all at equal density on the bundled models, and published here "
            f"({preset.source}); taken at density {general['density']:g} with at least a quarter "
            "of the steps dense, for nothing was tried. probe=... with min_psnr= tries and chooses"
        )
        return method, general, why
    return "dense", {}, f"no method has a published setting for {variants[0]!r}; name one to use it"


def preset_for(*variants: str, method: str) -> Preset:
    """Return the preset of ``method`` on the first of these variants that has one, or `DEFAULT`."""
    for variant in variants:
        if (variant, method) in PRESETS:
            return PRESETS[variant, method]
    return DEFAULT


def source_of(chosen: Sequence[str | Method], variants: tuple[str, ...]) -> str:
    """Say where the settings of the methods chosen by name come from."""
    names = [member for member in chosen if isinstance(member, str)]
    sources = [preset_for(*variants, method=name).source for name in names]
    return "; ".join(sources or [DEFAULT.source])


def attention_preset(chosen: Sequence[str | Method], variants: tuple[str, ...]) -> Preset:
    """Return the published settings of the attention method, if it was chosen by name."""
    names = [name for name in chosen if isinstance(name, str)]
    attention = [name for name in names if method_class(name).kind == "attention"]
    return preset_for(*variants, method=attention[0]) if attention else DEFAULT
