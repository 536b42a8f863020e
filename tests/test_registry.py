"""Finding methods and families, and the published settings."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
from tiny_pipelines import TINY_PIPELINES

from dit_accel import accelerate_pipeline, acceleration_report, registry
from dit_accel.methods.dense import Dense
from dit_accel.presets import DEFAULT, PRESETS, auto_method, preset_for


@dataclass(frozen=True)
class ThirdParty(Dense):
    """A method from another package."""

    name: ClassVar[str] = "third_party"


@pytest.fixture
def third_party(monkeypatch):
    point = SimpleNamespace(load=lambda: ThirdParty)
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [point] if group == "dit_accel.methods" else []
    )
    registry._methods.cache_clear()
    yield
    registry._methods.cache_clear()


def test_built_in_methods_and_families():
    names = ["dense", "gna", "pisa", "psa", "radial", "rectified", "sliding_window"]
    assert registry.list_methods("attention") == names
    assert registry.list_families() == ["flux", "hunyuan_video", "sd3", "wan"]


def test_entry_points_of_other_packages(third_party):
    assert registry.method_class("third_party") is ThirdParty
    pipe = TINY_PIPELINES["wan"][0]()
    accelerate_pipeline(pipe, "third_party")
    assert acceleration_report(pipe).method == "third_party"


@pytest.mark.parametrize(("variant", "method"), sorted(PRESETS))
def test_published_settings_are_valid_options(variant, method):
    preset = preset_for(variant, method=method)
    assert registry.resolve_method(method, **preset.options).name == method
    assert preset.source


@pytest.mark.parametrize(
    ("variant", "grid", "windows", "strides"),
    [
        ("hunyuan_video", (30, 48, 80), (18, 24, 24), (16, 8, 8)),
        ("wan", (16, 44, 80), (16, 32, 48), (1, 8, 16)),
        ("flux", (1, 256, 256), (1, 80, 80), (1, 16, 16)),
    ],
    ids=["hunyuan_video", "wan", "flux"],
)
def test_published_gna_windows_come_out_at_the_published_sizes(variant, grid, windows, strides):
    axes = registry.resolve_method("gna", **preset_for(variant, method="gna").options).axes(grid)
    assert tuple(axis.window for axis in axes) == windows
    assert tuple(axis.stride for axis in axes) == strides


def test_presets_reach_the_method_and_the_schedule():
    pipe = TINY_PIPELINES["wan22"][0]()
    accelerate_pipeline(pipe, "radial", decay=0.5)
    report = acceleration_report(pipe)
    assert report.options["radial"]["block_size"] == 64  # Wan 2.2's published setting
    assert report.options["radial"]["decay"] == 0.5  # the user's
    assert report.settings["dense_steps"][0] == 11 / 40
    assert "Wan2.2" in report.settings["preset"]
    assert preset_for("wan", method="sliding_window") is DEFAULT


@pytest.mark.parametrize("name", ["wan", "hunyuan", "flux", "sd3"])
def test_auto_takes_a_published_method_at_careful_settings_and_says_so(name):
    pipe = TINY_PIPELINES[name][0]()
    accelerate_pipeline(pipe)
    report = acceleration_report(pipe)
    assert report.method == "pisa"
    assert report.settings["density"] >= 0.25
    assert report.settings["dense_steps"][0] >= 0.25
    assert any("method='auto' took 'pisa'" in note for note in report.notes)
    accelerate_pipeline(pipe, density=0.5, dense_steps=2)
    report = acceleration_report(pipe)
    assert report.settings["density"] == 0.5  # the user's
    assert report.settings["dense_steps"][0] == 2
    assert auto_method("unheard_of")[0] == "dense"


def test_report_as_json_and_text():
    import json

    from tiny_pipelines import run_tiny

    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    accelerate_pipeline(pipe, "gna", block_size=16, dense_steps=1, min_tokens=0)
    run_tiny(pipe, arguments)
    report = acceleration_report(pipe)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["attention_calls"] == len(report.calls) == 18
    assert content["sparse_density"] < content["density"] < 1
    assert content["density"] <= content["block_density"]
    assert set(content["steps"]) == {"0", "1", "2"}
    assert content["transformer_s"] > 0
    assert "one of the dense first steps" in str(report)


@pytest.mark.parametrize(
    ("pipeline", "width", "extra", "expected"),
    [
        ("WanPipeline", 5120, {}, ("wan2.1-14b-t2v", "wan2.1-14b", "wan")),
        ("WanImageToVideoPipeline", 5120, {}, ("wan2.1-14b-i2v", "wan2.1-14b", "wan")),
        ("WanPipeline", 1536, {}, ("wan2.1-1.3b-t2v", "wan2.1-1.3b", "wan")),
        ("WanPipeline", 256, {}, ("wan",)),
        ("WanPipeline", 5120, {"transformer_2": 1}, ("wan2.2-a14b-t2v", "wan2.2-a14b", "wan2.2")),
        ("WanPipeline", 3072, {"config": {"expand_timesteps": True}}, ("wan2.2-5b", "wan2.2")),
    ],
    ids=["14B", "14B I2V", "1.3B", "any size", "2.2 A14B", "2.2 5B"],
)
def test_wan_pipelines_are_told_apart(pipeline, width, extra, expected):
    config = SimpleNamespace(num_attention_heads=width // 128, attention_head_dim=128)
    pipe = type(pipeline, (), {"transformer": SimpleNamespace(config=config), **extra})()
    assert registry.family_class("wan")().variants(pipe) == expected


def test_settings_of_the_most_specific_variant_win():
    radial = preset_for("wan2.2-a14b-t2v", "wan2.2-a14b", "wan2.2", method="radial")
    assert radial is PRESETS["wan2.2", "radial"]
