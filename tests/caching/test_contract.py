"""What every cache must do on every family."""

from __future__ import annotations

import pytest
import torch
from cache_subjects import ACTIVE, OFF, STEPS, Subject, skipped

from dit_accel import accelerate_pipeline, acceleration_report, list_methods, restore_pipeline

# Remainder reuse goes with a sparse method alone, and has tests of its own.
CACHES = [name for name in list_methods("cache") if name != "remainder_cache"]
# One of each engine, and a gate that looks at values: what they share is tested on these.
ENGINES = ["dual_block_cache", "profiling_cache", "pab", "unconditional_cache"]
BRANCHES = {"sd3": {"cond_uncond"}}


@pytest.mark.parametrize("cache", CACHES)
def test_no_strength_is_bit_identical(subject, cache):
    dense = subject.run()
    accelerate_pipeline(subject.pipe, cache, **OFF[cache])
    assert torch.equal(subject.run(), dense)
    report = acceleration_report(subject.pipe)
    assert skipped(report) == 0
    assert len(report.steps) >= STEPS


@pytest.mark.parametrize("cache", CACHES)
def test_it_skips_says_so_and_leaves_no_trace(subject, cache):
    dense = subject.run()
    accelerate_pipeline(subject.pipe, cache, **ACTIVE[cache])
    out = subject.run()
    report = acceleration_report(subject.pipe)
    assert skipped(report) > 0
    assert report.cache_bytes > 0
    assert 0 < (out - dense).norm() / dense.norm() < 0.3
    assert subject.session.bytes_held == 0, "something outlives the generation"
    logical = {step.step for step in report.steps}
    assert logical == set(range(STEPS))
    expected = BRANCHES.get(subject.name, {"cond", "uncond"})
    if cache == "unconditional_cache":
        expected = {"cond", "uncond"}  # it tells the halves of a batch apart
    assert {step.branch for step in report.steps} == expected
    assert str(report)

    assert torch.equal(subject.run(), out), "a second generation differs"
    subject.run(num_inference_steps=9)
    assert torch.equal(subject.run(), out), "another number of steps left something behind"
    restore_pipeline(subject.pipe)
    assert torch.equal(subject.run(), dense)
    assert not any(
        "_compiled_call_impl" in vars(module) or any("dit_accel" in name for name in vars(module))
        for module in subject.pipe.transformer.modules()
    )


@pytest.mark.parametrize("cache", ENGINES)
def test_an_interrupted_generation_leaves_nothing_behind(subject, cache):
    accelerate_pipeline(subject.pipe, cache, **ACTIVE[cache])
    out = subject.run()

    def stop(_pipe, step, _timestep, kwargs):
        if step == 5:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        subject.run(callback_on_step_end=stop)
    smaller = {"height": 80, "width": 112} if "num_frames" in subject.arguments else {"height": 160}
    subject.run(**smaller)
    assert torch.equal(subject.run(), out)


@pytest.mark.parametrize("cache", ENGINES)
def test_a_batch_of_prompts(subject, cache):
    """One decision for the batch; a larger batch after a smaller one starts anew."""
    accelerate_pipeline(subject.pipe, cache, **ACTIVE[cache])
    once = subject.run()
    prompts = ["a red ball", "a blue ball with stripes"]
    negative = {"negative_prompt": ["blurry"] * 2} if "negative_prompt" in subject.arguments else {}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    both = subject.run(prompt=prompts, generator=generators, **negative)
    assert len(both) == 2
    assert both.isfinite().all()
    assert torch.equal(subject.run(), once)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["wan", "hunyuan", "flux"])
def test_the_unconditional_prompt_does_not_reach_the_conditional_branch(name, cache):
    """Replay one generation's calls with other unconditional inputs: cond stays bit-equal."""
    subject = Subject(name)
    calls = []
    handle = subject.pipe.transformer.register_forward_pre_hook(
        lambda _module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    subject.run()
    handle.remove()
    assert len(calls) == 2 * STEPS
    timesteps = subject.pipe.scheduler.timesteps

    @torch.no_grad()
    def replay(shift: float) -> list[torch.Tensor]:
        subject.pipe.scheduler.timesteps = timesteps.clone()  # as a new generation would
        accelerate_pipeline(subject.pipe, cache, **ACTIVE[cache])
        found = []
        for index, kwargs in enumerate(calls):
            branch = ("cond", "uncond")[index % 2]
            text = kwargs["encoder_hidden_states"]
            kwargs = kwargs | {"encoder_hidden_states": text + shift if index % 2 else text}
            with subject.pipe.transformer.cache_context(branch):
                out = subject.pipe.transformer(**kwargs)[0]
            if branch == "cond":
                found.append(out)
        return found

    plain, shifted = replay(0.0), replay(1.0)
    assert skipped(acceleration_report(subject.pipe)) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, shifted, strict=True))


@pytest.mark.parametrize("cache", ENGINES)
def test_halves_of_a_guided_batch_do_not_mix(cache):
    """SD3 runs both branches in one batch: other unconditional inputs leave cond bit-equal."""
    subject = Subject("sd3")
    calls = []
    handle = subject.pipe.transformer.register_forward_pre_hook(
        lambda _module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    subject.run()
    handle.remove()
    assert len(calls) == STEPS
    timesteps = subject.pipe.scheduler.timesteps

    @torch.no_grad()
    def replay(shift: float) -> list[torch.Tensor]:
        subject.pipe.scheduler.timesteps = timesteps.clone()
        accelerate_pipeline(subject.pipe, cache, **ACTIVE[cache])
        found = []
        for kwargs in calls:
            text = kwargs["encoder_hidden_states"].clone()
            text[0] += shift
            out = subject.pipe.transformer(**kwargs | {"encoder_hidden_states": text})[0]
            found.append(out)
        return found

    plain, shifted = replay(0.0), replay(1.0)
    assert skipped(acceleration_report(subject.pipe)) > 0
    assert all(torch.equal(a[1], b[1]) for a, b in zip(plain, shifted, strict=True))
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(plain, shifted, strict=True))


@pytest.mark.parametrize("cache", CACHES)
def test_without_guidance_there_is_one_branch(cache):
    subject = Subject("wan")
    accelerate_pipeline(subject.pipe, cache, **ACTIVE[cache])
    subject.run(guidance_scale=1.0)
    report = acceleration_report(subject.pipe)
    assert [step.step for step in report.steps] == list(range(STEPS))
    assert {step.branch for step in report.steps} == {"cond"}
    if cache == "unconditional_cache":
        assert any("no unconditional pass" in note for note in report.notes)
    else:
        assert skipped(report) > 0


@pytest.mark.parametrize("cache", CACHES)
def test_pipelines_of_one_class_do_not_affect_each_other(cache):
    first, second = Subject("wan"), Subject("wan")
    dense = second.run()
    accelerate_pipeline(first.pipe, cache, **ACTIVE[cache])
    cached = first.run()
    assert torch.equal(second.run(), dense)
    accelerate_pipeline(second.pipe, cache, **OFF[cache])
    assert torch.equal(first.run(), cached)
    restore_pipeline(first.pipe)
    assert torch.equal(second.run(), dense)
    assert torch.equal(first.run(), dense)


@pytest.mark.parametrize("cache", CACHES)
def test_few_steps_run_in_full_and_say_so(cache):
    subject = Subject("wan")
    dense = subject.run(num_inference_steps=4)
    accelerate_pipeline(subject.pipe, cache, **ACTIVE[cache])
    assert torch.equal(subject.run(num_inference_steps=4), dense)
    assert any("min_steps" in note for note in acceleration_report(subject.pipe).notes)


@pytest.mark.parametrize("cache", ENGINES)
def test_together_with_a_sparse_method(subject, cache):
    """The first sparse step runs in full: tokens have another order from there on."""
    check_together(subject, "gna", cache)


@pytest.mark.parametrize("attention", ["radial", "pisa"])
@pytest.mark.parametrize("cache", CACHES)
def test_together_with_other_sparse_methods(attention, cache):
    check_together(Subject("wan"), attention, cache)


def check_together(subject: Subject, attention: str, cache: str) -> None:
    accelerate_pipeline(
        subject.pipe, [attention, cache], dense_steps=4, min_tokens=0, **{cache: ACTIVE[cache]},
        **{attention: {"block_size": 16}},
    )  # fmt: skip
    out = subject.run()
    report = acceleration_report(subject.pipe)
    assert skipped(report) > 0
    if cache != "unconditional_cache":
        assert all(all(s.ran) and not s.attention_reused for s in report.steps if s.step == 4)
    assert report.method == f"{attention} + {cache}"
    assert torch.equal(subject.run(), out)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "flux", "sd3"])
@pytest.mark.parametrize("cache", ["first_block_cache", "teacache", "unconditional_cache"])
def test_compiled_blocks_have_no_more_graphs_than_without(name, cache):
    def count_graphs(subject: Subject) -> tuple[int, torch.Tensor]:
        graphs = []

        def count(graph, _inputs):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        for stack in ("blocks", "transformer_blocks", "single_transformer_blocks"):
            for block in getattr(subject.pipe.transformer, stack, []):
                block.compile(fullgraph=True, backend=count)
        out = subject.run()
        torch._dynamo.reset()
        return len(graphs), out

    stock, _ = count_graphs(Subject(name))
    subject = Subject(name)
    accelerate_pipeline(subject.pipe, cache, **ACTIVE[cache])
    eager = subject.run()
    graphs, compiled = count_graphs(subject)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    assert skipped(acceleration_report(subject.pipe)) > 0
    # The batch of SD3's conditional half alone has a size of its own.
    halves = name == "sd3" and cache == "unconditional_cache"
    assert graphs <= stock * (2 if halves else 1)


def test_every_cache_has_options_here():
    assert set(CACHES) == set(ACTIVE) == set(OFF)
