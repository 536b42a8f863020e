"""The transformer: a small stock `WanTransformer3DModel`, trained by flow matching.

It learns with its text encoder on latents that were encoded beforehand.
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from dit_accel.world import clips as world
from recipes.shared.flow import NOISE_LEVELS, noise_level
from recipes.shared.optim import MuonAdamW, WeightAverage, captured
from recipes.shared.schedule import schedule
from recipes.tiny_wan import text
from recipes.tiny_wan import vae as autoencoder

CONFIG = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=4,
    attention_head_dim=64,
    in_channels=16,
    out_channels=16,
    text_dim=256,
    freq_dim=256,
    ffn_dim=1024,
    num_layers=8,
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
    rope_max_seq_len=256,
)
SMOKE_CONFIG = {**CONFIG, "num_layers": 2, "num_attention_heads": 1, "ffn_dim": 64}
TEXT_TOKENS = 48  # kept of a prompt in training, padding included
PROMPT_LENGTHS = (64, 128, 226, 512, 512)  # the lengths that `WanPipeline` may pad a prompt to


@dataclass(frozen=True)
class Bucket:
    """Clips of one size."""

    name: str
    size: tuple[int, int, int]  # frames, height, width
    clips: int
    encode_batch: int
    batch: int
    shift: float  # of the noise schedule: longer clips need more noise to hide the same detail
    share: float  # of the steps in the mixed phase


def make_dit(config: dict) -> WanTransformer3DModel:
    """A fresh transformer that starts by predicting zero and not reading the text."""
    torch.manual_seed(2)
    dit = WanTransformer3DModel(**config)
    for name, p in dit.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif name.endswith("weight") and p.ndim >= 2:
            nn.init.xavier_uniform_(p.view(p.shape[0], -1))
    embedder = dit.condition_embedder
    for layer in (
        embedder.time_embedder.linear_1,
        embedder.time_embedder.linear_2,
        embedder.time_proj,
    ):
        nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(dit.proj_out.weight)
    for block in dit.blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
    return dit


class PaddedTextProcessor(WanAttnProcessor):
    """Cross-attention in which the last text token stands for all the padding of a prompt.

    `WanPipeline` zeroes the embeddings behind the prompt, so padding tokens share one key and one
    value: n copies of a key equal one key with log(n) added to its score.
    """

    def __init__(self, bias: Tensor):
        super().__init__()
        self.bias = bias  # [TEXT_TOKENS], changed in place

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ):
        """As `WanAttnProcessor`, for attention over text only."""
        q, k, v = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for x in (
                attn.norm_q(attn.to_q(hidden_states)),
                attn.norm_k(attn.to_k(encoder_hidden_states)),
                attn.to_v(encoder_hidden_states),
            )
        )
        scores = (q @ k.mT).float() * q.shape[-1] ** -0.5 + self.bias
        out = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        return attn.to_out[0](out.to(hidden_states.dtype))


@torch.no_grad()
def encode_clips(
    vae, tokenizer, bucket: Bucket, clips: int, seed: int, device: str, draw: Callable
):
    """Draw and encode `clips` clips; returns normalised latents in bf16 and token ids."""
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
    rng, latents, captions = random.Random(seed), [], []
    for _ in range(clips // bucket.encode_batch):
        scenes = [world.sample_scene(rng) for _ in range(bucket.encode_batch)]
        tensors = world.scene_tensors(scenes, rng.randrange(1 << 30))
        x = draw(*[t.to(device) for t in tensors], size=bucket.size)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            z, _ = autoencoder.encode(vae, x)
        latents.append(((z - mean) / std).bfloat16())
        captions += [world.caption(s, rng) for s in scenes]
    ids = tokenizer(
        captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    )
    return torch.cat(latents), ids.input_ids.to(device)


def vary_text(ids: Tensor) -> Tensor:
    """Drop a tenth of the captions, for guidance; make some words of another tenth unknown."""
    rows = (len(ids), 1)
    noisy = torch.rand(rows, device=ids.device) < 0.1
    hit = noisy & (torch.rand(ids.shape, device=ids.device) < 0.12) & (ids > text.UNKNOWN)
    ids = ids.masked_fill(hit, text.UNKNOWN)
    empty = torch.zeros_like(ids)
    empty[:, 0] += text.END
    return torch.where(torch.rand(rows, device=ids.device) < 0.1, empty, ids)


class Trainer:
    """Trains `dit` and `encoder` together on buckets of latents."""

    def __init__(self, dit, encoder, device: str, log: Callable):
        self.dit, self.encoder = dit.to(device).train(), encoder.to(device).train()
        self.device, self.log, self.on_gpu = device, log, device == "cuda"
        self.bias = torch.zeros(TEXT_TOKENS, device=device)
        for block in dit.blocks:
            block.attn2.set_processor(PaddedTextProcessor(self.bias))
        inner = [p for n, p in dit.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
        ids = {id(p) for p in inner}
        parameters = [*dit.parameters(), *encoder.parameters()]
        self.optimizer = MuonAdamW(
            inner, [p for p in parameters if id(p) not in ids], lr=2e-3, lr_rest=1e-3
        )
        self.average = WeightAverage(parameters, 0.999)
        self.steps: dict[str, Callable[[], None]] = {}
        self.losses: dict[str, Tensor] = {}
        self.done = 0
        if self.on_gpu:
            dit.compile_repeated_blocks(fullgraph=True, dynamic=False)

    def loss(self, latents: Tensor, ids: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """Flow-matching error per clip [B]."""
        s = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.on_gpu):
            words = text.embed(self.encoder, ids)
            out = self.dit((1 - s) * latents + s * noise, sigma * 1000, words, return_dict=False)[0]
        return (out.float() - (noise - latents)).square().flatten(1).mean(1)

    def set_prompt_length(self, length: int) -> None:
        """Pretend that prompts are padded to `length` tokens."""
        self.bias[-1] = math.log(length - TEXT_TOKENS + 1)

    def add(self, bucket: Bucket, latents: Tensor, ids: Tensor) -> None:
        """Prepare the training step for a bucket's clips."""
        total = torch.zeros((), device=self.device)

        def step() -> None:
            with torch.no_grad():
                pick = torch.randint(len(latents), (bucket.batch,), device=self.device)
                x, words = latents[pick].float(), vary_text(ids[pick])
                sigma = noise_level(bucket.batch, bucket.shift, self.device)
                noise = torch.randn_like(x)
            loss = self.loss(x, words, sigma, noise).mean()
            self.optimizer.backward_and_step(loss)
            self.average.update()
            total.add_(loss.detach())

        self.set_prompt_length(512)
        self.optimizer.set_factor(0.0)  # capturing runs the step twice
        self.steps[bucket.name] = captured(step) if self.on_gpu else step
        self.losses[bucket.name] = total.zero_()
        self.log(f"transformer: step for {bucket.name} ready")

    def train(
        self, seconds: float, shares: dict[str, float], hold: float, warm_up: int = 200
    ) -> int:
        """Train for `seconds`, picking buckets by `shares`; returns the steps."""
        rng = random.Random(self.done)
        names, weights = list(shares), list(shares.values())
        counts = dict.fromkeys(names, 0)
        start, first, every = time.monotonic(), self.done, 500 if self.on_gpu else 20
        while (share := (time.monotonic() - start) / seconds) < 1:
            warm = min(1.0, (self.done + 1) / warm_up)
            self.optimizer.set_factor(warm * schedule(share, hold))
            self.set_prompt_length(rng.choice(PROMPT_LENGTHS))
            name = rng.choices(names, weights)[0]
            self.steps[name]()
            counts[name] += 1
            self.done += 1
            if self.on_gpu and self.done % 20 == 0:
                torch.cuda.synchronize()  # the clock must not run ahead of the device
            if (self.done - first) % every == 0:
                means = {n: self.losses[n].item() / max(1, counts[n]) for n in names}
                for n in names:
                    self.losses[n].zero_()
                    counts[n] = 0
                shown = ", ".join(f"{n} {v:.4f}" for n, v in means.items())
                spent = time.monotonic() - start
                self.log(
                    f"transformer: step {self.done}, {spent:.0f} of {seconds:.0f} s, loss {shown}"
                )
        return self.done - first

    @torch.no_grad()
    def validate(self, latents: Tensor, ids: Tensor, batch: int) -> float:
        """Mean loss over eight noise levels with fixed noise."""
        self.set_prompt_length(512)
        values = []
        for level in NOISE_LEVELS:
            for i in range(0, len(latents), batch):
                x = latents[i : i + batch].float()
                seed = torch.Generator(self.device).manual_seed(i)
                noise = torch.randn(x.shape, device=self.device, generator=seed)
                sigma = torch.full((len(x),), level, device=self.device)
                values += self.loss(x, ids[i : i + batch], sigma, noise).tolist()
        return sum(values) / len(values)

    def use_average(self) -> None:
        """Put the averaged weights in place; training ends here."""
        self.average.store()
        self.steps.clear()
        for block in self.dit.blocks:
            block._compiled_call_impl = None
        self.dit.eval()
        self.encoder.eval()
