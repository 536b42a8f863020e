"""What every method must do on every family: tiny random pipelines, whole generations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_pipelines import TINY_PIPELINES, run_tiny

from dit_accel import accelerate_pipeline, acceleration_report, method_class, restore_pipeline
from dit_accel.grid import RASTER
from dit_accel.methods.base import StaticMethod
from dit_accel.methods.selecting import SelectingMethod
from dit_accel.registry import list_methods, resolve_method
from dit_accel.runtime import Runtime

# With random weights, sparse attention is so far from dense that the guard would step in.
EVERYWHERE: dict[str, Any] = {
    "dense_steps": 0,
    "dense_layers": 0,
    "min_tokens": 0,
    "guard": False,
}
# Options that leave something out on grids of 250 tokens.
SPARSE_OPTIONS: dict[str, dict[str, Any]] = {
    "radial": {"decay": 0.02, "block_size": 16, "sink": False},
    "gna": {"window": (1.0, 0.4, 0.4), "block_size": 16},
    "sliding_window": {"window": (0.4, 0.4), "block_size": 16},
    "psa": {"query_block": 16, "key_block": 16},
    "rectified": {"block_size": 16},
    "pisa": {"block_size": 16},
}
ATTENTION = list_methods("attention")
SPARSE = [name for name in ATTENTION if name != "dense"]


@pytest.mark.parametrize("method", ATTENTION)
def test_density_one_is_dense(subject, method):
    accelerate_pipeline(
        subject.pipe, method, density=None if method == "dense" else 1, **EVERYWHERE
    )
    torch.testing.assert_close(subject.run(), subject.dense, rtol=1e-5, atol=1e-5)
    assert acceleration_report(subject.pipe).density == 1


@pytest.mark.parametrize("method", SPARSE)
def test_it_computes_what_the_method_defines(subject, masked, method):
    """Tile order, block lists and text placement against one plain token mask."""
    chosen = resolve_method(method, **SPARSE_OPTIONS.get(method, {}))
    if not isinstance(chosen, StaticMethod):
        pytest.skip("no token mask: the pattern depends on the values")
    accelerate_pipeline(subject.pipe, chosen, **EVERYWHERE)
    out = subject.run()
    grid_is_an_image = acceleration_report(subject.pipe).density == 1
    accelerate_pipeline(subject.pipe, masked(chosen), **EVERYWHERE)
    torch.testing.assert_close(out, subject.run(), rtol=1e-4, atol=2e-5)
    if method == "radial" and grid_is_an_image:
        return  # one frame is its own neighbourhood: Radial keeps all of it
    assert not torch.allclose(out, subject.dense, atol=1e-4), "nothing was left out"


@pytest.mark.parametrize("method", SPARSE)
def test_it_computes_what_the_reference_does(subject, method, monkeypatch, request):
    """Order, blocks and text placement of methods that look at the tokens."""
    if request.node.callspec.params["subject"] == "flux_kontext":
        pytest.skip("its reference image has to be reordered, which is switched off below")
    chosen = resolve_method(method, **SPARSE_OPTIONS.get(method, {}))
    if not isinstance(chosen, SelectingMethod):
        pytest.skip("the token mask is the reference")
    accelerate_pipeline(subject.pipe, chosen, **EVERYWHERE)
    out = subject.run()
    assert acceleration_report(subject.pipe).density < 1

    def literal(self, query, key, value, scale, call, reason, running):
        layout, text = call.layout, call.layout.text_length if call.layout.text_first else 0
        rows = [torch.cat([x[:, text:], x[:, :text]], 1) for x in (query, key, value)]
        text_last = layout.text_length
        got = chosen.reference(*rows, grid=layout.grid, text_length=text_last)
        video = layout.video_length
        return torch.cat([got[:, video:], got[:, :video]], 1) if text else got

    monkeypatch.setattr(Runtime, "_reorder", lambda *args: RASTER)
    monkeypatch.setattr(Runtime, "_sample", literal)
    torch.testing.assert_close(out, subject.run(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["radial", "gna"])
def test_pooled_remainder_is_nearer_to_dense(subject, method):
    def distance(**options: Any) -> float:
        options = {**SPARSE_OPTIONS[method], **options}
        accelerate_pipeline(subject.pipe, method, **options, **EVERYWHERE)
        return float((subject.run() - subject.dense).norm())

    without = distance()
    if acceleration_report(subject.pipe).density == 1:
        pytest.skip("one frame is its own neighbourhood: nothing is left out")
    assert distance(remainder="pooled") < without


@pytest.mark.parametrize("method", ["psa", "rectified", "pisa"])
def test_every_call_has_the_density_that_was_asked_for(subject, method):
    """Also where some layers see the video alone."""
    options = SPARSE_OPTIONS[method]
    accelerate_pipeline(subject.pipe, method, density=0.85, **options, **EVERYWHERE)
    subject.run()
    for call in acceleration_report(subject.pipe).calls:
        assert call.density == pytest.approx(0.85, rel=0.1)


@pytest.mark.parametrize("density", [0.6, 0.85])
@pytest.mark.parametrize("method", ["gna", "sliding_window"])
def test_no_call_is_much_sparser_than_asked_for(subject, method, density):
    """Also where some layers see the video alone, and text takes nothing of the density."""
    options = {"block_size": 16}
    accelerate_pipeline(subject.pipe, method, density=density, **options, **EVERYWHERE)
    subject.run()
    for call in acceleration_report(subject.pipe).calls:
        assert density - 0.2 <= call.block_density <= density


@pytest.mark.parametrize("method", ["psa", "rectified", "pisa"])
def test_a_plan_serves_as_many_steps_as_asked_for(subject, method, monkeypatch):
    options = SPARSE_OPTIONS[method]
    choices = []
    choose = method_class(method).choose
    monkeypatch.setattr(
        method_class(method), "choose", lambda *args: choices.append(1) or choose(*args)
    )
    counts = {}
    for every in (1, 2, 100):
        choices.clear()
        accelerate_pipeline(subject.pipe, method, refresh_every=every, **options, **EVERYWHERE)
        subject.run()
        counts[every] = len(choices)
    assert counts[1] == len(acceleration_report(subject.pipe).calls)
    assert counts[100] <= counts[2] <= counts[1]
    assert counts[100] < counts[1]


@pytest.mark.parametrize("method", SPARSE)
def test_restore_is_bit_identical(subject, method):
    before = copy.deepcopy(list(subject.pipe.transformer.state_dict()))
    accelerate_pipeline(subject.pipe, method, **SPARSE_OPTIONS.get(method, {}), **EVERYWHERE)
    subject.run()
    assert restore_pipeline(subject.pipe) is subject.pipe
    assert torch.equal(subject.run(), subject.dense)
    assert list(subject.pipe.transformer.state_dict()) == before
    assert not any("dit_accel" in name for name in subject.pipe.__dict__)
    assert not any(
        "dit_accel" in name
        for module in subject.pipe.transformer.modules()
        for name in [*module.__dict__, *getattr(module, "processor", module).__dict__]
    )


def test_second_acceleration_replaces_the_first(subject):
    accelerate_pipeline(subject.pipe, "gna", **SPARSE_OPTIONS["gna"], **EVERYWHERE)
    once = subject.run()
    accelerate_pipeline(subject.pipe, "dense")
    torch.testing.assert_close(subject.run(), subject.dense, rtol=1e-5, atol=1e-5)
    accelerate_pipeline(subject.pipe, "gna", **SPARSE_OPTIONS["gna"], **EVERYWHERE)
    assert torch.equal(subject.run(), once)
    restore_pipeline(subject.pipe)
    assert torch.equal(subject.run(), subject.dense)


def test_a_refused_acceleration_leaves_the_pipeline_as_it_was(subject):
    accelerate_pipeline(subject.pipe, "gna", **SPARSE_OPTIONS["gna"], **EVERYWHERE)
    before = subject.run()
    with pytest.raises(ValueError, match="decay"):
        accelerate_pipeline(subject.pipe, "radial", decai=1)
    assert torch.equal(subject.run(), before)


def test_dense_steps_and_layers_are_dense(subject):
    accelerate_pipeline(
        subject.pipe,
        "gna",
        **SPARSE_OPTIONS["gna"],
        dense_steps=(1, 1),
        dense_layers=[1],
        min_tokens=0,
        guard=False,
    )
    subject.run()
    for call in acceleration_report(subject.pipe).calls:
        assert (call.density == 1) == (call.step != 1 or call.layer == 1), call


def test_short_sequences_stay_dense(subject):
    accelerate_pipeline(subject.pipe, "gna", **SPARSE_OPTIONS["gna"], min_tokens=256)
    torch.testing.assert_close(subject.run(), subject.dense, rtol=1e-5, atol=1e-5)
    reasons = {call.reason for call in acceleration_report(subject.pipe).calls}
    assert all("min_tokens" in reason for reason in reasons)


def test_several_prompts_in_one_batch(subject, request):
    """Each sample comes out as it does alone, though texts differ in length."""
    name = request.node.callspec.params["subject"]
    if name in {"wan_i2v", "wan_ti2v_image", "wan_vace", "flux_kontext"}:
        pytest.skip("covered by the text-to-image and text-to-video forms")
    accelerate_pipeline(subject.pipe, "gna", **SPARSE_OPTIONS["gna"], **EVERYWHERE)
    prompts = ["a red ball", "a much longer prompt about two blue"]

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    together = subject.run(prompt=prompts, generator=generators())
    for i, (prompt, generator) in enumerate(zip(prompts, generators(), strict=True)):
        alone = subject.run(prompt=prompt, generator=generator)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "flux", "sd3"])
def test_pipelines_in_one_process_do_not_affect_each_other(name):
    build, arguments = TINY_PIPELINES[name]
    first, second, plain = build(), build(), build()
    dense = run_tiny(plain, arguments)
    accelerate_pipeline(first, "gna", **SPARSE_OPTIONS["gna"], **EVERYWHERE)
    alone = run_tiny(first, arguments)
    accelerate_pipeline(second, "sliding_window", window=(0.3, 0.3), **EVERYWHERE)
    run_tiny(second, arguments)
    assert torch.equal(run_tiny(first, arguments), alone)
    assert torch.equal(run_tiny(plain, arguments), dense)
    restore_pipeline(second)
    assert torch.equal(run_tiny(first, arguments), alone)
    assert torch.equal(run_tiny(second, arguments), dense)


@pytest.mark.parametrize("name", ["wan", "wan22", "hunyuan", "flux", "sd3"])
def test_save_and_load_after_acceleration(name, tmp_path):
    build, arguments = TINY_PIPELINES[name]
    pipe = build()
    dense = run_tiny(pipe, arguments)
    accelerate_pipeline(pipe, "gna", **SPARSE_OPTIONS["gna"], **EVERYWHERE)
    sparse = run_tiny(pipe, arguments)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    saved, kept = again.transformer.state_dict(), pipe.transformer.state_dict()
    assert saved.keys() == kept.keys()
    assert all(torch.equal(saved[key], kept[key]) for key in kept)
    # Not bit-identical: weights mapped from a file are aligned otherwise in memory.
    torch.testing.assert_close(run_tiny(again, arguments), dense, rtol=1e-5, atol=1e-5)
    accelerate_pipeline(again, "gna", **SPARSE_OPTIONS["gna"], **EVERYWHERE)
    torch.testing.assert_close(run_tiny(again, arguments), sparse, rtol=1e-5, atol=1e-5)


def test_every_method_says_what_it_is():
    for name in list_methods():
        cls = method_class(name)
        assert cls.name == name
        assert cls.__doc__
