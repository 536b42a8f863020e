"""What benchmarks of models with fixed prompts share: their options, prompts, and generating."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import OptionError
from dit_accel.generation import GenerationRequest, pipeline_arguments
from dit_accel.models import generation_defaults, load_pipeline
from dit_accel.world.worlds import fixed_prompts

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def options_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with a script's first line and the models."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny-wan"], help="names or folders")
    return parser


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add what `Prompts` reads."""
    for name in ("steps", "frames", "height", "width"):
        parser.add_argument(f"--{name}", type=int, help="the model's own by default")


def add_machine_and_files(parser: argparse.ArgumentParser, dtype: str = "auto") -> None:
    """Add where it runs, and what is written where."""
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default=dtype, choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    parser.add_argument("--commit")
    parser.add_argument("--force", action="store_true", help="start the files again")


def load(model: str, dtype: str, device: str) -> Any:
    """Return a model's pipeline."""
    return load_pipeline(
        model, device=device, dtype=None if dtype == "auto" else getattr(torch, dtype)
    )


@dataclass(frozen=True)
class Prompts:
    """The fixed prompts of a model's world, and how it generates them.

    Attributes:
        world: name of the drawn world.
        entries: of the prompts.
        requests: one for each, of its own seed.
        settings: size, steps and guidance: the model's own, unless the options have others.
    """

    world: str
    entries: list[Row]
    requests: list[GenerationRequest]
    settings: Row

    @classmethod
    def of(cls, model: str, args: argparse.Namespace) -> Prompts:
        """Return all fixed prompts of a model.

        Raises:
            OptionError: if it belongs to no drawn world.
        """
        settings: Row = asdict(generation_defaults(model))
        del settings["fps"]
        world = settings.pop("world")
        if world is None:
            raise OptionError(f"{model} belongs to no drawn world, which has fixed prompts.")
        given = {name: getattr(args, name) for name in ("steps", "frames", "height", "width")}
        settings |= {name: value for name, value in given.items() if value is not None}
        entries = fixed_prompts(world)
        requests = [
            GenerationRequest(prompt=entry["prompt"], seed=seed, **settings)
            for seed, entry in enumerate(entries)
        ]
        return cls(world, entries, requests, settings)


@dataclass(frozen=True)
class Clips:
    """What a pipeline made of each prompt: frames ``[T, 3, H, W]`` and last latents, float32."""

    frames: list[Tensor]
    latents: list[Tensor]


def generate_all(
    pipe: Any, requests: Sequence[GenerationRequest], batch: int, extra: Row | None = None
) -> Clips:
    """Generate requests that differ in prompt and seed alone, ``batch`` at once.

    Unlike `dit_accel.generation.generate_batch` it leaves clips where they were made, and waits for
    no step, so that callers may time it.

    Args:
        pipe: the pipeline.
        requests: what to generate.
        batch: how many at once.
        extra: further arguments of the pipeline.
    """
    pipe.set_progress_bar_config(disable=True)
    clips = Clips([], [])
    for start in range(0, len(requests), batch):
        now = requests[start : start + batch]
        last: dict[str, Tensor] = {}

        def keep(_pipe: Any, _step: int, _time: Any, kwargs: Row, last: Any = last) -> Row:
            last["latents"] = kwargs["latents"]
            return kwargs

        output = pipe(
            **pipeline_arguments(pipe, now[0]) | {"prompt": [request.prompt for request in now]},
            **(extra or {}),
            generator=[torch.Generator().manual_seed(request.seed) for request in now],
            output_type="pt",
            callback_on_step_end=keep,
        )
        frames = output.frames if hasattr(output, "frames") else output.images[:, None]
        clips.frames.extend(frames.float())
        clips.latents.extend(last["latents"].float())
    return clips
