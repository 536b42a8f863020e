"""The pictures of the methods' pages, drawn from what this package really computes.

python docs/hooks/pictures.py            # draw them all again, into docs/pictures/ (minutes)
python docs/hooks/pictures.py gna psa    # draw these methods' again

A build draws what is missing. A picture is a PNG with a transparent ground, so that it suits a
light and a dark page, and has its caption inside. Masks, steps and attention maps have one pixel to
a block, and the page enlarges them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dit_accel import SlidingWindow, accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.errors import DensityUnreachableError, OptionError
from dit_accel.grid import TokenOrder
from dit_accel.guidance.reference import perturbed_attention
from dit_accel.highres.reference import window_tokens
from dit_accel.methods.base import AttentionMethod, StaticMethod
from dit_accel.methods.selecting import SelectingMethod
from dit_accel.models import load_pipeline
from dit_accel.plan import PARTIAL, AttentionPlan, DensePlan, JointPlan
from dit_accel.registry import family_class, list_methods, method_class
from dit_accel.tracking import Moment
from dit_accel.world.clips import Scene, Thing, caption, render

PICTURES = Path(__file__).parents[1] / "pictures"
BLUE, AMBER, ORANGE = (79, 108, 232), (236, 152, 44), (255, 140, 40)
LARGE = TokenLayout((21, 30, 52))
"""480 x 832 pixels and 81 frames of Wan 2.1."""
SMALL = TokenLayout((9, 16, 16))
"""256 x 256 pixels and 33 frames of tiny-wan, for methods that look at the tokens."""
SMALL_BLOCK, SMALL_DENSITY, SHOWN_HEAD, SHOWN_LAYER = 32, 0.25, 1, 4
FRAMES = (0, 2, 4, 6, 8)
STEPS = 16
SCENE = Scene(
    (Thing("large", "red", "plain", "circle", "moving right"),), "dark blue", pattern="checkered"
)
DRAWN_CACHES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "dual_block_cache": (["dual_block_cache"], {"first_blocks": 2, "last_blocks": 1}),
    "remainder_cache": (["gna", "remainder_cache"], {"dense_steps": 2, "min_tokens": 0}),
}
"""What is drawn of caches whose defaults are for larger models, or that need a method beside."""
COUNTED = {"pab": "attention modules", "remainder_cache": "layers"}
"""What caches reuse that is not blocks."""
PERTURBED = {
    "pag": [("identity", 0.0), ("identity", 1.0)],
    "seg": [("query_mean", 0.0), ("query_mean", 1.0)],
    "softpag": [
        *(("identity", strength) for strength in (0.0, 0.5, 1.0)),
        ("uniform", 0.5),
        ("query_mean", 0.5),
    ],
}
"""Perturbations of attention maps, and strengths, that are drawn."""
WEIGHTS = {0: 0.0, 1: 1.0, 2: 0.7, 4: 0.5, 8: 0.35}
"""How strongly a level of PSA is drawn."""


@dataclass(frozen=True)
class Picture:
    """One picture of a page: colours and opacity, 8 bits ``[rows, columns, 4]``."""

    pixels: np.ndarray
    caption: str
    axes: tuple[str, str] | None = None
    """What goes right and what goes down; None for pictures of frames."""

    def save(self, path: Path) -> None:
        """Write a PNG with the caption inside."""
        texts = PngInfo()
        texts.add_text("caption", self.caption)
        texts.add_text("axes", "|".join(self.axes or ()))
        Image.fromarray(self.pixels).save(path, pnginfo=texts, optimize=True)

    @classmethod
    def load(cls, path: Path) -> Picture:
        """Read what `save` wrote."""
        with Image.open(path) as image:
            right, _, down = image.info["axes"].partition("|")
            axes = (right, down) if down else None
            return cls(np.asarray(image.convert("RGBA")), image.info["caption"], axes)


def main(names: list[str]) -> None:
    """Draw the pictures of these methods, or of all."""
    for name in names or list_methods():
        for path in PICTURES.glob(f"{name}-*.png"):
            path.unlink()
        paths_of(name)


def paths_of(name: str) -> list[Path]:
    """Return the files of a method's pictures, which are drawn if there are none."""
    if not any(PICTURES.glob(f"{name}-*.png")):
        PICTURES.mkdir(exist_ok=True)
        for number, picture in enumerate(drawn(name)):
            picture.save(PICTURES / f"{name}-{number}.png")
    return sorted(PICTURES.glob(f"{name}-*.png"))


def drawn(name: str) -> list[Picture]:
    """Draw the pictures of a method; none if it is of a form that nobody has drawn yet."""
    cls: Any = method_class(name)
    if issubclass(cls, StaticMethod):
        return [_seen(cls()), *_masks(cls())]
    if issubclass(cls, SelectingMethod):
        return _chosen(cls)
    if name == "dense":
        return [_seen(cls())]
    if cls.kind == "cache":
        return _steps(name)
    if cls.kind == "guidance":
        return _perturbed(name, cls)
    return _windows() if name == "freeswim" else []


def _masks(method: StaticMethod) -> Iterator[Picture]:
    """Yield the block masks of a static method, sparser from one to the next."""
    drawn = set()
    for asked in (0.5, 0.25, 0.1):
        try:
            chosen = method.at_density(asked, LARGE)
        except DensityUnreachableError as error:
            chosen = method.at_density(error.least, LARGE)
        if chosen in drawn:
            continue
        drawn.add(chosen)
        order = chosen.token_order(LARGE.grid)
        states = chosen.tile_states(LARGE, order).numpy()
        partial = states == PARTIAL
        rgba = _tint(BLUE, (states != 0).astype(float))
        rgba[partial] = (*AMBER, 255)
        text = f"density {chosen.block_density(LARGE, order):.2f}"
        yield Picture(rgba, text, ("key blocks", "query blocks"))


def _seen(method: AttentionMethod) -> Picture:
    """Draw what a token sees by a static method at half of the pairs, or by a dense one."""
    if not isinstance(method, StaticMethod):
        weight, text = np.ones(SMALL.video_length), "every token of every frame"
    else:
        method = _reachable(replace(method, block_size=SMALL_BLOCK), 0.5)
        keys = torch.arange(SMALL.video_length)
        weight = method.allowed(SMALL)(torch.tensor(_query()), keys).numpy().astype(float)
        text = f"{weight.mean():.0%} of the tokens"
    return _lit(weight, f"What the token in the orange square sees: {text}, shown lit.")


def _chosen(cls: type[SelectingMethod]) -> list[Picture]:
    """Draw what a method chose in tiny-wan: for one token, and for all blocks of four heads."""
    size = {"query_block": SMALL_BLOCK, "key_block": SMALL_BLOCK}
    blocks = size if "query_block" in cls.__dataclass_fields__ else {"block_size": SMALL_BLOCK}
    method = _reachable(cls(**blocks), SMALL_DENSITY)  # type: ignore[arg-type]
    query, key, value = _tokens()
    order = method.token_order(SMALL.grid)
    inside = order.permutation(SMALL.grid)
    plan = method.plan(AttentionCall(SMALL), *(x[:, inside] for x in (query, key, value)), order)
    assert isinstance(plan, JointPlan)
    levels = plan.levels[0].expand(query.shape[2], -1, -1).numpy()
    rest = 0.2 if plan.remainder or plan.added is not None else 0.0
    strength = np.vectorize({**WEIGHTS, 0: rest}.get)(levels)
    place = int(order.inverse(SMALL.grid)[_query()])
    row = np.repeat(strength[SHOWN_HEAD, place // SMALL_BLOCK], SMALL_BLOCK)
    weight = np.empty(SMALL.video_length)
    weight[inside.numpy()] = row[: SMALL.video_length]
    what = "what is attended to as means is dimmer" if levels.max() > 1 or rest else "shown lit"
    told = f"What the token in the orange square sees in one head at density .25: {what}."
    heads = [
        Picture(_tint(BLUE, matrix), f"head {head}", ("key blocks", "query blocks"))
        for head, matrix in enumerate(strength)
    ]
    return [_lit(weight, told), *heads]


def _steps(name: str) -> list[Picture]:
    """Draw which blocks ran in which step of a short generation, by guidance branch."""
    pipe = _pipeline()
    methods, options = DRAWN_CACHES.get(name, ([name], {}))
    try:
        accelerate_pipeline(pipe, methods, **options)
    except OptionError:
        return []  # it needs to be told something: `DRAWN_CACHES` is the place
    pipe(
        caption(SCENE),
        height=64,
        width=64,
        num_frames=5,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    report = acceleration_report(pipe)
    restore_pipeline(pipe)
    what = COUNTED.get(name, "blocks")
    most = max(step.attention_reused for step in report.steps)
    rows = {
        (step.step, step.branch): [not step.attention_reused] * most if most else list(step.ran)
        for step in report.steps
    }
    by_branch = {
        told: np.array([ran for (_, where), ran in rows.items() if where == branch]).T.astype(float)
        for branch, told in (("cond", "conditional pass"), ("uncond", "unconditional pass"))
    }
    first, second = by_branch.values()
    if np.array_equal(first, second):
        by_branch = {"both passes": first}
    found = []
    for told, ran in by_branch.items():
        share = f"{ran.mean():.0%} of the {what} ran"
        if name == "remainder_cache":
            share = f"what is left out is computed in {ran[0].sum():.0f} of {ran.shape[1]} steps"
        drawn = _tint(BLUE, 0.15 + 0.85 * ran)
        found.append(Picture(drawn, f"{told}: {share}", ("steps", what)))
    return found


def _perturbed(name: str, cls: Any) -> list[Picture]:
    """Draw an attention map and what a guidance makes of it, or the blocks of the added pass."""
    if name == "slg":
        ran = np.ones((8, STEPS))
        guidance = cls(layers=(4,))
        steps = [guidance.guides(Moment(step, STEPS, "cond", 0)) for step in range(STEPS)]
        ran[4, np.array(steps)] = 0
        told = "blocks of the pass that is guided away from, layers=[4]; skipped where pale"
        return [Picture(_tint(BLUE, 0.15 + 0.85 * ran), told, ("steps", "blocks"))]
    cases = PERTURBED.get(name, [])
    return [_map(perturbation, strength) for perturbation, strength in cases]


def _map(perturbation: str, strength: float) -> Picture:
    """Draw the map of one head among the tokens of one frame, mixed by ``strength``."""
    query, key, _ = _tokens()
    side = SMALL.grid[1] * SMALL.grid[2]
    middle = slice(4 * side, 5 * side)
    q, k = (x[:, middle, SHOWN_HEAD : SHOWN_HEAD + 1].double() for x in (query, key))
    # With the unit matrix for values, what comes out of attention is its map.
    unit = torch.eye(side, dtype=torch.float64)[None, :, None]
    amount = torch.tensor([strength], dtype=torch.float64)
    mixed = perturbed_attention(q, k, unit, amount, perturbation=perturbation)[0, :, 0]
    drawn = (mixed * side / 6).clamp(0, 1).sqrt().numpy()
    text = "as it is" if strength == 0 else f"{perturbation}, strength {strength:g}"
    return Picture(_tint(BLUE, drawn), text, ("keys of a frame", "queries"))


def _windows() -> list[Picture]:
    """Draw FreeSwim's window on a frame of twice the trained size, at three places."""
    trained, side = 16, 32
    window = window_tokens(trained, "released")
    layout = TokenLayout((1, side, side))
    allowed = SlidingWindow((window, window)).allowed(layout)
    frame = _frames()[16]
    panels = []
    for row, column in ((16, 16), (3, 26), (30, 2)):
        seen = allowed(torch.tensor(row * side + column), torch.arange(side * side))
        panels.append(_lit_frame(frame, seen.numpy().reshape(side, side), (row, column)))
    told = (
        "A frame of twice the trained size. A token sees a window as large as the trained grid, "
        "pushed inward at the borders; a full pass sees the rest."
    )
    return [Picture(_side_by_side(panels), told)]


def _lit(weight: np.ndarray, told: str) -> Picture:
    """Light up tokens of the drawn clip by ``weight`` ``[T*H*W]``."""
    volume = weight.reshape(SMALL.grid)
    where = np.unravel_index(_query(), SMALL.grid)
    clip = _frames()
    panels = [
        _lit_frame(clip[t * 4], volume[t], (where[1], where[2]) if t == where[0] else None)
        for t in FRAMES
    ]
    return Picture(_side_by_side(panels), told)


def _lit_frame(frame: np.ndarray, weight: np.ndarray, token: tuple[Any, Any] | None) -> np.ndarray:
    """Darken a frame ``[256, 256, 3]`` where ``weight`` ``[H, W]`` is low; mark one token."""
    zoom = frame.shape[0] // weight.shape[0]
    light = np.kron(weight.astype(float), np.ones((zoom, zoom)))[..., None]
    grey = frame.mean(-1, keepdims=True) * 0.3 + 24
    image = Image.fromarray((frame * light + grey * (1 - light)).astype(np.uint8))
    if token is not None:
        top, left = (int(place) * zoom for place in token)
        box = (left - 2, top - 2, left + zoom + 1, top + zoom + 1)
        ImageDraw.Draw(image).rectangle(box, outline=ORANGE, width=4)
    return np.asarray(image.convert("RGBA"))


def _side_by_side(panels: list[np.ndarray], gap: int = 12) -> np.ndarray:
    space = np.zeros((panels[0].shape[0], gap, 4), np.uint8)
    spaced = [part for panel in panels for part in (panel, space)][:-1]
    return np.concatenate(spaced, axis=1)


def _tint(colour: tuple[int, int, int], opacity: np.ndarray) -> np.ndarray:
    """Return one colour ``[..., 4]`` at an opacity in [0, 1]."""
    alpha = (np.clip(opacity, 0, 1) * 255).round().astype(np.uint8)
    tone = np.broadcast_to(np.array(colour, np.uint8), (*alpha.shape, 3))
    return np.concatenate([tone, alpha[..., None]], -1)


def _query() -> int:
    """Return a token on the moving thing, in the middle frame."""
    frame = _frames()[4 * (SMALL.grid[0] // 2)].astype(int)
    red = frame[..., 0] - frame[..., 2]
    rows, columns = np.nonzero(red > red.max() * 0.8)
    row, column = int(rows.mean()) // 16, int(columns.mean()) // 16
    return (SMALL.grid[0] // 2 * SMALL.grid[1] + row) * SMALL.grid[2] + column


def _reachable(method: Any, density: float) -> Any:
    """Set a density on the small grid, or the nearest that the method has there."""
    try:
        return method.at_density(density, SMALL)
    except DensityUnreachableError as error:
        return method.at_density(error.least, SMALL)


@cache
def _pipeline() -> Any:
    pipe = load_pipeline("tiny-wan")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def _clip() -> Tensor:
    """Return a drawn clip ``[T, 3, 256, 256]`` in [0, 1]."""
    clip = render([SCENE], seed=0, size=(33, 256, 256))[0]
    return (clip.movedim(0, 1) + 1) / 2


def _frames() -> np.ndarray:
    """Return it as ``[T, 256, 256, 3]`` of 8 bits."""
    return (_clip().movedim(1, -1) * 255).round().byte().numpy()


@dataclass(frozen=True)
class _Listener(AttentionMethod):
    """Attends to everything, and keeps the tokens of one layer."""

    name: ClassVar[str] = "listener"
    heard: Any = None

    def plan(
        self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, order: TokenOrder
    ) -> AttentionPlan:
        if call.layer == SHOWN_LAYER:
            self.heard[:] = [query.clone(), key.clone(), value.clone()]
        return DensePlan("listening", order)


@cache
@torch.no_grad()
def _tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value ``[1, N, H, D]`` of tiny-wan for the drawn clip, half noise."""
    pipe = _pipeline()
    latents = family_class("wan")().encode(pipe, _clip()[None])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    prompt, _ = pipe.encode_prompt(caption(SCENE), do_classifier_free_guidance=False)
    heard: list[Tensor] = []
    accelerate_pipeline(pipe, _Listener(heard=heard), dense_steps=0, dense_layers=0, min_tokens=0)
    pipe.transformer(
        hidden_states=(latents + noise) / 2,
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=prompt,
    )
    restore_pipeline(pipe)
    query, key, value = heard
    return query, key, value


if __name__ == "__main__":
    main(sys.argv[1:])
