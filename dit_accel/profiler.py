"""Makes a profile for `ProfilingCache`: whose attention goes to the foreground.

ProfilingDiT (arXiv 2504.03140). For every block and step, a token's score is the attention that it
receives: the mean of its column of the attention matrix. A block's figure is the share of the
foreground's tokens whose score is high. Columns are summed up over sampled query rows, a few at a
time, so nothing of size N x N is ever made.

The paper leaves three constants open; here a score is high if it is over ``kappa`` times the mean,
rows are sampled, and the background blocks are the lowest share rather than those under a
threshold. It finds the foreground with SAM2, which `foreground` offers beside two simpler ways.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.acceleration import accelerate_pipeline, family_of, restore_pipeline
from dit_accel.caching.profile import Profile, mean, token_width
from dit_accel.call import AttentionCall
from dit_accel.errors import OptionError
from dit_accel.files import write_text
from dit_accel.foreground import MaskFunction, mask_function
from dit_accel.generation import GenerationRequest, Progress, pipeline_arguments
from dit_accel.grid import TokenOrder
from dit_accel.methods.base import AttentionMethod
from dit_accel.pipelines.base import PipelineFamily
from dit_accel.plan import AttentionPlan, DensePlan

Row = dict[str, Any]


def column_means(query: Tensor, key: Tensor, rows: Tensor, chunk: int = 256) -> Tensor:
    """Return the mean attention that each key gets from some queries, float32 ``[K]``.

    Args:
        query: ``[N, H, D]``; ``key``: ``[K, H, D]``.
        rows: int64, which queries to ask.
        chunk: queries at a time; memory is chunk x K floats.
    """
    total = torch.zeros(len(key), device=key.device)
    for head in range(query.shape[1]):
        keys = key[:, head].float()
        for part in rows.split(chunk):
            scores = query[part, head].float() @ keys.T * query.shape[-1] ** -0.5
            total += scores.softmax(-1).sum(0)
    return total / (len(rows) * query.shape[1])


def sampled_rows(grid: tuple[int, int, int], per_frame: int, seed: int = 0) -> Tensor:
    """Return up to ``per_frame`` random token indices of every frame, the same for every call."""
    frames, tokens = grid[0], grid[1] * grid[2]
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randperm(tokens, generator=generator)[:per_frame] for _ in range(frames)]
    return torch.cat([pick + frame * tokens for frame, pick in enumerate(picks)])


def _shrunk(velocity: Tensor, like: Tensor) -> Tensor:
    """Average ``[T, H, W, C]`` over the latents of each token of ``like [T, H, W]``."""
    frames, height, width = like.shape
    pooled = F.adaptive_avg_pool3d(velocity.movedim(-1, 0).float(), (frames, height, width))
    return pooled.movedim(0, -1)


def foreground_share(high: Tensor, foreground: Tensor) -> float:
    """Return the share of the foreground that is high, mean over frames; both ``[T, H, W]``."""
    shares = [
        (score & mask).sum() / mask.sum()
        for score, mask in zip(high, foreground, strict=True)
        if mask.any()
    ]
    return float(torch.stack(shares).mean()) if shares else 0.0


@dataclass(frozen=True)
class _Watching(AttentionMethod):
    """Dense attention that scores the video tokens of every call."""

    name: ClassVar[str] = "profiler"

    per_frame: int
    kappa: float
    high: dict[int, Tensor] = field(default_factory=dict, compare=False)  # by layer, [T, H, W]

    def plan(
        self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, order: TokenOrder
    ) -> AttentionPlan:
        """Score the tokens; keep every pair."""
        grid, count = call.layout.grid, call.layout.video_length
        rows = sampled_rows(grid, self.per_frame).to(query.device)
        sample = len(query) - 1  # of a guided batch [uncond, cond], the conditional half
        scores = column_means(query[sample, :count], key[sample], rows)[:count]
        self.high[call.layer] = (scores > self.kappa * scores.mean()).view(grid).cpu()
        return DensePlan("profiling", order)


def profile_model(
    pipe: Any,
    requests: Sequence[GenerationRequest],
    *,
    model: str,
    output: Path | None = None,
    mask: str | MaskFunction = "colour",
    per_frame: int = 512,
    kappa: float = 1.0,
    progress: Progress | None = None,
) -> Profile:
    """Generate densely and profile every block; goes on where ``output`` ends.

    Args:
        pipe: a pipeline of a known family, not accelerated.
        requests: what to generate, one after the other.
        model: what to call the model in the profile.
        output: the profile's file, written after every prompt.
        mask: how to find the foreground: "colour", "motion", "sam2", or a `MaskFunction`.
        per_frame: query rows sampled in each frame.
        kappa: a score is high if it is over so many times the mean score.
        progress: told of every prompt.

    Raises:
        OptionError: if there is nothing to generate, ``mask`` is unknown, or ``output`` holds
            something else.
    """
    if not requests:
        raise OptionError("no prompts: give at least one.")
    find, named = (mask, "custom") if callable(mask) else (mask_function(mask), mask)
    family = family_of(pipe)
    first = requests[0]
    settings = {
        "steps": first.steps,
        "frames": first.frames,
        "height": first.height,
        "width": first.width,
        "guidance": first.guidance,
        "mask": named,
        "per_frame": per_frame,
        "kappa": kappa,
    }
    rows = _rows_so_far(output, settings)
    done = {(row["prompt"], row["seed"]) for row in rows}
    found = _profile(model, family, pipe, settings, rows)
    for index, request in enumerate(requests):
        if progress is not None:
            progress("prompts", index, len(requests))
        if (request.prompt, request.seed) not in done:
            found_here = _profile_prompt(pipe, family, request, find, per_frame, kappa)
            rows.append({"prompt": request.prompt, "seed": request.seed, **found_here})
            found = _profile(model, family, pipe, settings, rows)
            if output is not None:
                content = found.to_dict() | {"prompts": rows}
                write_text(output, json.dumps(content, indent=1) + "\n")
    if progress is not None:
        progress("prompts", len(requests), len(requests))
    return found


def _rows_so_far(output: Path | None, settings: Row) -> list[Row]:
    if output is None or not output.exists():
        return []
    loaded = Profile.load(output)
    if loaded.settings != settings:
        raise OptionError(
            f"{str(output)!r} holds a profile with other settings: name another file, or --force."
        )
    rows: list[Row] = json.loads(output.read_text(encoding="utf-8")).get("prompts", [])
    return rows


def _profile(
    model: str, family: PipelineFamily, pipe: Any, settings: Row, rows: Sequence[Row]
) -> Profile:
    blocks = len(family.blocks(pipe.transformer))
    steps = [mean(step) for step in zip(*(row["by_step"] for row in rows), strict=True)]
    return Profile(
        model=model,
        family=family.name,
        num_blocks=blocks,
        width=token_width(pipe.transformer),
        settings=settings,
        foreground=mean(steps) if steps else (0.0,) * blocks,
        by_step=tuple(steps),
        grid=tuple(rows[-1]["grid"]) if rows and "grid" in rows[-1] else None,
    )


def _profile_prompt(
    pipe: Any,
    family: PipelineFamily,
    request: GenerationRequest,
    find: MaskFunction,
    per_frame: int,
    kappa: float,
) -> Row:
    """Return each step's figure for each block, of the conditional branch, and the token grid."""
    watching = _Watching(per_frame, kappa)
    accelerate_pipeline(pipe, watching, dense_steps=0, min_tokens=0)
    runtime, by_step = pipe._dit_accel.runtime, dict[int, list[float]]()

    def measure(module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        moment = runtime.tracker.latest
        if moment is None or moment.step is None or moment.branch == "uncond":
            return
        sample = output[0] if isinstance(output, tuple) else output.sample
        velocity = family.volume(module, {**kwargs, "hidden_states": sample})[-1]
        by_block: dict[int, list[float]] = {}
        foregrounds: dict[torch.Size, Tensor] = {}
        for layer, high in watching.high.items():
            block = runtime.recorder.layer_blocks[layer]
            if block is not None:
                if high.shape not in foregrounds:
                    foregrounds[high.shape] = find(_shrunk(velocity, high)).cpu()
                share = foreground_share(high, foregrounds[high.shape])
                by_block.setdefault(block, []).append(share)
        by_step[moment.step] = [sum(v) / len(v) for _, v in sorted(by_block.items())]

    hooks = [
        getattr(pipe, name).register_forward_hook(measure, with_kwargs=True)
        for name in family.components
        if getattr(pipe, name, None) is not None
    ]
    try:
        pipe.set_progress_bar_config(disable=True)
        pipe(
            **pipeline_arguments(pipe, request),
            generator=torch.Generator().manual_seed(request.seed),
            output_type="latent",
        )
    finally:
        for hook in hooks:
            hook.remove()
        restore_pipeline(pipe)
    grid = list(next(iter(watching.high.values())).shape)
    return {"by_step": [by_step[step] for step in sorted(by_step)], "grid": grid}
