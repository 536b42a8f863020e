"""Perturbed heads against the definition, in float64, for every family's kind of block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_subjects import Subject
from tiny_pipelines import run_tiny
from torch import Tensor

from dit_accel import accelerate_pipeline
from dit_accel.acceleration import family_of
from dit_accel.guidance.attention import attention_of
from dit_accel.guidance.reference import perturbed_attention
from dit_accel.runtime import Runtime

# A dual-stream and a single-stream block where there are both; SD3's last block returns no text.
BLOCKS = [("wan", 1), ("flux", 0), ("flux", 2), ("hunyuan", 1), ("hunyuan", 2), ("sd3", 0)]
STRENGTH = [0.3, 0.9]


def outputs(name: str, layer: int, monkeypatch: Any, **options: Any) -> tuple[Tensor, ...]:
    """Return what one layer's attention gave in the plain and in the perturbed pass, and q, k, v.

    The layer's projections after attention are the identity, so that nothing else is in the way.
    """
    subject = Subject(name)
    transformer = subject.pipe.transformer
    accelerate_pipeline(
        subject.pipe, ["dense", "softpag"], heads=[(layer, 0), (layer, 1)], min_tokens=0,
        strength=STRENGTH, **options,
    )  # fmt: skip
    index, attn = attention_of(family_of(subject.pipe), transformer)[layer]
    for out in (getattr(attn, "to_out", None), getattr(attn, "to_add_out", None)):
        linear = out[0] if isinstance(out, torch.nn.ModuleList) else out
        if linear is not None:
            torch.nn.init.eye_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
    seen: list[tuple[Tensor, ...]] = []
    plain = Runtime.attend

    def spy(self, query, key, value, mask, scale, at):
        if at is not None and int(at) == index:
            seen.append((query.double(), key.double(), value.double()))
        return plain(self, query, key, value, mask, scale, at)

    monkeypatch.setattr(Runtime, "attend", spy)
    found: list[Any] = []

    def keep(inner: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(inner(*args, **kwargs))
        return found[-1]

    subject.pipe._dit_accel.runtime.seam.intercept(attn, keep)  # outside of what perturbs it
    run_tiny(subject.pipe, subject.arguments, num_inference_steps=1)
    output = found[1]  # the first call is conditional, the second perturbed
    if isinstance(output, tuple):
        output = torch.cat(output[::-1] if name == "flux" else output, 1)
    return output, *seen[1]


@pytest.mark.parametrize("scope", ["joint", "image"])
@pytest.mark.parametrize("perturbation", ["identity", "uniform", "query_mean"])
@pytest.mark.parametrize(("name", "layer"), BLOCKS)
def test_heads_are_as_defined(name, layer, perturbation, scope, monkeypatch):
    output, query, key, value = outputs(
        name, layer, monkeypatch, perturbation=perturbation, scope=scope
    )
    length, image = query.shape[1], 252 if name in ("wan", "hunyuan") else 255
    text = length - image
    rows = torch.ones(length, dtype=torch.bool)
    if scope == "image":
        rows = torch.arange(length) >= text if name == "flux" else torch.arange(length) < image
    expected = perturbed_attention(
        query, key, value, torch.tensor(STRENGTH, dtype=torch.float64),
        perturbation=perturbation, rows=rows,
    ).flatten(2)  # fmt: skip
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["hunyuan", "sd3", "flux"])
def test_the_runtime_s_attention_makes_no_difference(name):
    """Stock attention pads and masks text where ours does not; padding counts nowhere."""
    results = []
    for method in ("softpag", ["dense", "softpag"]):
        subject = Subject(name)
        heads = [(1, 0), (3 if name != "sd3" else 2, 1)]
        accelerate_pipeline(subject.pipe, method, heads=heads, perturbation="uniform")
        results.append(run_tiny(subject.pipe, subject.arguments))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_padding_of_a_batch_counts_nowhere():
    """Two prompts of different lengths give what each gives alone."""
    subject = Subject("hunyuan")
    prompts = ["a red ball", "a blue ball with stripes"]
    for perturbation in ("uniform", "query_mean"):
        accelerate_pipeline(
            subject.pipe, ["dense", "softpag"], heads=[(1, 0), (3, 1)], perturbation=perturbation
        )

        def run(prompt: Any, seeds: list[int], subject: Subject = subject) -> Tensor:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            negative = ["blurry"] * len(seeds)
            return run_tiny(
                subject.pipe, subject.arguments, prompt=prompt, generator=generators,
                negative_prompt=negative,
            )  # fmt: skip

        both = run(prompts, [0, 1])
        alone = torch.cat([run([prompt], [seed]) for seed, prompt in enumerate(prompts)])
        torch.testing.assert_close(both, alone, rtol=1e-3, atol=1e-3)


def test_fused_projections_give_the_same():
    subject = Subject("flux")
    accelerate_pipeline(subject.pipe, "softpag", heads=[(1, 0), (2, 1)])
    out = run_tiny(subject.pipe, subject.arguments)
    accelerate_pipeline(subject.pipe, "dense")
    subject.pipe.transformer.fuse_qkv_projections()
    accelerate_pipeline(subject.pipe, "softpag", heads=[(1, 0), (2, 1)])
    torch.testing.assert_close(run_tiny(subject.pipe, subject.arguments), out, rtol=1e-3, atol=1e-3)
