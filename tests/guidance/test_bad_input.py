"""What guidances refuse, and what they say."""

from __future__ import annotations

import json

import pytest
import torch
from cache_subjects import Subject
from tiny_pipelines import TINY_PIPELINES, run_tiny

from dit_accel import accelerate_pipeline
from dit_accel.acceleration import family_of
from dit_accel.errors import OptionError
from dit_accel.guidance.heads import HeadFile, model_identity


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("softpag", {"heads": []}, "heads is empty"),
        ("softpag", {"heads": [(1, 0), (1, 0)]}, r"has \(1, 0\) twice"),
        ("softpag", {"heads": [(3, 0)]}, "layer 3 is out of range.* 3 blocks, 0 to 2"),
        ("softpag", {"heads": [(1, 2)]}, "head 2 of layer 1 is out of range.* 2 heads"),
        ("softpag", {"heads": [(1, -1)]}, "no pair"),
        ("softpag", {"heads": [(1, 2, 3)]}, "no pair"),
        ("softpag", {"heads": [1]}, "no pair"),
        ("softpag", {"heads": 3}, "give pairs"),
        ("softpag", {"heads": "none.json"}, "no such file"),
        ("softpag", {"heads": [(1, 0)], "strength": 1.5}, r"in \[0, 1\]"),
        ("softpag", {"heads": [(1, 0)], "strength": (0.1, 0.2)}, "2 values for 1 heads"),
        ("softpag", {"heads": [(1, 0)], "perturbation": "identiy"}, "Did you mean 'identity'"),
        ("softpag", {"heads": [(1, 0)], "perturbation": "query_mean"}, r"\['dense', 'softpag'\]"),
        ("softpag", {"heads": [(1, 0)], "scope": "text"}, "unknown scope"),
        ("softpag", {"heads": [(1, 0)], "scale": float("nan")}, "finite"),
        ("softpag", {"heads": [(1, 0)], "scale": 2.0, "extra_pass": False}, "no effect"),
        ("softpag", {"heads": [(1, 0)], "start": 5, "stop": 5}, "no step would be guided"),
        ("softpag", {"heads": [(1, 0)], "stop": 1.5}, "share"),
        ("softpag", {"head": [(1, 0)]}, "Did you mean 'heads'"),
        ("softpag", {}, "heads"),
        ("pag", {"layers": []}, "layers is empty"),
        ("pag", {"layers": [1, 1]}, "twice"),
        ("pag", {"layers": "1"}, "give block numbers"),
        ("slg", {"layers": [-1]}, "no block number"),
        ("slg", {"layers": [7]}, "layer 7 is out of range"),
        ("seg", {"layers": [1]}, r"\['dense', 'seg'\]"),
        (["pag", "slg"], {"pag": {"layers": [1]}, "slg": {"layers": [1]}}, "one guidance at most"),
    ],
    ids=str,
)
def test_impossible_options_leave_the_pipeline_alone(method, options, says):
    pipe = TINY_PIPELINES["wan"][0]()
    with pytest.raises(OptionError, match=says):
        accelerate_pipeline(pipe, method, **options)
    assert not hasattr(pipe, "_dit_accel")
    assert not any("_compiled_call_impl" in vars(module) for module in pipe.transformer.modules())


def test_a_file_of_heads_knows_its_model(tmp_path):
    subject = Subject("wan")
    accelerate_pipeline(subject.pipe, "softpag", heads="1:0,2:1")
    out = run_tiny(subject.pipe, subject.arguments)
    identity = model_identity(family_of(subject.pipe), subject.pipe.transformer)
    path = tmp_path / "heads.json"
    HeadFile(((1, 0), (2, 1)), identity, "identity", "joint").write(path)
    accelerate_pipeline(subject.pipe, "softpag", heads=str(path))
    assert torch.equal(run_tiny(subject.pipe, subject.arguments), out)
    with pytest.raises(OptionError, match="found for perturbation='identity'"):
        accelerate_pipeline(subject.pipe, "softpag", heads=str(path), perturbation="uniform")
    with pytest.raises(OptionError, match="found for transformer='WanTransformer3DModel'"):
        accelerate_pipeline(TINY_PIPELINES["sd3"][0](), "softpag", heads=str(path))

    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"version": 9}))
    with pytest.raises(OptionError, match="version 9"):
        accelerate_pipeline(subject.pipe, "softpag", heads=str(path))
    path.write_text(path.read_text()[:20])
    with pytest.raises(OptionError, match="cut short"):
        accelerate_pipeline(subject.pipe, "softpag", heads=str(path))


def test_what_would_run_past_the_guidance_is_refused():
    subject = Subject("wan")
    accelerate_pipeline(subject.pipe, "softpag", heads=[(1, 0)])
    block = subject.pipe.transformer.blocks[1]
    block.compile(backend="eager")
    with pytest.raises(OptionError, match="don't compile the perturbed ones"):
        run_tiny(subject.pipe, subject.arguments)
    block._compiled_call_impl = None
    subject = Subject("wan")
    accelerate_pipeline(subject.pipe, "softpag", heads=[(1, 0)])
    attn = subject.pipe.transformer.blocks[1].attn1
    attn.to_v = torch.nn.Linear(64, 64)
    with pytest.raises(OptionError, match="projections were replaced"):
        run_tiny(subject.pipe, subject.arguments)
