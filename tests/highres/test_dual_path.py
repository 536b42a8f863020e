"""The second stage's passes against a literal form, and what holds of every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from freeswim_literal import LiteralDualPath
from tiny_pipelines import TINY_PIPELINES, run_tiny
from torch import Tensor

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.highres import stages
from dit_accel.highres.reference import length_gain, window_tokens

NATIVE = (112, 144)
TARGET = {"height": 224, "width": 288}
GRID, TRAINED = (4, 14, 18), (7, 9)
WINDOW = (7, 9)
STEPS = 6


def wan(*, prompts: int = 1, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return an accelerated tiny Wan and the arguments for a generation at `TARGET`."""
    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    accelerate_pipeline(pipe, "freeswim", native_size=NATIVE, **options)
    words = ["a red ball rolls to the right", "a blue cube"][:prompts]
    return pipe, {**arguments, **TARGET, "prompt": words, "num_inference_steps": STEPS}


def literally(
    pipe: Any, arguments: dict[str, Any], every: int, branches: tuple[str, ...], steps: int
) -> Tensor:
    """Generate like an accelerated pipeline, the second stage in its literal form."""
    session = pipe._dit_accel.runtime.sessions[0]
    method = session.method
    windows = [window_tokens(side, "released") for side in TRAINED]
    dual = LiteralDualPath(pipe.transformer, GRID, tuple(windows), length_gain(63), every, branches)
    stock = type(pipe).__mro__[1].__call__
    settings = {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    given = settings | arguments
    small = {"height": NATIVE[0], "width": NATIVE[1], "output_type": "pt"}
    restore_pipeline(pipe)
    base = stock(pipe, **given | small).frames
    latents = stages._enlarged(session, base, (224, 288))
    noise = stages._noise_like(latents, given["generator"])
    mixed = (1 - method.sigma) * latents + method.sigma * noise
    with stages._scheduler_from(pipe, method), dual.installed():
        out = stock(pipe, **given, latents=mixed).frames
    assert dual.step_of["cond"] + 1 == steps
    return out


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize(
    ("every", "branches"), [(1, "cond"), (1, "both"), (2, "cond"), (3, "both")]
)
def test_is_what_the_literal_form_gives(every, branches, prompts):
    pipe, arguments = wan(prompts=prompts, refresh_every=every, branches=branches)
    ours = run_tiny(pipe, arguments)
    steps = len({call.step for call in acceleration_report(pipe).calls})
    named = ("cond", "uncond") if branches == "both" else ("cond",)
    plain = literally(pipe, arguments, every, named, steps)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
