"""``dit-accel bench``, at toy sizes on a CPU."""

from __future__ import annotations

import json

import pytest
import torch

KERNEL = ("bench", "kernel", "--device", "cpu", "--tokens", "300", "--head-size", "16", "--dtype",
          "float32", "--heads", "1", "--timeout", "0")  # fmt: skip
STEP = ("bench", "step", "--device", "cpu", "--model", "wan2.1-14b", "--size", "toy", "--dtype",
        "float32", "--mode", "eager", "--layers", "1", "--timeout", "0")  # fmt: skip


def test_kernel_prints_ratios_and_says_who_is_missing(dit_accel):
    ran = dit_accel(*KERNEL, "--density", "0.5", "--operators", "torch,sdpa")
    assert ran.code == 0, ran.err
    assert "vs_sdpa" in ran.out
    assert "fp32-d16.300.0.5" in ran.out
    assert ran.err.count("contender") == 2
    everybody = dit_accel(*KERNEL, "--density", "1")
    assert "not measured: sage: the package sageattention is not installed" in everybody.out


def test_kernel_goes_on_where_its_output_ends(dit_accel, tmp_path):
    common = (*KERNEL, "--operators", "torch", "-o", "rows.json", "--commit", "abc")
    assert dit_accel(*common, "--density", "0.5").code == 0
    ran = dit_accel(*common, "--density", "0.5,1", "--json")
    assert "1/1" in ran.err
    content = json.loads(ran.out)
    assert content == json.loads((tmp_path / "rows.json").read_text())
    assert [row["density"] for row in content["rows"]] == [0.5, 1.0]
    assert content["manifest"]["trial"]
    assert content["manifest"]["commit"] == content["rows"][0]["commit"] == "abc"
    assert content["manifest"]["dense_backend"] == "sdpa, in torch's SDPA"
    refused = dit_accel(*common, "--heads", "2")
    assert refused.code == 2
    assert "another heads" in refused.err


def test_step(dit_accel):
    ran = dit_accel(*STEP, "--method", "gna", "--density", "0.5", "-o", "step.json")
    assert ran.code == 0, ran.err
    assert all(word in ran.out for word in ("stock", "gna", "amdahl", "in_attention", "vs_eager"))


def test_pipeline(dit_accel, video_model):
    ran = dit_accel(
        *("bench", "pipeline", "--device", "cpu", "--model", video_model, "--repeats", "1"),
        *("--method", "gna", "--block-size", "16", "--steps", "2", "--prompt", "a cat", "--json"),
    )
    assert ran.code == 0, ran.err
    rows = json.loads(ran.out)["rows"]
    assert [row["method"] for row in rows] == ["dense", "gna"]
    assert all(row["total_s"] > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tries it out under the interpreter")
def test_tune_on_a_cpu_is_a_trial_that_stores_nothing(dit_accel, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    quick = ("bench", "tune", "--device", "cpu", "--quick", "--head-size", "16", "--dtype",
             "float16", "--timeout", "0")  # fmt: skip
    refused = dit_accel(*quick)
    assert refused.code == 2
    assert "--dry-run" in refused.err
    ran = dit_accel(*quick, "--dry-run")
    assert ran.code == 0, ran.err
    assert "(16, 2): KernelConfig(" in ran.out
    assert not (tmp_path / "cache").exists()


def test_tune_stores_what_it_found(dit_accel, tmp_path, monkeypatch):
    """On a pretended card, with a pretended bench: storing is what is tested."""
    from dit_accel.bench.measuring import Row
    from dit_accel.bench.tune import TuneBench
    from dit_accel.cli import bench
    from dit_accel.kernels import block_sparse
    from dit_accel.tuning_file import load_tuning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bench, "_device", lambda name: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(block_sparse, "why_unavailable", lambda *rest: None)

    def measure(self: TuneBench, task: Row) -> Row:
        if task["config"].get("num_warps") == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"ms": 1.0, "tflops": 500.0 + task["config"].get("block_m", 0)}

    monkeypatch.setattr(TuneBench, "measure", measure)
    ran = dit_accel("bench", "tune", "--quick", "--head-size", "128", "--timeout", "0")
    assert ran.code == 0, ran.err
    assert "out of memory" in ran.out
    assert "wrote" in ran.out
    found = load_tuning(torch.device("cuda"))
    assert found.block_sparse[128, 2].block_m == 128
    assert "measured on this card" in found.source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*KERNEL, "--density", "0"], "above 0"),
        ([*KERNEL, "--density", "1.5"], "density"),
        ([*KERNEL, "--density", "few"], "numbers separated by commas"),
        ([*KERNEL, "--operators", "trition"], "Did you mean 'triton'"),
        ([*KERNEL, "--operators", "cudnn"], "it needs a CUDA device"),
        ([*KERNEL, "--lists", "randm"], "Did you mean 'random'"),
        ([*KERNEL, "--dtype", "int8"], "unknown dtype"),
        ([*KERNEL, "--dtype", ","], "nothing to measure"),
        ([*KERNEL, "--heads", "0"], "at least 1"),
        ([*KERNEL, "-o", "rows.txt"], "must end in .json"),
        ([*STEP, "--model", "wan2.1-15b"], "Did you mean 'wan2.1-14b'"),
        ([*STEP, "--size", "721p81"], "Did you mean '720p81'"),
        ([*STEP, "--method", "radail"], "Did you mean 'radial'"),
        ([*STEP, "--layers", "99"], "layers"),
        (["bench", "pipeline", "--model", "nothing"], "no bundled model"),
        (["bench", "pipeline", "--method", "gna+nothing"], "'nothing' is unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[-2:]),
)
def test_refuses(dit_accel, tmp_path, arguments, message):
    ran = dit_accel(*arguments)
    assert ran.code == 2
    assert message in ran.err
    assert list(tmp_path.iterdir()) == []
