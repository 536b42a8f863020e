"""VBench's score against golden values, only where it is whole; and its file names and layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dit_accel.errors import OptionError
from dit_accel.eval.clips import Clip, find_clips, find_run_clips
from dit_accel.eval.export import export_clips
from dit_accel.eval.vbench import (
    SCALES,
    measured_of,
    normalised,
    official_results,
    prompt_of,
    read_values,
    vbench_scores,
    video_name,
)


@pytest.fixture
def raw(golden):
    return {name.replace(" ", "_"): value for name, value in golden["aggregate"]["raw"].items()}


def test_golden_scores(golden, raw):
    expected = golden["aggregate"]
    scores = vbench_scores(raw)
    assert scores == pytest.approx(
        {name: expected[name] for name in ("quality", "semantic", "total")}
    )
    for name, value in expected["normalised_weighted"].items():
        name = name.replace(" ", "_")
        assert SCALES[name].weight * normalised(name, raw[name]) == pytest.approx(value)


def test_no_score_without_all_of_its_dimensions(golden, raw):
    quality = {name: value for name, value in raw.items() if SCALES[name].group == "quality"}
    assert vbench_scores(quality) == pytest.approx({"quality": golden["aggregate"]["quality"]})
    assert measured_of(quality, "quality") == (7, 7)
    assert measured_of(quality, "semantic") == (0, 9)
    for missing in raw:
        fewer = {name: value for name, value in raw.items() if name != missing}
        scores = vbench_scores(fewer)
        assert "total" not in scores
        assert SCALES[missing].group not in scores


def test_a_proxy_is_no_dimension(raw):
    value = raw.pop("dynamic_degree")
    assert "quality" not in vbench_scores({**raw, "proxy_dynamic_degree": value})


def test_file_names():
    assert video_name("A cat, walking-2 miles.", 3) == "A cat, walking-2 miles.-3.mp4"
    assert prompt_of(Path("x/A cat, walking-2 miles.-3.mp4")) == "A cat, walking-2 miles."
    assert prompt_of(Path("well-known.mp4")) == "well-known"
    assert prompt_of(Path("bird-12.mp4")) == "bird"


def test_results_in_the_official_layout(tmp_path):
    values = {"imaging_quality": 0.6, "dynamic_degree": 0.5, "proxy_dynamic_degree": 1.0}
    videos = {
        "imaging_quality": [("a-0.mp4", 0.5), ("b-0.mp4", 0.7)],
        "dynamic_degree": [("a-0.mp4", 1.0), ("b-0.mp4", 0.0)],
        "proxy_dynamic_degree": [("a-0.mp4", 1.0)],
    }
    written = official_results(values, videos)
    assert written == {
        "dynamic_degree": [
            0.5,
            [
                {"video_path": "a-0.mp4", "video_results": True},
                {"video_path": "b-0.mp4", "video_results": False},
            ],
        ],
        "imaging_quality": [
            0.6,
            [
                {"video_path": "a-0.mp4", "video_results": 50},
                {"video_path": "b-0.mp4", "video_results": 70},
            ],
        ],
    }
    path = tmp_path / "results_eval_results.json"
    path.write_text(json.dumps(written))
    assert read_values(path) == {"imaging_quality": 0.6, "dynamic_degree": 0.5}
    for text in ("[]", "{", '{"color": []}', '{"color": 3}'):
        path.write_text(text)
        with pytest.raises(OptionError, match="no result of VBench's tool"):
            read_values(path)


def test_clips_of_a_folder(tmp_path):
    for name in ("b-1.mp4", "b-0.MP4", "a cat-0.mp4", "notes.txt", "one.png"):
        (tmp_path / name).write_bytes(b"x")
    found = [(clip.path.name, clip.prompt) for clip in find_clips(tmp_path)]
    assert found == [
        ("a cat-0.mp4", "a cat"),
        ("b-0.MP4", "b"),
        ("b-1.mp4", "b"),
        ("one.png", "one"),
    ]
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"/elsewhere/b-1.mp4": "two / birds"}))
    listed = {clip.path.name: clip.prompt for clip in find_clips(tmp_path, prompts=prompts)}
    assert listed == {"a cat-0.mp4": "", "b-0.MP4": "", "b-1.mp4": "two / birds", "one.png": ""}
    for content, message in (
        ('{"b-2.mp4": ""}', "Did you mean 'b-1.mp4'"),
        ("[]", "must map"),
        ("{", "can't be read"),
    ):
        prompts.write_text(content)
        with pytest.raises(OptionError, match=message):
            find_clips(tmp_path, prompts=prompts)
    with pytest.raises(OptionError, match="is no folder"):
        find_clips(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="holds no videos"):
        find_clips(tmp_path / "empty")


def test_clips_of_a_run(tmp_path):
    rows = [
        {"method": "dense", "prompt": "a cat", "clip": "clips/dense/0-0.mp4"},
        {"method": "gna", "prompt": "a cat", "clip": "clips/gna/0-0.mp4"},
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"rows": rows}))
    assert find_run_clips(tmp_path) == {
        "dense": [Clip(tmp_path / "clips/dense/0-0.mp4", "a cat")],
        "gna": [Clip(tmp_path / "clips/gna/0-0.mp4", "a cat")],
    }
    for content, message in (({}, "no result of a run"), ({"rows": []}, "lists no clips")):
        path.write_text(json.dumps(content))
        with pytest.raises(OptionError, match=message):
            find_run_clips(tmp_path)


def test_export_names_what_the_official_tool_reads(tmp_path):
    prompts = ["a cat", "a dog", "a cat", "either/or", "long " * 60, ""]
    clips = []
    for number, prompt in enumerate(prompts):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(str(number).encode())
        clips.append(Clip(path, prompt))
    (tmp_path / "broken.mp4").write_bytes(b"")
    broken = [Clip(tmp_path / "broken.mp4", "b"), Clip(tmp_path / "gone.mp4", "g")]
    out = tmp_path / "out put"
    command, problems = export_clips([*clips, *broken], out)
    expected = {
        "a cat-0.mp4": "a cat",
        "a dog-0.mp4": "a dog",
        "a cat-1.mp4": "a cat",
        "clip-0003-0.mp4": "either/or",
        "clip-0004-0.mp4": "long " * 60,
        "clip-0005-0.mp4": "",
    }
    assert json.loads((out / "prompts.json").read_text()) == expected
    for number, name in enumerate(expected):
        assert (out / "videos" / name).read_text() == str(number)
    assert sorted(p.name for p in (out / "videos").iterdir()) == sorted(expected)
    assert [problem.rpartition("/")[2] for problem in problems] == [
        "broken.mp4: the file is empty.",
        "gone.mp4: there is no such file.",
    ]
    assert f"--videos_path '{out}/videos' --prompt_file '{out}/prompts.json'" in command
    with pytest.raises(OptionError, match="isn't empty"):
        export_clips(clips, out)
