"""What a press of Generate makes, without the page, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import pytest
import torch
from PIL import Image
from tiny_pipelines import tiny_sd3, tiny_wan

from dit_accel import acceleration_report
from dit_accel.app import views
from dit_accel.app.jobs import Cancelled, Job
from dit_accel.app.settings import AppSettings
from dit_accel.app.store import Store
from dit_accel.app.tabs.choosing import is_by_hand, wishes
from dit_accel.app.work import Studio, check_order, recommended
from dit_accel.choosing import trials
from dit_accel.errors import DitAccelError, OptionError
from dit_accel.generation import GenerationRequest, generate, generate_accelerated
from dit_accel.models import load_pipeline

DEFAULTS = '{"steps": 2, "frames": 5, "height": 112, "width": 144, "guidance": 3.0, "fps": 8}'
OPTIONS = ["block_size=16", "min_tokens=0", "dense_steps=1", "dense_layers=0", "density=0.6"]


@pytest.fixture(scope="module")
def video_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "video"
    tiny_wan().save_pretrained(folder)
    (folder / "dit_accel.json").write_text(DEFAULTS)
    return str(folder)


@pytest.fixture(scope="module")
def settings(video_model) -> AppSettings:
    return AppSettings(models=(video_model,), max_side=512)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(Store(tmp_path_factory.mktemp("results")))


def job() -> Job:
    return Job("visitor", lambda job: None)


def given(model: str, **changes: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "a 'red' ball", "seed": 3, "compare": True, **changes}


def test_clips_figures_pictures_and_code(studio, settings, video_model, tmp_path, monkeypatch):
    order = check_order(settings, given(video_model), "gna", OPTIONS)
    name = studio.generate(job(), order)
    content = studio.store.result(name)
    for kind in ("accelerated", "dense", "difference"):
        path = studio.store.file(name, content["files"][kind])
        assert imageio.imread(path).shape == (5, 112, 144, 3)
        assert imageio.immeta(path)["fps"] == 8
    assert content["settings"] == {
        **{"steps": 2, "guidance": 3.0, "frames": 5, "height": 112, "width": 144, "seed": 3}
    }
    table = content["report"]["tables"][0]
    assert table["headers"][0] == "attention calls"
    assert content["report"]["mask"]["computed"] < 1
    shown = views.result(name, content)
    for words in (f"{content['psnr_db']:.1f} dB", "a &#39;red&#39; ball", "Copy as Python"):
        assert words in shown

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(content["code"], "snippet", "exec"), names)
    assert (tmp_path / "gna.mp4").stat().st_size > 0
    request = GenerationRequest(
        prompt="a 'red' ball", steps=2, frames=5, height=112, width=144, guidance=3.0, seed=3
    )
    again = generate_accelerated(load_pipeline(video_model), request, "gna", order.options)
    output = torch.from_numpy(names["output"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(output, again.accelerated.frames)


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Let the time of a trial be the blocks that ran, and keep results out of the user's folder."""
    generate = trials.Trials._generate

    def counting(self: Any, call: Any) -> Any:
        made = generate(self, call)
        acceleration = self.pipe.__dict__.get("_dit_accel")
        skipped = acceleration.report().blocks_skipped if acceleration else None
        return trials.Generated(made.frames, made.latents, 1 - (skipped or 0.0))

    monkeypatch.setattr(trials.Trials, "_generate", counting)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_budget_chooses_and_says_why(
    studio, settings, video_model, tmp_path, monkeypatch, counted
):
    asked = given(video_model, steps=12, compare=False, tried=1, way="budget", guard=False)
    wish = wishes({**asked, "goal": "target_speedup", "amount": 1.2, "guard_error": 0.6})
    assert wish == {"target_speedup": 1.2, "guard": False}
    assert wishes({**asked, "goal": "target_speedup", "amount": 1.2, "minutes": 0}) == wish
    hour = wishes({**asked, "goal": "target_speedup", "amount": 1.2, "minutes": 60})
    assert hour["probe_s"] == 3600
    wish["probe_s"] = 3600
    followed, told = job(), []
    monkeypatch.setattr(followed, "report", lambda *stage: told.append(stage))
    name = studio.generate(followed, check_order(settings, asked, "auto", [], wish))
    content = studio.store.result(name)
    (taken,) = [point for point in content["chosen"]["points"] if point["taken"]]
    assert taken["speedup"] >= 1.2
    why = content["chosen"]["why"][0]
    assert "the nearest to dense of" in why
    assert ("generations to try settings", 1, 0) in told
    shown = views.result(name, content)
    assert f"{taken['setting']} (chosen)" in shown
    assert shown.count(why.replace("'", "&#39;")) == 1

    # The code names what was chosen, a cache, which needs no guard: nothing is tried anew.
    assert "target_speedup" not in content["code"]
    assert "probe_s" not in content["code"]
    assert "guard" not in content["code"]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(content["code"], "snippet", "exec"), names)
    again = acceleration_report(names["pipe"])
    assert again.choice is None
    assert again.method == content["methods"]
    assert again.blocks_skipped == content["blocks_skipped"]


def test_automatic_says_why_and_the_guard_what_it_saw(studio, settings, video_model):
    order = check_order(settings, given(video_model, compare=False), "auto", [], {"guard": False})
    content = studio.store.result(studio.generate(job(), order))
    assert content["chosen"]["why"][0].startswith("method='auto' took")
    assert content["guard"] is None

    wish = wishes({"guard": True, "guard_error": 0.05})
    order = check_order(settings, given(video_model, compare=False), "gna", OPTIONS, wish)
    name = studio.generate(job(), order)
    content = studio.store.result(name)
    assert content["guard"]["budget"] == 0.05
    assert content["guard"]["repairs"] > 0
    assert Image.open(studio.store.file(name, content["files"]["report"])).width > 300
    shown = views.result(name, content)
    assert f"{content['guard']['repairs']} repairs" in shown
    assert "report.png" in shown
    assert "guard={&#39;max_error&#39;: 0.05}" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"amount": None}, "min_psnr is empty: write a number, such as 30", id="none"),
        pytest.param({"amount": -3}, "take 0 to 100", id="negative"),
        pytest.param({"amount": 0}, "must be a finite number over 0", id="zero"),
        pytest.param({"goal": "target_speedup", "amount": 1}, "over 1", id="no speed-up"),
        pytest.param({"goal": "max_eror"}, "Did you mean 'max_error'", id="goal"),
        pytest.param({"guard_error": 0}, "over 0", id="guard"),
        pytest.param({"guard_error": "much"}, "write one in digits", id="guard in words"),
        pytest.param({"tried": 99}, "take 1 to 16", id="prompts"),
        pytest.param({"minutes": 9999}, "take 0 to 1,440", id="days"),
    ],
)
def test_impossible_budgets_are_refused(settings, video_model, changes, message):
    asked = given(video_model, way="budget", goal="min_psnr", amount=30, guard=True) | changes
    with pytest.raises(DitAccelError, match=message):
        check_order(settings, asked, "auto", [], wishes(asked))
    with pytest.raises(DitAccelError, match="unknown way"):
        is_by_hand({"way": "anyhow"})


def test_without_comparison_there_is_one_clip(studio, settings, video_model):
    order = check_order(settings, given(video_model, compare=False), "easycache", [])
    name = studio.generate(job(), order)
    content = studio.store.result(name)
    assert "dense" not in content["files"]
    assert content["report"]["mask"] is None
    shown = views.result(name, content)
    assert "Speed-up" not in shown
    assert "no one mask to draw" in shown


def test_an_image_model_shows_pictures(studio, tmp_path):
    tiny_sd3().save_pretrained(tmp_path)
    settings = AppSettings(models=(str(tmp_path),))
    asked = given(str(tmp_path), steps=1, height=240, width=272, frames=33)
    name = studio.generate(job(), check_order(settings, asked, "gna", OPTIONS[:-1]))
    content = studio.store.result(name)
    assert Image.open(studio.store.file(name, content["files"]["accelerated"])).size == (272, 240)
    assert "<video" not in views.result(name, content)
    compile(content["code"], "snippet", "exec")


def test_a_cancelled_run_stops_at_its_step_and_leaves_the_next_as_it_would_be(
    studio, settings, video_model
):
    order = check_order(settings, given(video_model, steps=40, compare=False), "gna", OPTIONS)
    stopped = job()
    calls = []

    def cancel_in_the_third_call(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            stopped.cancel()

    with studio.pipeline(video_model, job()) as pipe:
        hook = pipe.transformer.register_forward_pre_hook(cancel_in_the_third_call)
    with pytest.raises(Cancelled):
        studio.generate(stopped, order)
    hook.remove()
    assert len(calls) <= 4

    with studio.pipeline(video_model, job()) as pipe:
        after = generate(pipe, order.request)
    fresh = generate(load_pipeline(video_model), order.request)
    assert torch.equal(after.frames, fresh.frames)


def test_cleaning_up_lets_the_model_go(studio, settings, video_model):
    with studio.pipeline(video_model, job()) as first:
        pass
    studio.clean_up()
    with studio.pipeline(video_model, job()) as second:
        assert second is not first


def test_pickled_weights_are_not_loaded(studio, tmp_path):
    tiny_wan().save_pretrained(tmp_path, safe_serialization=False)
    with (
        pytest.raises(OptionError, match="as a pickle, which is not loaded here"),
        studio.pipeline(str(tmp_path), job()),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"model": "tiny-van"}, "Did you mean 'tiny-wan'?", id="model"),
        pytest.param({"model": None}, "no model is chosen", id="no model"),
        pytest.param({"model": "/etc"}, "not on this page's list", id="folder"),
        pytest.param({"prompt": None}, "the prompt is empty", id="no prompt"),
        pytest.param({"prompt": "x" * 2000}, "shorten it", id="long prompt"),
        pytest.param({"steps": 0}, "take 1 to 100", id="steps"),
        pytest.param({"steps": float("nan")}, "is no number", id="nan"),
        pytest.param({"height": 100}, "is not a multiple of 16", id="height"),
        pytest.param({"height": 1024}, "take 16 to 512", id="too high"),
        pytest.param({"seed": 2**70}, "seed=", id="seed"),
        pytest.param({"guidance": -1}, "take 0 to 50", id="guidance"),
        pytest.param({"frames": "many"}, "write one in digits", id="words"),
    ],
)
def test_refusals_are_sentences(settings, video_model, changes, message):
    with pytest.raises(DitAccelError, match=message.replace("?", r"\?")):
        check_order(settings, given(video_model) | changes, "gna", OPTIONS)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("window=wide", "'wide' is not"),
        ("backend=tritn", "Did you mean 'triton'"),
        ("windw=2", "Did you mean 'window'"),
    ],
)
def test_wrong_options_are_told(settings, video_model, option, message):
    with pytest.raises(DitAccelError, match=message):
        check_order(settings, given(video_model), "gna", [option])


def test_many_pixels_are_refused(video_model):
    settings = AppSettings(models=(video_model,), max_pixels=100_000)
    asked = given(video_model, frames=9, height=112, width=144)
    with pytest.raises(OptionError, match="make it smaller or shorter"):
        check_order(settings, asked, "gna", [])


def test_choosing_a_model_fills_in_its_settings(settings, video_model):
    assert recommended(settings, video_model) == [2, 3.0, 5, 112, 144]
    with pytest.raises(OptionError, match="not on this page's list"):
        recommended(settings, "tiny-van")


def test_results_lie_in_the_store_alone(studio, tmp_path: Path):
    name, folder = studio.store.begin()
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").write_text("b")
    studio.store.keep(name, {"any": 1}, [folder / "a.txt"])
    assert studio.store.file(name, "a.txt") == folder / "a.txt"
    for other in ("b.txt", "result.json", "../a.txt", f"../{name}/a.txt", "/etc/passwd", ""):
        assert studio.store.file(name, other) is None
    for other in (None, 3, "..", "../../etc/passwd", "0" * 32):
        assert studio.store.result(other) is None
