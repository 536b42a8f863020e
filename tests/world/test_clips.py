"""The drawn world of clips: captions that say what is drawn, at any size."""

from __future__ import annotations

import random

import pytest

from dit_accel.errors import OptionError
from dit_accel.world import clips
from dit_accel.world.worlds import fixed_prompts, unknown_words


def test_prompts_are_64_and_say_what_their_scene_holds():
    entries = fixed_prompts("clips")
    assert len(entries) == 64
    for entry in entries:
        assert entry["prompt"] == clips.caption(clips.Scene.from_dict(entry))


def test_captions_use_known_words_and_fit_the_text_encoder():
    rng = random.Random(0)
    for _ in range(300):
        caption = clips.caption(clips.sample_scene(rng), rng)
        assert unknown_words("clips", caption) == []
        assert len(caption.replace(",", " , ").split()) < 48


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("A Large red circle, moving left.", []),
        ("a dog, a red cat and a dog", ["dog", "cat"]),
        ("red-ish!", ["-", "ish", "!"]),
        ("", []),
    ],
)
def test_unknown_words(text, unknown):
    assert unknown_words("clips", text) == unknown


def test_an_unknown_world_is_refused():
    for ask in (fixed_prompts, lambda name: unknown_words(name, "red")):
        with pytest.raises(OptionError, match="Did you mean 'clips'"):
            ask("clip")


def test_a_scene_is_drawn_alike_again_and_otherwise_from_another_seed():
    scene = clips.sample_scene(random.Random(3))
    first, again, other = (clips.render([scene], (5, 32, 32), seed=s) for s in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("size", [(1, 16, 16), (5, 24, 40)], ids=str)
def test_clips_of_any_size_are_drawn_in_range(size):
    rng = random.Random(1)
    drawn = clips.render([clips.sample_scene(rng) for _ in range(3)], size, seed=2)
    assert drawn.shape == (3, 3, *size)
    assert drawn.min() >= -1
    assert drawn.max() <= 1
