"""The drawn world of pictures: its scenes, captions and drawings."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from dit_accel.world import pictures
from dit_accel.world.pictures import Scene, Thing

PROMPTS = json.loads(
    Path(pictures.__file__).with_name("prompts").joinpath("pictures.json").read_text()
)


def scenes(count: int, seed: int) -> list[Scene]:
    rng = random.Random(seed)
    return [pictures.sample_scene(rng) for _ in range(count)]


def words(caption: str) -> list[str]:
    return caption.replace(",", " , ").split()


def test_prompts_are_the_captions_of_their_scenes():
    assert len({entry["prompt"] for entry in PROMPTS}) == 64
    for entry in PROMPTS:
        assert pictures.caption(Scene.from_dict(entry)) == entry["prompt"]


@pytest.mark.parametrize("name", [*pictures.THING_CLASSES, *pictures.SCENE_CLASSES])
def test_prompts_and_samples_use_every_value_of_every_class(name):
    classes = {**pictures.THING_CLASSES, **pictures.SCENE_CLASSES}
    for group in ([Scene.from_dict(entry) for entry in PROMPTS], scenes(400, 0)):
        owners = [t for s in group for t in s.things] if name in pictures.THING_CLASSES else group
        assert {getattr(owner, name) for owner in owners} == set(classes[name])


def test_scenes_survive_a_round_trip_through_dicts():
    for scene in scenes(50, 1):
        assert Scene.from_dict(json.loads(json.dumps(asdict(scene)))) == scene


def test_sampled_scenes_are_drawable_and_say_what_can_be_seen():
    for scene in scenes(500, 2):
        drawn = sum(pictures.COUNTS.index(t.count) + 1 for t in scene.things)
        colours = [t.colour for t in scene.things]
        assert drawn <= pictures.MOST_DRAWN
        assert len(set(colours)) == len(colours)
        assert scene.style != "outlined" or "white" not in colours
        if scene.relation != "none":
            assert tuple(t.place for t in scene.things) == pictures.RELATIONS[scene.relation]


def test_captions_are_short_and_in_the_vocabulary():
    known, rng = set(pictures.vocabulary()), random.Random(3)
    for scene in scenes(500, 3):
        for caption in (pictures.caption(scene), pictures.caption(scene, rng)):
            assert set(words(caption)) <= known
            assert len(words(caption)) < 40


def test_every_word_of_the_vocabulary_is_said():
    rng = random.Random(4)
    said = {w for scene in scenes(4000, 4) for w in words(pictures.caption(scene, rng))}
    assert said == set(pictures.vocabulary())


def test_phrases_name_their_thing_and_never_hide_texture_pattern_or_style():
    rng = random.Random(5)

    def names(value: str) -> set[str]:
        return {value, *pictures.PICTURE_SYNONYMS.get(value, ())}

    for scene in scenes(300, 5):
        parts = pictures.phrases(scene, rng)
        rest = " ".join(text for text, owner in parts if owner is None)
        for value in {scene.pattern, scene.style} - {"plain"}:
            assert any(name in rest for name in names(value))
        for index, thing in enumerate(scene.things):
            (text,) = [text for text, owner in parts if owner == index]
            assert thing.colour in text
            assert thing.texture == "plain" or any(n in text for n in names(thing.texture))


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (
            Scene((Thing("small", "red", "plain", "circle", "three"),), "gray", style="outlined"),
            "an outlined picture of three small red circles on a gray background",
        ),
        (
            Scene(
                (
                    Thing("large", "red", "dotted", "square", place="left"),
                    Thing("small", "blue", "plain", "cross", "two", place="right"),
                ),
                "dark blue",
                "cloudy",
                relation="left of",
            ),
            "a large dotted red square left of two small blue crosses"
            " on a cloudy dark blue background",
        ),
        (
            Scene(
                (
                    Thing("large", "red", "plain", "star", place="top"),
                    Thing("small", "cyan", "plain", "ring", place="middle"),
                ),
                "black",
            ),
            "a large red star at the top and a small cyan ring in the middle on a black background",
        ),
    ],
    ids=["counted", "related", "joined"],
)
def test_canonical_captions(scene, caption):
    assert pictures.caption(scene) == caption


def test_drawing_is_decided_by_the_seed():
    group = scenes(4, 6)
    first, again = (pictures.render(group, (40, 40), 7) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, pictures.render(group, (40, 40), 8))


@pytest.mark.parametrize("size", [(64, 64), (200, 136), (33, 71)], ids=str)
def test_drawing_at_any_size(size):
    picture = pictures.render(scenes(6, 8), size, 0)
    assert picture.shape == (6, 3, *size)
    assert picture.isfinite().all()
    assert picture.abs().max() <= 1


def test_a_circle_stays_round_in_a_wide_picture():
    scene = Scene((Thing("large", "white", "plain", "circle", place="left"),), "black")
    white = pictures.render([scene], (64, 128), 0)[0].amin(0) > 0.3
    across, down = white.any(0).sum(), white.any(1).sum()
    assert abs(int(across) - int(down)) <= 2
    assert white[:, :64].sum() > 0
    assert white[:, 64:].sum() == 0


@pytest.mark.parametrize("style", pictures.STYLES[1:])
def test_styles_change_the_picture(style):
    look = Scene((Thing("large", "red", "plain", "circle", place="middle"),), "gray")
    plain, styled = pictures.render([look, Scene(look.things, "gray", style=style)], (64, 64), 0)
    tensors = pictures.scene_tensors([look], 0)
    tensors[8] = torch.tensor([pictures.STYLES.index(style)])
    alone = pictures.make_renderer()(*tensors, size=(64, 64))[0]
    assert (styled - plain).abs().mean() > 0.01
    assert (alone - plain).abs().mean() > 0.01


def test_tensors_have_fixed_shapes_and_refuse_too_many_objects():
    shapes = {
        tuple(t.shape for t in pictures.scene_tensors(scenes(5, seed), seed, 8))
        for seed in range(3)
    }
    assert len(shapes) == 1
    crowd = pictures.sample_crowd(random.Random(9), 8)
    assert pictures.render([crowd], (48, 48), 0).isfinite().all()
    with pytest.raises(ValueError, match="8 objects"):
        pictures.scene_tensors([crowd], 0, 7)
