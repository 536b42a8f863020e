"""Small stock autoencoders, for pictures and for clips, and how they are trained."""

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d
from torch import Tensor, nn

from recipes.shared.optim import MuonAdamW, captured_if_possible
from recipes.shared.schedule import schedule

Autoencoder = AutoencoderKL | AutoencoderKLHunyuanVideo
Size = tuple[int, ...]  # pictures: (count, height, width); clips: (count, frames, height, width)

CROWD = 6  # things in a crowded scene
CROWDED = 0.6  # share of crowded scenes


def make_picture_autoencoder(widths: tuple[int, ...] = (32, 64, 96)) -> AutoencoderKL:
    """An autoencoder of pictures with 8 channels; it halves a side `len(widths) - 1` times."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=8,
        norm_num_groups=8,
        sample_size=256,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    return _with_unit_gain(vae)


def make_clip_autoencoder(
    widths: tuple[int, ...] = (8, 16, 48, 64),
) -> AutoencoderKLHunyuanVideo:
    """An autoencoder of clips with 16 channels: 8 x 8 pixels and 4 frames to a latent."""
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=16,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=2,  # a group of one channel would forget its brightness
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    return _with_unit_gain(vae)


def _with_unit_gain(vae: Autoencoder) -> Autoencoder:
    for m in vae.modules():
        if isinstance(m, nn.Conv2d | nn.Conv3d):
            nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
            nn.init.zeros_(m.bias)
    return vae


def _group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """In the input's type, where autocast would go to fp32 and back; sums are in fp32 anyway."""
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
        return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)


def _causal_conv(conv: HunyuanVideoCausalConv3d, x: Tensor) -> Tensor:
    """Pad by copies of the edge: autograd's own edge padding adds up gradients slowly."""
    left, right, top, bottom, before, _ = conv.time_causal_padding
    if before:
        x = torch.cat([x[:, :, :1]] * before + [x], 2)
    if top:
        x = torch.cat([x[..., :1, :]] * top + [x] + [x[..., -1:, :]] * bottom, -2)
    if left:
        x = torch.cat([x[..., :1]] * left + [x] + [x[..., -1:]] * right, -1)
    return conv.conv(x)


@contextmanager
def quick_to_train(vae: Autoencoder) -> Iterator[None]:
    """Within, `vae` gives the same numbers by operations that have fast gradients."""
    quick = {nn.GroupNorm: _group_norm, HunyuanVideoCausalConv3d: _causal_conv}
    changed = [m for m in vae.modules() if type(m) in quick]
    for m in changed:
        m.forward = partial(quick[type(m)], m)
    try:
        yield
    finally:
        for m in changed:
            del m.forward


def encode(vae: Autoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of pictures or clips, in one piece."""
    moments = vae.encoder(x)
    if vae.quant_conv is not None:
        moments = vae.quant_conv(moments)
    mean, log_var = moments.float().chunk(2, 1)
    return mean, log_var.clamp(-20, 10)


def decode(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Pictures or clips in [-1, 1] from unscaled latents, in one piece."""
    if vae.post_quant_conv is not None:
        latents = vae.post_quant_conv(latents)
    return vae.decoder(latents).float()


def _edges(error: Tensor) -> Tensor:
    axes = range(2, error.ndim)
    return torch.stack([error.diff(dim=d).abs().mean() for d in axes]).mean()


class _Step:
    """One update on freshly drawn scenes of one size; captured on a GPU."""

    def __init__(self, vae, optimizer, world, draw, size: Size, losses: Tensor, device: str, log):
        self.world, self.count, self.rng = world, size[0], random.Random(sum(size))
        self.tensors = [t.to(device) for t in self._drawn()]

        def step() -> None:
            with torch.no_grad():
                x = draw(*self.tensors, size=size[1:])
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                mean, log_var = encode(vae, x)
                y = decode(vae, mean + torch.randn_like(mean) * (0.5 * log_var).exp())
            error = y - x
            l1, l2, edges = error.abs().mean(), error.square().mean(), _edges(error)
            kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
            optimizer.backward_and_step(l1 + 2 * l2 + edges + 3e-4 * kl)
            losses.add_(torch.stack((l1, l2, edges, kl)).detach())

        self.run = captured_if_possible(step, log) if device == "cuda" else step

    def _drawn(self) -> list[Tensor]:
        scenes = [
            self.world.sample_crowd(self.rng, CROWD)
            if self.rng.random() < CROWDED
            else self.world.sample_scene(self.rng)
            for _ in range(self.count)
        ]
        return self.world.scene_tensors(scenes, self.rng.randrange(1 << 30), slots=CROWD)

    def __call__(self) -> None:
        for mine, fresh in zip(self.tensors, self._drawn(), strict=True):
            mine.copy_(fresh, non_blocking=True)
        self.run()


def train_autoencoder(
    vae: Autoencoder,
    world: ModuleType,
    draw: Callable,
    sizes: list[Size],
    seconds: float,
    device: str,
    log: Callable[[str], None],
) -> int:
    """Train for `seconds`, cycling through `sizes`; returns the steps."""
    vae.train().to(device)
    named = list(vae.named_parameters())
    ends = ("conv_in", "conv_out", "quant")
    inner = [
        p
        for n, p in named
        if n.endswith("weight") and p.ndim >= 4 and not any(e in n for e in ends)
    ]
    ids = {id(p) for p in inner}
    optimizer = MuonAdamW(inner, [p for _, p in named if id(p) not in ids], lr=3e-3, lr_rest=1e-3)
    optimizer.set_factor(0.0)  # capturing runs each step twice
    losses = torch.zeros(4, device=device)
    with quick_to_train(vae):
        steps = {
            s: _Step(vae, optimizer, world, draw, s, losses, device, log)
            for s in dict.fromkeys(sizes)
        }
        log("autoencoder: steps ready")
        losses.zero_()
        start, done, every = time.monotonic(), 0, 500 if device == "cuda" else 20
        while (share := (time.monotonic() - start) / seconds) < 1:
            optimizer.set_factor(min(1.0, (done + 1) / 100) * schedule(share, 0.35))
            steps[sizes[done % len(sizes)]]()
            done += 1
            if device == "cuda" and done % 20 == 0:
                torch.cuda.synchronize()  # the clock must not run ahead of the device
            if done % every == 0:
                l1, l2, edges, kl = (losses / every).tolist()
                losses.zero_()
                spent = time.monotonic() - start
                log(
                    f"autoencoder: step {done}, {spent:.0f} of {seconds:.0f} s, l1 {l1:.4f}, "
                    f"{10 * math.log10(4 / l2):.1f} dB, edges {edges:.4f}, kl {kl:.2f}"
                )
    vae.eval()
    return done


def drawn(world: ModuleType, draw: Callable, size: Size, rng: random.Random, device: str):
    """Scenes and their pictures or clips."""
    scenes = [world.sample_scene(rng) for _ in range(size[0])]
    tensors = world.scene_tensors(scenes, rng.randrange(1 << 30))
    return scenes, draw(*[t.to(device) for t in tensors], size=size[1:])


@torch.no_grad()
def measure_latents(
    vae: Autoencoder, world: ModuleType, draw: Callable, size: Size, batches: int, device: str
) -> None:
    """Store in the config what brings the latents to mean 0 and spread 1, as far as it can."""
    rng, latents = random.Random(90_000), []
    for _ in range(batches):
        _, x = drawn(world, draw, size, rng, device)
        latents.append(vae.encode(x).latent_dist.mean.flatten().double())
    values = torch.cat(latents)
    entries = {"scaling_factor": round(1 / float(values.std()), 5)}
    if isinstance(vae, AutoencoderKL):
        entries["shift_factor"] = round(float(values.mean()), 5)
    vae.register_to_config(**entries)


@torch.no_grad()
def reconstruction_psnr(
    vae: Autoencoder, world: ModuleType, draw: Callable, size: Size, batches: int, device: str
) -> float:
    """PSNR in dB of the stock autoencoder, averaged over scenes unseen in training."""
    rng, values = random.Random(777_000), []
    for _ in range(batches):
        _, x = drawn(world, draw, size, rng, device)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        error = (y - x).square().flatten(1).mean(1)
        values += (10 * torch.log10(4 / error)).tolist()
    return sum(values) / len(values)
