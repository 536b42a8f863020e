"""The two stages around a pipeline's call: exactness, what is refused, and what is put back."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from tiny_pipelines import TINY_PIPELINES, run_tiny

from dit_accel import FreeSwim, accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.errors import OptionError, UnknownPipelineError
from dit_accel.highres import stages
from dit_accel.highres.schedule import starting_at
from dit_accel.highres.store import TensorStore

NATIVE, TARGET = (112, 144), {"height": 144, "width": 192}
OVERRIDE = {"wan": "cross", "wan22": "cross", "wan_ti2v": "cross"}
FAMILIES = ("wan", "wan22", "wan_ti2v", "hunyuan", "flux", "flux_schnell", "sd3")


def tiny(name: str = "wan", **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return a tiny pipeline with FreeSwim and its arguments; its own size is the trained one."""
    build, arguments = TINY_PIPELINES[name]
    pipe = build()
    options = {"native_size": (arguments["height"], arguments["width"])} | options
    accelerate_pipeline(pipe, "freeswim", **{"override": OVERRIDE.get(name, "joint")} | options)
    return pipe, arguments


@pytest.mark.parametrize("name", FAMILIES)
def test_the_trained_size_gives_exactly_the_plain_pipeline(name):
    build, arguments = TINY_PIPELINES[name]
    plain = run_tiny(build(), arguments)
    pipe, _ = tiny(name)
    assert torch.equal(run_tiny(pipe, arguments), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_restoring_is_exact_also_after_a_large_generation(name):
    build, arguments = TINY_PIPELINES[name]
    pipe = build()
    plain, cls, before = run_tiny(pipe, arguments), type(pipe), dict(pipe.config)
    native = (arguments["height"] - 16, arguments["width"] - 16)
    accelerate_pipeline(pipe, "freeswim", native_size=native, override=OVERRIDE.get(name, "joint"))
    scheduler = pipe.scheduler
    large = run_tiny(pipe, arguments)
    assert large.isfinite().all()
    assert large.shape == plain.shape
    assert torch.equal(run_tiny(pipe, arguments), large)
    assert pipe.scheduler is scheduler
    assert not pipe.vae.use_tiling
    restore_pipeline(pipe)
    assert type(pipe) is cls
    assert dict(pipe.config) == before
    assert torch.equal(run_tiny(pipe, arguments), plain)
    assert not any(vars(m).get("_compiled_call_impl") for m in pipe.transformer.modules())


def test_the_pipeline_keeps_its_class_and_signature(tmp_path):
    pipe, _ = tiny()
    assert isinstance(pipe, WanPipeline)
    assert inspect.signature(type(pipe).__call__) == inspect.signature(WanPipeline.__call__)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "WanPipeline"
    parts = pipe.components
    other = WanPipeline(**parts)
    assert type(other) is WanPipeline


def test_no_graph_of_gradients_is_kept():
    pipe, arguments = tiny()
    seen: list[bool] = []
    encode = pipe.vae.encode
    pipe.vae.encode = lambda pixels: seen.append(torch.is_grad_enabled()) or encode(pixels)
    run_tiny(pipe, arguments, **TARGET)
    assert seen == [False]


def test_two_pipelines_of_one_class_do_not_affect_each_other():
    pipe, arguments = tiny()
    other = TINY_PIPELINES["wan"][0]()
    plain = run_tiny(other, arguments, **TARGET)
    run_tiny(pipe, arguments, **TARGET)
    assert torch.equal(run_tiny(other, arguments, **TARGET), plain)


def test_a_generation_that_breaks_off_leaves_no_trace():
    pipe, arguments = tiny()
    out = run_tiny(pipe, arguments, **TARGET)
    scheduler = pipe.scheduler
    seen: list[int] = []

    def stop(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["hidden_states"].shape[-1])
        if seen[-1] == 24 and seen[-2] == 24:
            raise KeyboardInterrupt

    handle = pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(pipe, arguments, **TARGET)
    handle.remove()
    assert pipe.scheduler is scheduler
    assert not pipe.vae.use_tiling
    assert pipe._dit_accel.runtime.sessions[0].store.nbytes == 0
    assert torch.equal(run_tiny(pipe, arguments, **TARGET), out)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "flux", "sd3"])
def test_latents_of_frames_are_scaled_as_the_pipeline_unscales_them(name):
    """What the pipeline gives its decoder is what the encoder gave."""
    pipe, arguments = tiny(name)
    shape = (1, 5 if "num_frames" in arguments else 1, 3, 112, 144)
    frames, seen = torch.rand(shape), {}
    latents = pipe._dit_accel.runtime.family.encode(pipe, frames)
    video = frames.transpose(1, 2) if shape[1] > 1 else frames[:, 0]
    expected = pipe.vae.encode(video * 2 - 1).latent_dist.mode()

    def decode(latents: torch.Tensor, **_: Any) -> Any:
        seen["latents"] = latents
        return (video,)

    pipe.vae.decode = decode
    restore_pipeline(pipe)
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: step(*args, **kwargs) and (latents,)
    size = {"height": 112, "width": 144} | ({"num_frames": 5} if shape[1] > 1 else {})
    run_tiny(pipe, arguments, **size, output_type="pt", latents=latents)
    torch.testing.assert_close(seen["latents"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("sigma", [1.0, 0.9546, 0.6])
@pytest.mark.parametrize("shift", [None, 9.0])
@pytest.mark.parametrize(
    "scheduler",
    [
        UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=["unipc", "euler"],
)
def test_schedules_begin_at_the_stated_noise(scheduler, shift, sigma, steps):
    before = {name: scheduler.config[name] for name in scheduler.config}
    made = starting_at(scheduler, sigma, shift)
    made.set_timesteps(steps)
    plain = type(scheduler).from_config(scheduler.config)
    if shift is not None:
        name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
        plain = type(scheduler).from_config(scheduler.config, **{name: shift})
    plain.set_timesteps(steps)
    assert float(made.sigmas[0]) == pytest.approx(sigma)
    assert float(made.timesteps[0]) == pytest.approx(1000 * sigma, abs=1)
    assert len(made.timesteps) + 1 == len(made.sigmas)
    count = len(made.timesteps) - 1
    assert torch.equal(made.sigmas[1:], plain.sigmas[len(plain.sigmas) - 1 - count :])
    assert (made.sigmas.diff() < 0).all()
    assert {name: scheduler.config[name] for name in scheduler.config} == before
    if (steps, shift, sigma) == (50, 9.0, 0.9546):
        assert len(made.timesteps) == 35  # the released "strength 0.7" of 50 steps


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"native_size": (112,)}, "two integers"),
        ({"native_size": (112, 140)}, "native width=140 is not a multiple of 16.*take 144"),
        ({"native_size": 112}, "two integers"),
        ({"window": "releasd"}, "Did you mean 'released'"),
        ({"window": (7, 0)}, "two integers"),
        ({"override": "text"}, "unknown override"),
        ({"override": "joint"}, "choose override='cross'"),
        ({"branches": "uncond"}, "unknown branches"),
        ({"refresh_every": 0}, "refresh_every=0"),
        ({"pool_keys": 1.5}, "pool_keys=1.5"),
        ({"sigma": 0}, r"sigma=0 must be in \(0, 1\]"),
        ({"sigma": 1.2}, "sigma=1.2"),
        ({"gain": float("nan")}, "gain"),
        ({"budget_gib": -1}, "budget_gib"),
        ({"flow_shift": 0}, "flow_shift"),
        ({"compile": True}, "leave compile out"),
        ({"density": 0.3}, "density"),
        ({"strength": 0.7}, "no option 'strength'"),
    ],
    ids=str,
)
def test_impossible_options_leave_the_pipeline_alone(options, says):
    pipe = TINY_PIPELINES["wan"][0]()
    with pytest.raises(OptionError, match=says):
        accelerate_pipeline(pipe, "freeswim", **{"native_size": NATIVE, **options})
    assert type(pipe) is WanPipeline
    assert not hasattr(pipe, "_dit_accel")
    assert not any(vars(m).get("_compiled_call_impl") for m in pipe.transformer.modules())


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((150, 192), "height=150 is not a multiple of 16.*take 144"),
        ((144, 200), "width=200 is not a multiple of 16"),
        ((96, 128), "smaller than the trained size 112 x 144"),
        ((112, 128), "smaller than the trained size"),
        ((288, 208), r"another shape.*native_size=\(144, 112\)"),
    ],
)
def test_impossible_targets_are_refused_before_anything_is_generated(size, says):
    pipe, arguments = tiny()
    runs: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(OptionError, match=says):
        run_tiny(pipe, arguments, height=size[0], width=size[1])
    assert not runs


def test_models_without_positions_for_a_size_refuse_it():
    pipe, arguments = tiny("sd3")
    with pytest.raises(OptionError, match="more than the 512"):
        run_tiny(pipe, arguments, height=528, width=592)


@pytest.mark.parametrize("name", ["hunyuan", "flux", "sd3"])
def test_cross_attention_that_is_not_there_is_asked_for(name):
    with pytest.raises(OptionError, match=r"override='cross' needs.*override='joint'"):
        tiny(name, override="cross")


@pytest.mark.parametrize("name", ["wan_i2v", "wan_vace", "flux_kontext"])
def test_pipelines_that_need_more_than_text_are_refused(name):
    with pytest.raises(UnknownPipelineError, match="text alone"):
        tiny(name, override="none")


def test_other_schedulers_are_refused():
    pipe = TINY_PIPELINES["wan"][0]()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(OptionError, match="DDIMScheduler works otherwise"):
        accelerate_pipeline(pipe, "freeswim", native_size=NATIVE)
    with pytest.raises(OptionError, match="use_dynamic_shifting"):
        tiny("flux", flow_shift=9.0)


@pytest.mark.parametrize(
    ("beside", "says"),
    [
        ("first_block_cache", "don't run together"),
        ("remainder_cache", "don't run together"),
        ("radial", "pool_keys=2 and the method 'radial'"),
    ],
)
def test_methods_that_do_not_go_together(beside, says):
    build, _ = TINY_PIPELINES["wan"]
    pool = 2 if beside == "radial" else 1
    with pytest.raises(OptionError, match=says):
        accelerate_pipeline(
            build(), ["freeswim", beside], native_size=NATIVE, pool_keys=pool,
            **({} if beside == "radial" else {"freeswim": {"refresh_every": 2}}),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "prompts"),
    [("wan", {}, 1), ("wan", {"branches": "both"}, 2), ("hunyuan", {}, 1), ("sd3", {}, 2)],
    ids=str,
)
def test_memory_is_told_before_it_is_taken(name, options, prompts):
    pipe, arguments = tiny(name, **options)
    size = {"height": arguments["height"] + 32, "width": arguments["width"] + 32}
    given = {**arguments, **size, "prompt": ["a red ball"] * prompts}
    session = pipe._dit_accel.runtime.sessions[0]
    told = stages.kept_bytes(session, (size["height"], size["width"]), given)
    run_tiny(pipe, arguments, **size, prompt=given["prompt"], num_inference_steps=6)
    report = acceleration_report(pipe)
    text = 0 if name == "wan" else 0.3  # text tokens are not counted; large pictures have few
    assert told <= report.cache_bytes <= told * (1 + text)
    assert any(f"keeps {told / 2**20:.2f} MiB" in note for note in report.notes)


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_generated(monkeypatch):
    pipe, arguments = tiny(budget_gib=1e-6)
    runs: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(OptionError, match="of budget_gib: set offload=True, or set refresh_every"):
        run_tiny(pipe, arguments, **TARGET)
    monkeypatch.setattr(stages, "free_bytes", lambda device: 1000)
    pipe, arguments = tiny()
    pipe.transformer.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(OptionError, match="that are free"):
        run_tiny(pipe, arguments, **TARGET)
    assert not runs
    pipe, arguments = tiny(refresh_every=1)
    assert run_tiny(pipe, arguments, **TARGET).isfinite().all()


def test_trained_sizes_that_nobody_gives_are_looked_up(tmp_path):
    pipe = TINY_PIPELINES["wan"][0]()
    accelerate_pipeline(pipe, "freeswim")
    session = pipe._dit_accel.runtime.sessions[0]
    assert session.sizes.trained == (480, 832)  # the pipeline's own default
    assert session.method.flow_shift == 9
    pipe.save_pretrained(tmp_path)
    (tmp_path / "dit_accel.json").write_text('{"height": 128, "width": 160}')
    loaded = WanPipeline.from_pretrained(tmp_path)
    accelerate_pipeline(loaded, FreeSwim())
    assert loaded._dit_accel.runtime.sessions[0].sizes.trained_grid == (8, 10)


def test_guidance_goes_beside_it():
    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    accelerate_pipeline(
        pipe, ["freeswim", "slg"], native_size=NATIVE, layers=[1], start=0, stop=1.0
    )
    out = run_tiny(pipe, arguments, **TARGET)
    assert out.isfinite().all()
    accelerate_pipeline(pipe, "freeswim", native_size=NATIVE)
    assert not torch.equal(run_tiny(pipe, arguments, **TARGET), out)


def test_stored_tensors_are_replaced_and_forgotten():
    store = TensorStore()
    first, second = torch.ones(2, 3), torch.zeros(2, 3)
    store.put("a", first)
    store.put("a", second)
    assert store.get("a") is second
    assert store.nbytes == 24
    store.clear()
    with pytest.raises(KeyError):
        store.get("a")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 5), (2, 2**20, 20)], ids=str)
def test_tensors_in_cpu_memory_come_back_as_they_were(shape):
    store = TensorStore(offload=True)
    for round_ in range(3):
        kept = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        for index, tensor in enumerate(kept):
            store.put(index, tensor * 2)
        for index, tensor in enumerate(kept):
            assert torch.equal(store.get(index), tensor * 2), round_
    assert store.nbytes == sum(tensor.nbytes for tensor in kept)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_offloading_changes_no_bit(name):
    outs = []
    for offload in (False, True):
        pipe, arguments = tiny(name, offload=offload, refresh_every=3)
        pipe.to("cuda")
        size = {"height": arguments["height"] + 32, "width": arguments["width"] + 32}
        outs.append(run_tiny(pipe, arguments, **size, num_inference_steps=6))
    assert torch.equal(*outs)
