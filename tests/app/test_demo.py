"""The demo page: what a press of the button makes, what it refuses, and how the page is built."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gradio as gr
import imageio.v3 as imageio
import pytest
import torch
from PIL import Image
from tiny_pipelines import tiny_sd3, tiny_wan

from dit_accel import demo, list_methods
from dit_accel.cli.options import GENERAL, method_hints
from dit_accel.demo.controls import option_controls, recommended
from dit_accel.demo.page import build_page, generate, present
from dit_accel.demo.runner import Runner
from dit_accel.errors import OptionError
from dit_accel.generation import GenerationRequest, generate_accelerated
from dit_accel.models import load_pipeline

ROOT = Path(__file__).parents[2]
DEFAULTS = '{"steps": 2, "frames": 5, "height": 112, "width": 144, "guidance": 3.0, "fps": 8}'
SOON = {"block_size": "16", "min_tokens": "0", "dense_steps": "1", "dense_layers": "0"}
OPTIONS = [*SOON, "window", "causal", "backend"]


@pytest.fixture(scope="module")
def video_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "video"
    tiny_wan().save_pretrained(folder)
    (folder / "dit_accel.json").write_text(DEFAULTS)
    return str(folder)


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner()


def values(model: str, **changes: Any) -> dict[str, Any]:
    """Return what the controls hold when only the model was chosen, with changes."""
    untouched = dict.fromkeys(["steps", "guidance", "frames", "height", "width", *OPTIONS])
    page = {
        "model": model,
        "prompt": "a 'red' ball",
        "attention": "gna",
        "seed": 3,
        "set_density": True,
        "density": 0.6,
        "compare": True,
    }
    return {**untouched, **page, **SOON, **changes}


def test_a_press_makes_clips_figures_mask_and_code(runner, video_model, tmp_path, monkeypatch):
    seen = []
    outcome = generate(
        runner, values(video_model), OPTIONS, lambda part, desc, unit: seen.append((desc, *part))
    )
    for path in (outcome.accelerated, outcome.dense):
        assert imageio.imread(path).shape == (5, 112, 144, 3)
        assert imageio.immeta(path)["fps"] == 8
    assert Image.open(outcome.mask).width > 100
    for stage in ("denoising (dense)", "denoising (gna)"):
        assert [done for desc, done, total in seen if desc == stage and total == 2] == [1, 2]

    shown = present(outcome)
    assert shown["dense_video"]["value"] == outcome.dense
    assert "dense, " in shown["dense_video"]["label"]
    assert not shown["dense_image"]["visible"]
    assert f"density {outcome.result.report.block_density:.3f}" in shown["figures"]
    assert f"PSNR {outcome.result.psnr_db:.1f} dB" in shown["figures"]
    assert "|speed-up|" in shown["figures"]
    assert shown["report"]["value"]["headers"][0] == "attention calls"
    calls = sum(int(row[0]) for row in shown["report"]["value"]["data"])
    assert calls == len(outcome.result.report.calls)

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(outcome.code, "snippet", "exec"), names)
    assert (tmp_path / "gna.mp4").stat().st_size > 0
    assert names["pipe"] is not None
    request = GenerationRequest(
        prompt="a 'red' ball", steps=2, frames=5, height=112, width=144, guidance=3.0, seed=3
    )
    options = {"block_size": 16, "min_tokens": 0, "dense_steps": 1, "dense_layers": 0}
    again = generate_accelerated(
        load_pipeline(video_model), request, "gna", {**options, "density": 0.6}
    )
    output = torch.from_numpy(names["output"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(output, again.accelerated.frames)


def test_without_comparison_there_is_one_clip(runner, video_model):
    outcome = generate(runner, values(video_model, compare=False, set_density=False), OPTIONS)
    shown = present(outcome)
    assert outcome.dense is None
    assert shown["dense_video"]["value"] is None
    assert "speed" not in shown["figures"]


def test_a_dense_run_has_no_mask_to_show(runner, video_model):
    outcome = generate(runner, values(video_model, min_tokens="100000", steps=1), OPTIONS)
    assert outcome.mask is None
    assert not present(outcome)["mask"]["visible"]
    assert "equal to dense" in present(outcome)["figures"]


def test_an_image_model_shows_pictures(tmp_path):
    tiny_sd3().save_pretrained(tmp_path)
    given = values(str(tmp_path), steps=1, height=240, width=272, set_density=False)
    runner = Runner()
    outcome = generate(runner, given, OPTIONS)
    shown = present(outcome)
    assert Image.open(outcome.accelerated).size == (272, 240)
    assert shown["accelerated_image"]["value"] == outcome.accelerated
    assert not shown["accelerated_video"]["visible"]
    compile(outcome.code, "snippet", "exec")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"model": "tiny-van"}, "no bundled model", id="model"),
        pytest.param({"model": None}, "model", id="no model"),
        pytest.param({"steps": 0}, "steps=0 must be at least 1", id="steps"),
        pytest.param({"height": 100}, "is not a multiple of 16", id="height"),
        pytest.param({"window": "wide"}, "'wide' is not", id="option"),
        pytest.param({"window": "50"}, "50", id="window over the axis"),
        pytest.param({"backend": "tritn"}, "Did you mean 'triton'?", id="backend"),
        pytest.param({"set_density": True, "density": 0.0001}, "out of reach", id="density"),
    ],
)
def test_refusals_are_told_in_words(runner, video_model, changes, message):
    with pytest.raises(gr.Error) as error:
        generate(runner, values(video_model, set_density=False) | changes, OPTIONS)
    assert message in error.value.message
    assert not error.value.print_exception


def test_the_next_press_works_after_a_refusal(runner, video_model):
    with pytest.raises(gr.Error):
        generate(runner, values(video_model, density=0.0001), OPTIONS)
    outcome = generate(runner, values(video_model, compare=False), OPTIONS)
    assert outcome.accelerated.is_file()


def test_files_go_with_the_runner(video_model):
    runner = Runner()
    path = generate(runner, values(video_model, compare=False), OPTIONS).accelerated
    assert path.is_file()
    del runner
    assert not path.exists()


def test_page_is_built():
    page = build_page(Runner())
    labels = {getattr(block, "label", None) for block in page.blocks.values()}
    assert {"Model", "Prompt", "Method", "Density", "Steps", "Seed"} <= labels
    assert page.get_config_file()["components"]


@pytest.mark.parametrize("method", list_methods())
def test_every_option_of_a_method_has_a_control(method):
    with gr.Blocks():
        boxes = option_controls(method)
    general = GENERAL if method in list_methods("attention") else ()
    assert set(boxes) == {*method_hints(method), *general} - {"density"}
    assert not any(box.value for box in boxes.values())


def test_choosing_a_model_fills_in_its_settings(video_model):
    assert recommended(video_model) == [2, 3.0, 5, 112, 144]
    with pytest.raises(gr.Error, match="no bundled model"):
        recommended("tiny-van")


def test_launch_serves_the_page(monkeypatch):
    launched = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **options: launched.append(options))
    demo.launch(server_port=1234)
    assert launched[0]["server_port"] == 1234


def test_missing_gradio_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(OptionError, match=r"pip install 'dit-accel\[app\]'"):
        demo.launch()


def test_app_without_gradio_prints_one_line():
    hide = "import runpy, sys; sys.modules['gradio'] = None"
    script = f"{hide}; runpy.run_path('app.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: the demo page needs gradio")
    assert len(done.stderr.splitlines()) == 1
