"""Sets of heads that a model's folder brings, and what a file of heads recommends."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import TINY_PIPELINES, run_tiny, tiny_sd3

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.acceleration import family_of
from dit_accel.errors import OptionError
from dit_accel.guidance.heads import HeadFile, model_identity

ARGUMENTS = TINY_PIPELINES["sd3"][1]


@pytest.fixture
def pipe(tmp_path):
    made = tiny_sd3()
    made.save_pretrained(tmp_path / "model")
    identity = model_identity(family_of(made), made.transformer)
    (tmp_path / "model" / "heads").mkdir()
    for name, heads, strength in (("general", ((1, 0),), 0.25), ("dark", ((0, 1), (2, 0)), None)):
        file = HeadFile(heads, identity, "identity", "joint", strength, 2.0)
        file.write(tmp_path / "model" / "heads" / f"{name}.json")
    return DiffusionPipeline.from_pretrained(tmp_path / "model")


def guided(pipe, **options):
    accelerate_pipeline(pipe, "softpag", **options)
    return run_tiny(pipe, ARGUMENTS)


def test_a_name_stands_for_the_set_of_the_folder_and_its_strength(pipe):
    by_name = guided(pipe, heads="general")
    assert acceleration_report(pipe).options["softpag"]["heads"] == "general"
    assert torch.equal(by_name, guided(pipe, heads=[(1, 0)], strength=0.25, scale=2.0))
    assert torch.equal(
        guided(pipe, heads="dark"), guided(pipe, heads="0:1,2:0", strength=0.5, scale=2.0)
    )


def test_what_is_given_goes_before_what_the_set_recommends(pipe):
    given = guided(pipe, heads="general", strength=1.0, scale=3.0)
    assert torch.equal(given, guided(pipe, heads=[(1, 0)], strength=1.0, scale=3.0))
    restore_pipeline(pipe)
    plain = run_tiny(pipe, ARGUMENTS)
    assert torch.equal(guided(pipe, heads="general", scale=0), plain)
    assert torch.equal(guided(pipe, heads="general", strength=0), plain)


def test_a_set_by_name_goes_with_a_cache_and_without_an_added_pass(pipe):
    accelerate_pipeline(pipe, ["first_block_cache", "softpag"], threshold=0.1, heads="general")
    run_tiny(pipe, ARGUMENTS)
    out = guided(pipe, heads="general", extra_pass=False)
    assert torch.equal(out, guided(pipe, heads="1:0", strength=0.25, extra_pass=False))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"heads": "drak"}, "no such set. Did you mean 'dark'.* Valid: dark, general"),
        ({"heads": "dark", "strength": (0.1,)}, "1 values for 2 heads"),
        ({"heads": "dark", "strength": 2.0}, r"in \[0, 1\]"),
        ({"heads": "dark", "perturbation": "uniform"}, r"\['dense', 'softpag'\]|found for"),
    ],
    ids=str,
)
def test_impossible_sets_leave_the_pipeline_alone(pipe, options, says):
    with pytest.raises(OptionError, match=says):
        accelerate_pipeline(pipe, "softpag", **options)
    assert not hasattr(pipe, "_dit_accel")


def test_a_model_without_sets_says_how_to_get_one():
    with pytest.raises(OptionError, match=r"brings no sets of heads.*dit-accel headhunt"):
        accelerate_pipeline(tiny_sd3(), "softpag", heads="general")


def test_a_set_of_another_model_is_refused(pipe, tmp_path):
    path = tmp_path / "model" / "heads" / "general.json"
    HeadFile(((1, 0),), {"transformer": "Other"}, "identity", "joint").write(path)
    with pytest.raises(OptionError, match="found for transformer='Other'"):
        accelerate_pipeline(pipe, "softpag", heads="general")
