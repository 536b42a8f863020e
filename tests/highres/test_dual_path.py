"""The second stage's passes against a literal form, and what holds of every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from freeswim_literal import LiteralDualPath
from tiny_pipelines import TINY_PIPELINES, run_tiny
from torch import Tensor

from dit_accel import (
    FreeSwim,
    SlidingWindow,
    accelerate_pipeline,
    acceleration_report,
    restore_pipeline,
)
from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.grid import RASTER
from dit_accel.highres import stages
from dit_accel.highres.full_pass import cell_counts, pooled_attention
from dit_accel.highres.reference import inward_window, length_gain
from dit_accel.kernels.reference import masked_attention
from dit_accel.session import SelfAttention

NATIVE, TARGET = (112, 144), (144, 192)  # pixels
TRAINED, GRID, WINDOW = (7, 9), (2, 9, 12), (7, 9)  # tokens
IMAGE_NATIVE, IMAGE_TARGET = (240, 272), (320, 368)
WHOLE = (99, 99)
EXPERIMENTAL = ("hunyuan", "flux", "sd3")
GUIDED: dict[str, Any] = {"true_cfg_scale": 3.0, "negative_prompt": "blurry"}


def large(name: str, prompts: int = 1, steps: int = 5, **options: Any) -> tuple[Any, dict]:
    """Return a tiny pipeline with FreeSwim, and the arguments for a generation at the target."""
    build, arguments = TINY_PIPELINES[name]
    pipe, video = build(), "num_frames" in arguments
    options = {"override": "cross" if name.startswith("wan") else "joint", **options}
    native, target = (NATIVE, TARGET) if video else (IMAGE_NATIVE, IMAGE_TARGET)
    accelerate_pipeline(pipe, "freeswim", native_size=native, **options)
    words = ["a red ball rolls to the right", "a blue cube"][:prompts]
    size = {"height": target[0], "width": target[1]} | ({"num_frames": 5} if video else {})
    guided = GUIDED if name in ("hunyuan", "flux") else {}
    given = {**arguments, **size, **guided, "prompt": words, "num_inference_steps": steps}
    if prompts > 1 and guided:
        given["negative_prompt"] = ["blurry", "dark and noisy"]
    return pipe, given


def session_of(pipe: Any) -> Any:
    return pipe._dit_accel.runtime.sessions[0]


def literally(
    pipe: Any, arguments: dict[str, Any], every: int, branches: tuple[str, ...]
) -> Tensor:
    """Generate as an accelerated pipeline does, the second stage in its literal form."""
    session, stock = session_of(pipe), type(pipe).__mro__[1].__call__
    literal = LiteralDualPath(pipe.transformer, GRID, WINDOW, length_gain(63), every, branches)
    restore_pipeline(pipe)
    generator = torch.Generator().manual_seed(0)
    given = {**arguments, "output_type": "latent", "generator": generator}
    small = {"height": NATIVE[0], "width": NATIVE[1], "output_type": "pt"}
    base = stock(pipe, **given | small).frames
    latents = stages._enlarged(session, base, TARGET)
    noise = stages._noise_like(latents, generator)
    given["latents"] = (1 - 0.9546) * latents + 0.9546 * noise
    with stages._scheduler_from(pipe, session.method), literal.installed():
        out: Tensor = stock(pipe, **given).frames
    assert literal.step_of == {"cond": 3, "uncond": 3}
    return out


@pytest.mark.parametrize(
    ("every", "branches", "prompts"),
    [(1, "cond", 1), (1, "both", 2), (2, "cond", 2), (3, "both", 1)],
)
def test_is_what_the_literal_form_gives(every, branches, prompts):
    pipe, arguments = large("wan", prompts, refresh_every=every, branches=branches)
    ours = run_tiny(pipe, arguments)
    named = ("cond", "uncond") if branches == "both" else ("cond",)
    plain = literally(pipe, arguments, every, named)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["wan", "wan22", "wan_ti2v", *EXPERIMENTAL])
def test_keeping_changes_nothing_where_every_step_has_a_full_pass(name, monkeypatch):
    """The form that keeps what a full pass read, with interval 1, is the form that doesn't."""
    pipe, arguments = large(name, refresh_every=1, branches="both")
    plain = run_tiny(pipe, arguments)
    assert acceleration_report(pipe).cache_bytes == 0
    pipe, arguments = large(name, refresh_every=9, branches="both")
    session = session_of(pipe)
    enter = session.enter

    def forget(forward: Any) -> None:
        session._guided_at.clear()
        enter(forward)

    monkeypatch.setattr(session, "enter", forget)
    assert torch.equal(run_tiny(pipe, arguments), plain)
    assert acceleration_report(pipe).cache_bytes > 0


@pytest.mark.parametrize("name", ["wan", *EXPERIMENTAL])
def test_windows_that_see_everything_need_no_override(name):
    """Then both passes are one, so taking over what the full one read changes nothing."""
    pipe, arguments = large(name, refresh_every=1, branches="both", window=WHOLE, gain=1.0)
    ours = run_tiny(pipe, arguments)
    pipe, arguments = large(name, override="none", window=WHOLE, gain=1.0)
    torch.testing.assert_close(ours, run_tiny(pipe, arguments), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["wan", *EXPERIMENTAL])
def test_full_passes_change_something_and_steps_between_reuse(name):
    pipe, arguments = large(name, refresh_every=3, branches="both")
    out = run_tiny(pipe, arguments)
    report = acceleration_report(pipe)
    full = {call.step for call in report.calls if call.branch.endswith("full")}
    assert full == {step for step in range(len(report.forward_s)) if step % 3 == 0}
    assert {s.step for s in report.steps if s.attention_reused} == set(report.forward_s) - full
    pipe, arguments = large(name, override="none")
    assert not torch.allclose(run_tiny(pipe, arguments), out, atol=1e-3)


@pytest.mark.parametrize("name", ["wan", *EXPERIMENTAL])
def test_prompts_of_a_batch_are_independent(name):
    pipe, arguments = large(name, prompts=2)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    both = run_tiny(pipe, arguments, generator=generators)
    for index, words in enumerate(arguments["prompt"]):
        alone = {**arguments, "prompt": words}
        if isinstance(arguments.get("negative_prompt"), list):
            alone["negative_prompt"] = arguments["negative_prompt"][index]
        generator = torch.Generator().manual_seed(index)
        single = run_tiny(pipe, alone, generator=generator)
        torch.testing.assert_close(both[index : index + 1], single, rtol=1e-3, atol=1e-3)


def test_joint_attention_is_split_between_windows_and_the_text_of_the_full_pass():
    """One softmax over the window's image keys and the full pass's logits to the text."""
    pipe, _ = large("flux", gain=1.25)
    session, layout = session_of(pipe), TokenLayout((1, 6, 8), 5, text_first=True)
    session.sizes = stages.Sizes((48, 64), 16)  # trained on 3 x 4 tokens
    windows, full = (torch.randn(3, 1, 53, 2, 8, dtype=torch.float64) for _ in range(2))
    session._second_stage = True
    session._pass = _fresh_pass()
    mask = inward_window((1, 6, 8), (3, 5))

    def own(qkv, layout, scale, with_lse):
        assert layout.text_length == 0
        return masked_attention(*qkv, mask, 1.25 * 8**-0.5)

    def attend(qkv: Tensor) -> Tensor:
        call = AttentionCall(layout)
        usual = lambda qkv, call, scale: qkv[0]  # noqa: E731
        return session.attend(SelfAttention((*qkv,), call, 0, None, RASTER, own, usual))

    session._pass.in_full = True
    attend(full)
    session._pass.in_full = False
    out = attend(windows)[:, 5:]

    scale = 8**-0.5
    to_image = torch.einsum("bnhd,bmhd->bhnm", windows[0][:, 5:], windows[1][:, 5:]) * 1.25 * scale
    to_text = torch.einsum("bnhd,bmhd->bhnm", full[0][:, 5:], full[1][:, :5]) * scale
    to_image = to_image.masked_fill(~mask, -torch.inf)
    weights = torch.cat([to_image, to_text], -1).softmax(-1)
    values = torch.cat([windows[2][:, 5:], full[2][:, :5]], 1)
    expected = torch.einsum("bhnm,bmhd->bnhd", weights, values)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def _fresh_pass() -> Any:
    from dit_accel.highres.engine import _Pass

    return _Pass((0, "cond"), guided=True, keeps=False)


@pytest.mark.parametrize("order", [RASTER, None], ids=["raster", "tiles"])
@pytest.mark.parametrize(("grid", "text"), [((2, 6, 8), 0), ((2, 5, 7), 0), ((1, 5, 7), 3)])
def test_pooled_keys_count_for_the_tokens_they_are_made_of(grid, text, order):
    """As if every token were replaced by the mean of its cell."""
    layout = TokenLayout(grid, text)
    query, key, value = (
        torch.randn(2, layout.num_tokens, 2, 8, dtype=torch.float64) for _ in range(3)
    )
    means = [_cell_means(x, layout) for x in (key, value)]
    everything = torch.ones(1, dtype=torch.bool)
    expected, _ = masked_attention(query, *means, everything, 0.4)
    from dit_accel.grid import TokenOrder

    order = order or TokenOrder((1, 4, 2))
    gather = torch.cat(
        [order.permutation(grid), torch.arange(layout.video_length, layout.num_tokens)]
    )
    moved = (x[:, gather] for x in (query, key, value))
    out = pooled_attention(*moved, layout, order, 2, 0.4)
    torch.testing.assert_close(out, expected[:, gather])
    assert cell_counts(grid, 2).sum() == layout.video_length


def _cell_means(tokens: Tensor, layout: TokenLayout) -> Tensor:
    video = tokens[:, : layout.video_length].unflatten(1, layout.grid).clone()
    for h in range(0, layout.grid[1], 2):
        for w in range(0, layout.grid[2], 2):
            cell = video[:, :, h : h + 2, w : w + 2]
            cell[:] = cell.mean((2, 3), keepdim=True)
    return torch.cat([video.flatten(1, 3), tokens[:, layout.video_length :]], 1)


@pytest.mark.parametrize(
    ("beside", "options"),
    [
        ("radial", {"decay": 0.2, "radial": {"block_size": 16}, "dense_layers": 0}),
        ("pisa", {"pisa": {"density": 0.4, "block_size": 16}, "dense_layers": 0}),
    ],
)
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_full_passes_may_be_sparse(name, beside, options):
    build, arguments = TINY_PIPELINES[name]
    pipe = build()
    override = "cross" if name == "wan" else "joint"
    native, target = (NATIVE, (224, 288)) if name == "wan" else (IMAGE_NATIVE, IMAGE_TARGET)
    accelerate_pipeline(
        pipe, ["freeswim", beside], native_size=native, override=override,
        dense_steps=0, min_tokens=0, guard=False, **options,
    )  # fmt: skip
    out = run_tiny(pipe, arguments, height=target[0], width=target[1])
    assert out.isfinite().all()
    report = acceleration_report(pipe)
    full = [call for call in report.calls if call.branch.endswith("full")]
    assert full
    if not (beside == "radial" and name == "flux"):  # radial is dense on one frame
        assert all(call.density < 1 for call in full)


def test_full_passes_may_pool_their_keys():
    pipe, arguments = large("wan", pool_keys=2)
    assert run_tiny(pipe, arguments).isfinite().all()
    full = [c for c in acceleration_report(pipe).calls if c.branch.endswith("full")]
    assert all(call.density == pytest.approx(5 * 6 / (9 * 12)) for call in full)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "flux"])
def test_full_passes_run_in_their_own_order_of_tokens(name):
    """With the same windows in a full pass, in other tiles, it gives what windows alone give."""
    build, arguments = TINY_PIPELINES[name]
    native = NATIVE if "num_frames" in arguments else IMAGE_NATIVE
    size = {"height": 2 * native[0], "width": 2 * native[1]}
    window = (native[0] // 16, native[1] // 16)
    same, outs = SlidingWindow(window, block_size=16), []
    for override in ("none", "cross" if name == "wan" else "joint"):
        pipe = build()
        method = FreeSwim(native, window, gain=1.0, override=override, refresh_every=1)
        accelerate_pipeline(pipe, [method, same], dense_steps=0, min_tokens=0)
        outs.append(run_tiny(pipe, arguments, **size))
    plans = {call.branch: call.plan for call in acceleration_report(pipe).calls}
    assert plans["cond"].order != plans["cond full"].order
    torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-3)
