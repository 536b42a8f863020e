"""Measure how a trained model attends: how locally, how widely, and how heads differ.

    python -m recipes.shared.attention dit_accel/models/tiny-sd3

Fixed prompts are generated densely. In the steps nearest to three noise levels, the attention of
every layer and head is looked at for some of the video's or picture's tokens.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel import accelerate_pipeline, restore_pipeline
from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.environment import pick_device
from dit_accel.generation import GenerationRequest, pipeline_arguments
from dit_accel.grid import TokenOrder
from dit_accel.methods.base import AttentionMethod
from dit_accel.models import generation_defaults, load_pipeline
from dit_accel.plan import AttentionPlan, DensePlan
from dit_accel.world.worlds import fixed_prompts

FILE = "attention.json"  # in a model's folder, for its card
NOISE_LEVELS = (0.95, 0.7, 0.3)
QUERIES = 256  # looked at, of all

Sums = dict[str, dict[int, dict[str, Tensor]]]  # noise level, layer, statistic: one value a head


def head_statistics(query: Tensor, key: Tensor, layout: TokenLayout) -> dict[str, Tensor]:
    """Return means over some video queries, per head [H].

    `query` and `key` are [N, H, D], video tokens first. Masses are shares of all attention.
    """
    grid, count = layout.grid, layout.video_length
    pick = torch.linspace(0, count - 1, min(count, QUERIES)).round().long()
    scores = torch.einsum("qhd,khd->hqk", query[pick].float(), key.float())
    mass = (scores * query.shape[-1] ** -0.5).softmax(-1)
    video, text = mass.split([count, len(key) - count], -1)
    axes = torch.meshgrid(*(torch.arange(g) for g in grid), indexing="ij")
    place = torch.stack(axes, -1).flatten(0, 2).to(mass.device)
    far = (place[pick][:, None] - place).abs()
    near = (far[..., 0] <= 1) & (far[..., 1:] <= 2).all(-1)
    ordered = mass.sort(-1, descending=True).values
    found = {
        "effective keys": (-(mass * mass.clamp(min=1e-20).log()).sum(-1)).exp(),
        "mass of the strongest quarter of keys": ordered[..., : len(key) // 4].sum(-1),
    }
    if grid[0] == 1:
        found["mass within 2 tokens"] = (video * near).sum(-1)
    else:
        same_place = (far[..., 1:] == 0).all(-1)
        found["mass within 1 frame and 2 tokens"] = (video * near).sum(-1)
        found["mass in the same frame"] = (video * (far[..., 0] == 0)).sum(-1)
        found["mass at the same place in all frames"] = (video * same_place).sum(-1)
        found["mass on the first frame"] = video[..., : grid[1] * grid[2]].sum(-1)
    if layout.text_length:
        found["mass on the text"] = text.sum(-1)
    return {name: values.mean(1).cpu() for name, values in found.items()}


@dataclass(frozen=True)
class Looking(AttentionMethod):
    """Dense attention that measures the conditional branch in some of the steps."""

    name: ClassVar[str] = "looking"

    levels: dict[int, str] = field(default_factory=dict, compare=False)  # by step
    sums: Sums = field(default_factory=dict, compare=False)
    layouts: set[TokenLayout] = field(default_factory=set, compare=False)

    def plan(
        self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, order: TokenOrder
    ) -> AttentionPlan:
        """Measure, and keep every pair."""
        level = self.levels.get(-1 if call.step is None else call.step)
        if level is not None and call.branch != "uncond":
            layer = self.sums.setdefault(level, {}).setdefault(call.layer, defaultdict(float))
            # Of a guided batch [uncond, cond], the conditional half.
            for name, values in head_statistics(query[-1], key[-1], call.layout).items():
                layer[name] += values
            self.layouts.add(call.layout)
        return DensePlan("measuring", order)


def attention_statistics(pipe: Any, requests: list[GenerationRequest]) -> dict[str, Any]:
    """Return each statistic [layer][head] by noise level, mean over the requests."""
    looking = Looking()
    pipe.set_progress_bar_config(disable=True)
    accelerate_pipeline(pipe, looking, dense_steps=0, min_tokens=0)
    read = pipe.transformer.register_forward_pre_hook(lambda *_: _choose_steps(pipe, looking))
    try:
        for request in requests:
            generator = torch.Generator().manual_seed(request.seed)
            arguments = pipeline_arguments(pipe, request)
            pipe(**arguments, generator=generator, output_type="latent")
    finally:
        read.remove()
        restore_pipeline(pipe)
    layers = {
        level: [
            {name: (values / len(requests)).tolist() for name, values in layer.items()}
            for _, layer in sorted(by_layer.items())
        ]
        for level, by_layer in looking.sums.items()
    }
    largest = max(looking.layouts, key=lambda layout: layout.num_tokens)
    return {
        "prompts": len(requests),
        "grid": list(largest.grid),
        "text_tokens": largest.text_length,
        "noise": {
            level: {
                name: [[round(v, 4) for v in layer.get(name, [])] for layer in found]
                for name in dict.fromkeys(name for layer in found for name in layer)
            }
            for level, found in layers.items()
        },
    }


def _choose_steps(pipe: Any, looking: Looking) -> None:
    """Find the steps nearest to the noise levels, once the schedule is known."""
    noise = pipe.scheduler.timesteps.float().cpu() / 1000
    looking.levels.clear()
    looking.levels.update({int((noise - n).abs().argmin()): str(n) for n in NOISE_LEVELS})


def table(result: dict[str, Any]) -> list[str]:
    """Return the statistics as a Markdown table: over heads, layers and noise levels."""
    by_level = list(result["noise"].values())
    rows = ["| | lowest head | median | highest head |", "|---|---|---|---|"]
    for name in by_level[0]:
        levels = [sorted(v for layer in level[name] for v in layer) for level in by_level]
        medians = sorted(values[len(values) // 2] for values in levels)
        middle = " to ".join(dict.fromkeys((_number(medians[0]), _number(medians[-1]))))
        low, high = min(v[0] for v in levels), max(v[-1] for v in levels)
        rows.append(f"| {name} | {_number(low)} | {middle} | {_number(high)} |")
    return rows


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def main() -> None:
    """Measure a model's folder, and write the statistics into it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a saved pipeline of a known family")
    parser.add_argument("--output", type=Path, help=f"default: {FILE} in the folder")
    parser.add_argument("--prompts", type=int, default=4, help="how many of the fixed prompts")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    settings = vars(generation_defaults(str(args.folder))).copy()
    del settings["fps"]
    entries = fixed_prompts(settings.pop("world"))[:: 64 // args.prompts][: args.prompts]
    requests = [
        GenerationRequest(prompt=entry["prompt"], seed=seed, **settings)
        for seed, entry in enumerate(entries)
    ]
    pipe = load_pipeline(str(args.folder), device=pick_device(args.device), dtype=torch.float32)
    with torch.no_grad():
        result = attention_statistics(pipe, requests)
    (args.output or args.folder / FILE).write_text(json.dumps(result) + "\n")
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
