"""The picture checker against drawings whose content is known."""

import random
from collections import Counter

import pytest
import torch

from dit_accel.world import pictures
from dit_accel.world.picture_checker import read_picture, score_picture
from dit_accel.world.pictures import Scene, Thing
from dit_accel.world.reading import shape_masks
from dit_accel.world.worlds import fixed_prompts

SLOTS, TONES, STYLE = 0, 3, 8  # of `scene_tensors`: places of objects, their tones, the style

RELATED = Scene(
    (
        Thing("large", "red", "plain", "square", place="left"),
        Thing("large", "cyan", "striped", "star", place="right"),
    ),
    "dark green",
    "dotted",
    "outlined",
    "left of",
)
JOINED = Scene(
    (
        Thing("large", "orange", "dotted", "circle", place="left"),
        Thing("small", "blue", "plain", "ring", place="top"),
    ),
    "gray",
    "striped",
    "pastel",
)
COUNTED = Scene(
    (Thing("small", "magenta", "checkered", "triangle", "three"),), "brown", "checkered", "noisy"
)


@pytest.fixture(scope="module")
def masks():
    return shape_masks()


def drawn(scene: Scene, change=None, size=(256, 256), seed=0) -> torch.Tensor:
    """A picture [H, W, 3] in [0, 1], after `change` of its tensors."""
    slots = sum(pictures.COUNTS.index(t.count) + 1 for t in scene.things)
    tensors = pictures.scene_tensors([scene], seed, slots)
    if change:
        change(tensors)
    return (pictures.make_renderer()(*tensors, size=size)[0].permute(1, 2, 0) + 1) / 2


def lost(picture: torch.Tensor, scene: Scene, masks: torch.Tensor) -> Counter:
    """How many marks of each kind are wrong."""
    marks = score_picture(picture, scene, masks)
    return Counter({k: v.count(False) for k, v in marks.items() if k != "seen" and False in v})


def swap_tones(tensors):
    tensors[TONES][:, :2] = tensors[TONES][:, :2].flip(1)


def erase_first(tensors):
    tensors[SLOTS][:, 0] = 0


def remove_style(tensors):
    tensors[STYLE].zero_()


def test_reads_drawn_pictures(masks):
    rng, right, asked = random.Random(20), Counter(), Counter()
    for i in range(50):
        scene = pictures.sample_scene(rng)
        marks = score_picture(drawn(scene, seed=i), scene, masks)
        for kind, values in marks.items():
            if kind != "seen":
                right[kind] += sum(values)
                asked[kind] += len(values)
    assert set(asked) == {
        *("colour", "shape", "texture", "count", "place"),
        *("relation", "background", "pattern", "style"),
    }
    assert right.total() >= 0.99 * asked.total()


def test_reads_the_fixed_prompts(masks):
    wrong = Counter()
    for entry in fixed_prompts("pictures")[::4]:
        scene = Scene.from_dict(entry)
        wrong += lost(drawn(scene, seed=0), scene, masks)
    assert wrong.total() <= 1


def test_reads_blurred_and_noisy_pictures(masks):
    rng, noise = random.Random(21), torch.Generator().manual_seed(0)
    wrong = asked = 0
    for i in range(8):
        scene = pictures.sample_scene(rng)
        x = drawn(scene, seed=i)
        x = (2 * x + x.roll(1, 0) + x.roll(1, 1)) / 4
        x = (x + 0.02 * torch.randn(x.shape, generator=noise)).clamp(0, 1)
        marks = score_picture(x, scene, masks)
        asked += sum(len(v) for k, v in marks.items() if k != "seen")
        wrong += lost(x, scene, masks).total()
    assert wrong <= 0.03 * asked


@pytest.mark.parametrize("scene", [RELATED, JOINED, COUNTED], ids=["related", "joined", "counted"])
@pytest.mark.parametrize("size", [(256, 256), (200, 328), (384, 384)], ids=str)
def test_reads_known_scenes_at_any_size(scene, size, masks):
    assert not lost(drawn(scene, size=size), scene, masks)


@pytest.mark.parametrize(
    ("scene", "change", "kinds"),
    [
        (RELATED, swap_tones, {"shape": 2, "texture": 2, "relation": 1}),
        (RELATED, remove_style, {"style": 1}),
        (JOINED, remove_style, {"style": 1}),
        (COUNTED, remove_style, {"style": 1}),
        (COUNTED, erase_first, {"count": 1}),
        (JOINED, erase_first, dict.fromkeys(("colour", "shape", "texture", "count", "place"), 1)),
    ],
    ids=[
        "colours swapped",
        "outlines removed",
        "pastel removed",
        "noise removed",
        "one of three erased",
        "one thing erased",
    ],
)
def test_changed_pictures_lose_what_was_changed(scene, change, kinds, masks):
    assert lost(drawn(scene, change), scene, masks) == kinds


@pytest.mark.parametrize(
    ("scene", "kinds"),
    [(RELATED, {"relation": 1}), (JOINED, {"place": 1})],
    ids=["related", "joined"],
)
def test_mirrored_pictures_lose_their_sides(scene, kinds, masks):
    assert lost(drawn(scene).flip(1), scene, masks) == kinds


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0], ids=str)
def test_an_empty_picture_shows_no_thing(value, masks):
    seen = read_picture(torch.full((64, 64, 3), value), 2, masks)
    assert all(thing["count"] == "one" for thing in seen["things"].values())
    assert len(seen["things"]) <= 1
