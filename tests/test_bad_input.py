"""Wrong use is refused with a cause and a remedy."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_pipelines import TINY_PIPELINES

from dit_accel import GNA, accelerate_pipeline, acceleration_report, method_class, sparse_attention
from dit_accel.errors import (
    DitAccelError,
    GridMismatchError,
    OperatorUnavailableError,
    OptionError,
    UnknownMethodError,
    UnknownPipelineError,
    UnknownWordsWarning,
)
from dit_accel.generation import GenerationRequest, generate
from dit_accel.models import load_pipeline


@pytest.fixture(scope="module")
def pipe():
    return TINY_PIPELINES["wan"][0]()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"method": "radail"}, UnknownMethodError, "Did you mean 'radial'"),
        ({"method": "radial", "decey": 1}, OptionError, "Did you mean 'decay'"),
        ({"method": GNA(), "window": 3}, OptionError, "put them into the object"),
        ({"method": 3}, OptionError, "give"),
        ({"method": ["radial", "gna"]}, OptionError, "one attention method"),
        ({"method": "gna", "density": 0}, OptionError, "density"),
        ({"method": "gna", "density": 1.5}, OptionError, "density"),
        ({"method": "gna", "dense_steps": -1}, OptionError, "dense_steps"),
        ({"method": "gna", "dense_steps": 1.5}, OptionError, "dense_steps"),
        ({"method": "gna", "dense_steps": (1, 2, 3)}, OptionError, "first, last"),
        ({"method": "gna", "dense_layers": -1}, OptionError, "dense_layers"),
        ({"method": "gna", "dense_layers": 0.5}, OptionError, "dense_layers"),
        ({"method": "gna", "min_tokens": -1}, OptionError, "min_tokens"),
        ({"method": "gna", "backend": "trition"}, OptionError, "Did you mean 'triton'"),
        ({"method": "gna", "guard": 0.1}, OptionError, "guard"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_impossible_options(pipe, arguments, error, says):
    with pytest.raises(error, match=says):
        accelerate_pipeline(pipe, **arguments)
    with pytest.raises(OptionError, match="not accelerated"):
        acceleration_report(pipe)


def test_unknown_pipeline_lists_the_families_and_how_to_add_one():
    stranger = SimpleNamespace(transformer=torch.nn.Linear(1, 1))
    with pytest.raises(UnknownPipelineError, match=r"hunyuan_video.*PipelineFamily"):
        accelerate_pipeline(stranger, "radial")


def test_method_class_suggests_the_nearest():
    with pytest.raises(UnknownMethodError, match="Did you mean 'sliding_window'"):
        method_class("slidingwindow")


def test_words_that_a_bundled_model_never_saw_are_named():
    request = GenerationRequest(
        prompt="a red unicorn", negative_prompt="blurry", steps=1, frames=1, height=16, width=16
    )
    with pytest.warns(UnknownWordsWarning, match="nothing of 'unicorn', 'blurry'"):
        made = generate(load_pipeline("tiny-wan"), request)
    assert made.frames.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("prompt", ["", " \n"], ids=repr)
def test_an_empty_prompt(prompt):
    with pytest.raises(OptionError, match="prompt is empty"):
        GenerationRequest(prompt=prompt)


def tokens(count: int) -> torch.Tensor:
    return torch.randn(1, count, 2, 16)


def test_grid_that_does_not_explain_the_tokens():
    x = tokens(130)
    with pytest.raises(GridMismatchError, match=r"130 tokens.*4x5x6 explains 120.*text_length=10"):
        sparse_attention(x, x, x, GNA(0.5), grid=(4, 5, 6))
    with pytest.raises(GridMismatchError, match="patch"):
        sparse_attention(tokens(7), tokens(7), tokens(7), GNA(0.5), grid=(4, 5, 6))


def test_window_larger_than_the_axis():
    x = tokens(120)
    with pytest.raises(OptionError, match="7"):
        sparse_attention(x, x, x, GNA((4, 7, 6)), grid=(4, 5, 6))


def test_operator_asked_for_by_name_never_falls_back():
    x = tokens(120)
    method = GNA(0.5, block_size=16)  # flash-attn-4 takes blocks of 128 on a Hopper GPU
    with pytest.raises(OperatorUnavailableError, match="doctor"):
        sparse_attention(x, x, x, method, grid=(4, 5, 6), backend="flash-attn-4")


def test_shapes_that_disagree():
    with pytest.raises(OptionError, match="shape"):
        sparse_attention(tokens(120), tokens(60), tokens(120), GNA(0.5), grid=(4, 5, 6))


def test_all_errors_share_a_base():
    for error in (OptionError, GridMismatchError, OperatorUnavailableError, UnknownPipelineError):
        assert issubclass(error, DitAccelError)
