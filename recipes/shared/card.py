"""Write a bundled model's card from what its training and its checker measured.

    python -m recipes.shared.card dit_accel/models/tiny-flux --following follow.json

`following.png` in the folder, the sheet of that run, is shown if it is there, and so is what
`recipes.shared.attention` wrote; without `--following`, that section alone is renewed.
The last section, what the model can't do, is written by hand: a card that is there keeps its own.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from dit_accel.models import GenerationDefaults
from dit_accel.world import clips, pictures
from recipes.shared.attention import FILE as STATISTICS
from recipes.shared.attention import table

ATTENTION, LIMITS = "## Attention", "## What it can't do"
DATA = {
    "clips": (
        "Clips drawn by `dit_accel/world/clips.py`: one to three textured things that move over "
        "patterned backgrounds, may pass in front of one another and cast a soft shadow; the "
        "camera moves in a fifth of them."
    ),
    "pictures": (
        "Pictures drawn by `dit_accel/world/pictures.py`: one to five textured things, placed, "
        "counted or related to one another, on patterned backgrounds; rather more than half of "
        "them in a style."
    ),
}
OURS = "No picture or text made by people was used."


def parts(pipe: DiffusionPipeline) -> list[str]:
    """Table rows of the pipeline's networks."""
    rows = ["| part | class | parameters |", "|---|---|---|"]
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            count = sum(p.numel() for p in part.parameters())
            rows.append(f"| {name} | `{type(part).__name__}` | {count / 1e6:.1f} M |")
    return rows


def vocabulary(world: str) -> list[str]:
    """What the model can be asked for, an item each."""
    module = clips if world == "clips" else pictures
    classes = {**module.THING_CLASSES, **module.SCENE_CLASSES}
    return [f"- {name}: {', '.join(values)}" for name, values in classes.items()]


def training(facts: dict[str, Any]) -> list[str]:
    """What was done, and what came out on unseen scenes."""
    scenes = sum(facts["scenes"].values())
    rows = [
        f"On one {facts['device']}: autoencoder {facts['autoencoder_s']} s "
        f"({facts['autoencoder_steps']:,} steps), drawing and encoding {scenes:,} scenes "
        f"{facts['latents_s']} s, text encoders {facts['text_s']} s, transformer "
        f"{facts['transformer_s']} s ({facts['transformer_steps']:,} steps). Flow matching; Muon "
        "with AdamW; weights averaged.",
        "",
        "| unseen scenes | autoencoder, PSNR |",
        "|---|---|",
        *(f"| {size} | {value} dB |" for size, value in facts["autoencoder_psnr_db"].items()),
        "",
        "| unseen scenes | transformer, loss over eight noise levels |",
        "|---|---|",
        *(f"| {size} | {value} |" for size, value in facts["transformer_loss"].items()),
    ]
    return rows


def following(result: dict[str, Any]) -> list[str]:
    """How many attributes of the fixed prompts came out."""
    shares, settings = result["following"], result["settings"]
    kinds = [k for k in shares if k not in ("all", "attributes")]
    size = "x".join(str(settings[k]) for k in ("frames", "height", "width") if settings.get(k))
    return [
        f"`dit-accel eval follow`, {len(result['rows'])} fixed prompts at {size}, "
        f"{settings['steps']} steps, guidance {settings['guidance']}:",
        "",
        "| attribute | right |",
        "|---|---|",
        *(f"| {kind} | {100 * shares[kind]:.0f} % |" for kind in kinds),
        f"| all {shares['attributes']} | **{100 * shares['all']:.0f} %** |",
    ]


def attention(folder: Path) -> list[str]:
    """The section on how the model attends; nothing if that was not measured."""
    path = folder / STATISTICS
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    grid = " x ".join(map(str, found["grid"]))
    text = f" and {found['text_tokens']} text tokens" if found["text_tokens"] else ""
    layers = len(next(iter(found["noise"].values()))["effective keys"])
    return [
        ATTENTION,
        "",
        f"`python -m recipes.shared.attention`: all heads of {layers} layers over a grid of "
        f"{grid}{text}, {found['prompts']} prompts, at noise levels {', '.join(found['noise'])}. "
        "Masses are shares of a head's attention; the median is given as a range over the noise "
        "levels.",
        "",
        *table(found),
        "",
    ]


def renewed(card: str, folder: Path) -> str:
    """The card with its section on attention made again, before the limits."""
    before, after = card.split(LIMITS)
    before = before.split(ATTENTION)[0].rstrip("\n") + "\n\n"
    return before + "".join(f"{line}\n" for line in attention(folder)) + LIMITS + after


def main() -> None:
    """Write README.md into the model's folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a saved pipeline")
    parser.add_argument("--following", type=Path, help="of dit-accel eval follow")
    args = parser.parse_args()
    card = args.folder / "README.md"
    if args.following is None:
        card.write_text(renewed(card.read_text(), args.folder))
        return

    pipe = DiffusionPipeline.from_pretrained(args.folder)
    defaults = GenerationDefaults(**json.loads((args.folder / "dit_accel.json").read_text()))
    world = defaults.world or "clips"
    name = args.folder.resolve().name
    sheet = args.folder / "following.png"
    total = sum(f.stat().st_size for f in args.folder.rglob("*.safetensors"))
    old = card.read_text() if card.exists() else ""
    limits = old[old.index(LIMITS) :] if LIMITS in old else f"{LIMITS}\n\nTo be written.\n"
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: diffusers",
        f"pipeline_tag: text-to-{'video' if world == 'clips' else 'image'}",
        "---",
        f"# {name}",
        "",
        f"A stock `{type(pipe).__name__}` of {total / 1e6:.0f} MB in fp16, trained from nothing by "
        "`recipes/tiny_joint`. It exists to try attention methods anywhere, also without a GPU.",
        "",
        "## What it is",
        "",
        *parts(pipe),
        "",
        "## What it can be asked for",
        "",
        *vocabulary(world),
        "",
        "## Data",
        "",
        f"{DATA[world]} {OURS}",
        "",
        "## Training",
        "",
        *training(json.loads((args.folder / "training.json").read_text())),
        "",
        "## How well it follows a prompt",
        "",
        *following(json.loads(args.following.read_text())),
        *(["", "![All prompts in order](following.png)"] if sheet.exists() else []),
        "",
        *attention(args.folder),
    ]
    card.write_text("\n".join(lines) + "\n" + limits)


if __name__ == "__main__":
    main()
