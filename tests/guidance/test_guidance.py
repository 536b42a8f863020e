"""Perturbation guidance on the four families: algebra, heads, shared layers, bad input."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cache_subjects import ACTIVE, STEPS, Subject
from tiny_pipelines import run_tiny
from torch import Tensor

from dit_accel import accelerate_pipeline, acceleration_report, list_methods, restore_pipeline
from dit_accel.errors import OptionError
from dit_accel.guidance.reference import guided

FAMILIES = ["wan", "hunyuan", "flux", "sd3"]
UNGUIDED: dict[str, dict[str, Any]] = {
    "wan": {"guidance_scale": 1.0},
    "hunyuan": {"true_cfg_scale": 1.0},
    "flux": {"true_cfg_scale": 1.0},
    "sd3": {"guidance_scale": 1.0},
}
CFG = {"wan": 5.0, "hunyuan": 3.0, "flux": 3.0, "sd3": 7.0}
HEADS = [(1, 0), (2, 1)]
SMALL_BLOCKS: dict[str, dict[str, Any]] = {
    "radial": {"block_size": 16},
    "gna": {"block_size": 16},
    "psa": {"query_block": 16, "key_block": 16},
}


def one_step(subject: Subject, **overrides: Any) -> Tensor:
    """Generate in one step, so that the latents are linear in the prediction."""
    return run_tiny(subject.pipe, subject.arguments, num_inference_steps=1, **overrides)


@contextmanager
def recorded(pipe: Any):
    """Record the predictions that the pipeline's transformer returns."""
    found: list[Tensor] = []
    handle = pipe.transformer.register_forward_hook(
        lambda _module, _args, output: found.append(
            output[0] if isinstance(output, tuple) else output.sample
        ),
        always_call=True,
    )
    yield found
    handle.remove()


def predictions(subject: Subject, **overrides: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return cond, perturbed and uncond of the step that was run, before anything was added."""
    with recorded(subject.pipe) as found:
        one_step(subject, **overrides)
    if subject.name == "sd3" and len(found[0]) > len(found[1]):
        uncond, cond = found[0].chunk(2)
        return cond, found[1], uncond
    return found[0], found[1], found[2] if len(found) == 3 else None


def final_prediction(subject: Subject, **overrides: Any) -> Tensor:
    """Return the prediction that the scheduler gets."""
    got: list[Tensor] = []
    step = subject.pipe.scheduler.step

    def spy(prediction: Tensor, *args: Any, **kwargs: Any) -> Any:
        got.append(prediction)
        return step(prediction, *args, **kwargs)

    subject.pipe.scheduler.step = spy
    try:
        one_step(subject, **overrides)
    finally:
        del subject.pipe.scheduler.step
    return got[0]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no cfg"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_guided_prediction_is_the_formula_s(name, cfg, batch):
    subject = Subject(name)
    overrides = {} if cfg else dict(UNGUIDED[name])
    if batch == 2:
        overrides |= {"prompt": ["a red ball", "a blue ball with stripes"]}
        if "negative_prompt" in subject.arguments:
            overrides |= {"negative_prompt": ["blurry"] * 2}
    accelerate_pipeline(subject.pipe, "softpag", heads=HEADS, strength=0.7, scale=2.5)
    cond, perturbed, uncond = predictions(subject, **overrides)
    assert (uncond is not None) == cfg
    assert not torch.equal(cond, perturbed)
    # Subtracting predictions and scaling by up to 7 loses a digit in float32.
    expected = guided(
        cond.double(), perturbed.double(), 2.5, None if uncond is None else uncond.double(),
        subject.pipe.guidance_scale if name in ("wan", "sd3") else CFG[name],
    )  # fmt: skip
    got = final_prediction(subject, **overrides)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5 * float(got.abs().max()))


def test_layer_skipping_of_the_pipeline_itself_keeps_its_weight():
    """Stable Diffusion 3's own third call gets the same difference, so that it cancels there."""
    subject = Subject("sd3")
    own = {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1.0}
    plain = final_prediction(subject, **own)
    accelerate_pipeline(subject.pipe, "softpag", heads=HEADS, scale=2.5)
    cond, perturbed, _ = predictions(subject)
    got = final_prediction(subject, **own)
    torch.testing.assert_close(got, plain + 2.5 * (cond - perturbed), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"scale": 0}, {"strength": 0.0}, {"strength": [0, 0]}, {"start": 3, "stop": 9}],
    ids=str,
)
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_to_guide_is_bit_identical(name, options):
    subject = Subject(name)
    plain = run_tiny(subject.pipe, subject.arguments)
    accelerate_pipeline(subject.pipe, "softpag", heads=HEADS, **options)
    assert torch.equal(run_tiny(subject.pipe, subject.arguments), plain)
    assert acceleration_report(subject.pipe).perturbed_share is None


@pytest.mark.parametrize("name", [*FAMILIES, "wan22"])
def test_all_heads_at_full_strength_are_pag_and_restoring_is_exact(name):
    subject = Subject(name)
    plain = run_tiny(subject.pipe, subject.arguments)
    accelerate_pipeline(subject.pipe, "softpag", heads=[(1, 0), (1, 1)], strength=1.0)
    soft = run_tiny(subject.pipe, subject.arguments)
    assert torch.equal(run_tiny(subject.pipe, subject.arguments), soft), "a second one differs"
    accelerate_pipeline(subject.pipe, "pag", layers=[1])
    assert torch.equal(run_tiny(subject.pipe, subject.arguments), soft)
    assert not torch.equal(soft, plain)
    restore_pipeline(subject.pipe)
    assert torch.equal(run_tiny(subject.pipe, subject.arguments), plain)
    assert not any(
        "_compiled_call_impl" in vars(module) for module in subject.pipe.transformer.modules()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_below_are_shared_and_counted(name):
    subject = Subject(name)
    accelerate_pipeline(subject.pipe, "pag", layers=[2])
    blocks = subject.pipe._dit_accel.runtime.family.blocks(subject.pipe.transformer)
    calls: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
        for index, block in enumerate(blocks)
    ]
    shared = run_tiny(subject.pipe, subject.arguments)
    passes = 1 if name == "sd3" else 2
    assert [calls.count(index) for index in range(len(blocks))] == [
        3 * (passes + (index >= 2)) for index in range(len(blocks))
    ]
    for handle in handles:
        handle.remove()
    report = acceleration_report(subject.pipe)
    assert len(report.perturbed) == 3
    assert report.perturbed_share == pytest.approx(1 - 2 / len(blocks))
    assert report.to_dict()["guidance"]["extra_passes"] == 3
    assert "3 perturbed passes added" in str(report)
    subject.session._shares = lambda _transformer: False
    torch.testing.assert_close(
        run_tiny(subject.pipe, subject.arguments), shared, rtol=1e-3, atol=1e-3
    )
    assert acceleration_report(subject.pipe).perturbed_share == 1


@pytest.mark.parametrize("method", ["softpag", "pag", "slg"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_unconditional_pass_can_be_perturbed_instead(name, method):
    subject = Subject(name)
    options: dict[str, Any] = {"heads": HEADS} if method == "softpag" else {"layers": [1]}
    plain = run_tiny(subject.pipe, subject.arguments)
    with recorded(subject.pipe) as before:
        run_tiny(subject.pipe, subject.arguments, num_inference_steps=1)
    accelerate_pipeline(subject.pipe, method, **options, extra_pass=False, start=0, stop=1.0)
    with recorded(subject.pipe) as after:
        run_tiny(subject.pipe, subject.arguments, num_inference_steps=1)
    assert len(before) == len(after)
    if name == "sd3":
        (before, after) = (list(found[0].chunk(2))[::-1] for found in (before, after))
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-6)
    assert (after[1] - before[1]).abs().max() > 1e-4
    out = run_tiny(subject.pipe, subject.arguments)
    assert not torch.equal(out, plain)
    assert "none added" in str(acceleration_report(subject.pipe))
    with pytest.raises(OptionError, match="turn on classifier-free guidance"):
        run_tiny(subject.pipe, subject.arguments, **UNGUIDED[name])


def test_only_steps_in_range_are_guided():
    subject = Subject("wan")
    accelerate_pipeline(subject.pipe, "pag", layers=[1], start=0.25, stop=0.5)
    subject.run()
    steps = [step.step for step in acceleration_report(subject.pipe).perturbed]
    assert steps == list(range(STEPS // 4, STEPS // 2))
    accelerate_pipeline(subject.pipe, "slg", layers=[1])
    subject.run()
    report = acceleration_report(subject.pipe)
    assert [step.step for step in report.perturbed] == [1, 2]
    assert report.perturbed[0].ran == (False, False, True)


@pytest.mark.parametrize("cache", ["first_block_cache", "taylorseer", "easycache", "pab"])
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_a_cache_keeps_the_perturbed_pass_apart(name, cache):
    """At a vanishing scale, cached outputs are those of the cache alone."""
    subject = Subject(name)
    accelerate_pipeline(subject.pipe, cache, **ACTIVE[cache])
    alone = subject.run()
    guide = {"layers": [1], "scale": 1e-30}
    accelerate_pipeline(subject.pipe, [cache, "pag"], **{cache: ACTIVE[cache]}, pag=guide)
    assert torch.equal(subject.run(), alone)
    report = acceleration_report(subject.pipe)
    assert {step.branch for step in report.steps} == {"cond", "uncond", "perturbed"}
    assert len(report.perturbed) == STEPS
    assert "perturbed" in str(report)
    accelerate_pipeline(
        subject.pipe, [cache, "pag"], **{cache: ACTIVE[cache]}, pag=guide | {"scale": 1.0}
    )
    out = subject.run()
    assert out.isfinite().all()
    assert not torch.equal(out, alone)
    assert torch.equal(subject.run(), out)


@pytest.mark.parametrize("extra_pass", [True, False])
@pytest.mark.parametrize("name", ["wan", "sd3"])
def test_together_with_a_cache_of_the_unconditional_pass(name, extra_pass):
    subject, cache = Subject(name), "unconditional_cache"
    accelerate_pipeline(
        subject.pipe, [cache, "pag"], **{cache: ACTIVE[cache]}, layers=[1], extra_pass=extra_pass
    )
    out = subject.run()
    assert out.isfinite().all()
    assert len(acceleration_report(subject.pipe).perturbed) == STEPS
    assert torch.equal(subject.run(), out)


@pytest.mark.parametrize("attention", ["radial", "gna", "psa"])
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_together_with_sparse_attention(name, attention):
    """The pass that is added runs sparse too, and the others are as they were."""
    subject = Subject(name)
    sparse: dict[str, Any] = {"dense_steps": 1, "min_tokens": 0}
    sparse |= {attention: SMALL_BLOCKS[attention]}
    accelerate_pipeline(subject.pipe, attention, **sparse)
    alone = run_tiny(subject.pipe, subject.arguments)
    guide = {"heads": HEADS, "scale": 1e-30}
    accelerate_pipeline(subject.pipe, [attention, "softpag"], **sparse, softpag=guide)
    assert torch.equal(run_tiny(subject.pipe, subject.arguments), alone)
    calls = acceleration_report(subject.pipe).calls
    layers = len(subject.pipe._dit_accel.runtime.family.blocks(subject.pipe.transformer))
    assert sum(call.branch == "perturbed" for call in calls) == 3 * (layers - 1)


@pytest.mark.parametrize(("method", "compiled"), [("pag", [0, 2]), ("slg", [0, 1, 2])])
def test_compiled_blocks_that_are_not_perturbed_inside(method, compiled):
    subject = Subject("wan")
    options = {"start": 0, "stop": 1.0, "layers": [1]}
    accelerate_pipeline(subject.pipe, method, **options)
    eager = run_tiny(subject.pipe, subject.arguments)
    torch._dynamo.reset()
    for index in compiled:
        subject.pipe.transformer.blocks[index].compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(run_tiny(subject.pipe, subject.arguments), eager)
    assert acceleration_report(subject.pipe).perturbed_share == pytest.approx(
        {"pag": 2 / 3, "slg": 1 / 3}[method]
    )
    torch._dynamo.reset()


def test_an_interrupted_generation_leaves_nothing_behind():
    subject = Subject("wan")
    accelerate_pipeline(subject.pipe, "softpag", heads=HEADS)
    out = run_tiny(subject.pipe, subject.arguments)
    calls = []

    def stop(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:  # in the middle of the perturbed pass
            raise KeyboardInterrupt

    handle = subject.pipe.transformer.blocks[2].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(subject.pipe, subject.arguments)
    handle.remove()
    assert torch.equal(run_tiny(subject.pipe, subject.arguments), out)


def test_pipelines_of_one_class_do_not_affect_each_other():
    first, second = Subject("wan"), Subject("wan")
    plain = run_tiny(second.pipe, second.arguments)
    accelerate_pipeline(first.pipe, "pag", layers=[1])
    run_tiny(first.pipe, first.arguments)
    assert torch.equal(run_tiny(second.pipe, second.arguments), plain)


def test_methods_are_registered():
    assert list_methods("guidance") == ["pag", "seg", "slg", "softpag"]
