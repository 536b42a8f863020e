"""The drawn world of pictures: captioned images of counted, placed and textured things in styles.

A `Scene` says what is in a picture, `caption` puts it into words, and `render` draws it in batched,
anti-aliased plain torch at any size. Places are shares of the width and height, lengths are in
shorter sides, angles in radians; a picture is [C, H, W] in [-1, 1].
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dit_accel.world.painting import (
    background_tensors,
    paint_background,
    paint_outline,
    paint_style,
    paint_thing,
)
from dit_accel.world.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    PATTERNS,
    SHAPES,
    SIZES,
    SYNONYMS,
    TEXTURES,
)

STYLES = ("plain", "outlined", "noisy", "hatched", "dark", "pastel")
COUNTS = ("one", "two", "three", "four")
# The way from the picture's middle to a place; counted groups without a place are "spread".
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0)}
# A relation says where two groups are: the first and the second one's place.
RELATIONS = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
WORDS_OF_PLACE = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "middle": ("in the middle", "in the center"),
}
WORDS_OF_RELATION = {
    "left of": ("to the left of",),
    "right of": ("to the right of",),
    "above": ("over",),
    "below": ("under",),
}
PICTURE_SYNONYMS = {
    **SYNONYMS,
    **WORDS_OF_RELATION,
    "picture": ("image", "drawing"),
    "noisy": ("grainy",),
    "dark": ("dim",),
}
PLURALS = {"cross": "crosses", "box": "boxes", "plus": "pluses"}  # others take an s
SPREADS = (  # where alike things lie, and the scale of their size
    ([(0.28, 0.5), (0.72, 0.5)], 0.8),
    ([(0.5, 0.28), (0.5, 0.72)], 0.8),
    ([(0.3, 0.3), (0.7, 0.7)], 0.8),
    ([(0.7, 0.3), (0.3, 0.7)], 0.8),
    ([(0.5, 0.28), (0.27, 0.7), (0.73, 0.7)], 0.75),
    ([(0.5, 0.72), (0.27, 0.3), (0.73, 0.3)], 0.75),
    ([(0.19, 0.5), (0.5, 0.5), (0.81, 0.5)], 0.58),
    ([(0.5, 0.19), (0.5, 0.5), (0.5, 0.81)], 0.58),
    ([(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)], 0.75),
    ([(0.5, 0.21), (0.21, 0.5), (0.79, 0.5), (0.5, 0.79)], 0.62),
)
MOST_DRAWN = 5  # objects of a scene that `sample_scene` makes

# What a caption's words say: attributes of a thing, and of the scene, with their values.
THING_CLASSES = {
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "shape": SHAPES,
    "count": COUNTS,
    "place": (*PLACES, "spread"),
}
SCENE_CLASSES = {
    "background": tuple(BACKGROUNDS),
    "pattern": PATTERNS,
    "style": STYLES,
    "relation": ("none", *RELATIONS),
}


@dataclass(frozen=True)
class Thing:
    """One drawn object, or a group of up to four alike."""

    size: str
    colour: str
    texture: str
    shape: str
    count: str = "one"
    place: str = "spread"


@dataclass(frozen=True)
class Scene:
    """What a picture shows; `relation` is that of the first thing to the second.

    Only a counted group alone is "spread"; of several things each has a place of its own, and in a
    relation each is up to three alike.
    """

    things: tuple[Thing, ...]
    background: str
    pattern: str = "plain"
    style: str = "plain"
    relation: str = "none"

    @classmethod
    def from_dict(cls, entry: dict) -> Scene:
        """Read what `dataclasses.asdict` wrote; other keys are ignored."""
        known = {f.name: entry[f.name] for f in fields(cls) if f.name in entry}
        return cls(**{**known, "things": tuple(Thing(**t) for t in entry["things"])})


def _sample_look(rng: random.Random) -> tuple[str, str, str]:
    """A background, its pattern and a style."""
    style = "plain" if rng.random() < 0.45 else rng.choice(STYLES[1:])
    return rng.choice(list(BACKGROUNDS)), rng.choice(("plain", *PATTERNS)), style


def sample_thing(rng: random.Random, taken: set[str], count: str, place: str) -> Thing:
    """A random thing in a colour outside `taken`."""
    texture = "plain" if rng.random() < 0.45 else rng.choice(TEXTURES[1:])
    colour = rng.choice([c for c in COLOURS if c not in taken])
    return Thing(rng.choice(list(SIZES)), colour, texture, rng.choice(SHAPES), count, place)


def sample_scene(rng: random.Random) -> Scene:
    """A random scene: one thing, a counted group, two in a relation, or two or three joined.

    Outlined scenes hold nothing white, since outlines are white.
    """
    background, pattern, style = _sample_look(rng)
    kind = rng.choices(("single", "counted", "related", "joined"), (0.28, 0.22, 0.3, 0.2))[0]
    relation = "none"
    if kind == "single":
        groups = [("one", rng.choice(list(PLACES)))]
    elif kind == "counted":
        groups = [(rng.choice(COUNTS[1:]), "spread")]
    elif kind == "related":
        relation = rng.choice(list(RELATIONS))
        alone = ("one", "one")
        counts = rng.choices(
            (alone, ("two", "one"), ("three", "one"), ("two", "two"), ("three", "two")),
            (0.6, 0.14, 0.12, 0.08, 0.06),
        )[0]
        counts = counts if rng.random() < 0.5 else counts[::-1]
        groups = list(zip(counts, RELATIONS[relation], strict=True))
    else:
        places = rng.sample(list(PLACES), rng.choice((2, 2, 3)))
        groups = [("one", p) for p in places]
    taken = {"white"} if style == "outlined" else set()
    things: list[Thing] = []
    for count, place in groups:
        things.append(sample_thing(rng, taken | {t.colour for t in things}, count, place))
    return Scene(tuple(things), background, pattern, style, relation)


def sample_crowd(rng: random.Random, count: int) -> Scene:
    """A crowded scene without a sensible caption: more edges a pixel, to train the autoencoder."""
    things = tuple(sample_thing(rng, set(), "one", "spread") for _ in range(count))
    return Scene(things, *_sample_look(rng))


def plural(noun: str) -> str:
    """Several of `noun`."""
    return PLURALS.get(noun, noun + "s")


def phrases(scene: Scene, rng: random.Random | None = None) -> list[tuple[str, int | None]]:
    """A caption in parts, each with the index of the thing it speaks of (None: of the scene).

    With `rng` it comes in varied words and order, and sometimes leaves out a size. Texture,
    pattern and style are left out only where they are plain.
    """

    def chance(share: float) -> bool:
        return rng is not None and rng.random() < share

    def say(word: str) -> str:
        if rng is not None and word in PICTURE_SYNONYMS and rng.random() < 0.15:
            return rng.choice(PICTURE_SYNONYMS[word])
        return word

    def article(words: str) -> str:
        return ("an " if words[0] in "aeiou" else "a ") + words

    def noun(thing: Thing) -> str:
        words = [] if chance(0.1) else [say(thing.size)]
        if thing.texture != "plain":
            words.append(say(thing.texture))
        words.append(thing.colour)
        if thing.count != "one":
            return " ".join([thing.count, *words, plural(say(thing.shape))])
        phrase = " ".join([*words, say(thing.shape)])
        return f"one {phrase}" if chance(0.04) else article(phrase)

    def placed(thing: Thing) -> str:
        if scene.relation != "none" or thing.place == "spread":
            return noun(thing)
        where = WORDS_OF_PLACE[thing.place][int(chance(0.2))]
        first = not styled_first and chance(0.15)
        return f"{where} {noun(thing)}" if first else f"{noun(thing)} {where}"

    styled_last = scene.style != "plain" and chance(0.3)
    styled_first = scene.style != "plain" and not styled_last
    parts: list[tuple[str, int | None]] = []
    for i, thing in enumerate(scene.things):
        if i == 1 and scene.relation != "none":
            parts.append((say(scene.relation), None))
        elif i:
            parts.append(("," if chance(0.2) else "and", None))
        parts.append((placed(thing), i))
    ground = f"{say(scene.background)} background"
    if scene.pattern != "plain":
        ground = f"{say(scene.pattern)} {ground}"
    styled = article(f"{say(scene.style)} {say('picture')} of")
    if styled_first:
        parts.insert(0, (styled, None))
    if chance(0.2):
        parts.insert(0, (f"{'with' if styled_first else 'on'} {article(ground)},", None))
    else:
        parts.append((f", {ground}" if chance(0.15) else f"on {article(ground)}", None))
    if styled_last:
        parts.append((f", in {say(scene.style)} style", None))
    return parts


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Describe the scene; with `rng` in varied words."""
    return " ".join(text for text, _ in phrases(scene, rng)).replace(" ,", ",")


def vocabulary() -> list[str]:
    """Every word a caption may hold, sorted."""
    shapes = [word for s in SHAPES for word in (s, *SYNONYMS.get(s, ()))]
    looks = [*TEXTURES, *PATTERNS, *STYLES]
    said = [*SIZES, *COLOURS, *BACKGROUNDS, *COUNTS, *RELATIONS, *looks]
    said += [s for word in (*said, "picture") for s in PICTURE_SYNONYMS.get(word, ())]
    said += [
        *shapes,
        *map(plural, shapes),
        *(w for words in WORDS_OF_PLACE.values() for w in words),
    ]
    said.append("a an and , in of on with picture style background")
    return sorted({word for phrase in said for word in phrase.split()} - {"plain"})  # is not said


def _spots(scene: Scene, rng: random.Random) -> tuple[list[list[tuple[float, float]]], float]:
    """Places (x, y) of the objects of each thing, and the scale of their sizes."""
    things = scene.things
    if len(things) > 3:  # a crowd
        return [[(rng.uniform(0.08, 0.92), rng.uniform(0.08, 0.92))] for _ in things], 0.8
    if things[0].place == "spread":
        count = COUNTS.index(things[0].count) + 1
        points, scale = rng.choice([s for s in SPREADS if len(s[0]) == count])
        return [points], scale
    most = max(COUNTS.index(t.count) + 1 for t in things)
    middle = any(t.place == "middle" for t in things)
    if len(things) == 1:
        away, scale = 0.25, 0.95
    elif scene.relation == "none":
        away, scale = 0.29, 0.58 if middle else 0.68
    else:
        away, scale = 0.26, (0.8, 0.7, 0.58)[most - 1]
    aside = 0.03 if len(things) > 1 and scene.relation == "none" else 0.06
    spots = []
    for thing in things:
        dx, dy = PLACES[thing.place]
        count = COUNTS.index(thing.count) + 1
        step = 0.4 if count == 2 else 0.29
        shift = rng.uniform(-aside, aside) if count == 1 else 0.0
        offsets = [step * (k - (count - 1) / 2) + shift for k in range(count)]
        spots.append(
            [(0.5 + dx * away + (dx == 0) * o, 0.5 + dy * away + (dx != 0) * o) for o in offsets]
        )
    return spots, scale


def _objects(scene: Scene, rng: random.Random) -> list[tuple[Thing, list[float]]]:
    """Each object drawn, as its thing and its (x, y, radius, angle)."""
    spots, scale = _spots(scene, rng)
    out = []
    for thing, points in zip(scene.things, spots, strict=True):
        for x, y in points:
            x, y = x + rng.uniform(-0.02, 0.02), y + rng.uniform(-0.02, 0.02)
            r = SIZES[thing.size] * scale * rng.uniform(0.94, 1.06)
            out.append((thing, [x, y, r, rng.uniform(-0.08, 0.08)]))
    return out


def scene_tensors(scenes: list[Scene], seed: int, slots: int = MOST_DRAWN) -> list[Tensor]:
    """What `make_renderer` draws: one row a scene, `slots` objects each (missing: no radius).

    Returns place [N, K, 4], shape and texture [N, K], tones of the objects [N, K, 2, 3] and of the
    background [N, 2, 3], pattern [N], pattern frequency, phase and angle [N, 3],
    cloud waves [N, W, 3], style [N] and the seed of its noise [N].
    """
    rng = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)
    n = len(scenes)
    nothing = ([0.0] * 4, 0, 0, ((0.0,) * 3,) * 2)
    rows = []
    for scene in scenes:
        row = [
            (place, SHAPES.index(t.shape), TEXTURES.index(t.texture), COLOURS[t.colour])
            for t, place in _objects(scene, rng)
        ]
        if len(row) > slots:
            raise ValueError(f"a scene of {len(row)} objects doesn't fit {slots} slots")
        rows.append(row + [nothing] * (slots - len(row)))
    place, shape, texture, tones = (
        torch.tensor([[entry[i] for entry in row] for row in rows]) for i in range(4)
    )
    tones = tones * (1 - 0.06 * torch.rand(n, slots, 1, 1, generator=noise))
    ground, pattern, look, waves = background_tensors(
        [s.background for s in scenes], [s.pattern for s in scenes], noise
    )
    style = torch.tensor([STYLES.index(s.style) for s in scenes])
    grain_seed = torch.randint(1 << 30, (n,), generator=noise)
    return [place, shape, texture, tones, ground, pattern, look, waves, style, grain_seed]


def make_renderer(compiled: bool = False) -> Callable[..., Tensor]:
    """A function (scene tensors..., size=(height, width)) -> pictures [N, 3, H, W] in [-1, 1].

    `compiled` fuses the painting of each layer, for GPUs.
    """
    background, thing, outline, finish = paint_background, paint_thing, paint_outline, paint_style
    if compiled:
        background, thing, outline, finish = (
            torch.compile(f, dynamic=True) for f in (background, thing, outline, finish)
        )

    def draw(*tensors: Tensor, size: tuple[int, int]) -> Tensor:
        place, shape, texture, tones, ground, pattern, look, waves, style, grain_seed = tensors
        height, width = size
        pixels = min(size)
        wide, high = width / pixels, height / pixels
        device = place.device
        rows = ((torch.arange(height, device=device) + 0.5) / height).view(1, 1, -1, 1)
        columns = ((torch.arange(width, device=device) + 0.5) / width).view(1, 1, 1, -1)
        x, y = columns * wide, rows * high
        px, py, r, angle = place.unbind(-1)
        place = torch.stack((px * wide, py * high, r, angle), -1)
        image = background(ground, pattern, look, waves, x, y, pixels)
        for k in range(place.shape[1]):
            at = place[:, k, None]
            image = thing(image, at, shape[:, k], texture[:, k], tones[:, k], x, y, pixels)
            image = outline(image, at, shape[:, k], style == 1, x, y, pixels)
        return finish(image[:, :, 0], style, grain_seed, x, y, pixels) * 2 - 1

    return draw


def render(
    scenes: list[Scene], size: tuple[int, int], seed: int, device: str | torch.device = "cpu"
) -> Tensor:
    """Draw `scenes` at `size` (height, width); returns [N, 3, H, W] in [-1, 1]."""
    slots = max(sum(COUNTS.index(t.count) + 1 for t in s.things) for s in scenes)
    tensors = [t.to(device) for t in scene_tensors(scenes, seed, slots)]
    return make_renderer()(*tensors, size=size)
