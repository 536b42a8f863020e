"""The checker reads off drawn clips what they were drawn with, and misses what was taken away."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dit_accel.world import clips
from dit_accel.world.clip_checker import read_clip, score_clip
from dit_accel.world.clips import Scene, Thing
from dit_accel.world.reading import shape_masks
from dit_accel.world.worlds import fixed_prompts, make_reader, shares_right

SIZE = (17, 128, 128)


@pytest.fixture(scope="module")
def masks() -> Tensor:
    return shape_masks()


def draw(scene: Scene, seed: int = 0) -> Tensor:
    """Return the clip [T, H, W, 3] in [0, 1]."""
    return ((clips.render([scene], SIZE, seed)[0] + 1) / 2).permute(1, 2, 3, 0)


def square(motion: str = "moving right", *, shape: str = "square", **scene: str) -> Scene:
    thing = Thing("large", "red", "plain", shape, motion)
    return Scene((thing,), **{"background": "black", "pattern": "striped", **scene})


def wrong(clip: Tensor, scene: Scene, masks: Tensor) -> set[str]:
    """Return the kinds of attributes of which the checker misses some."""
    marks = score_clip(clip, scene, masks)
    return {kind for kind, right in marks.items() if kind != "seen" and not all(right)}


def test_at_least_99_percent_of_random_scenes_is_right(masks):
    rng = random.Random(5)
    scenes = [clips.sample_scene(rng) for _ in range(24)]
    marks = [score_clip(draw(scene, i), scene, masks) for i, scene in enumerate(scenes)]
    shares = shares_right(marks)
    assert shares["attributes"] > 120
    assert shares["all"] >= 0.99
    assert {"colour", "shape", "motion", "background", "pattern", "camera"} < shares.keys()


def test_another_scene_scores_low(masks):
    drawn, told = (Scene.from_dict(fixed_prompts("clips")[i]) for i in (3, 12))
    assert shares_right([score_clip(draw(drawn), told, masks)])["all"] < 0.5


GROWING = square("growing")
PAN = square("staying still", camera="panning left", pattern="checkered")


@pytest.mark.parametrize("scene", [square(), GROWING, PAN], ids=["moving", "growing", "pan"])
def test_a_drawn_clip_shows_all_it_was_drawn_with(masks, scene):
    assert wrong(draw(scene), scene, masks) == set()


def recoloured(clip: Tensor) -> Tensor:
    """Make red things blue."""
    return torch.where((clip[..., :1] > 0.7) & (clip[..., 1:2] < 0.4), clip.flip(-1), clip)


@pytest.mark.parametrize(
    ("scene", "corrupt", "lost"),
    [
        pytest.param(square(), recoloured, {"colour", "shape", "motion"}, id="other colour"),
        pytest.param(square(), lambda clip: clip.flip(0), {"motion"}, id="backwards"),
        pytest.param(square(), lambda clip: clip[8:9].expand_as(clip), {"motion"}, id="frozen"),
        pytest.param(GROWING, lambda clip: clip.flip(0), {"motion"}, id="shrinking instead"),
        pytest.param(PAN, lambda clip: clip.flip(2), {"camera"}, id="mirrored pan"),
        pytest.param(
            square(), lambda clip: (clip + 0.33).clamp(max=1), {"background"}, id="too bright"
        ),
    ],
)
def test_a_corrupted_clip_loses_the_attribute(masks, scene, corrupt, lost):
    assert lost <= wrong(corrupt(draw(scene)), scene, masks)


@pytest.mark.parametrize("attribute", ["shape", "pattern", "background"])
def test_one_changed_attribute_is_the_one_that_is_wrong(masks, attribute):
    other = {"shape": "triangle", "pattern": "dotted", "background": "brown"}[attribute]
    assert wrong(draw(square(**{attribute: other})), square(), masks) == {attribute}


def test_an_empty_clip_is_read_without_things(masks):
    seen = read_clip(torch.full((9, 128, 128, 3), 0.03), 2, masks)
    assert seen == {"background": "black", "pattern": "plain", "camera": "still", "things": {}}


def test_the_reader_takes_frames_as_generation_gives_them():
    entry = fixed_prompts("clips")[0]
    frames = draw(Scene.from_dict(entry)).permute(0, 3, 1, 2)
    assert shares_right([make_reader("clips")(frames, entry)])["all"] == 1


def test_shares():
    marks = [{"colour": [True, False], "seen": {}}, {"colour": [True], "camera": [], "shape": []}]
    assert shares_right(marks) == {"colour": 2 / 3, "all": 2 / 3, "attributes": 3}
    assert shares_right([]) == {"attributes": 0}
