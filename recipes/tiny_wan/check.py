"""Read colour, shape, motion, background and camera off clips, and score a model by them.

    python recipes/tiny_wan/check.py dit_accel/models/tiny-wan --output score.json

No learned model: pixels are matched with the world's colours, things are tracked by their centre
and area, shapes are compared with drawn masks, and the camera is found by undoing its movement.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
import world
from diffusers import WanPipeline
from PIL import Image
from torch import Tensor
from world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Scene

PROMPTS = Path(__file__).with_name("prompts.json")
CROP = 32  # pixels of a side of the view on a tracked thing
VIEW = 1.9  # half a side of that view, in radii of the disc of equal area
TURNS = 24  # rotations at which a shape is compared
SHADOW = 0.6
FRAMES = 17  # looked at, spread over the clip
OUTLINE_CHANGE = 0.13  # least change of outline that counts as spinning, as a share of the area
TEXTURE_POWER = 0.01  # least variance of the second tone's share that counts as texture
TEXTURE_LIKENESS = 0.6  # correlation of texture under which it counts as turned


def distance_to_tones(pixels: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Distance of pixels [..., 3] to the line between two tones [3]."""
    line = second - first
    share = ((pixels - first) @ line / line.square().sum()).clamp(0, 1)
    return (pixels - first - share[..., None] * line).norm(dim=-1)


def background_distance(clip: Tensor, name: str) -> Tensor:
    """Distance of the clip's pixels to a background's tones, in light or shadow."""
    tone = torch.tensor(BACKGROUNDS[name], device=clip.device)
    second = world.second_tone(tone)
    lit = distance_to_tones(clip, tone, second)
    return torch.minimum(lit, distance_to_tones(clip, SHADOW * tone, SHADOW * second))


def colour_distance(clip: Tensor, name: str) -> Tensor:
    """Distance of the clip's pixels to a thing's tones."""
    first, second = (torch.tensor(c, device=clip.device) for c in COLOURS[name])
    return distance_to_tones(clip, first, second)


def opened(mask: Tensor) -> Tensor:
    """Drop what is thinner than three pixels from masks [T, H, W]."""
    core = -F.max_pool2d(-mask.float()[:, None], 3, 1, 1)
    return F.max_pool2d(core, 3, 1, 1)[:, 0] > 0.5


def find_colours(clip: Tensor, things: int) -> tuple[str, list[str]]:
    """The background and the `things` most visible colours of a clip [T, H, W, 3]."""
    names = [*BACKGROUNDS, *COLOURS]
    distances = [background_distance(clip, n) for n in BACKGROUNDS]
    distances += [colour_distance(clip, n) for n in COLOURS]
    label = torch.stack(distances).argmin(0)
    area = torch.stack([opened(label == i).float().mean() for i in range(len(names))])
    ground = int(area[: len(BACKGROUNDS)].argmax())
    seen = area[len(BACKGROUNDS) :]
    order = seen.argsort(descending=True)[:things].tolist()
    return names[ground], [list(COLOURS)[i] for i in order if seen[i] > 2e-3]


def thing_masks(clip: Tensor, background: str, colours: list[str]) -> Tensor:
    """Masks [K, T, H, W] of the things in `colours`."""
    distances = [
        background_distance(clip, background),
        *(colour_distance(clip, c) for c in colours),
    ]
    label = torch.stack(distances).argmin(0)
    found = [opened(label == i + 1) for i in range(len(colours))]
    return (
        torch.stack(found)
        if found
        else torch.zeros(0, *label.shape, dtype=bool, device=clip.device)
    )


def positions(count: int, device) -> Tensor:
    """Pixel centres between 0 and 1."""
    return (torch.arange(count, device=device) + 0.5) / count


def track(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Centre [T, 2] (x, y) and area [T] of a thing, as shares of the frame."""
    m = mask.float()
    area = m.mean((1, 2))
    x = (m.mean(1) * positions(m.shape[2], m.device)).mean(1)
    y = (m.mean(2) * positions(m.shape[1], m.device)).mean(1)
    return torch.stack((x, y), 1) / area.clamp(min=1e-6)[:, None], area


def undo_camera(
    points: Tensor, camera: tuple[float, float, float], t: Tensor
) -> tuple[Tensor, Tensor]:
    """World positions of screen positions [T, ..., 2] and the zoom [T], at clip times `t` [T]."""
    dx, dy, rate = camera
    zoom = (rate * (t - 0.5)).exp()
    shape = (-1, *[1] * (points.dim() - 1))
    pan = torch.stack((dx * (t - 0.5), dy * (t - 0.5)), 1)
    pan = pan.view(-1, *[1] * (points.dim() - 2), 2)
    return (points - 0.5) / zoom.view(shape) + 0.5 + pan, zoom


def find_camera(clip: Tensor, free: Tensor) -> tuple[str, tuple[float, float, float]]:
    """The camera's movement (x, y, log zoom over the clip) that best explains the background.

    `free` [T, H, W] marks background. A frame is drawn from one an eighth of the clip later.
    """
    guesses = [("still", (0.0, 0.0, 0.0))]
    for reach in (0.2, 0.3, 0.4):
        guesses += [
            (f"panning {d}", (x * reach, y * reach, 0.0)) for d, (x, y) in DIRECTIONS.items()
        ]
        guesses += [
            ("zooming in", (0.0, 0.0, 1.6 * reach)),
            ("zooming out", (0.0, 0.0, -1.6 * reach)),
        ]
    step = len(clip) // 8
    side = torch.meshgrid(
        positions(clip.shape[1], clip.device), positions(clip.shape[2], clip.device), indexing="ij"
    )
    grid = torch.stack((side[1], side[0]), -1)[None]
    later = torch.cat((clip, free[..., None].float()), -1)[step:].permute(0, 3, 1, 2)
    costs = []
    for _, (dx, dy, rate) in guesses:
        where, _ = undo_camera(
            grid,
            (-dx, -dy, -rate),
            torch.tensor([0.5 + step / (len(clip) - 1)], device=clip.device),
        )
        where = where.expand(len(later), -1, -1, -1) * 2 - 1
        seen = F.grid_sample(later, where, align_corners=False)
        weight = free[:-step] * (seen[:, 3] > 0.99)
        error = (seen[:, :3].permute(0, 2, 3, 1) - clip[:-step]).abs().mean(-1)
        costs.append(float((error * weight).sum() / weight.sum().clamp(min=1)))
    best = min(range(len(costs)), key=costs.__getitem__)
    if costs[0] < 1.15 * costs[best] + 2e-3:
        best = 0
    return guesses[best]


def find_pattern(clip: Tensor, free: Tensor, background: str) -> str:
    """The background's pattern, from the shares of its tones and the direction of its edges."""
    tone = torch.tensor(BACKGROUNDS[background], device=clip.device)
    line = world.second_tone(tone) - tone
    share = (clip - tone) @ line / line.square().sum()
    inside = -F.max_pool2d(-free.float()[:, None], 9, 1, 4)[:, 0] > 0.5  # away from shadows
    values = share[inside]
    if len(values) < 100 or values.std() < 0.15:
        return "plain"
    values = values[:: 1 + len(values) // 100_000]
    low, high = values.quantile(torch.tensor([0.02, 0.98], device=values.device))
    level = (values - low) / (high - low)
    if ((level > 0.25) & (level < 0.75)).float().mean() > 0.38:
        return "cloudy"
    gy, gx = share[:, 1:, :-1] - share[:, :-1, :-1], share[:, :-1, 1:] - share[:, :-1, :-1]
    keep = inside[:, 1:, 1:] & inside[:, :-1, :-1]
    gx, gy = gx[keep], gy[keep]
    xx, yy, xy = (gx * gx).mean(), (gy * gy).mean(), (gx * gy).mean()
    if math.hypot(float(xx - yy), 2 * float(xy)) > 0.6 * float(xx + yy):
        return "striped"
    return "dotted" if (level > 0.5).float().mean() < 0.35 else "checkered"


def views(images: Tensor, centre: Tensor, area: Tensor) -> Tensor:
    """Crops [T, C, CROP, CROP] of images [T, C, H, W], of the same place and size on the thing."""
    side = torch.linspace(-VIEW, VIEW, CROP, device=images.device)
    offset = torch.stack(torch.meshgrid(side, side, indexing="ij")[::-1], -1)
    radius = (area / math.pi).sqrt()[:, None, None, None]
    grid = (centre[:, None, None] + radius * offset) * 2 - 1
    return F.grid_sample(images, grid, align_corners=False)


def shape_masks(device="cpu") -> Tensor:
    """Masks [shape, turn, CROP, CROP] of all shapes, seen as `views` sees a thing."""
    side = positions(128, device)
    y, x = torch.meshgrid(side, side, indexing="ij")
    angles = torch.arange(TURNS, device=device) * (2 * math.pi / TURNS)
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    x, y = x - 0.5, y - 0.5
    out = []
    for index in range(len(SHAPES)):
        radius = torch.tensor(0.3, device=device)
        edge = world._distance(
            torch.tensor(index, device=device), x * cos + y * sin, y * cos - x * sin, radius
        )
        mask = (edge < 0).float()
        out.append(views(mask[:, None], *track(mask))[:, 0])
    return torch.stack(out)


def find_shape(mask_views: Tensor, masks: Tensor) -> str:
    """The shape whose drawn mask overlaps best with the views [T, CROP, CROP] of a thing."""
    seen = mask_views[:, None, None]
    both = torch.minimum(seen, masks).sum((-1, -2))
    either = torch.maximum(seen, masks).sum((-1, -2))
    overlap = (both / either).amax(2)  # [T, shape]
    return SHAPES[int(overlap.mean(0).argmax())]


def spins(masks: Tensor, shares: Tensor) -> bool:
    """Whether outline or texture turn, from views [T, CROP, CROP] of mask and second-tone share.

    Both are compared with the frame that shows most of the thing.
    """
    first = int(masks.sum((1, 2)).argmax())
    change = (masks - masks[first]).abs().mean((1, 2)) / masks[first].mean()
    if change.quantile(0.6) > OUTLINE_CHANGE:
        return True
    both = masks * masks[first]
    weight = both / both.sum((1, 2), keepdim=True).clamp(min=1e-6)

    def centred(x: Tensor) -> Tensor:
        return x - (x * weight).sum((1, 2), keepdim=True)

    now, then = centred(shares), centred(shares[first])
    power = (now.square() * weight).sum((1, 2)), (then.square() * weight).sum((1, 2))
    if power[1].median() < TEXTURE_POWER:
        return False
    likeness = (now * then * weight).sum((1, 2)) / (power[0] * power[1]).sqrt().clamp(min=1e-6)
    return bool(likeness.quantile(0.4) < TEXTURE_LIKENESS)


def find_motion(centre: Tensor, radius: Tensor, masks: Tensor, shares: Tensor) -> str:
    """The motion of a thing from its world centre [T, 2] and radius [T], and views for `spins`."""
    ends = max(2, len(centre) // 4)
    moved = centre[-ends:].median(0).values - centre[:ends].median(0).values
    if moved.norm() > 0.14:
        axis = int(moved.abs().argmax())
        names = ("left", "right") if axis == 0 else ("up", "down")
        return f"moving {names[int(moved[axis] > 0)]}"
    growth = float(radius[-ends:].median() / radius[:ends].median())
    if growth > 1.3:
        return "growing"
    if growth < 1 / 1.3:
        return "shrinking"
    return "spinning" if spins(masks, shares) else "staying still"


def read_thing(clip: Tensor, mask: Tensor, colour: str, movement, masks: Tensor) -> dict | None:
    """Shape and motion of the thing in `mask` [T, H, W], or None if it is hardly there."""
    centre, area = track(mask)
    kept = area > max(1e-3, 0.1 * float(area.max()))
    if kept.sum() < 6:
        return None
    times = torch.linspace(0, 1, len(clip), device=clip.device)
    world_centre, zoom = undo_camera(centre, movement, times)
    first, second = (torch.tensor(c, device=clip.device) for c in COLOURS[colour])
    line = second - first
    share = ((clip - first) @ line / line.square().sum()).clamp(-0.2, 1.2)
    seen = views(torch.stack((mask.float(), share), 1), centre, area.clamp(min=1e-4))
    clear = kept & (area > 0.4 * float(area.max()))
    motion = find_motion(world_centre[kept], (area.sqrt() / zoom)[kept], *seen[kept].unbind(1))
    return {"shape": find_shape(seen[clear, 0], masks), "motion": motion}


def read_clip(clip: Tensor, things: int, masks: Tensor) -> dict:
    """What a clip [T, H, W, 3] in [0, 1] with `things` things shows, by `shape_masks`."""
    clip = clip[torch.linspace(0, len(clip) - 1, FRAMES).round().long()].float()
    if (factor := clip.shape[1] // 128) > 1:
        clip = F.avg_pool2d(clip.permute(0, 3, 1, 2), factor).permute(0, 2, 3, 1)
    background, colours = find_colours(clip[::2], things)
    found = thing_masks(clip, background, colours)
    free = F.max_pool2d(found.any(0).float()[:, None], 7, 1, 3)[:, 0] < 0.5
    camera, movement = find_camera(clip, free)
    seen = {c: read_thing(clip, m, c, movement, masks) for c, m in zip(colours, found, strict=True)}
    pattern = find_pattern(clip, free, background)
    return {
        "background": background,
        "pattern": pattern,
        "camera": camera,
        "things": {c: v for c, v in seen.items() if v},
    }


def score_clip(clip: Tensor, scene: Scene, masks: Tensor) -> dict[str, list[bool]]:
    """Which attributes of `scene` the clip [T, H, W, 3] in [0, 1] shows."""
    seen = read_clip(clip, len(scene.things), masks)
    marks = defaultdict(list)
    for thing in scene.things:
        found = seen["things"].get(thing.colour)
        marks["colour"].append(found is not None)
        marks["shape"].append(found is not None and found["shape"] == thing.shape)
        marks["motion"].append(found is not None and found["motion"] == thing.motion)
    marks["background"].append(seen["background"] == scene.background)
    marks["pattern"].append(seen["pattern"] == scene.pattern)
    if scene.camera != "still":
        marks["camera"].append(seen["camera"] == scene.camera)
    return {**marks, "seen": seen}


def summary(marks: list[dict]) -> dict[str, float]:
    """Share of right attributes, of each kind and of all together."""
    kinds = ("colour", "shape", "motion", "background", "pattern", "camera")
    values = {k: [v for m in marks for v in m.get(k, [])] for k in kinds}
    everything = [v for k in kinds for v in values[k]]
    shares = {k: sum(v) / len(v) for k, v in values.items() if v}
    return {**shares, "all": sum(everything) / len(everything), "attributes": len(everything)}


def generate(
    pipe, prompts: list[str], size: tuple[int, int, int], steps: int, guidance: float, batch: int
):
    """Yield a clip [T, H, W, 3] in [0, 1] a prompt; the i-th starts from seed i."""
    frames, height, width = size
    for i in range(0, len(prompts), batch):
        part = prompts[i : i + batch]
        seeds = [torch.Generator("cpu").manual_seed(i + k) for k in range(len(part))]
        out = pipe(
            prompt=part,
            num_frames=frames,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=seeds,
            output_type="pt",
        ).frames
        yield from out.float().permute(0, 1, 3, 4, 2)


def contact_sheet(clips: list[Tensor], path: Path, columns: int = 6, side: int = 96) -> None:
    """Save a picture with a row of `columns` frames a clip."""
    rows = []
    for clip in clips:
        picked = clip[torch.linspace(0, len(clip) - 1, columns).round().long()].permute(0, 3, 1, 2)
        rows.append(
            F.interpolate(picked, (side, side), mode="area").permute(2, 0, 3, 1).flatten(1, 2)
        )
    pixels = (torch.cat(rows).clamp(0, 1) * 255).round().byte().cpu().numpy()
    Image.fromarray(pixels).save(path)


def main() -> None:
    """Generate the fixed prompts with a pipeline folder and write how many attributes are right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a saved WanPipeline")
    parser.add_argument("--output", type=Path, default=Path("score.json"))
    parser.add_argument("--sheet", type=Path, help="also save a picture with frames of all clips")
    parser.add_argument(
        "--size", type=int, nargs=3, default=(33, 256, 256), metavar=("FRAMES", "HEIGHT", "WIDTH")
    )
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompts", type=int, help="only the first so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    entries = json.loads(PROMPTS.read_text())[: args.prompts]
    pipe = WanPipeline.from_pretrained(args.folder, torch_dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(leave=False)
    start = time.monotonic()
    prompts = [e["prompt"] for e in entries]
    clips = list(generate(pipe, prompts, args.size, args.steps, args.guidance, args.batch))
    generated = time.monotonic() - start
    masks = shape_masks(args.device)
    marks = [score_clip(c, Scene.from_dict(e), masks) for c, e in zip(clips, entries, strict=True)]
    result = {
        "size": list(args.size),
        "steps": args.steps,
        "guidance": args.guidance,
        "scheduler": type(pipe.scheduler).__name__,
        "prompts": len(entries),
        "generate_s": round(generated, 1),
        "score": summary(marks),
        "clips": [{"prompt": p, **m} for p, m in zip(prompts, marks, strict=True)],
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    if args.sheet:
        contact_sheet(clips, args.sheet)
    print(json.dumps({k: v for k, v in result.items() if k != "clips"}))


if __name__ == "__main__":
    main()
