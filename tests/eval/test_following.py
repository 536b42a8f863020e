"""Fixed prompts are generated in batches on every family, and shown on a sheet that can grow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_pipelines import TINY_PIPELINES

from dit_accel.errors import OptionError
from dit_accel.eval.contact_sheet import FRAMES, ROW, SIDE, ContactSheet
from dit_accel.eval.following import FollowingRun
from dit_accel.generation import GenerationRequest, generate, generate_batch, makes_video
from dit_accel.world.worlds import fixed_prompts


@pytest.mark.parametrize("family", ["wan", "hunyuan", "flux", "sd3"])
def test_a_batch_gives_what_single_runs_give(family):
    pipe = TINY_PIPELINES[family][0]()
    frames = 5 if makes_video(type(pipe)) else None
    first = GenerationRequest(
        prompt="a red circle", steps=2, frames=frames, height=64, width=96, guidance=2.0
    )
    second = replace(first, prompt="two blue squares", seed=1)
    steps = []
    made = generate_batch(pipe, [first, second], progress=lambda *told: steps.append(told))
    batch = made.frames.float()
    assert made.steps == 2
    assert len(made.latents) == 2
    assert batch.shape == (2, frames or 1, 3, 64, 96)
    assert [(step, of) for _, step, of in steps] == [(1, 2), (2, 2)]
    for one, request in zip(batch, (first, second), strict=True):
        torch.testing.assert_close(one, generate(pipe, request).frames, atol=1e-3, rtol=0)


def test_each_prompt_has_its_own_seed_and_the_model_its_settings():
    requests = FollowingRun(model="tiny-wan", prompts=3, steps=5).requests()
    entries = fixed_prompts("clips")[:3]
    assert [r.prompt for r in requests] == [entry["prompt"] for entry in entries]
    assert [r.seed for r in requests] == [0, 1, 2]
    assert {(r.steps, r.height, r.width) for r in requests} == {(5, 256, 256)}


@pytest.mark.parametrize("video", [True, False], ids=["video", "image"])
def test_a_sheet_grows_from_what_it_shows(tmp_path, video):
    frames = FRAMES if video else 1
    shades = torch.linspace(0.1, 0.9, ROW + 1).view(-1, 1, 1, 1, 1)
    clips = (shades * torch.ones(ROW + 1, frames, 3, 40, 48)).unbind()
    whole = ContactSheet(tmp_path / "whole.png", video=video)
    for clip in clips:
        whole.add(clip)
    whole.write()

    path = tmp_path / "grown.png"
    begun = ContactSheet(path, video=video)
    begun.add(clips[0])
    begun.write()
    grown = ContactSheet(path, video=video, kept=1)
    for clip in clips[1:]:
        grown.add(clip)
    grown.write()
    picture = Image.open(path)
    assert picture.tobytes() == Image.open(tmp_path / "whole.png").tobytes()
    assert picture.width == ROW * SIDE
    assert picture.height == -(-frames * (ROW + 1) // ROW) * SIDE
    with pytest.raises(OptionError, match="lacks the pictures"):
        ContactSheet(path, video=video, kept=10 * ROW)
