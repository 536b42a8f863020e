"""Training of a transformer by flow matching, with guidance distilled into it on the way."""

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from recipes.shared.flow import NOISE_LEVELS, noise_level
from recipes.shared.optim import MuonAdamW, WeightAverage, captured_if_possible
from recipes.shared.schedule import schedule
from recipes.tiny_joint.model import Bucket, Model

DROPPED = 0.1  # share of captions left out, for guidance
ALONE = 0.3  # share of the time spent on the first, smallest bucket alone
DISTILLED = 0.3  # share at the end in which embedded guidance is learned
HOLD = 0.45  # share of the time before the learning rate falls


def initialise(transformer: nn.Module) -> None:
    """Xavier weights; blocks and output start by changing nothing."""
    for name, p in transformer.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif name.endswith("weight") and p.ndim >= 2:
            nn.init.xavier_uniform_(p.view(p.shape[0], -1))
    for name, p in transformer.named_parameters():
        if p.ndim < 2:
            continue
        if "guidance_embedder.linear_2" in name:
            nn.init.zeros_(p)
        elif "time_text_embed" in name:
            nn.init.normal_(p, std=0.02)
        elif ("norm" in name and "linear" in name) or name.startswith("proj_out"):
            nn.init.zeros_(p)


def _remember(module: nn.Module) -> None:
    """Let a module that only depends on its input's shape answer from memory."""
    answers: dict[tuple[int, ...], object] = {}
    compute = module.forward

    def forward(x: Tensor):
        if (key := tuple(x.shape)) not in answers:
            answers[key] = compute(x)
        return answers[key]

    module.forward = forward


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Values [B] in a shape that multiplies with `like` [B, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))


def velocity(
    model: Model, transformer: nn.Module, x: Tensor, sigma: Tensor, text, guidance: Tensor
) -> Tensor:
    """The transformer's answer, fp32; on a GPU computed in bf16."""
    text = tuple(t.float() if t.is_floating_point() else t for t in text)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        return model.velocity(transformer, x, sigma, text, guidance).float()


def quick_to_train(transformer: nn.Module) -> None:
    """Compile the blocks, and remember the rotary tables."""
    for name in ("pos_embed", "rope"):  # SD3's of that name is a layer
        module = getattr(transformer, name, None)
        if module is not None and not list(module.parameters()):
            _remember(module)
    for name, block in transformer.named_modules():
        if name.rpartition(".")[0] in ("transformer_blocks", "single_transformer_blocks"):
            block.compile(dynamic=False)


class Trainer:
    """Trains a model's transformer on buckets of latents and embedded captions.

    Embedded guidance is learned last, from a teacher: the averaged weights as they are by then.
    A model that is its own teacher drags its answers, and thus its targets, away: the loss of
    tiny-flux rose fourfold.
    """

    def __init__(
        self, model: Model, transformer: nn.Module, device: str, log: Callable, capture: bool = True
    ):
        self.model, self.transformer = model, transformer.to(device).train()
        self.device, self.log, self.on_gpu = device, log, device == "cuda"
        self.capture = capture and self.on_gpu
        inner = [
            p
            for n, p in transformer.named_parameters()
            if "blocks." in n and p.ndim == 2 and "norm" not in n
        ]
        ids = {id(p) for p in inner}
        parameters = list(transformer.parameters())
        self.optimizer = MuonAdamW(
            inner, [p for p in parameters if id(p) not in ids], lr=2e-3, lr_rest=1e-3
        )
        self.average = WeightAverage(parameters, 0.999)
        self.steps: dict[tuple[str, bool], Callable[[], None]] = {}
        self.losses: dict[str, Tensor] = {}
        self.done, self.spent = 0, 0.0
        self.teacher = None if model.guidance is None else copy.deepcopy(self.transformer)
        self.distilling = False
        if self.on_gpu:
            for m in (self.transformer, self.teacher):
                if m is not None:
                    quick_to_train(m)

    def add(self, bucket: Bucket, latents: Tensor, text, empty, guided: bool) -> None:
        """Prepare the step for a bucket; `text` and `empty` (of no prompt) are `Model.embed`'s.

        `guided`: half of the batch learns the teacher's answer at a guidance above 1, told which
        (Meng et al. 2023, "On distillation of guided diffusion models").
        """
        total = self.losses.setdefault(bucket.name, torch.zeros((), device=self.device))
        count, half = bucket.batch, bucket.batch // 2

        def step() -> None:
            with torch.no_grad():
                pick = torch.randint(len(latents), (count,), device=self.device)
                x = latents[pick].float()
                words = tuple(t[pick] for t in text)
                sigma = noise_level(count, bucket.shift, self.device)
                noise = torch.randn_like(x)
                noisy = x + spread(sigma, x) * (noise - x)
                target = noise - x
                guidance = torch.ones(count, device=self.device)
                dropped = torch.rand(count, device=self.device) < DROPPED
                if guided:
                    low, high = self.model.guidance
                    guidance[:half] = low + (high - low) * torch.rand(half, device=self.device)
                    dropped[:half] = False
                    nothing = tuple(e.expand(half, *e.shape[1:]) for e in empty)
                    both = tuple(
                        torch.cat((w[:half], n)) for w, n in zip(words, nothing, strict=True)
                    )
                    with torch.enable_grad():  # not needed, but so no other code is compiled
                        answers = velocity(
                            self.model,
                            self.teacher,
                            noisy[:half].repeat(2, *[1] * (x.ndim - 1)),
                            sigma[:half].repeat(2),
                            both,
                            torch.ones(2 * half, device=self.device),
                        )
                    told, untold = answers.detach().chunk(2)
                    target[:half] = told + spread(guidance[:half] - 1, x) * (told - untold)
                words = tuple(
                    torch.where(spread(dropped, w), e, w) for w, e in zip(words, empty, strict=True)
                )
            answer = velocity(self.model, self.transformer, noisy, sigma, words, guidance)
            error = (answer - target).square().flatten(1).mean(1)
            self.optimizer.backward_and_step(error.mean())
            self.average.update()
            total.add_(error[half:].mean().detach())

        self.optimizer.set_factor(0.0)  # capturing runs the step twice
        average = [a.clone() for a in self.average.average]
        self.steps[bucket.name, guided] = (
            captured_if_possible(step, self.log) if self.capture else step
        )
        for mine, kept in zip(self.average.average, average, strict=True):
            mine.copy_(kept)
        self.log(f"transformer: step for {bucket.name}{' guided' if guided else ''} ready")

    def train(
        self,
        seconds: float,
        deadline: float | None,
        save: Callable[[], object],
        save_every_s: float,
        warm_up: int = 200,
        alone: float = ALONE,
    ) -> bool:
        """Train until `seconds` are spent, earlier runs counted in; False if `deadline` came first.

        The first, smallest bucket has the share `alone` of the time for itself, at the start.
        `deadline` is a time of `time.monotonic`. `save` is called every `save_every_s` seconds; its
        time does not count.
        """
        rng = random.Random(self.done)
        first, *_ = buckets = list(self.losses)
        shares = {b.name: b.share for b in (*self.model.buckets, *self.model.smoke_buckets)}
        counts = dict.fromkeys(buckets, 0)
        before, start, every = self.spent, time.monotonic(), 500 if self.on_gpu else 20
        saved = self.spent
        for total in self.losses.values():
            total.zero_()
        while self.spent < seconds:
            if deadline is not None and time.monotonic() > deadline:
                return False
            share = self.spent / seconds
            warm = min(1.0, (self.done + 1) / warm_up)
            self.optimizer.set_factor(warm * schedule(share, HOLD))
            name = first if share < alone else rng.choices(buckets, [shares[b] for b in buckets])[0]
            guided = self.teacher is not None and share >= 1 - DISTILLED
            if guided and not self.distilling:
                self.distilling = True
                self.store_average(self.teacher)
            self.steps[name, guided]()
            counts[name] += 1
            self.done += 1
            if self.on_gpu and self.done % 20 == 0:
                torch.cuda.synchronize()  # the clock must not run ahead of the device
            self.spent = before + time.monotonic() - start
            if self.spent - saved > save_every_s:
                began, saved = time.monotonic(), self.spent
                save()
                start += time.monotonic() - began
            if self.done % every == 0:
                if not all(bool(total.isfinite()) for total in self.losses.values()):
                    raise RuntimeError(f"the loss is not finite at step {self.done}")
                shown = ", ".join(
                    f"{n} {self.losses[n].item() / counts[n]:.4f}" for n in buckets if counts[n]
                )
                for n in buckets:
                    self.losses[n].zero_()
                    counts[n] = 0
                self.log(
                    f"transformer: step {self.done}, {self.spent:.0f} of {seconds:.0f} s, "
                    f"loss {shown}"
                )
        return True

    def measure(self, log: Callable, times: int = 20) -> None:
        """Tell how long each step takes; the learning rate is 0 meanwhile."""
        self.optimizer.set_factor(0.0)
        for (name, guided), step in self.steps.items():
            step()
            start = time.monotonic()
            for _ in range(times):
                step()
            loss = self.losses[name].item()  # waits for the device
            spent = 1000 * (time.monotonic() - start) / times
            log(f"{name}{' guided' if guided else ''}: {spent:.1f} ms a step, loss sum {loss:.3f}")

    def save(self, path: Path) -> None:
        """Write all that is needed to go on."""
        state = {
            "weights": [p.detach().cpu() for p in self.transformer.parameters()],
            "average": [a.cpu() for a in self.average.average],
            "optimizer": self.optimizer.state_dict(),
            "teacher": list(self.teacher.state_dict().values()) if self.distilling else None,
            "done": self.done,
            "spent": self.spent,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from what `save` wrote; before any `add`."""
        state = torch.load(path, map_location=self.device)
        for p, stored in zip(self.transformer.parameters(), state["weights"], strict=True):
            p.copy_(stored)
        for a, stored in zip(self.average.average, state["average"], strict=True):
            a.copy_(stored)
        if state["teacher"] is not None:
            self.distilling = True
            for p, stored in zip(self.teacher.state_dict().values(), state["teacher"], strict=True):
                p.copy_(stored)
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.spent = state["done"], state["spent"]

    @torch.no_grad()
    def store_average(self, transformer: nn.Module) -> None:
        """Give `transformer`, another of the same kind, the averaged weights."""
        for p, average in zip(transformer.parameters(), self.average.average, strict=True):
            p.copy_(average)


@torch.no_grad()
def validate(model: Model, transformer: nn.Module, latents: Tensor, text, batch: int) -> float:
    """Mean loss over eight noise levels with fixed noise, at guidance 1."""
    device, values = latents.device, []
    for level in NOISE_LEVELS:
        for i in range(0, len(latents), batch):
            x = latents[i : i + batch].float()
            seed = torch.Generator(device).manual_seed(i)
            noise = torch.randn(x.shape, device=device, generator=seed)
            sigma = torch.full((len(x),), level, device=device)
            words = tuple(t[i : i + batch] for t in text)
            answer = velocity(
                model, transformer, x + level * (noise - x), sigma, words, torch.ones_like(sigma)
            )
            values += (answer - noise + x).square().flatten(1).mean(1).tolist()
    return sum(values) / len(values)
