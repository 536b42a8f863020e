"""Generating for a run: what a batch cannot reach is asked for less strictly, for it alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dit_accel.errors import DensityUnreachableError
from dit_accel.eval import sampling
from dit_accel.eval.candidates import Candidate
from dit_accel.eval.settings import ModelSettings

LEAST = {"short": 0.5, "long": 0.6}


def test_a_batch_that_cannot_reach_the_density_takes_its_own_least(monkeypatch):
    asked: list[dict[str, Any]] = []

    def generate(_pipe: Any, requests: list[Any], **_progress: Any) -> Any:
        least = LEAST[requests[0].prompt]
        if asked[-1]["density"] < least:
            raise DensityUnreachableError("out of reach", least)
        return SimpleNamespace(total_s=1.0, denoise_s=1.0, steps=1)

    monkeypatch.setattr(
        sampling, "accelerate_pipeline", lambda _pipe, _method, **options: asked.append(options)
    )
    monkeypatch.setattr(sampling, "generate_batch", generate)
    for name in ("restore_pipeline", "warm_up_batch", "accelerate_at"):
        monkeypatch.setattr(sampling, name, lambda *_args, **_kwargs: {})
    monkeypatch.setattr(sampling, "_acceleration", lambda _pipe: {})
    monkeypatch.setattr(sampling.PipelineSampler, "_pipe", lambda _self: None)
    sampler = sampling.PipelineSampler(ModelSettings(model="tiny-wan", device="cpu"))
    candidate = Candidate("gna@0.5", "gna", {"density": 0.5})

    def reached(prompt: str) -> Any:
        return sampler.sample(candidate, [SimpleNamespace(prompt=prompt)]).acceleration

    assert reached("short") == {}
    assert reached("long") == {"reaches": 0.6}
    assert reached("short") == {}  # as after a run that was cut off here
    assert [options["density"] for options in asked] == [0.5, 0.6, 0.5]
    assert all(options["guard"] is False for options in asked)


def test_what_no_density_helps_is_raised(monkeypatch):
    monkeypatch.setattr(sampling.PipelineSampler, "_pipe", lambda _self: None)
    sampler = sampling.PipelineSampler(ModelSettings(model="tiny-wan", device="cpu"))
    monkeypatch.setattr(sampler, "_attach", lambda *_: None)

    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(sampling, "generate_batch", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        sampler.sample(Candidate("dense", "dense"), [SimpleNamespace(prompt="short")])
