"""`dit-accel headhunt`: finds heads, goes on where it was cut short, refuses what can't work."""

from __future__ import annotations

import json

import pytest
from PIL import Image

SMALL = ("--limit", "1", "--steps", "2", "--height", "64", "--width", "64", "--device", "cpu")
FEW = ("--candidates", "0:1,4:2", "--per-round", "1")
HUNT = ("headhunt", "--model", "tiny-sd3", "--objective", "style:dark", *SMALL, *FEW)


def test_finds_heads_that_generate_takes(dit_accel, tmp_path):
    ran = dit_accel(*HUNT, "--output", "heads.json", "--heatmap", "heads.png")
    assert ran.code == 0, ran.err
    assert "heads: " in ran.out
    assert "wrote heads.png" in ran.out
    content = json.loads((tmp_path / "heads.json").read_text())
    assert content["heads"] in ([[0, 1]], [[4, 2]])
    assert content["found"]["objective"] == "style:dark"
    assert content["found"]["settings"]["guidance"] == 1.0
    assert Image.open(tmp_path / "heads.png").width > 100
    journal = (tmp_path / "heads.jsonl").read_bytes()

    again = dit_accel(*HUNT, "--output", "heads.json", "--json")  # all of it is in the journal
    assert again.code == 0, again.err
    assert json.loads(again.out)["heads"] == content["heads"]
    assert (tmp_path / "heads.jsonl").read_bytes() == journal
    assert json.loads((tmp_path / "heads.json").read_text())["heads"] == content["heads"]

    changed = dit_accel(*HUNT, "--output", "heads.json", "--strength", "0.25")
    assert changed.code == 2
    assert "was made with another strength" in changed.err
    forced = dit_accel(*HUNT, "--output", "heads.json", "--strength", "0.25", "--force")
    assert forced.code == 0, forced.err
    assert json.loads((tmp_path / "heads.json").read_text())["strength"] == 0.25

    made = dit_accel(
        "generate", "a dark picture of a large red ring on a gray background", "--model",
        "tiny-sd3", "--method", "softpag", "--set", "heads=heads.json", "-o", "ring.png",
        "--steps", "2", "--height", "64", "--width", "64",
    )  # fmt: skip
    assert made.code == 0, made.err


def test_prompts_from_a_file_on_a_model_of_no_world(dit_accel, image_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ball\n\nsnow\n")
    ran = dit_accel("headhunt", "--model", image_model, "--prompts", "prompts.txt", "-o", "a.json")
    assert ran.code == 2
    assert "this model belongs to none" in ran.err
    hub = ("--objective", "pickscore", "--prompts", "prompts.txt")
    ran = dit_accel("headhunt", "--model", image_model, *hub, "-o", "a.json", "--device", "cpu")
    assert ran.code == 2
    assert "objective 'pickscore' needs" in ran.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--objective", "styel:dark"], "Did you mean 'style'"),
        (["--objective", "style:drak"], "Did you mean 'dark'"),
        (["--model", "tiny-sd"], "Did you mean 'tiny-sd3'"),
        (["--output", "heads.txt"], "must end in .json"),
        (["--heatmap", "heads.jpg"], "must end in .png"),
        (["--journal", "journal.json"], "must end in .jsonl"),
        (["--candidates", "1"], "no such file"),
        (["--candidates", "0:0,0:0"], "twice"),
        (["--layers", "one"], "write block numbers"),
        (["--prompts", "none.txt"], "can't be read"),
        (["--rounds", "0"], "rounds=0"),
        (["--strength", "2"], "in [0, 1]"),
        (["--perturbation", "identiy"], "Did you mean 'identity'"),
        (["--seeds", "0"], "seeds=0"),
        (["--steps", "0"], "steps=0"),
        (["--height", "100"], "take 96"),
        (["--first-seed", "-1"], "seed=-1"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_loading")
def test_refused_before_loading(dit_accel, tmp_path, arguments, says):
    ran = dit_accel("headhunt", "-o", "heads.json", "--device", "cpu", *arguments)
    assert ran.code == 2
    assert says in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_loading")
def test_texts_are_no_use_to_an_objective_that_knows_scenes(dit_accel, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    ran = dit_accel("headhunt", "--prompts", "prompts.txt", "-o", "heads.json")
    assert ran.code == 2
    assert "leave the prompts out" in ran.err


@pytest.mark.usefixtures("no_loading")
def test_a_file_that_is_there_is_kept(dit_accel, tmp_path):
    (tmp_path / "heads.json").write_text("mine")
    ran = dit_accel(*HUNT, "-o", "heads.json")
    assert ran.code == 2
    assert "exists" in ran.err
    assert (tmp_path / "heads.json").read_text() == "mine"


def test_heads_out_of_range_are_refused(dit_accel):
    ran = dit_accel(*HUNT, "-o", "heads.json", "--candidates", "7:0")
    assert ran.code == 2
    assert "head 7:0 is out of range: this model has 5 layers of 3 heads" in ran.err
