"""The step bench: architectures, where time goes, and ratios."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from dit_accel.bench.architectures import TOY, list_architectures, load_architecture
from dit_accel.bench.breakdown import ATTENTION, amdahl_bound, breakdown, split
from dit_accel.bench.step import STOCK, StepBench, step_tasks, with_ratios
from dit_accel.errors import OptionError

# Billions of parameters as the models' pages give them, and tokens at their largest size.
PUBLISHED = {
    "wan2.1-1.3b": (1.42, 75_600),
    "wan2.1-14b": (14.29, 75_600),
    "hunyuanvideo": (12.82, 118_800),
    "flux.1-dev": (11.90, 65_536),
    "sd3.5-large": (8.06, 16_384),
}


@pytest.mark.parametrize("name", list_architectures())
def test_architectures_are_the_published_ones(name):
    import diffusers

    model = load_architecture(name)
    with torch.device("meta"):
        transformer = getattr(diffusers, model.transformer)(**model.config)
    parameters = sum(parameter.numel() for parameter in transformer.parameters()) / 1e9
    billions, tokens = PUBLISHED[name]
    assert parameters == pytest.approx(billions, abs=0.01)
    assert max(model.tokens(size) for size in model.sizes) == tokens


@pytest.mark.parametrize(("name", "wanted", "measured"), [
    ("wan2.1-14b", 4, 4), ("flux.1-dev", 6, 6), ("flux.1-dev", 1, 2), ("hunyuanvideo", None, 60),
])  # fmt: skip
def test_layers_are_taken_in_proportion(name, wanted, measured):
    config, layers = load_architecture(name).with_layers(wanted)
    assert layers == measured
    if "num_single_layers" in config and wanted != 1:
        assert config["num_single_layers"] == 2 * config["num_layers"]


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(OptionError, match=r"Did you mean 'wan2.1-14b'"):
        load_architecture("wan2.1-14")
    with pytest.raises(OptionError, match="Did you mean '720p81'"):
        load_architecture("wan2.1-14b").at("720p")
    with pytest.raises(OptionError, match="40 layers"):
        load_architecture("wan2.1-14b").with_layers(41)


@pytest.mark.parametrize("name", list_architectures())
def test_a_toy_of_every_architecture_is_measured(name):
    bench = StepBench("cpu", "float32")
    tasks = step_tasks(
        models=[name], sizes=[TOY], methods=["gna"], densities=[0.5], modes=[False], layers=2
    )
    rows = [task | bench.measure(task) for task in tasks]
    stock, gna = with_ratios(rows)
    for row in (stock, gna):
        parts = row["breakdown_ms"]
        assert 0 < parts["attention"] < parts["total"]
        assert parts["matmul"] > 0
        scale = row["layers_of_model"] / row["layers_measured"]
        assert row["forward_s"] == pytest.approx(row["measured_ms"] * scale / 1e3, rel=0.01)
    assert stock["vs_eager"] == 1
    assert gna["block_density"] <= 0.5
    assert gna["operators"] == ["torch"]
    assert gna["amdahl"] > 1
    assert gna["density"] == 0.5  # what was asked for tells the task


def test_the_model_is_stock_again_after_a_method():
    bench = StepBench("cpu", "float32")
    stock, gna = step_tasks(
        models=["wan2.1-14b"], sizes=[TOY], methods=["gna"], densities=[None], modes=[False],
        layers=1,
    )  # fmt: skip
    pipe = bench._pipeline(stock, torch.float32)
    inputs = load_architecture("wan2.1-14b").at(TOY).inputs(TOY, "cpu", torch.float32)
    with torch.no_grad():
        before = pipe.transformer(**inputs)[0]
        bench.measure(gna)
        assert bench._pipeline(stock, torch.float32) is pipe
        assert torch.equal(pipe.transformer(**inputs)[0], before)


def test_out_of_reach_and_all_dense_are_said():
    bench = StepBench("cpu", "float32")
    task = {"model": "wan2.1-14b", "size": TOY, "layers": 1, "compiled": False}
    task["precision"] = None
    row = bench.measure({**task, "attention": "radial", "density": 0.01})
    assert row["reaches"] > 0.01
    assert row["block_density"] == pytest.approx(row["reaches"], abs=1e-3)
    image = {**task, "model": "flux.1-dev"}
    row = bench.measure({**image, "attention": "radial", "density": None})
    assert "every call is dense" in row["refused"]


def test_each_precision_is_a_task_of_sparse_methods_alone():
    tasks = list(
        step_tasks(
            models=["wan2.1-14b"], sizes=[TOY], methods=["dense", "gna"], densities=[0.5],
            modes=[False], layers=1, precisions=[None, "fp8"],
        )
    )  # fmt: skip
    told = [(task["attention"], task["density"], task["precision"]) for task in tasks]
    assert told == [
        (STOCK, None, None), ("dense", None, None), ("gna", 0.5, None), ("gna", 0.5, "fp8"),
    ]  # fmt: skip


@pytest.mark.slow
def test_compiled_blocks_are_measured(monkeypatch):
    # Traced as ever; generating code for a processor takes a minute and is nothing of ours.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    bench = StepBench("cpu", "float32")
    tasks = step_tasks(
        models=["wan2.1-14b"], sizes=[TOY], methods=["gna"], densities=[None], modes=[True],
        layers=1,
    )  # fmt: skip
    rows = with_ratios([task | bench.measure(task) for task in tasks])
    assert [row["attention"] for row in rows] == [STOCK, "gna"]
    assert all(row["vs_compiled"] > 0 for row in rows)
    assert "vs_eager" not in rows[0]


def test_breakdown_tells_self_attention_from_cross_attention_and_products():
    q, text, weight = torch.randn(1, 2, 64, 16), torch.randn(1, 2, 8, 16), torch.randn(16, 16)

    def self_attention() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)

    def cross_attention() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, text, text)

    assert breakdown(self_attention, "cpu")["attention"] > 0
    assert breakdown(cross_attention, "cpu")["attention"] == 0
    assert breakdown(cross_attention, "cpu")["rest"] > 0
    parts = breakdown(lambda: q @ weight, "cpu")
    assert parts["matmul"] > 0
    assert parts["attention"] == 0
    for run in (self_attention, cross_attention):
        parts = breakdown(run, "cpu")
        whole = parts["attention"] + parts["matmul"] + parts["rest"]
        assert whole == pytest.approx(parts["total"], abs=0.01)


def event(name: str, kind: str, start: float, end: float, parent: object = None, **more: object):
    """An event of a profile on a GPU; times in microseconds."""
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(
        **{"name": name, "device_type": kind, "time_range": span, "cpu_parent": parent,
           "input_shapes": [], "device_time_total": 0.0, "is_user_annotation": False, **more}
    )  # fmt: skip


def test_kernels_that_no_operator_launched_count_as_attention_inside_its_range():
    whole = event(ATTENTION, "DeviceType.CPU", 0, 9, device_time_total=300.0)
    product = event("aten::mm", "DeviceType.CPU", 1, 2, whole, device_time_total=100.0)
    other = event("aten::addmm", "DeviceType.CPU", 10, 11, device_time_total=500.0)
    events = [
        whole, product, other,
        event(ATTENTION, "DeviceType.CUDA", 1_000, 1_450, is_user_annotation=True),
        event("gemm", "DeviceType.CUDA", 1_000, 1_100),
        event("our attention", "DeviceType.CUDA", 1_100, 1_300),
        event("statistics, launched by Triton alone", "DeviceType.CUDA", 1_300, 1_450),
        event("gemm", "DeviceType.CUDA", 2_000, 2_500),
        event("norm", "DeviceType.CUDA", 2_500, 2_550),
    ]  # fmt: skip
    found = {"attention": 0.45, "matmul": 0.5, "total": 1.0, "rest": 0.05}
    assert split(events, gpu=True) == pytest.approx(found)


def test_amdahl():
    assert amdahl_bound(0.5, 1.0) == 1
    assert amdahl_bound(0.5, 0.0) == 2
    assert amdahl_bound(2 / 3, 0.25) == pytest.approx(2)
