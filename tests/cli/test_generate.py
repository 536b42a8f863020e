"""`dit-accel generate`: what it writes, what it refuses, and that no file is half-written."""

from __future__ import annotations

import json
from pathlib import Path

import imageio.v3 as imageio
import pytest
from PIL import Image

SPARSE = ("--method", "gna", "--set", "block_size=16", "--set", "density=0.6")
SOON = ("--set", "min_tokens=0", "--set", "dense_steps=1", "--set", "dense_layers=0")
WRITTEN = ["out.dense.mp4", "out.mp4", "out.report.json", "out.report.txt"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_comparison_writes_both_videos_and_a_report(dit_accel, video_model, tmp_path):
    ran = dit_accel(
        *("generate", "a red ball", "--model", video_model, "--output", "out.mp4"),
        *(*SPARSE, *SOON, "--no-guard", "--compare", "--seed", "3", "--json"),
    )
    assert ran.code == 0, ran.err
    assert names(tmp_path) == WRITTEN
    report = json.loads(ran.out)
    assert report == json.loads((tmp_path / "out.report.json").read_text())
    assert report["request"] == {
        "prompt": "a red ball",
        "negative_prompt": None,
        "steps": 3,
        "frames": 9,
        "height": 112,
        "width": 144,
        "guidance": 3.0,
        "seed": 3,
    }
    first, *others = (step["density"] for step in report["acceleration"]["steps"].values())
    assert first == 1
    assert all(density < 0.6 for density in others)
    assert report["density"] == pytest.approx((first + sum(others)) / 3)
    assert report["psnr_db"] > 10
    assert report["speedup"] == pytest.approx(
        report["dense"]["total_s"] / report["accelerated"]["total_s"]
    )
    for run in (report["dense"], report["accelerated"]):
        assert 0 < run["denoise_s"] < run["total_s"]
    for name in ("out.mp4", "out.dense.mp4"):
        assert imageio.imread(tmp_path / name).shape == (9, 112, 144, 3)
        assert imageio.immeta(tmp_path / name)["fps"] == 8
    text = (tmp_path / "out.report.txt").read_text()
    assert "speed-up" in text
    assert "PSNR" in text


def test_dense_method_equals_dense(dit_accel, video_model):
    ran = dit_accel(
        *("generate", "x", "--model", video_model, "--output", "out.mp4"),
        *("--method", "dense", "--compare", "--json"),
    )
    report = json.loads(ran.out)
    assert report["identical"]
    assert report["psnr_db"] is None
    assert report["density"] == 1


def test_without_comparison_there_is_one_video(dit_accel, video_model, tmp_path):
    ran = dit_accel("generate", "x", "--model", video_model, "-o", "new/out.mp4", *SPARSE, *SOON)
    assert ran.code == 0, ran.err
    assert names(tmp_path / "new") == ["out.mp4", "out.report.json", "out.report.txt"]
    assert "wrote new/out.mp4" in ran.out
    report = json.loads((tmp_path / "new/out.report.json").read_text())
    assert "dense" not in report
    assert report["speedup"] is None


def test_without_an_output_files_are_named_after_the_prompt(dit_accel, video_model, tmp_path):
    ran = dit_accel("generate", "A red ball, ../up!", "--model", video_model, *SPARSE, *SOON)
    assert ran.code == 0, ran.err
    assert "a-red-ball-up.mp4" in names(tmp_path / "outputs")
    assert "wrote outputs/a-red-ball-up.mp4" in ran.out
    again = dit_accel("generate", "A red ball, ../up!", "--model", video_model)
    assert again.code == 2
    assert "give another name, or --force" in again.err


def test_image_model_writes_a_picture(dit_accel, image_model, tmp_path):
    ran = dit_accel(
        *("generate", "x", "--model", image_model, "-o", "out.png", "--steps", "2"),
        *("--height", "240", "--width", "272", "--method", "gna", *SOON),
    )
    assert ran.code == 0, ran.err
    assert Image.open(tmp_path / "out.png").size == (272, 240)


def test_larger_than_the_model_was_trained_for(dit_accel, video_model, tmp_path):
    ran = dit_accel(
        *("generate", "x", "--model", video_model, "-o", "out.mp4", "--method", "freeswim"),
        *("--height", "144", "--width", "192", "--set", "window=native", "--json"),
    )
    assert ran.code == 0, ran.err
    assert imageio.imread(tmp_path / "out.mp4").shape == (9, 144, 192, 3)
    report = json.loads(ran.out)["acceleration"]
    assert report["options"]["freeswim"]["window"] == "native"
    assert report["cache"]["attention_reused"] > 0


def test_a_seed_gives_the_same_video_again(dit_accel, video_model, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        dit_accel("generate", "x", "--model", video_model, "-o", f"{name}.mp4", "--seed", seed)
    first, again, other = ((tmp_path / f"{n}.mp4").read_bytes() for n in "abc")
    assert first == again
    assert first != other


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--method", "radail"], "Did you mean 'radial'?", id="method"),
        pytest.param(["--set", "decai=0.3"], "Did you mean 'decay'?", id="option"),
        pytest.param(["--set", "decay=soft"], "'soft' is not float", id="type"),
        pytest.param(["--set", "rule=released2"], "is not released or paper", id="literal"),
        pytest.param(["--set", "density"], "write name=value", id="assignment"),
        pytest.param(["--set", "density=1.5"], "must be in (0, 1]", id="density"),
        pytest.param(["--set", "backend=tritn"], "Did you mean 'triton'?", id="backend"),
        pytest.param(["--set", "dense_steps=-1"], "dense_steps=-1", id="schedule"),
        pytest.param(
            ["--method", "gna", "--set", "window=4", "--set", "stride=8"], "stride", id="stride"
        ),
        pytest.param(["--steps", "0"], "steps=0 must be at least 1", id="steps"),
        pytest.param(["--height", "-16"], "height=-16", id="height"),
        pytest.param(["--height", "100"], "is not a multiple of 16", id="patch size"),
        pytest.param(
            ["--method", "freeswim", "--height", "150"], "take 144", id="larger: patch size"
        ),
        pytest.param(
            ["--method", "freeswim", "--set", "sigma=2"], "sigma=2.0 must be", id="noise level"
        ),
        pytest.param(["--frames", "8"], "take 9", id="frames"),
        pytest.param(["--seed", "-1"], "seed=-1", id="seed"),
        pytest.param(["--device", "cuda:99"], "no device 'cuda:99' here", id="device"),
        pytest.param(["--dtype", "float8"], "Did you mean 'float", id="dtype"),
        pytest.param(["--output", "out.avi"], "must end in .mp4 or .png", id="suffix"),
        pytest.param(["--output", "out.png"], "WanPipeline makes videos", id="kind"),
        pytest.param(["--output", "taken/out.mp4"], "'taken/out.mp4' exists", id="exists"),
        pytest.param(["--output", "taken/second.mp4"], "second.report.json' exists", id="report"),
        pytest.param(["--output", "taken.mp4"], "is a folder", id="folder"),
        pytest.param(["--output", "a_file/out.mp4"], "is no folder", id="under a file"),
        pytest.param(["--model", "./nowhere"], "'./nowhere' does not exist", id="model folder"),
        pytest.param(["--model", "taken"], "no model_index.json", id="no pipeline"),
        pytest.param(["--model", "tiny-van"], "no bundled model", id="model name"),
    ],
)
def test_refused_before_loading(dit_accel, video_model, tmp_path, arguments, message):
    for taken in ("taken/out.mp4", "taken/second.report.json", "taken.mp4/x", "a_file"):
        (tmp_path / taken).parent.mkdir(exist_ok=True)
        (tmp_path / taken).write_text("precious")
    ran = dit_accel("generate", "x", "--model", video_model, "--output", "out.mp4", *arguments)
    assert ran.code == 2
    assert message in ran.err
    assert len(ran.err.splitlines()) == 1
    assert "Traceback" not in ran.err
    assert names(tmp_path) == ["a_file", "taken", "taken.mp4"]
    assert (tmp_path / "taken/out.mp4").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["--method", "gna", *SOON, "--set", "window=50"], "50", id="window over the axis"
        ),
        pytest.param(
            ["--method", "freeswim", "--height", "96", "--width", "128"],
            "smaller than the trained size 112 x 144",
            id="under the trained size",
        ),
    ],
)
def test_refused_once_loaded(dit_accel, video_model, tmp_path, arguments, message):
    ran = dit_accel(
        *("generate", "x", "--model", video_model, "--output", "out.mp4"),
        *("--compare", *arguments),
    )
    assert ran.code == 2
    assert message in ran.err
    assert names(tmp_path) == []


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("prompt", ["", "  "], ids=repr)
def test_an_empty_prompt_is_refused(dit_accel, video_model, tmp_path, prompt):
    ran = dit_accel("generate", prompt, "--model", video_model, "--output", "out.mp4")
    assert ran.code == 2
    assert "the prompt is empty" in ran.err
    assert names(tmp_path) == []


def test_words_unknown_to_a_bundled_model_are_named(dit_accel, tmp_path):
    ran = dit_accel(
        *("generate", "a red unicorn moving left", "--model", "tiny-wan", "--output", "out.mp4"),
        *("--frames", "5", "--height", "32", "--width", "32", "--steps", "1", "--compare"),
    )
    assert ran.code == 0, ran.err
    assert ran.err.count("warning: this model knows nothing of 'unicorn'") == 1
    assert (tmp_path / "out.mp4").exists()


def test_unwritable_folder_is_refused(dit_accel, video_model, tmp_path, monkeypatch):
    monkeypatch.setattr("dit_accel.files.os.access", lambda *_: False)  # root may write anywhere
    ran = dit_accel("generate", "x", "--model", video_model, "--output", "out.mp4")
    assert ran.code == 2
    assert "is not writable" in ran.err


def test_force_replaces(dit_accel, video_model, tmp_path):
    (tmp_path / "out.mp4").write_text("old")
    ran = dit_accel("generate", "x", "--model", video_model, "-o", "out.mp4", "--force")
    assert ran.code == 0, ran.err
    assert imageio.imread(tmp_path / "out.mp4").shape[0] == 9


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no space")], ids=repr)
def test_interrupted_writing_leaves_nothing(dit_accel, video_model, tmp_path, monkeypatch, error):
    def fail(path: Path, *_: object, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr("imageio.v2.mimwrite", fail)
    (tmp_path / "out.mp4").write_text("old")
    ran = dit_accel("generate", "x", "--model", video_model, "-o", "out.mp4", "--force")
    assert ran.code not in (0, 2)
    assert "Traceback" not in ran.err
    assert names(tmp_path) == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_text() == "old"


def test_guard_and_picture_of_the_report(dit_accel, video_model, tmp_path):
    ran = dit_accel(
        *("generate", "a red ball", "--model", video_model, "--output", "out.mp4"),
        *(*SPARSE, *SOON, "--guard-error", "1e-9", "--report-picture", "report.png", "--json"),
    )
    assert ran.code == 0, ran.err
    assert "warning: quality guard" in ran.err
    guard = json.loads(ran.out)["acceleration"]["guard"]
    assert guard["options"]["max_error"] == 1e-9
    assert guard["trips"] > 0
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 900


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--no-guard", "--guard-error", "0.1"), "contradict"),
        (("--guard-error", "-1"), "max_error=-1.0"),
        (("--report-picture", "report.jpg"), "must end in .png"),
        (("--method", "first_block_cache", "--report-picture", "r.png"), "attention alone"),
    ],
)
def test_impossible_guards_and_pictures(dit_accel, video_model, tmp_path, arguments, says):
    ran = dit_accel("generate", "x", "--model", video_model, "--output", "out.mp4", *arguments)
    assert ran.code == 2
    assert says in ran.err
    assert not names(tmp_path)
