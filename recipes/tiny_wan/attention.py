"""Measure how a trained model attends: how locally, how widely, and how heads differ.

    python -m recipes.tiny_wan.attention dit_accel/models/tiny-wan --output attention.json

Drawn clips of the fixed prompts are noised, and the self-attention of every layer and head is
looked at for some of the queries.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from unittest import mock

import torch
from diffusers import WanPipeline
from diffusers.models.transformers import transformer_wan
from torch import Tensor

from dit_accel.world import clips
from dit_accel.world.worlds import fixed_prompts

NOISE_LEVELS = (0.3, 0.7, 0.95)
QUERIES = 256  # looked at, of all


def head_statistics(query: Tensor, key: Tensor, grid: tuple[int, int, int]) -> dict[str, Tensor]:
    """Per head [H], means over some queries; query and key are [1, N, H, D], grid is (T, H, W)."""
    n = query.shape[1]
    pick = torch.linspace(0, n - 1, min(n, QUERIES)).round().long()
    scores = (
        torch.einsum("qhd,khd->hqk", query[0, pick].float(), key[0].float())
        * query.shape[-1] ** -0.5
    )
    mass = scores.softmax(-1)
    axes = torch.meshgrid(*(torch.arange(g) for g in grid), indexing="ij")
    place = torch.stack(axes, -1).flatten(0, 2).to(mass.device)
    far = (place[pick][:, None] - place).abs()
    near = (far[..., 0] <= 1) & (far[..., 1:] <= 2).all(-1)
    column = (far[..., 1:] == 0).all(-1)
    ordered = mass.sort(-1, descending=True).values
    return {
        "effective keys": (-(mass * mass.clamp(min=1e-20).log()).sum(-1)).exp().mean(1),
        "mass within 1 frame and 2 tokens": (mass * near).sum(-1).mean(1),
        "mass in the same frame": (mass * (far[..., 0] == 0)).sum(-1).mean(1),
        "mass at the same place in all frames": (mass * column).sum(-1).mean(1),
        "mass on the first frame": mass[..., : grid[1] * grid[2]].sum(-1).mean(1),
        "mass of the strongest quarter of keys": ordered[..., : n // 4].sum(-1).mean(1),
    }


@torch.no_grad()
def attention_statistics(
    pipe: WanPipeline, entries: list[dict], size: tuple[int, int, int]
) -> dict:
    """Statistics [layer, head] per noise level, averaged over the entries' drawn clips."""
    mean = torch.tensor(pipe.vae.config.latents_mean).view(1, -1, 1, 1, 1).to(pipe.device)
    std = torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1).to(pipe.device)
    stock = transformer_wan.dispatch_attention_fn
    sums: dict[float, list] = {
        level: [defaultdict(float) for _ in pipe.transformer.blocks] for level in NOISE_LEVELS
    }
    for i, entry in enumerate(entries):
        clip = clips.render([clips.Scene.from_dict(entry)], size, seed=i, device=pipe.device)
        latents = (pipe.vae.encode(clip).latent_dist.mode() - mean) / std
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(i)).to(latents)
        words, _ = pipe.encode_prompt(entry["prompt"], do_classifier_free_guidance=False)
        grid = (latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2)
        for level in NOISE_LEVELS:
            layers = iter(sums[level])

            def look(query, key, value, grid=grid, layers=layers, **options):
                if query.shape[1] == key.shape[1]:  # not over text
                    layer = next(layers)
                    for name, values in head_statistics(query, key, grid).items():
                        layer[name] += values / len(entries)
                return stock(query, key, value, **options)

            noisy = (1 - level) * latents + level * noise
            time = torch.tensor([1000 * level], device=pipe.device)
            with mock.patch.object(transformer_wan, "dispatch_attention_fn", look):
                pipe.transformer(noisy, time, words)
    return {
        str(level): {
            name: [[round(v, 4) for v in layer[name].tolist()] for layer in layers]
            for name in layers[0]
        }
        for level, layers in sums.items()
    }


def main() -> None:
    """Measure a pipeline folder and write the statistics."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a saved WanPipeline")
    parser.add_argument("--output", type=Path, default=Path("attention.json"))
    parser.add_argument(
        "--size", type=int, nargs=3, default=(33, 256, 256), metavar=("FRAMES", "HEIGHT", "WIDTH")
    )
    parser.add_argument("--prompts", type=int, default=4, help="how many of the fixed prompts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    pipe = WanPipeline.from_pretrained(args.folder, torch_dtype=torch.float32).to(args.device)
    entries = fixed_prompts("clips")[:: 64 // args.prompts][: args.prompts]
    result = attention_statistics(pipe, entries, tuple(args.size))
    args.output.write_text(json.dumps(result) + "\n")
    for level, table in result.items():
        for name, layers in table.items():
            values = sorted(v for layer in layers for v in layer)
            middle = values[len(values) // 2]
            print(
                f"noise {level}: {name}: {values[0]:.3g} to {values[-1]:.3g}, median {middle:.3g}"
            )


if __name__ == "__main__":
    main()
