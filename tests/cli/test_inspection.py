"""The commands that look at what there is: methods, families, doctor, show-mask."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from PIL import Image

from dit_accel.functional import attention_mask
from dit_accel.methods.gna import GNA
from dit_accel.operators import list_operators
from dit_accel.registry import list_families, list_methods, method_class


def test_methods_lists_every_option(dit_accel):
    rows = {row["name"]: row for row in json.loads(dit_accel("methods", "--json").out)}
    assert sorted(rows) == list_methods()
    for name, row in rows.items():
        expected = {field.name for field in fields(method_class(name))}
        assert {option["name"] for option in row["options"]} == expected
    decay = next(o for o in rows["radial"]["options"] if o["name"] == "decay")
    assert decay == {"name": "decay", "type": "float", "default": method_class("radial")().decay}
    assert rows["radial"]["static"]


def test_families(dit_accel):
    rows = json.loads(dit_accel("families", "--json").out)
    assert [row["name"] for row in rows] == list_families()
    assert all(row["transformers"] for row in rows)


def test_doctor_gives_a_reason_for_each_operator_that_cannot_run(dit_accel):
    found = json.loads(dit_accel("doctor", "--json").out)
    assert found["operators"] == {op.name: op.why_not_here() for op in list_operators()}
    assert found["operators"]["torch"] is None
    assert found["packages"]["torch"]
    assert found["ffmpeg"]
    assert found["tile_shapes"].startswith(("built-in table", "measured on this card"))


@pytest.mark.parametrize("command", ["methods", "families", "doctor"])
def test_tables(dit_accel, command):
    ran = dit_accel(command)
    assert ran.code == 0
    words = {"methods": list_methods(), "families": list_families(), "doctor": ["triton", "flex"]}
    assert all(word in ran.out for word in words[command])


def test_show_mask_draws_and_counts(dit_accel, tmp_path):
    ran = dit_accel(
        *("show-mask", "gna", "--grid", "3,7,9", "--text", "5", "-o", "mask.png", "--json"),
        *("--set", "window=3,3,3", "--set", "block_size=16"),
    )
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    mask = attention_mask(GNA(window=3, block_size=16), grid=(3, 7, 9), text_length=5)
    assert found["density"] == pytest.approx(mask.float().mean().item())
    assert found["density"] <= found["block_density"] <= 1
    with Image.open(tmp_path / "mask.png") as picture:
        picture.verify()


def test_show_mask_at_a_density(dit_accel):
    ran = dit_accel(
        *("show-mask", "gna", "--grid", "5,12,16", "-o", "mask.png", "--json"),
        *("--set", "density=0.4", "--set", "block_size=16"),
    )
    assert json.loads(ran.out)["block_density"] <= 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["radial", "--grid", "3x4x5"], "write tokens as T,H,W", id="grid text"),
        pytest.param(["radial", "--grid", "3,0,5"], "no token grid", id="grid value"),
        pytest.param(["dense", "--grid", "3,4,5"], "no one mask", id="not static"),
        pytest.param(["radial", "--grid", "3,4,5", "--text", "-1"], "text", id="text"),
        pytest.param(["gna", "--grid", "3,4,5", "--set", "window=9"], "window", id="window"),
        pytest.param(["gna", "--grid", "3,4,5", "--set", "backend=flex"], "backend", id="general"),
        pytest.param(["radial", "--grid", "3,4,5", "-o", "m.jpg"], "must end in .png", id="suffix"),
    ],
)
def test_show_mask_refuses(dit_accel, tmp_path, arguments, message):
    ran = dit_accel("show-mask", "--output", "mask.png", *arguments)
    assert ran.code == 2
    assert message in ran.err
    assert list(tmp_path.iterdir()) == []
