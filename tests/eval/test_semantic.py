"""Prompt following in VBench's manner: drawn scenes follow their prompts, others in part."""

from __future__ import annotations

import pytest

from dit_accel.errors import OptionError, VideoError
from dit_accel.eval.semantic import (
    SEMANTIC,
    make_semantic_reader,
    mean_values,
    semantic_values,
)
from dit_accel.world import clips, pictures
from dit_accel.world.worlds import fixed_prompts


def seen(**things):
    """Return what a checker reports of things by colour."""
    return {colour: {"shape": shape} for colour, shape in things.items()}


ENTRY = {"things": [{"shape": "star", "colour": "red"}, {"shape": "ring", "colour": "blue"}]}
RIGHT = {"background": [True], "pattern": [True]}


@pytest.mark.parametrize(
    ("things", "object_class", "color", "multiple"),
    [
        pytest.param(seen(red="star", blue="ring"), 1, 1, 1, id="all"),
        pytest.param(seen(red="ring", blue="star"), 1, 0, 0, id="colours swapped"),
        pytest.param(seen(red="star"), 0.5, 1, 0, id="one missing"),
        pytest.param(seen(green="star", blue="ring"), 1, 0.5, 0, id="one of another colour"),
        pytest.param(seen(green="cross"), 0, None, 0, id="none of them"),
    ],
)
def test_objects_and_colours_by_hand(things, object_class, color, multiple):
    values = semantic_values(ENTRY, {**RIGHT, "seen": {"things": things}})
    assert values["world_object_class"] == object_class
    assert values.get("world_color") == color  # of absent things there is none
    assert values["world_multiple_objects"] == multiple
    assert values["world_scene"] == 1
    assert values.keys() <= SEMANTIC.keys()


def test_other_attributes_by_hand():
    marks = {
        "background": [True],
        "pattern": [False],
        "relation": [True],
        "place": [False],
        "motion": [True, False],
        "camera": [True, True],
        "style": [False],
        "seen": {"things": seen(red="star")},
    }
    values = semantic_values({"things": ENTRY["things"][:1]}, marks)
    assert values["world_scene"] == 0
    assert values["world_spatial_relationship"] == 0.5
    assert values["world_motion"] == 0.75
    assert values["world_style"] == 0
    assert "world_multiple_objects" not in values


@pytest.mark.parametrize("world", ["clips", "pictures"])
def test_drawn_scenes_follow_their_prompts(world):
    read = make_semantic_reader(world)
    collected = []
    for seed, entry in enumerate(fixed_prompts(world)[:4]):
        if world == "clips":
            drawn = clips.render([clips.Scene.from_dict(entry)], (17, 128, 128), seed)
            frames = drawn[0].permute(1, 0, 2, 3)
        else:
            frames = pictures.render([pictures.Scene.from_dict(entry)], (256, 256), seed)
        collected.append(read((frames + 1) / 2, entry["prompt"]))
    means = mean_values(collected)
    kinds = {"clips": "motion", "pictures": "spatial_relationship"}
    assert f"world_{kinds[world]}" in means
    assert min(means.values()) > 0.9


def test_other_prompts_and_worlds_are_refused():
    read = make_semantic_reader("clips")
    with pytest.raises(VideoError, match="no fixed prompt"):
        read(None, "a cat")
    with pytest.raises(OptionError, match="Did you mean 'clips'"):
        make_semantic_reader("clip")


def test_means_are_over_those_that_have_a_value():
    rows = [{"a": 1.0, "b": 0.0}, {"a": 0.0}, {}]
    assert mean_values(rows) == {"a": 0.5, "b": 0.0}
