"""The autoencoder: a small stock `AutoencoderKLWan`, and how it is trained.

Stock code walks a clip in chunks of four frames with a feature cache, which is slow to train.
`whole_sequence` gives the same numbers in one pass over all frames.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import Tensor, nn

from dit_accel.world import clips as world
from recipes.shared.optim import MuonAdamW, captured
from recipes.shared.schedule import schedule

Size = tuple[int, int, int, int]  # clips, frames, height, width

CONFIG = dict(
    base_dim=32,
    decoder_base_dim=56,
    z_dim=16,
    dim_mult=[1, 2, 2],
    num_res_blocks=1,
    temperal_downsample=[True, True],
    is_residual=True,
    patch_size=2,
    in_channels=12,
    out_channels=12,
    scale_factor_temporal=4,
    scale_factor_spatial=8,
)
SMOKE_CONFIG = {**CONFIG, "base_dim": 8, "decoder_base_dim": 8}
CROWD = 6  # things in a crowded scene
CROWDED = 0.6  # share of crowded scenes


def make_vae(config: dict) -> AutoencoderKLWan:
    """A fresh autoencoder with unit-gain weights."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**config)
    for m in vae.modules():
        if isinstance(m, nn.Conv3d | nn.Conv2d):
            nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
            nn.init.zeros_(m.bias)
    # RMS norm forgets brightness unless some channels are constant.
    for m in (vae.encoder.conv_in, vae.decoder.conv_in):
        nn.init.normal_(m.bias, std=1.0)
    nn.init.constant_(vae.quant_conv.bias[config["z_dim"] :], -3.0)  # start with little noise
    return vae


def _norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt((wide * wide).mean(1, keepdim=True).clamp_min(1e-24))
    return F.silu(wide * scale * gamma).to(x.dtype)


def _residual_block(block, x, feat_cache=None, feat_idx=None, *, norm_silu=_norm_silu):
    shortcut = block.conv_shortcut(x)
    x = block.conv1(norm_silu(x, block.norm1.gamma))
    return block.conv2(norm_silu(x, block.norm2.gamma)) + shortcut


def _resample(block, x, feat_cache=None, feat_idx=None):
    """The first frame has no predecessor: time is resampled over the frames after it."""
    if block.mode == "upsample3d" and x.shape[2] > 1:
        pairs = block.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # [B, 2, C, t, H, W]
        rest = torch.stack((pairs[:, 0], pairs[:, 1]), 3).flatten(2, 3)
        x = torch.cat((x[:, :, :1], rest), 2)
    frames = x.shape[2]
    x = block.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2)
    if block.mode == "downsample3d" and frames > 1:
        x = torch.cat((x[:, :, :1], block.time_conv(x)), 2)
    return x


def _causal_conv(conv, x, cache_x=None):
    """Pad time by a copy, and space inside the convolution."""
    width, height, before = conv._padding[0], conv._padding[2], conv._padding[4]
    if before:
        x = F.pad(x, (0, 0, 0, 0, before, 0))
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, (0, height, width))


@contextmanager
def whole_sequence(vae: AutoencoderKLWan, compiled: bool = False) -> Iterator[None]:
    """Within, `encode` and `decode` of this module work on `vae`, in channels-last memory."""
    norm_silu = torch.compile(_norm_silu, dynamic=True) if compiled else _norm_silu
    replacements = {
        wan.WanResidualBlock: partial(_residual_block, norm_silu=norm_silu),
        wan.WanResample: _resample,
        wan.WanCausalConv3d: _causal_conv,
    }
    changed = [m for m in vae.modules() if type(m) in replacements]
    for m in vae.modules():
        if isinstance(m, nn.Conv3d):
            m.weight.data = m.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(m, nn.Conv2d):
            m.weight.data = m.weight.data.contiguous(memory_format=torch.channels_last)
    for m in changed:
        m.forward = partial(replacements[type(m)], m)
    try:
        yield
    finally:
        for m in changed:
            del m.forward
        for p in vae.parameters():
            p.data = p.data.contiguous()


def encode(vae: AutoencoderKLWan, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance, each [B, z, t, h, w], of clips [B, 3, T, H, W]."""
    x = wan.patchify(clips, vae.config.patch_size)
    x = vae.encoder(x.contiguous(memory_format=torch.channels_last_3d))
    mean, log_var = vae.quant_conv(x).float().chunk(2, 1)
    return mean, log_var.clamp(-20, 10)


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Clips [B, 3, T, H, W] from (unnormalised) latents."""
    latents = latents.contiguous(memory_format=torch.channels_last_3d)
    x = vae.decoder(vae.post_quant_conv(latents), first_chunk=True)
    return wan.unpatchify(x, vae.config.patch_size).float()


def _edges(error: Tensor) -> Tensor:
    return sum(error.diff(dim=d).abs().mean() for d in (-1, -2, -3)) / 3


def _scenes(count: int, rng: random.Random) -> list[world.Scene]:
    return [
        world.sample_crowd(rng, CROWD) if rng.random() < CROWDED else world.sample_scene(rng)
        for _ in range(count)
    ]


class _Step:
    """One update on freshly drawn clips of one size; captured on a GPU."""

    def __init__(self, vae, optimizer, draw, size: Size, losses: Tensor, device: str):
        self.count, self.rng = size[0], random.Random(sum(size))
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

        self.run = captured(step) if device == "cuda" else step

    def _drawn(self) -> list[Tensor]:
        return world.scene_tensors(
            _scenes(self.count, self.rng), self.rng.randrange(1 << 30), CROWD
        )

    def __call__(self) -> None:
        for mine, fresh in zip(self.tensors, self._drawn(), strict=True):
            mine.copy_(fresh, non_blocking=True)
        self.run()


def train_vae(
    vae, sizes: list[Size], seconds: float, device: str, draw: Callable, log: Callable
) -> int:
    """Train within `whole_sequence` for `seconds`, cycling through `sizes`; returns the steps."""
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
    steps = {s: _Step(vae, optimizer, draw, s, losses, device) for s in dict.fromkeys(sizes)}
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


@torch.no_grad()
def measure_latents(vae, size: Size, batches: int, device: str, draw: Callable) -> None:
    """Store the latents' mean and spread per channel in the config that the pipeline reads."""
    rng = random.Random(90_000)
    total = square = variance = 0
    for _ in range(batches):
        scenes = [world.sample_scene(rng) for _ in range(size[0])]
        tensors = world.scene_tensors(scenes, rng.randrange(1 << 30))
        x = draw(*[t.to(device) for t in tensors], size=size[1:])
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            mean, log_var = encode(vae, x)
        axes = (0, 2, 3, 4)
        total = total + mean.double().mean(axes)
        square = square + mean.double().square().mean(axes)
        variance = variance + log_var.double().exp().mean(axes)
    mean = total / batches
    std = (square / batches - mean**2 + variance / batches).sqrt()
    vae.register_to_config(
        latents_mean=[round(v, 5) for v in mean.tolist()],
        latents_std=[round(v, 5) for v in std.tolist()],
    )


@torch.no_grad()
def reconstruction_psnr(vae, size: Size, batches: int, device: str, draw: Callable) -> float:
    """PSNR in dB, averaged over clips unseen in training, through this module's one-pass code."""
    rng, values = random.Random(777_000), []
    for _ in range(batches):
        scenes = [world.sample_scene(rng) for _ in range(size[0])]
        tensors = world.scene_tensors(scenes, rng.randrange(1 << 30))
        x = draw(*[t.to(device) for t in tensors], size=size[1:])
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            y = decode(vae, encode(vae, x)[0])
        error = (y.clamp(-1, 1) - x).square().flatten(1).mean(1)
        values += (10 * torch.log10(4 / error)).tolist()
    return sum(values) / len(values)
