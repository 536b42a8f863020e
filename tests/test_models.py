"""How models are found, and that half precision weights are widened on a CPU."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_pipelines import tiny_sd3, tiny_wan

from dit_accel.errors import OptionError
from dit_accel.models import (
    GenerationDefaults,
    generation_defaults,
    list_models,
    load_pipeline,
    locate_model,
    model_folder,
    pipeline_class,
)


def test_bundled_models_lie_in_the_package():
    for name in list_models():
        assert (model_folder(name) / "model_index.json").is_file()
        assert locate_model(name) == str(model_folder(name))


def test_a_hub_id_is_passed_on():
    assert locate_model("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert generation_defaults("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") == GenerationDefaults()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tiny-van", "no bundled model"),
        ("./missing", "does not exist"),
        ("a/b/c", "no hub id"),
    ],
)
def test_unknown_models_are_refused(model, message):
    with pytest.raises(OptionError, match=message):
        locate_model(model)


def test_half_precision_weights_become_float32_on_a_cpu(tmp_path):
    tiny_wan().to(torch.float16).save_pretrained(tmp_path)
    pipe = load_pipeline(str(tmp_path))
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}


def test_an_asked_for_dtype_is_kept(tmp_path):
    tiny_sd3().save_pretrained(tmp_path)
    assert load_pipeline(str(tmp_path), dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def test_pipeline_class_needs_no_weights(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert pipeline_class(str(tmp_path)).__name__ == "FluxPipeline"
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NextYearPipeline"}))
    with pytest.raises(OptionError, match="NextYearPipeline"):
        pipeline_class(str(tmp_path))


def test_generation_defaults(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert generation_defaults(str(tmp_path)) == GenerationDefaults()
    (tmp_path / "dit_accel.json").write_text('{"steps": 4, "fps": 8}')
    assert generation_defaults(str(tmp_path)) == GenerationDefaults(steps=4, fps=8)
    (tmp_path / "dit_accel.json").write_text('{"stepz": 4}')
    with pytest.raises(OptionError, match="Did you mean 'steps'"):
        generation_defaults(str(tmp_path))
