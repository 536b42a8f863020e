"""The pipeline bench on a tiny model."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import tiny_wan

from dit_accel.bench.pipeline import PipelineBench, pipeline_tasks, with_speedups


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_wan().save_pretrained(folder)
    (folder / "dit_accel.json").write_text('{"steps": 3, "frames": 9, "height": 112, "width": 144}')
    return str(folder)


def test_dense_and_a_method_are_timed_alike(model):
    bench = PipelineBench("cpu", repeats=1, prompt="a cat")
    tasks = list(pipeline_tasks(models=[model], methods=["gna"], densities=[0.5], block_size=16))
    assert [task["method"] for task in tasks] == ["dense", "gna"]
    dense, gna = with_speedups([task | bench.measure(task) for task in tasks])
    assert dense["vs_dense"] == 1
    assert gna["vs_dense"] == pytest.approx(dense["total_s"] / gna["total_s"])
    assert gna["acceleration"]["density"] == 0.5
    assert gna["mean_density"] == 1  # 168 tokens stay dense under the usual minimum
    assert gna["psnr_db"] is None  # and equal to the bit


def test_a_run_that_goes_on_makes_the_dense_clip_again(model):
    task = {"model": model, "method": "gna", "density": None, "block_size": 16}
    row = PipelineBench("cpu", repeats=1, prompt="a cat").measure(task)
    assert {"total_s", "denoise_s", "psnr_db"} <= row.keys()


def test_a_cache_alone_is_measured(model):
    task = {"model": model, "method": "first_block_cache", "density": None, "block_size": None}
    row = PipelineBench("cpu", repeats=1, prompt="a cat").measure(task)
    assert row["total_s"] > 0


def test_methods_go_together(model):
    task = {"model": model, "method": "gna+first_block_cache", "density": None, "block_size": None}
    row = PipelineBench("cpu", repeats=1, prompt="a cat").measure(task)
    assert row["total_s"] > 0


def test_the_pipeline_is_stock_afterwards(model):
    bench = PipelineBench("cpu", repeats=1, prompt="a cat")
    bench.measure({"model": model, "method": "gna", "density": None, "block_size": 16})
    (pipe,) = bench._pipes.values()
    assert "_dit_accel" not in pipe.__dict__
    assert pipe.transformer.dtype == torch.float32
