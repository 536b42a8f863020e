"""`dit-accel eval follow`: shares of right attributes, resumed where an output ends."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from dit_accel.models import model_folder
from dit_accel.world.worlds import fixed_prompts

SMALL = ("--frames", "9", "--height", "64", "--width", "64", "--steps", "2", "--device", "cpu")
FOLLOW = ("eval", "follow", "--model", "tiny-wan", *SMALL)


def test_counts_attributes_and_goes_on_where_the_output_ends(dit_accel, tmp_path):
    files = ("--output", "out.json", "--sheet", "out.png")
    first = dit_accel(*FOLLOW, *files, "--prompts", "1", "--json")
    assert first.code == 0, first.err
    result = json.loads(first.out)
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert result["settings"]["frames"] == 9
    assert result["settings"]["guidance"] == 3.0  # the model's own
    assert result["environment"]["packages"]["torch"]
    (row,) = result["rows"]
    assert (row["prompt"], row["seed"]) == (fixed_prompts("clips")[0]["prompt"], 0)
    assert row["marks"].keys() == {"colour", "shape", "motion", "background", "pattern"}
    assert result["following"]["attributes"] == 5
    sheet = Image.open(tmp_path / "out.png").copy()

    second = dit_accel(*FOLLOW, *files, "--prompts", "2", "--json")
    assert second.code == 0, second.err
    longer = json.loads(second.out)
    assert longer["rows"][0] == row  # with its time: it was not made again
    assert [row["seed"] for row in longer["rows"]] == [0, 1]
    right = [mark for row in longer["rows"] for kind in row["marks"].values() for mark in kind]
    assert longer["following"]["all"] == pytest.approx(sum(right) / len(right))
    half = (0, 0, sheet.width // 2, sheet.height)  # the first of two videos in a row
    goes_on = Image.open(tmp_path / "out.png")
    assert goes_on.crop(half).tobytes() == sheet.crop(half).tobytes()
    assert goes_on.tobytes() != sheet.tobytes()

    whole = dit_accel(*FOLLOW, "--prompts", "2", "--batch", "2", "--json")
    for one, other in zip(json.loads(whole.out)["rows"], longer["rows"], strict=True):
        assert one["marks"] == other["marks"]

    changed = dit_accel(*FOLLOW, *files, "--prompts", "2", "--guidance", "1.5")
    assert changed.code == 2
    assert "was made with another guidance" in changed.err
    (tmp_path / "out.png").unlink()
    without_sheet = dit_accel(*FOLLOW, *files, "--prompts", "3")
    assert without_sheet.code == 2
    assert "lacks the pictures" in without_sheet.err
    assert json.loads((tmp_path / "out.json").read_text()) == longer


def test_a_sparse_method_tells_its_density(dit_accel, tmp_path):
    sparse = ("--method", "gna", "--set", "density=0.8", "--set", "block_size=16")
    soon = ("--set", "dense_steps=0", "--set", "dense_layers=0", "--set", "min_tokens=0")
    ran = dit_accel(*FOLLOW, *sparse, *soon, "--prompts", "1", "--output", "out.json")
    assert ran.code == 0, ran.err
    assert "background" in ran.out
    assert "wrote out.json" in ran.out
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["settings"]["method"] == "gna"
    assert result["settings"]["options"]["density"] == 0.8
    assert result["rows"][0]["density"] <= 0.8


def test_force_starts_again(dit_accel, tmp_path):
    (tmp_path / "out.json").write_text("{}")
    refused = dit_accel(*FOLLOW, "--prompts", "1", "--output", "out.json")
    assert refused.code == 2
    assert "no result of `eval follow`" in refused.err
    ran = dit_accel(*FOLLOW, "--prompts", "1", "--output", "out.json", "--force")
    assert ran.code == 0, ran.err
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 1


def test_other_weights_under_the_same_name_are_noticed(dit_accel, tmp_path):
    shutil.copytree(model_folder("tiny-wan"), tmp_path / "model")
    arguments = ("eval", "follow", "--model", "./model", *SMALL, "--prompts", "1", "-o", "out.json")
    assert dit_accel(*arguments).code == 0
    weights = tmp_path / "model/vae/diffusion_pytorch_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    ran = dit_accel(*arguments)
    assert ran.code == 2
    assert "another weights_sha256" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--prompts", "0"], "prompts=0 must be at least 1", id="prompts"),
        pytest.param(["--batch", "0"], "batch=0 must be at least 1", id="batch"),
        pytest.param(["--steps", "0"], "steps=0 must be at least 1", id="steps"),
        pytest.param(["--height", "100"], "take 96", id="height"),
        pytest.param(["--frames", "8"], "take 9", id="frames"),
        pytest.param(["--model", "tiny-van"], "Did you mean 'tiny-wan'", id="model"),
        pytest.param(["--method", "radail"], "Did you mean 'radial'", id="method"),
        pytest.param(["--set", "densty=1"], "Did you mean 'density'", id="option"),
        pytest.param(["--output", "out.txt"], "must end in .json", id="output"),
        pytest.param(["--sheet", "out.jpg"], "must end in .png", id="sheet"),
        pytest.param(["--device", "cuda:99"], "no device", id="device"),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_refused_before_loading(dit_accel, tmp_path, arguments, message):
    ran = dit_accel(*FOLLOW, *arguments)
    assert ran.code == 2
    assert message in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_loading")
def test_a_model_of_no_drawn_world_is_refused(dit_accel, image_model):
    ran = dit_accel("eval", "follow", "--model", image_model)
    assert ran.code == 2
    assert "belongs to no drawn world" in ran.err
