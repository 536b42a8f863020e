"""What HunyuanVideo's transformer does besides the pipeline's usual calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

from dit_accel import (
    GNA,
    PISA,
    PSA,
    RectifiedSpaAttn,
    accelerate_pipeline,
    acceleration_report,
)

WINDOW = GNA((1.0, 0.4, 0.4), block_size=16)
# With random weights, sparse attention is so far from dense that the guard would step in.
EVERYWHERE: dict[str, Any] = {"dense_steps": 0, "min_tokens": 0, "guard": False}


def transformer(condition: str | None = None) -> Any:
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=condition,
        guidance_embeds=condition is None,
    ).eval()


def inputs(valid: list[list[int]], guidance: bool = True) -> dict[str, Any]:
    torch.manual_seed(1)
    batch = len(valid)
    return {
        "hidden_states": torch.randn(batch, 4, 3, 14, 18),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, 6, 16),
        "encoder_attention_mask": torch.tensor(valid),
        "pooled_projections": torch.randn(batch, 16),
        "guidance": torch.full((batch,), 3000.0) if guidance else None,
        "return_dict": False,
    }


@torch.no_grad()
def run(model: Any, arguments: dict[str, Any]) -> torch.Tensor:
    return model(**arguments)[0]


METHODS = [
    WINDOW,
    GNA((1.0, 0.4, 0.4), block_size=16, remainder="pooled"),
    PSA(query_block=16, key_block=16),
    RectifiedSpaAttn(block_size=16, drop=0.9),
    PISA(block_size=16),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("junk", [1e4, float("inf"), float("nan")])
def test_padding_is_dropped_whatever_it_holds(method, junk):
    model = transformer()
    pipe = SimpleNamespace(transformer=model)
    arguments = inputs([[1, 1, 1, 1, 0, 0]])
    dense = run(model, arguments)
    accelerate_pipeline(pipe, "dense")
    torch.testing.assert_close(run(model, arguments), dense, rtol=1e-5, atol=1e-5)
    accelerate_pipeline(pipe, method, **EVERYWHERE)
    sparse = run(model, arguments)
    assert acceleration_report(pipe).density < 1
    arguments["encoder_hidden_states"][:, 4:] = junk
    torch.testing.assert_close(run(model, arguments), sparse)


def test_padding_is_no_part_of_the_text():
    model = transformer()
    pipe = SimpleNamespace(transformer=model)
    accelerate_pipeline(pipe, WINDOW, **EVERYWHERE)
    run(model, inputs([[1, 1, 1, 1, 0, 0]]))
    assert acceleration_report(pipe).calls[0].plan.layout.text_length == 4


def test_text_mask_with_holes_stays_dense_and_is_reported():
    model = transformer()
    pipe = SimpleNamespace(transformer=model)
    arguments = inputs([[1, 0, 1, 1, 0, 0]])
    dense = run(model, arguments)
    accelerate_pipeline(pipe, WINDOW, **EVERYWHERE)
    assert torch.equal(run(model, arguments), dense)
    assert {call.reason for call in acceleration_report(pipe).calls} == {
        "the model masks text in the middle"
    }


def test_first_frame_modulation_reorders_in_every_layer(masked):
    """Image-to-video by token replacement finds its first frame by position."""
    model = transformer("token_replace")
    pipe = SimpleNamespace(transformer=model)
    arguments = inputs([[1, 1, 1, 1, 1, 0]], guidance=False)
    accelerate_pipeline(pipe, WINDOW, **EVERYWHERE)
    out = run(model, arguments)
    assert any("in every layer" in note for note in acceleration_report(pipe).notes)
    accelerate_pipeline(pipe, masked(WINDOW), **EVERYWHERE)
    torch.testing.assert_close(out, run(model, arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [WINDOW, "dense"], ids=["sparse", "dense"])
def test_samples_with_texts_of_different_lengths(method):
    model = transformer()
    pipe = SimpleNamespace(transformer=model)
    options = EVERYWHERE if method == WINDOW else {}
    accelerate_pipeline(pipe, method, **options)
    arguments = inputs([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    both = run(model, arguments)
    for i in range(2):
        alone = {k: v[i : i + 1] if torch.is_tensor(v) else v for k, v in arguments.items()}
        torch.testing.assert_close(both[i : i + 1], run(model, alone), rtol=1e-4, atol=1e-5)
