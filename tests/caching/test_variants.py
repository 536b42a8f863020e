"""Caches on the families' other pipelines, from a picture, and beside offloading."""

from __future__ import annotations

import pytest
import torch
from cache_subjects import ACTIVE, STEPS, Subject, skipped
from PIL import Image
from tiny_pipelines import TINY_PIPELINES, run_tiny

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline

OTHERS = [
    "wan_ti2v", "wan_ti2v_image", "wan_i2v", "wan_vace", "flux_schnell", "flux_kontext"
]  # fmt: skip
CACHES = ["first_block_cache", "seacache", "profiling_cache", "pab"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_pipelines_of_the_families(name):
    build, arguments = TINY_PIPELINES[name]
    pipe, arguments = build(), arguments | {"num_inference_steps": STEPS}
    dense = run_tiny(pipe, arguments)
    for cache in CACHES:
        accelerate_pipeline(pipe, cache, **ACTIVE[cache])
        cached = run_tiny(pipe, arguments)
        report = acceleration_report(pipe)
        assert skipped(report) > 0, cache
        assert {step.step for step in report.steps} == set(range(STEPS)), cache
        assert cached.isfinite().all()
        assert torch.equal(run_tiny(pipe, arguments), cached), cache
    restore_pipeline(pipe)
    assert torch.equal(run_tiny(pipe, arguments), dense)


@pytest.mark.parametrize("cache", CACHES)
def test_a_generation_that_begins_in_the_middle(cache):
    """From a picture: steps are counted over those that really run."""
    from diffusers import FluxImg2ImgPipeline

    subject = Subject("flux")
    pipe = FluxImg2ImgPipeline(
        **{name: part for name, part in subject.pipe.components.items() if "image" not in name}
    )
    arguments = subject.arguments | {"image": Image.linear_gradient("L").convert("RGB")}
    arguments |= {"strength": 0.75, "num_inference_steps": 16}
    accelerate_pipeline(pipe, cache, **ACTIVE[cache])
    run_tiny(pipe, arguments)
    report = acceleration_report(pipe)
    assert {step.step for step in report.steps} == set(range(12))
    assert skipped(report) > 0


@pytest.mark.parametrize("cache", [*CACHES, "unconditional_cache"])
@pytest.mark.parametrize("accelerate_first", [True, False])
def test_model_offload(subject, cache, accelerate_first):
    """`enable_model_cpu_offload` wraps each transformer; neither order changes a bit."""
    from accelerate import cpu_offload_with_hook

    accelerate_pipeline(subject.pipe, cache, **ACTIVE[cache])
    cached = subject.run()
    if not accelerate_first:
        restore_pipeline(subject.pipe)
    for name in ("transformer", "transformer_2"):
        if getattr(subject.pipe, name, None) is not None:
            cpu_offload_with_hook(getattr(subject.pipe, name), "cpu")
    if not accelerate_first:
        accelerate_pipeline(subject.pipe, cache, **ACTIVE[cache])
    assert torch.equal(subject.run(), cached)
