"""The checker reads what was drawn off drawn clips."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny_wan"


@pytest.fixture(scope="module", autouse=True)
def recipe_path():
    """The recipe's modules import each other by name, as a script's folder allows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(RECIPE), *sys.path])
        yield


@pytest.fixture(scope="module")
def shape_masks():
    import check

    return check.shape_masks()


def entries():
    return json.loads((RECIPE / "prompts.json").read_text())


@pytest.mark.parametrize("index", [3, 7, 12, 24, 41, 49, 56], ids="prompt{}".format)
def test_drawn_clip_shows_all_it_was_drawn_with(index, shape_masks):
    import check
    import world

    scene = world.Scene.from_dict(entries()[index])
    clip = (world.render([scene], (17, 128, 128), seed=index)[0] + 1) / 2
    marks = check.score_clip(clip.permute(1, 2, 3, 0), scene, shape_masks)
    assert check.summary([marks])["all"] == 1.0, marks


def test_other_scene_scores_low(shape_masks):
    import check
    import world

    drawn, told = (world.Scene.from_dict(entries()[i]) for i in (3, 12))
    clip = (world.render([drawn], (17, 128, 128), seed=0)[0] + 1) / 2
    assert (
        check.summary([check.score_clip(clip.permute(1, 2, 3, 0), told, shape_masks)])["all"] < 0.5
    )


def test_empty_clip_is_read_without_things(shape_masks):
    import check

    seen = check.read_clip(torch.full((9, 128, 128, 3), 0.03), 2, shape_masks)
    assert seen == {"background": "black", "pattern": "plain", "camera": "still", "things": {}}


def test_prompts_are_64_and_say_what_their_scene_holds():
    import world

    assert len(entries()) == 64
    for entry in entries():
        assert entry["prompt"] == world.caption(world.Scene.from_dict(entry))


def test_every_caption_word_is_known():
    import text
    import world

    tokenizer, rng = text.make_tokenizer(), random.Random(0)
    ids = tokenizer([world.caption(world.sample_scene(rng), rng) for _ in range(300)]).input_ids
    assert not any(text.UNKNOWN in row for row in ids)
    assert max(map(len, ids)) < 48


@pytest.mark.parametrize("size", [(1, 16, 16), (5, 24, 40)], ids=str)
def test_clips_of_any_size_are_drawn_in_range(size):
    import world

    rng = random.Random(1)
    clips = world.render([world.sample_scene(rng) for _ in range(3)], size, seed=2)
    assert clips.shape == (3, 3, *size)
    assert clips.min() >= -1
    assert clips.max() <= 1
