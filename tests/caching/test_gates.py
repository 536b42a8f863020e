"""Gates, scopes and predictors by themselves: published lists, closed forms, other libraries."""

from __future__ import annotations

import math

import pytest
import torch
from cache_subjects import STEPS, Subject, marks

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.caching.gates import Limits, mask_from, nearest, polynomial, relative_l1
from dit_accel.caching.magcache import MagCache
from dit_accel.caching.predictors import Predictor, Taylor, When, lagrange_weights
from dit_accel.caching.profiling import ProfilingCache, refresh_steps, runs
from dit_accel.caching.seacache import wiener_filter
from dit_accel.caching.stack import Setting
from dit_accel.pipelines.base import Streams
from dit_accel.presets import preset_for
from dit_accel.tracking import Moment

RELEASED = {*range(6), 6, 18, 26, 32, 38, 42, 46, 48}


def published(variant: str, method: str) -> dict:
    return dict(preset_for(variant, method=method).options)


def setting(num_steps: int, cache, start: int = 0, branch: str = "cond") -> Setting:
    """Return what a gate is made for, with HunyuanVideo's 60 blocks."""
    moment = Moment(start, num_steps, branch, 0)
    return Setting(None, None, moment, {}, 60, cache.limits(num_steps))


def test_the_released_refresh_steps():
    assert refresh_steps(50, 6, 11, 2) == RELEASED
    assert refresh_steps(50, 6, 6, 6) == {*range(6), *range(6, 50, 6)}
    for steps in range(1, 60):
        refreshed = refresh_steps(steps, 1, 11, 2)
        assert 0 in refreshed
        assert max(refreshed) < steps


def test_the_published_lists_and_their_block_calls():
    hunyuan = ProfilingCache(**published("hunyuan_video-13b", "profiling_cache"))
    scope = hunyuan.scope(60)
    assert [run for run in scope if run.start < 20] == [range(6, 20)]
    assert len(scope) == 1 + 8
    dual, single = block_calls(hunyuan, range(20)), block_calls(hunyuan, range(20, 60))
    assert (dual, single) == (496, 1136)
    wan = ProfilingCache(**published("wan2.1-14b-t2v", "profiling_cache"))
    assert len(wan.scope(40)) == 5
    assert block_calls(wan, range(40)) == 992


def block_calls(cache: ProfilingCache, blocks: range) -> int:
    """Count the calls of these blocks in 50 steps."""
    gate = cache.gate(setting(50, cache))
    listed = {block: run for run in cache.scope(60) for block in run}
    return sum(
        block not in listed or not gate.skips(listed[block], step)
        for step in range(50)
        for block in blocks
    )


def test_runs():
    assert runs([]) == []
    assert runs([3, 0, 1, 7, 4]) == [range(0, 2), range(3, 5), range(7, 8)]


def test_magcache_follows_its_published_rule():
    options = published("wan2.1-14b-t2v", "magcache")
    cache = MagCache(**options)
    for branch, ratios in (("cond", options["ratios"]), ("uncond", options["uncond_ratios"])):
        product, error, count, expected = 1.0, 0.0, 0, []
        for step in range(50):
            reuse = False
            if 10 <= step < 49:
                product, count = product * ratios[step], count + 1
                error += abs(1 - product)
                reuse = error <= 0.24 and count <= 6
            if not reuse:
                product, error, count = 1.0, 0.0, 0
            expected.append(not reuse)
        gate = cache.gate(setting(50, cache, branch=branch))
        assert list(gate.full) == expected
        assert 0 < sum(expected) < 30


def test_a_mask_begins_where_its_transformer_does():
    cache = MagCache(ratios=(0.99,) * 20, threshold=1.0, first_steps=1, max_reuses=None)
    gate = cache.gate(setting(20, cache, start=7))
    assert all(gate.full[:8])
    assert not any(gate.full[8:-1])


def test_ratios_of_another_number_of_steps():
    assert nearest((1.0, 2.0, 3.0), 3) == (1.0, 2.0, 3.0)
    assert nearest((1.0, 2.0, 3.0), 5) == (1.0, 1.0, 2.0, 3.0, 3.0)
    assert nearest((1.0, 2.0, 3.0), 1) == (1.0,)


def test_limits_of_a_mask():
    gate = mask_from(lambda step, reuses: (float(reuses), True), 10, 0, Limits(2, 1, 3))
    assert "".join("#" if full else "." for full in gate.full) == "##...#...#"
    assert gate.keeps(range(1), 1)
    assert not gate.keeps(range(1), 0)


def test_relative_l1():
    old = torch.tensor([1.0, -3.0], dtype=torch.bfloat16)
    new = torch.tensor([2.0, -3.0], dtype=torch.bfloat16)
    assert relative_l1(new, old) == pytest.approx(0.25)
    assert relative_l1(new, None) == math.inf
    assert relative_l1(new, torch.zeros(2)) == math.inf
    assert relative_l1(torch.tensor([math.nan, 1]), old) == math.inf
    assert relative_l1(new[:1], old) == math.inf
    assert polynomial((2.0, 0.0, 1.0), 3.0) == 19.0


def test_extrapolation_is_exact_on_polynomials_and_stops_at_its_horizon():
    times = [900.0, 850.0, 700.0, 640.0, 500.0, 300.0]

    def value(time: float) -> torch.Tensor:
        return torch.tensor([[2 + 0.5 * time - 0.01 * time**2]], dtype=torch.float64)

    predictor = Taylor(order=2, horizon=2)
    for step in range(3):
        predictor.update(When(step, times[step]), Streams(value(times[step]), None))
    for step in (3, 4):
        torch.testing.assert_close(
            predictor.predict(When(step, times[step])).video.double(),
            value(times[step]),
            rtol=1e-4,
            atol=1e-2,
        )
    clamped = predictor.predict(When(5, times[5])).video.double()
    at = times[2] + (times[5] - times[2]) * 2 / 3
    torch.testing.assert_close(clamped, value(at), rtol=1e-4, atol=1e-2)
    assert sum(lagrange_weights([3.0, 1.0], 0.0)) == pytest.approx(1)


def test_a_predictor_holds_as_many_points_as_its_order_needs():
    for predictor, points in ((Predictor(), 1), (Taylor(2, 3), 3)):
        for step in range(5):
            predictor.update(When(step, -float(step)), Streams(torch.zeros(2, 3), torch.zeros(1)))
        assert predictor.bytes_held == points * 7 * 4


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
def test_the_filter_is_diffusers_own(sigma):
    sea = pytest.importorskip("diffusers.hooks.sea_cache")
    latent = torch.randn(1, 4, 5, 6, 16)
    theirs = sea._apply_sea_filter(latent[0], sigma=sigma, power_exp=3.0)
    torch.testing.assert_close(wiener_filter(latent, sigma, 3.0)[0], theirs)


@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_seacache_runs_as_many_blocks_as_diffusers_does(threshold):
    """Near, not equal: it extrapolates over steps, and ours over the scheduler's times."""
    pytest.importorskip("diffusers.hooks.sea_cache")
    from diffusers import SeaCacheConfig

    subject, calls = Subject("wan"), []
    subject.pipe.transformer.blocks[1].attn1.register_forward_hook(lambda *_: calls.append(1))
    subject.pipe.transformer.enable_cache(SeaCacheConfig(threshold=threshold))
    theirs, expected = subject.run(), len(calls)
    subject.pipe.transformer.disable_cache()
    calls.clear()
    accelerate_pipeline(subject.pipe, "seacache", threshold=threshold)
    ours = subject.run()
    assert len(calls) == expected < 2 * STEPS
    assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_first_block_cache_decides_as_diffusers_does():
    from diffusers import FirstBlockCacheConfig

    subject = Subject("wan")
    for threshold in (0.2, 0.5):
        subject.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        theirs = subject.run()
        subject.pipe.transformer.disable_cache()
        accelerate_pipeline(
            subject.pipe, "first_block_cache", threshold=threshold, last_steps=0, min_steps=0
        )
        assert torch.equal(subject.run(), theirs)
        found = marks(acceleration_report(subject.pipe), "cond")
        assert "." in found
        restore_pipeline(subject.pipe)


def test_teacache_on_wan_follows_the_timesteps_alone():
    """Whatever prompt, branch and size: the same steps, known before the first."""
    subject = Subject("wan")
    options = {"coefficients": (1.0, 0.0), "indicator": "time", "threshold": 2.0}
    accelerate_pipeline(subject.pipe, "teacache", **options)
    found = set()
    for changes in ({}, {"prompt": "another"}, {"height": 80}):
        subject.run(**changes)
        report = acceleration_report(subject.pipe)
        found |= {marks(report, "cond"), marks(report, "uncond")}
    assert len(found) == 1
    assert "." in found.pop()


def test_teacache_sums_the_estimated_changes_of_its_embedding():
    subject = Subject("wan")
    transformer, embeddings = subject.pipe.transformer, []
    handle = transformer.condition_embedder.register_forward_hook(
        lambda _module, _args, output: embeddings.append(output[0])
    )
    subject.run(guidance_scale=1.0)
    handle.remove()
    expected, total = "#", 0.0
    for step in range(1, len(embeddings)):
        total += 2 * relative_l1(embeddings[step], embeddings[step - 1])
        reuse = total < 4.0 and step < len(embeddings) - 1
        expected += "." if reuse else "#"
        total = total if reuse else 0.0
    accelerate_pipeline(
        subject.pipe, "teacache", coefficients=(2.0, 0.0), indicator="time", threshold=4.0
    )
    subject.run(guidance_scale=1.0)
    assert marks(acceleration_report(subject.pipe), "cond") == expected
    assert "." in expected
