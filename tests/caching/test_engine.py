"""The engine under the caches: counts, memory, guidance that changes, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from cache_subjects import ACTIVE, STEPS, Subject, marks
from packaging.version import Version

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.acceleration import family_of
from dit_accel.caching.profile import Profile
from dit_accel.errors import OptionError

BLOCKS = {"wan": 3, "wan22": 3, "hunyuan": 4, "flux": 4, "sd3": 3}


@pytest.mark.parametrize(
    ("cache", "options", "full", "always"),
    [
        ("first_block_cache", {"threshold": 1e9}, 2, 1),
        ("dual_block_cache", ACTIVE["dual_block_cache"] | {"threshold": 1e9}, 3, 2),
        ("taylorseer", {"interval": 100, "first_steps": 2}, 3, 0),
        ("profiling_cache", {"blocks": (1,), "longest": 50, "shortest": 50}, 3, -1),
    ],
)
def test_block_calls_are_what_the_closed_form_says(subject, cache, options, full, always):
    """full x L + (S - full) x blocks that always run, per branch."""
    blocks = BLOCKS[subject.name]
    always = blocks - 1 if always < 0 else always
    accelerate_pipeline(subject.pipe, cache, **options)
    subject.run()
    report = acceleration_report(subject.pipe)
    branches = len({step.branch for step in report.steps})
    # Wan 2.2's second transformer knows nothing at its first step.
    full += sum("step before" in step.why for step in report.steps) // branches
    run = sum(sum(step.ran) for step in report.steps)
    assert run == branches * (full * blocks + (STEPS - full) * always)
    assert report.blocks_skipped == pytest.approx(1 - run / (branches * STEPS * blocks))


@pytest.mark.parametrize(
    ("cache", "videos", "texts"),
    [
        ("first_block_cache", 2, 1),
        ("magcache", 1, 1),
        ("taylorseer", 2, 2),
        ("profiling_cache", 1, 1),
    ],
)
def test_memory_is_what_the_table_says(subject, cache, videos, texts):
    """Streams held per branch: of the video, and of the text where blocks change it."""
    held = {}
    family = family_of(subject.pipe)

    def measure(_module, args, kwargs):
        streams = family.streams_in(args, kwargs)
        held["video"] = streams.video.nbytes
        held["text"] = 0 if streams.text is None else streams.text.nbytes

    block = family.blocks(subject.pipe.transformer)[0]
    handle = block.register_forward_pre_hook(measure, with_kwargs=True)
    accelerate_pipeline(subject.pipe, cache, **ACTIVE[cache])
    subject.run()
    handle.remove()
    report = acceleration_report(subject.pipe)
    branches = len({step.branch for step in report.steps})
    if subject.name == "sd3" and cache != "profiling_cache":
        texts = 0  # its last block gives no text
    assert report.cache_bytes == branches * (videos * held["video"] + texts * held["text"])


def test_attention_outputs_take_a_tensor_per_module_and_branch():
    subject = Subject("wan")
    accelerate_pipeline(subject.pipe, "pab", **ACTIVE["pab"])
    subject.run()
    assert acceleration_report(subject.pipe).cache_bytes == 6 * 2 * 252 * 64 * 4


def test_guidance_that_ends_early_and_comes_back():
    """A branch that sat a step out starts with a full step; the other one goes on."""
    subject = Subject("wan")
    accelerate_pipeline(subject.pipe, "first_block_cache", threshold=1e9)

    def switch(pipe, step, _timestep, kwargs):
        pipe._guidance_scale = 1.0 if 3 <= step < 6 else 5.0
        return kwargs

    subject.run(callback_on_step_end=switch)
    report = acceleration_report(subject.pipe)
    assert marks(report, "cond") == "#..........#"
    steps = [step.step for step in report.steps if step.branch == "uncond"]
    assert steps == [0, 1, 2, 3, 7, 8, 9, 10, 11]
    assert marks(report, "uncond") == "#...#...#"


def test_caps_and_masks_of_the_dual_block_cache():
    subject = Subject("wan")
    often = {"threshold": 1e9, "first_blocks": 1, "first_steps": 2}
    for options, expected in (
        ({"max_total": 3}, "##...#######"),
        ({"max_reuses": 2}, "##..#..#..##"),
        ({"mask": "#..#..#..#.#"}, "##.#..#..#.#"),
        ({"mask": "#."}, "######.....#"),
    ):
        accelerate_pipeline(subject.pipe, "dual_block_cache", **often | options)
        subject.run()
        assert marks(acceleration_report(subject.pipe), "cond") == expected, options
    accelerate_pipeline(subject.pipe, "dual_block_cache", **often)
    subject.run()
    report = acceleration_report(subject.pipe)
    sums = [step.value for step in report.steps if step.branch == "cond" and step.value]
    cap = sums[0] + sums[1] / 2  # between one and two reuses
    accelerate_pipeline(subject.pipe, "dual_block_cache", **often, max_sum=cap)
    subject.run()
    assert marks(acceleration_report(subject.pipe), "cond").startswith("##.#")


@pytest.mark.parametrize("cache", ["first_block_cache", "taylorseer", "easycache", "pab"])
def test_a_perturbed_pass_has_a_state_of_its_own(cache):
    """A guidance that runs the conditional call once more, by another name, changes nothing."""
    subject = Subject("wan")
    accelerate_pipeline(subject.pipe, cache, **ACTIVE[cache])
    alone = subject.run()
    runtime = subject.pipe._dit_accel.runtime

    def twice(inner, *args, **kwargs):
        moment = runtime.tracker.advance(kwargs["timestep"])
        with runtime.tracker.hold(moment):
            out = inner(*args, **kwargs)
        if moment.branch == "cond":
            perturbed = kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"] + 1}
            with runtime.tracker.hold(replace(moment, branch="perturbed")):
                inner(*args, **perturbed)
        return out

    runtime.seam.intercept(subject.pipe.transformer, twice)
    assert torch.equal(subject.run(), alone)
    report = acceleration_report(subject.pipe)
    assert {step.branch for step in report.steps} == {"cond", "uncond", "perturbed"}
    assert marks(report, "perturbed").count(".") > 0


def test_a_skipped_pass_never_refreshes():
    """The unconditional pass that is made, not run, leaves the kept difference as it is."""
    subject = Subject("wan")
    accelerate_pipeline(subject.pipe, "unconditional_cache", every=3, first_steps=2, last_steps=1)
    kept = []
    session = subject.session
    keep = session._keep
    session._keep = lambda transformer, moment, difference: (
        kept.append(moment.step),
        keep(transformer, moment, difference),
    )
    subject.run()
    report = acceleration_report(subject.pipe)
    ran = [s.step for s in report.steps if s.branch == "uncond" and all(s.ran)]
    assert ran == [0, 1, 4, 7, 10, 11]
    assert kept == ran[:-1]


def test_pab_never_hands_one_branch_the_other_s_attention():
    subject = Subject("wan")
    outputs: dict[str, list[torch.Tensor]] = {}
    accelerate_pipeline(subject.pipe, "pab", **ACTIVE["pab"])
    session = subject.session
    block = subject.pipe.transformer.blocks[-1]
    block.norm3.register_forward_pre_hook(
        lambda _module, args: outputs.setdefault(session._forward.moment.branch, []).append(args[0])
    )
    subject.run()
    assert len(outputs["cond"]) == len(outputs["uncond"]) == STEPS
    assert not any(map(torch.equal, outputs["cond"], outputs["uncond"]))


def test_control_residuals_between_skipped_blocks_count_once():
    """What is added between blocks is part of a run's residual, and not added again."""
    subject = Subject("flux")
    inputs = {}
    handle = subject.pipe.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: inputs.update(kwargs), with_kwargs=True
    )
    subject.run(true_cfg_scale=1.0)
    handle.remove()
    inputs["controlnet_block_samples"] = [torch.randn(1, 255, 64) for _ in range(2)]
    inputs["controlnet_single_block_samples"] = [torch.randn(1, 255, 64) for _ in range(2)]
    scheduler, transformer = subject.pipe.scheduler, subject.pipe.transformer
    with torch.no_grad():
        accelerate_pipeline(subject.pipe, "taylorseer", order=0, interval=50, first_steps=1)
        outputs = []
        for time in scheduler.timesteps[:4]:
            inputs["timestep"] = time.expand(1) / 1000
            outputs.append(transformer(**inputs)[0])
    assert marks(acceleration_report(subject.pipe), "cond") == "#..."
    # The same tokens come in and the same residual is added, so only the last norm's timestep
    # tells the steps apart; a residual that counted twice would show.
    for out in outputs[1:]:
        assert (out - outputs[0]).norm() < 0.1 * outputs[0].norm()


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        (["first_block_cache", "teacache"], {}, "one cache at most"),
        ("first_block_cache", {"threshold": -0.1}, "threshold"),
        ("first_block_cache", {"threshold": float("nan")}, "threshold"),
        ("first_block_cache", {"threshold": float("inf")}, "threshold"),
        ("first_block_cache", {"threshold": "0.1"}, "threshold"),
        ("first_block_cache", {"first_steps": -1}, "first_steps"),
        ("first_block_cache", {"max_reuses": 0}, "max_reuses"),
        ("first_block_cache", {"treshold": 0.1}, "Did you mean 'threshold'"),
        ("dual_block_cache", {"first_blocks": 3}, "would skip none of the 3 blocks"),
        ("dual_block_cache", {"first_blocks": 0}, "first_blocks"),
        ("teacache", {}, "no TeaCache coefficients are published"),
        ("teacache", {"coefficients": (1.0,), "indicator": "tme"}, "indicator"),
        ("magcache", {}, "no MagCache ratios are published"),
        ("profiling_cache", {}, "no list of background blocks"),
        ("profiling_cache", {"blocks": (7,)}, "block 7 is listed, but the model has 3"),
        ("profiling_cache", {"blocks": (0,), "shortest": 20}, "over longest"),
        ("profiling_cache", {"profile": "nowhere.json"}, "can't be read"),
        ("profiling_cache", {"profile": "a.json", "blocks": (1,)}, "blocks=.* or profile="),
        ("pab", {"window": (800, 100)}, "window"),
        ("unconditional_cache", {"every": 0}, "every"),
    ],
    ids=str,
)
def test_refusals_leave_nothing_half_installed(method, options, says):
    subject = Subject("wan")
    with pytest.raises(OptionError, match=says):
        accelerate_pipeline(subject.pipe, method, **options)
    assert not hasattr(subject.pipe, "_dit_accel")
    transformer = subject.pipe.transformer
    assert not any("_compiled_call_impl" in vars(module) for module in transformer.modules())
    assert not transformer._forward_pre_hooks


def test_a_refused_cache_leaves_the_one_before_in_place():
    subject = Subject("wan")
    accelerate_pipeline(subject.pipe, "first_block_cache", threshold=1e9)
    cached = subject.run()
    with pytest.raises(OptionError, match="would skip none"):
        accelerate_pipeline(subject.pipe, "dual_block_cache", first_blocks=3)
    assert torch.equal(subject.run(), cached)
    assert acceleration_report(subject.pipe).method == "first_block_cache"


@pytest.mark.filterwarnings("ignore:Dynamo")
def test_a_compiled_wrapper_around_the_transformer_is_told():
    subject = Subject("wan")
    dense = subject.run()
    accelerate_pipeline(subject.pipe, "first_block_cache", threshold=1e9)
    subject.pipe.transformer = torch.compile(subject.pipe.transformer, backend="eager")
    with pytest.warns(UserWarning, match="did nothing: its blocks did not run one by one"):
        out = subject.run()
    torch.testing.assert_close(out, dense)
    torch._dynamo.reset()


def profile(**changes) -> dict:
    content = {
        "version": 1,
        "model": "tiny",
        "family": "wan",
        "num_blocks": 3,
        "width": 64,
        "settings": {},
        "foreground": [0.3, 0.1, 0.2],
        "by_step": [],
    }
    return content | changes


def test_a_profile_lists_its_lowest_blocks(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile()))
    subject = Subject("wan")
    accelerate_pipeline(subject.pipe, "profiling_cache", profile=str(path), fraction=0.67)
    subject.run()
    skipped = {
        index
        for step in acceleration_report(subject.pipe).steps
        for index, ran in enumerate(step.ran)
        if not ran
    }
    assert skipped == {1, 2}
    loaded = Profile.load(path)
    path.write_text(json.dumps(loaded.to_dict()))
    assert Profile.load(path) == loaded


def test_a_profile_of_another_size_serves_and_the_report_says_so(tmp_path):
    path, subject = tmp_path / "profile.json", Subject("wan")
    for measured_at, noted in (([9, 8, 8], True), (None, False)):
        path.write_text(json.dumps(profile(grid=measured_at)))
        accelerate_pipeline(subject.pipe, "profiling_cache", profile=str(path))
        subject.run()
        report = acceleration_report(subject.pipe)
        assert any(not all(step.ran) for step in report.steps)
        assert any("grid of (9, 8, 8), and this" in note for note in report.notes) == noted


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (json.dumps(profile())[:60], "cut short"),
        ("blocks", "not JSON"),
        (json.dumps([1]), "version None"),
        (json.dumps(profile(version=9)), "version 9, not 1"),
        (json.dumps({k: v for k, v in profile().items() if k != "width"}), "incomplete"),
        (json.dumps(profile(foreground=["a", 1, 2])), "incomplete"),
        (json.dumps(profile(foreground=[0.1])), "too few blocks"),
        (json.dumps(profile(width=128)), "width 128; this one is a wan of 3 blocks and width 64"),
        (json.dumps(profile(num_blocks=2, foreground=[0.1, 0.2])), "a wan of 2 blocks"),
        (json.dumps(profile(family="flux")), "made for 'tiny', a flux"),
    ],
    ids=lambda value: value[:30],
)
def test_profiles_that_do_not_fit(tmp_path, text, says):
    path = tmp_path / "profile.json"
    path.write_text(text)
    subject = Subject("wan")
    with pytest.raises(OptionError, match=says):
        accelerate_pipeline(subject.pipe, "profiling_cache", profile=str(path))
    assert not hasattr(subject.pipe, "_dit_accel")


def test_a_cache_that_diffusers_installed_is_refused_before_and_after():
    from diffusers import FirstBlockCacheConfig

    subject = Subject("wan")
    transformer = subject.pipe.transformer
    transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(OptionError, match="diffusers already caches"):
        accelerate_pipeline(subject.pipe, "first_block_cache")
    transformer.disable_cache()
    accelerate_pipeline(subject.pipe, "first_block_cache")
    transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(OptionError, match="diffusers already caches"):
        subject.run()


def test_a_cache_that_cache_dit_installed_is_refused():
    subject = Subject("wan")
    subject.pipe.transformer._is_cached = True  # the mark that cache-dit leaves
    with pytest.raises(OptionError, match="cache-dit already caches"):
        accelerate_pipeline(subject.pipe, "first_block_cache")


def test_blocks_replaced_after_acceleration_are_noticed():
    subject = Subject("wan")
    accelerate_pipeline(subject.pipe, "first_block_cache")
    blocks = subject.pipe.transformer.blocks
    blocks[1] = torch.compile(blocks[1], backend="eager")
    with pytest.raises(OptionError, match="blocks of the transformer were replaced"):
        subject.run()


def test_pab_refuses_compiled_blocks():
    subject = Subject("wan")
    accelerate_pipeline(subject.pipe, "pab")
    subject.pipe.transformer.blocks[0].compile(backend="eager")
    with pytest.raises(OptionError, match="don't compile them"):
        subject.run()


def test_group_offload_before_and_after():
    subject = Subject("wan")
    accelerate_pipeline(subject.pipe, "first_block_cache", threshold=1e9)
    cached = subject.run()
    cpu = torch.device("cpu")
    loads = []
    if Version(diffusers.__version__) < Version("0.40") and not torch.cuda.is_available():
        pytest.skip("this diffusers can't group-offload without an accelerator")
    subject.pipe.transformer.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )
    for block in subject.pipe.transformer.blocks[1:]:
        block.attn1.register_forward_pre_hook(lambda *_: loads.append(1))
    assert torch.equal(subject.run(), cached)
    assert len(loads) == 2 * 2 * 2, "skipped blocks were touched"
    restore_pipeline(subject.pipe)
    accelerate_pipeline(subject.pipe, "first_block_cache", threshold=1e9)
    assert torch.equal(subject.run(), cached)


def test_a_transformer_called_outside_a_loop_runs_in_full():
    subject = Subject("wan")
    latent, text = torch.randn(2, 16, 3, 10, 14), torch.randn(2, 7, 32)
    with torch.no_grad():
        dense = subject.pipe.transformer(latent, torch.tensor([500, 500]), text)[0]
        accelerate_pipeline(subject.pipe, "first_block_cache", threshold=1e9)
        for _ in range(3):
            again = subject.pipe.transformer(latent, torch.tensor([500, 500]), text)[0]
            assert torch.equal(again, dense)
