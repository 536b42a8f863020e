"""How models are found, and that half precision weights are widened on a CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_pipelines import TINY_PIPELINES, tiny_sd3, tiny_wan

from dit_accel.errors import OptionError
from dit_accel.models import (
    GenerationDefaults,
    generation_defaults,
    list_models,
    load_pipeline,
    locate_model,
    model_folder,
    pipeline_class,
    pipeline_outline,
    world_of,
)
from dit_accel.world.worlds import check_world


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


def test_every_bundled_model_names_its_world():
    for name in list_models():
        check_world(generation_defaults(name).world)


def test_the_world_of_a_loaded_pipeline():
    assert world_of(load_pipeline("tiny-wan")) == "clips"
    assert world_of(tiny_wan()) is None


@pytest.mark.parametrize("name", ["wan", "wan22", "wan_i2v", "wan_vace", "hunyuan", "flux", "sd3"])
def test_an_outline_has_the_sizes_and_no_weights(name, tmp_path):
    pipe = TINY_PIPELINES[name][0]()
    pipe.save_pretrained(tmp_path)
    outline = pipeline_outline(str(tmp_path))
    assert type(outline) is type(pipe)
    for factor in ("vae_scale_factor", "vae_scale_factor_spatial", "vae_scale_factor_temporal"):
        assert getattr(outline, factor, None) == getattr(pipe, factor, None)
    for part in ("vae", "transformer"):
        weights = dict(getattr(outline, part).named_parameters())
        assert weights.keys() == dict(getattr(pipe, part).named_parameters()).keys()
        assert {weight.device.type for weight in weights.values()} == {"meta"}


def test_models_of_the_hub_have_no_outline():
    assert pipeline_outline("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") is None


WEIGHTS = sorted(
    path.relative_to(model_folder(name).parent).as_posix()
    for name in list_models()
    for path in model_folder(name).glob("*/*.safetensors")
)


@pytest.fixture
def copied(tmp_path, request) -> Path:
    """Copy the model of a weight file, and return that file."""
    weights = tmp_path / request.param
    model = weights.parents[1]
    shutil.copytree(model_folder(model.name), model)
    return weights


@pytest.mark.parametrize("copied", WEIGHTS, indirect=True)
def test_a_missing_weight_file_is_named(copied):
    copied.unlink()
    with pytest.raises(OptionError, match=rf"no weights in .*{copied.parent.name}: copy or downl"):
        load_pipeline(str(copied.parents[1]))


@pytest.mark.parametrize("copied", WEIGHTS, indirect=True)
@pytest.mark.parametrize("kept", [0, 5, 1000, -1], ids="kept={}".format)
def test_a_truncated_weight_file_is_named(copied, kept):
    copied.write_bytes(copied.read_bytes()[:kept])
    with pytest.raises(OptionError, match=rf"{copied.parent.name}.*is damaged or incomplete"):
        load_pipeline(str(copied.parents[1]))


@pytest.mark.parametrize("file", ["vae/config.json", "text_encoder/config.json", "tokenizer"])
def test_other_damage_is_one_error_too(tmp_path, file):
    model = tmp_path / "model"
    shutil.copytree(model_folder("tiny-wan"), model)
    if (model / file).is_dir():
        (model / file / "tokenizer.json").write_text("{")
    else:
        (model / file).unlink()
    with pytest.raises(OptionError, match="could not be loaded"):
        load_pipeline(str(model))


@pytest.mark.parametrize("name", list_models())
def test_bundled_models_are_stock_pipelines_that_generate(name):
    pipe = load_pipeline(name)
    assert type(pipe).__module__.startswith("diffusers.")
    frames = {"num_frames": 5} if generation_defaults(name).frames else {}
    generated = pipe(
        "a red circle on a gray background",
        height=64,
        width=64,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **frames,
    )
    pictures = generated.frames[0] if frames else generated.images
    assert pictures.shape[-3:] == (3, 64, 64)
    assert pictures.isfinite().all()
    assert pictures.std() > 0.01


@pytest.mark.parametrize("name", list_models())
def test_cards_state_what_was_measured(name):
    card = (model_folder(name) / "README.md").read_text()
    for part in (
        "## Data",
        "## Training",
        "## How well it follows a prompt",
        "## What it can't do",
    ):
        assert part in card
