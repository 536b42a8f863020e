"""Statistics of attention: what they are on known maps, on every family, and in a card."""

import json
import sys

import pytest
import torch
from tiny_pipelines import TINY_PIPELINES

from dit_accel.call import TokenLayout
from dit_accel.generation import GenerationRequest
from recipes.shared import attention, card


def test_statistics_of_an_even_map_and_of_one_that_sees_itself():
    layout = TokenLayout((3, 4, 5), text_length=20)
    even = torch.zeros(80, 1, 8)
    found = attention.head_statistics(even, even, layout)
    assert found["effective keys"].item() == pytest.approx(80, rel=1e-4)
    assert found["mass on the text"].item() == pytest.approx(0.25)
    assert found["mass on the first frame"].item() == pytest.approx(0.25)
    assert found["mass at the same place in all frames"].item() == pytest.approx(3 / 80)
    assert found["mass of the strongest quarter of keys"].item() == pytest.approx(0.25)
    itself = torch.eye(80)[:, None] * 100
    found = attention.head_statistics(itself, itself, layout)
    assert found["effective keys"].item() == pytest.approx(1)
    assert found["mass within 1 frame and 2 tokens"].item() == pytest.approx(1)
    assert found["mass on the text"].item() == pytest.approx(0)


@pytest.mark.parametrize("name", ["wan", "flux", "sd3"])
@torch.no_grad()
def test_every_family_is_measured_and_left_as_it_was(name):
    pipe = TINY_PIPELINES[name][0]()
    size = {"frames": 5} if name == "wan" else {}
    request = GenerationRequest(prompt="a ball", height=112, width=144, steps=4, **size)
    found = attention.attention_statistics(pipe, [request])
    assert not hasattr(pipe, "_dit_accel")
    assert set(found["noise"]) == {str(level) for level in attention.NOISE_LEVELS}
    assert bool(found["text_tokens"]) == (name != "wan")
    for statistics in found["noise"].values():
        for layer in statistics["effective keys"]:
            assert all(v >= 1 for v in layer)
    assert len(attention.table(found)) == 2 + len(next(iter(found["noise"].values())))


def test_a_card_gets_its_section_again_and_keeps_the_rest(tmp_path, monkeypatch):
    statistics = {"effective keys": [[3.0, 40.0], [5.0, 1200.0]]}
    content = {"prompts": 1, "grid": [1, 8, 8], "text_tokens": 9, "noise": {"0.7": statistics}}
    (tmp_path / "attention.json").write_text(json.dumps(content))
    readme = tmp_path / "README.md"
    readme.write_text("# mine\n\nkept\n\n## What it can't do\n\n- It can't sing.\n")
    monkeypatch.setattr(sys, "argv", ["card", str(tmp_path)])
    card.main()
    once = readme.read_text()
    assert "| effective keys | 3 | 40 | 1,200 |" in once
    assert once.startswith("# mine\n\nkept\n\n## Attention\n")
    assert once.endswith("\n\n## What it can't do\n\n- It can't sing.\n")
    card.main()
    assert readme.read_text() == once
