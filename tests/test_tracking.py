"""Steps, branches and generations, over real pipelines."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import TINY_PIPELINES, run_tiny

from dit_accel import accelerate_pipeline, acceleration_report
from dit_accel.tracking import CallTracker

EXPECTED_BRANCHES = {
    "wan": {"cond", "uncond"},
    "wan22": {"cond", "uncond"},
    "wan_ti2v": {"cond", "uncond"},
    "wan_ti2v_image": {"cond", "uncond"},
    "wan_i2v": {"cond", "uncond"},
    "wan_vace": {"cond", "uncond"},
    "hunyuan": {"cond"},
    "flux": {"cond"},
    "flux_schnell": {"cond"},
    "flux_kontext": {"cond"},
    "sd3": {"cond_uncond"},
}


@pytest.mark.parametrize("name", sorted(TINY_PIPELINES))
def test_steps_and_branches_of_every_pipeline(name):
    build, arguments = TINY_PIPELINES[name]
    pipe = build()
    accelerate_pipeline(pipe, "dense")
    for steps in (4, 2, 1, 1):  # each generation starts again from step 0
        run_tiny(pipe, arguments, num_inference_steps=steps)
        calls = acceleration_report(pipe).calls
        assert sorted({call.step for call in calls}) == list(range(steps))
        assert {call.branch for call in calls} == EXPECTED_BRANCHES[name]
        layers = max(call.layer for call in calls) + 1
        assert len(calls) == steps * layers * len(EXPECTED_BRANCHES[name])


def test_image_to_image_counts_the_steps_that_run():
    from diffusers import FluxImg2ImgPipeline
    from PIL import Image

    pipe = TINY_PIPELINES["flux"][0]()
    pipe = FluxImg2ImgPipeline(**pipe.components)
    accelerate_pipeline(pipe, "gna", dense_steps=1, min_tokens=0, block_size=16, guard=False)
    picture = Image.linear_gradient("L").convert("RGB").resize((272, 240))
    arguments = {"image": picture, "height": 240, "width": 272, "max_sequence_length": 33}
    run_tiny(pipe, arguments, strength=0.5, num_inference_steps=6)
    calls = acceleration_report(pipe).calls
    assert sorted({call.step for call in calls}) == [0, 1, 2]
    assert all((call.density == 1) == (call.step == 0) for call in calls)


class Scheduler:
    """Only what the tracker reads."""

    timesteps = torch.tensor([999.0, 750.0, 500.0, 250.0])


class Pipe:
    """A pipeline that names neither branch nor step."""

    scheduler = Scheduler()
    transformer = object()
    do_classifier_free_guidance = True


def test_copied_timesteps_are_found_by_value():
    tracker = CallTracker(Pipe())
    moments = [tracker.advance(torch.full((2,), t)) for t in (999.0, 750.0, 500.0, 999.0)]
    assert [m.step for m in moments] == [0, 1, 2, 0]
    assert tracker.advance(torch.tensor([0.75])).step == 1  # FLUX divides by 1000
    assert [m.generation for m in moments] == [0, 0, 0, 1]
    assert moments[0].num_steps == 4


def test_without_a_scheduler_nothing_is_guessed():
    moment = CallTracker(object()).advance(torch.tensor([3.0]))
    assert (moment.step, moment.num_steps, moment.branch) == (None, None, "cond")
