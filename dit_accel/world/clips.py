"""The drawn world of clips: captioned videos of moving, textured shapes.

A `Scene` says what is in a clip, `caption` puts it into words, and `render` draws it in batched,
anti-aliased plain torch at any length and size. Lengths are in frame widths and heights (0 to 1),
angles in radians; a clip is [C, T, H, W] in [-1, 1].
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dit_accel.world.painting import background_tensors, paint_background, paint_thing
from dit_accel.world.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    PATTERNS,
    SHAPES,
    SIZES,
    SYNONYMS,
    TEXTURES,
)

MOTIONS = (
    *(f"moving {d}" for d in DIRECTIONS),
    "staying still",
    "growing",
    "shrinking",
    "spinning",
)
CAMERAS = ("still", *(f"panning {d}" for d in DIRECTIONS), "zooming in", "zooming out")

# What a caption's words say: attributes of a thing, and of the scene, with their values.
THING_CLASSES = {
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "shape": SHAPES,
    "motion": MOTIONS,
}
SCENE_CLASSES = {"background": tuple(BACKGROUNDS), "pattern": PATTERNS, "camera": CAMERAS}


@dataclass(frozen=True)
class Thing:
    """One drawn object."""

    size: str
    colour: str
    texture: str
    shape: str
    motion: str


@dataclass(frozen=True)
class Scene:
    """What a clip shows; later things lie in front of earlier ones."""

    things: tuple[Thing, ...]
    background: str
    pattern: str = "plain"
    camera: str = "still"

    @classmethod
    def from_dict(cls, entry: dict) -> Scene:
        """Read what `dataclasses.asdict` wrote; other keys are ignored."""
        known = {f.name: entry[f.name] for f in fields(cls) if f.name in entry}
        return cls(**{**known, "things": tuple(Thing(**t) for t in entry["things"])})


def sample_thing(rng: random.Random, taken: set[str], motions: tuple[str, ...]) -> Thing:
    """A random thing in a colour outside `taken`."""
    shape = rng.choice(SHAPES)
    texture = "plain" if rng.random() < 0.5 else rng.choice(TEXTURES[1:])
    if texture == "plain" and shape in ("circle", "ring"):  # these would not be seen to spin
        motions = tuple(m for m in motions if m != "spinning")
    colour = rng.choice([c for c in COLOURS if c not in taken])
    return Thing(rng.choice(list(SIZES)), colour, texture, shape, rng.choice(motions))


def sample_scene(rng: random.Random, things: int | None = None) -> Scene:
    """A random scene of one to three things (or `things`); the camera moves in a fifth of them.

    Under a moving camera all things stay where they are in the world, and the background has a
    pattern that shows the movement in both axes.
    """
    count = things or rng.choices((1, 2, 3), (0.62, 0.27, 0.11))[0]
    moves = rng.random() < 0.2
    camera = rng.choice(CAMERAS[1:]) if moves else "still"
    pattern = rng.choice(PATTERNS[2:] if moves else ("plain", *PATTERNS))
    motions = ("staying still", "spinning") if moves else (*MOTIONS, "spinning")
    chosen: list[Thing] = []
    for _ in range(count):
        chosen.append(sample_thing(rng, {t.colour for t in chosen}, motions))
    return Scene(tuple(chosen), rng.choice(list(BACKGROUNDS)), pattern, camera)


def sample_crowd(rng: random.Random, count: int) -> Scene:
    """A crowded scene without a sensible caption: more edges a pixel, to train the autoencoder."""
    things = tuple(sample_thing(rng, set(), MOTIONS) for _ in range(count))
    camera = rng.choice(("still", *CAMERAS))
    return Scene(things, rng.choice(list(BACKGROUNDS)), rng.choice(PATTERNS), camera)


def phrases(scene: Scene, rng: random.Random | None = None) -> list[tuple[str, int | None]]:
    """A caption in parts, each with the index of the thing it speaks of (None: of the scene).

    With `rng` it comes in varied words and order, and sometimes says less than all.
    """

    def say(word: str) -> str:
        if rng is not None and word in SYNONYMS and rng.random() < 0.12:
            return rng.choice(SYNONYMS[word])
        return word

    def drop(share: float) -> bool:
        return rng is not None and rng.random() < share

    def noun(thing: Thing) -> str:
        words = [] if drop(0.08) else [say(thing.size)]
        if thing.texture != "plain" and not drop(0.05):
            words.append(say(thing.texture))
        return " ".join([*words, thing.colour, say(thing.shape)])

    def motion(thing: Thing) -> str:
        if thing.motion in SYNONYMS:
            return say(thing.motion)
        return " ".join(say(w) for w in thing.motion.split())

    pattern = "" if scene.pattern == "plain" else say(scene.pattern) + " "
    place = f"{pattern}{say(scene.background)} background"
    style = 0.0 if rng is None else rng.random()
    short = 0.78 <= style < 0.88
    article, verb = ("" if short else "a "), ("is " if 0.65 <= style < 0.78 else "")
    parts: list[tuple[str, int | None]] = []
    for i, thing in enumerate(scene.things):
        parts += [("," if short else "and", None)] * (i > 0)
        parts.append((f"{article}{noun(thing)} {verb}{motion(thing)}", i))
    if style < 0.78:
        parts.append((f"on a {place}", None))
    elif short:
        parts.append((f", {place}", None))
    elif style < 0.96:
        parts.insert(0, (f"on a {place},", None))
    if scene.camera != "still":
        parts.append((f", camera {scene.camera}", None))
    return parts


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Describe the scene; with `rng` in varied words."""
    return " ".join(text for text, _ in phrases(scene, rng)).replace(" ,", ",")


def vocabulary() -> list[str]:
    """Every word a caption may hold, sorted."""
    phrases = ["a an the on is are and with of to in out , . camera video object shape background"]
    phrases += [*SIZES, *COLOURS, *TEXTURES, *PATTERNS, *SHAPES, *MOTIONS, *CAMERAS, *BACKGROUNDS]
    phrases += [s for group in SYNONYMS.values() for s in group]
    return sorted({word for phrase in phrases for word in phrase.split()})


def _place(scene: Scene, rng: random.Random) -> tuple[list[list[float]], list[list[float]]]:
    """Per thing its (x, y, radius, angle) at the clip's start and end."""
    count = len(scene.things)
    crowd = count > 3
    scale = {1: 1.0, 2: 0.85, 3: 0.72}.get(count, 0.8)
    # Two or three things start in lanes of their own; whoever moves across lanes passes others.
    lanes = {1: [0.0], 2: [-0.25, 0.25], 3: [-0.3, 0.0, 0.3]}.get(count, [0.0] * count)
    rng.shuffle(lanes)
    across = scene.things[0].motion in ("moving left", "moving right")
    starts, ends = [], []
    for thing, lane in zip(scene.things, lanes, strict=True):
        r = SIZES[thing.size] * scale * rng.uniform(0.92, 1.08)
        low, high = (0.1, 0.9) if crowd else (0.36, 0.64)
        x, y = rng.uniform(low, high), rng.uniform(low, high)
        if count in (2, 3) and across:
            y = 0.5 + lane + rng.uniform(-0.03, 0.03)
        elif count in (2, 3):
            x = 0.5 + lane + rng.uniform(-0.03, 0.03)
        angle = rng.uniform(-0.06, 0.06)
        start, end = [x, y, r, angle], [x, y, r, angle]
        kind, _, way = thing.motion.partition(" ")
        if kind == "moving":
            axis = 0 if way in ("left", "right") else 1
            reach = rng.uniform(0.44, 0.56) if thing.size == "small" else rng.uniform(0.36, 0.46)
            middle = rng.uniform(0.3, 0.7) if crowd else 0.5 + rng.uniform(-0.03, 0.03)
            sign = DIRECTIONS[way][axis]
            start[axis], end[axis] = middle - sign * reach / 2, middle + sign * reach / 2
        elif kind == "growing":
            start[2], end[2] = 0.45 * r, 1.25 * r
        elif kind == "shrinking":
            start[2], end[2] = 1.25 * r, 0.45 * r
        elif kind == "spinning":
            end[3] = angle + rng.uniform(0.9, 1.1) * math.pi
        starts.append(start)
        ends.append(end)
    return starts, ends


def _camera(camera: str, rng: random.Random) -> list[float]:
    """(x, y) travelled over the clip, and the log of the zoom at its start and end."""
    kind, _, way = camera.partition(" ")
    if kind == "panning":
        reach = rng.uniform(0.25, 0.35)
        return [DIRECTIONS[way][0] * reach, DIRECTIONS[way][1] * reach, 0.0, 0.0]
    if kind == "zooming":
        half = rng.uniform(0.2, 0.27) * (1 if way == "in" else -1)
        return [0.0, 0.0, -half, half]
    return [0.0, 0.0, 0.0, 0.0]


def scene_tensors(scenes: list[Scene], seed: int, slots: int = 3) -> list[Tensor]:
    """What `render` draws: one row a scene, `slots` things each (missing ones have no radius).

    Returns start and end [N, K, 4], shape and texture [N, K], thing tones [N, K, 2, 3],
    background tones [N, 2, 3], pattern [N], pattern frequency, phase and angle [N, 3],
    cloud waves [N, W, 3], camera [N, 4].
    """
    rng = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)
    n = len(scenes)
    start, end = torch.zeros(n, slots, 4), torch.zeros(n, slots, 4)
    shape = torch.zeros(n, slots, dtype=torch.long)
    texture = torch.zeros(n, slots, dtype=torch.long)
    tones = torch.zeros(n, slots, 2, 3)
    for i, scene in enumerate(scenes):
        k = len(scene.things)
        placed = _place(scene, rng)
        start[i, :k], end[i, :k] = torch.tensor(placed[0]), torch.tensor(placed[1])
        shape[i, :k] = torch.tensor([SHAPES.index(t.shape) for t in scene.things])
        texture[i, :k] = torch.tensor([TEXTURES.index(t.texture) for t in scene.things])
        tones[i, :k] = torch.tensor([COLOURS[t.colour] for t in scene.things])
    tones = tones * (1 - 0.06 * torch.rand(n, slots, 1, 1, generator=noise))
    ground, pattern, look, waves = background_tensors(
        [s.background for s in scenes], [s.pattern for s in scenes], noise
    )
    camera = torch.tensor([_camera(s.camera, rng) for s in scenes])
    return [start, end, shape, texture, tones, ground, pattern, look, waves, camera]


def make_renderer(compiled: bool = False) -> Callable[..., Tensor]:
    """A function (scene tensors..., frames, height, width) -> clips [N, 3, T, H, W] in [-1, 1].

    `compiled` fuses the painting of each layer, for GPUs.
    """
    background, thing = paint_background, paint_thing
    if compiled:
        background = torch.compile(background, dynamic=True)
        thing = torch.compile(thing, dynamic=True)

    def draw(*tensors: Tensor, size: tuple[int, int, int]) -> Tensor:
        start, end, shape, texture, tones, ground, pattern, look, waves, camera = tensors
        frames, height, width = size
        t = torch.linspace(0, 1, frames, device=start.device)
        rows = ((torch.arange(height, device=start.device) + 0.5) / height).view(1, 1, -1, 1)
        columns = ((torch.arange(width, device=start.device) + 0.5) / width).view(1, 1, 1, -1)
        zoom = (camera[:, 2:3] + (camera[:, 3:4] - camera[:, 2:3]) * t).exp()[..., None, None]
        pan = (camera[:, :2, None] * (t - 0.5))[..., None, None]  # [N, 2, T, 1, 1]
        x, y = (columns - 0.5) / zoom + 0.5 + pan[:, 0], (rows - 0.5) / zoom + 0.5 + pan[:, 1]
        pixels = zoom * height
        image = background(ground, pattern, look, waves, x, y, pixels)
        t = t.view(1, -1, 1)
        for k in range(start.shape[1]):
            place = start[:, k, None] * (1 - t) + end[:, k, None] * t  # [N, T, 4]
            image = thing(image, place, shape[:, k], texture[:, k], tones[:, k], x, y, pixels)
        return image * 2 - 1

    return draw


def render(
    scenes: list[Scene],
    size: tuple[int, int, int],
    seed: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw `scenes` at `size` (frames, height, width); returns [N, 3, T, H, W] in [-1, 1]."""
    slots = max(len(s.things) for s in scenes)
    tensors = [t.to(device) for t in scene_tensors(scenes, seed, slots)]
    return make_renderer()(*tensors, size=size)
