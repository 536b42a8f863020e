"""The kernel bench: its cases, its contenders, and that wrong results are not timed."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dit_accel.bench import contenders
from dit_accel.bench.cases import LISTS, make_case
from dit_accel.bench.contenders import (
    GRIDS,
    ByOperator,
    Natten,
    Sage,
    default_contenders,
    make_contenders,
    sdpa,
)
from dit_accel.bench.kernel import KernelBench, kernel_tasks
from dit_accel.call import TokenLayout
from dit_accel.kernels.reference import lists_to_mask, masked_attention
from dit_accel.methods.gna import GNA
from dit_accel.operators import make_operators
from dit_accel.plan import dense_block_states

FLOAT = torch.float32


def case(tokens: int = 700, lists: Any = "random", dtype: torch.dtype = FLOAT, density=0.4) -> Any:
    return make_case(tokens, 2, 16, density, "cpu", dtype, lists)


@pytest.mark.parametrize("lists", LISTS)
def test_a_case_knows_what_is_right(lists):
    made = case(lists=lists)
    right, _ = masked_attention(*made.qkv, lists_to_mask(made.lists()))
    error, of_plain = made.sampled_errors(right)
    assert error <= 2 * of_plain + 1e-7
    assert made.sampled_errors(right, dense=True)[0] > 0.1
    wrong = right.clone()
    wrong[:, -1] = 0
    assert made.sampled_error(wrong) > 0.01
    dense = sdpa(*made.qkv)
    assert made.sampled_errors(dense, dense=True)[0] < 1e-6


def test_lists_and_block_mask_agree():
    made = case()
    states = dense_block_states(made.block_mask())
    assert states.sum() / 2 == made.lists().full_count.sum()
    assert made.pairs() == int(lists_to_mask(made.lists()).sum())


@pytest.mark.parametrize("name", ["torch", "flex", "sdpa"])
def test_contenders_that_run_here_are_right(name):
    made, contender = case(), make_contenders()[name]
    assert contender.why_not_here("cpu") is None
    assert contender.why_not(made) is None
    error, of_plain = contender.errors(made, contender.runner(made, 0.4)(), 0.4)
    assert error <= 2 * of_plain + 1e-7


def test_those_that_cannot_run_here_say_why():
    chosen, left_out = default_contenders("cpu")
    assert set(chosen) | set(left_out) == set(make_contenders())
    for name in ("cudnn", "flash-attn-2", "sage", "natten"):
        assert left_out[name]
    half = case(dtype=torch.float32)
    assert "float32" in (make_contenders()["cudnn"].why_not(half) or "")
    masked = case(lists="masked")
    assert "masked" in (ByOperator(make_operators()["flex"]).why_not(masked) or "")


def test_measures_beside_the_baseline_and_keeps_on():
    tasks = list(
        kernel_tasks(
            tokens=[700], densities=[0.5, 0.2], head_sizes=[16], dtypes=["float32"],
            lists=["random", "band"], contenders=["torch", "sdpa"],
        )
    )  # fmt: skip
    assert [task["contender"] for task in tasks] == ["sdpa", *["torch"] * 4]
    bench = KernelBench("cpu", heads=2)
    dense, *sparse = [bench.measure(task) for task in tasks]
    assert dense["attended_share"] == 1
    assert "of_baseline_rate" not in dense
    for task, row in zip(tasks[1:], sparse, strict=True):
        assert row["attended_share"] == pytest.approx(task["density"], abs=0.1)
        rate = row["tflops"] / row["baseline_tflops"]
        assert row["of_baseline_rate"] == pytest.approx(rate, rel=1e-3)


def test_a_wrong_result_is_not_timed(monkeypatch):
    def forgetful(self: Any, query: Any, key: Any, value: Any, *rest: Any) -> Any:
        return value, None

    monkeypatch.setattr(type(make_operators()["torch"]), "run", forgetful)
    (task,) = kernel_tasks(
        tokens=[300], densities=[0.5], head_sizes=[16], dtypes=["float32"], lists=["random"],
        contenders=["torch"],
    )  # fmt: skip
    row = KernelBench("cpu", heads=1).measure(task)
    assert "wrong result" in row["failed"]
    assert "ms" not in row


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a module in the place of a peer that is not installed."""

    def install(name: str, **functions: Any) -> None:
        module = ModuleType(name)
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, module)
        real = contenders.importlib.util.find_spec
        spec = SimpleNamespace(name=name)
        monkeypatch.setattr(
            contenders.importlib.util, "find_spec", lambda n, *a: spec if n == name else real(n, *a)
        )

    return install


def test_sage_is_called_heads_last_and_may_be_approximate(peer):
    def sageattn(q: Any, k: Any, v: Any, *, tensor_layout: str, is_causal: bool) -> Any:
        assert (tensor_layout, is_causal) == ("NHD", False)
        return sdpa(q, k, v) * 1.05

    peer("sageattention", sageattn=sageattn)
    made, sage = case(dtype=torch.bfloat16), Sage()
    assert sage.why_not_here("cuda") is None
    assert sage.why_not_here("cpu") == "it needs a CUDA device"
    assert sage.why_not(made) is None
    assert sage.pairs(made, 0.4) == 2 * 700**2
    assert 0.04 < sage.errors(made, sage.runner(made, 0.4)(), 0.4)[0] < 0.1
    assert not sage.exact


def test_natten_gets_the_window_of_our_gna(peer):
    def na3d(q: Any, k: Any, v: Any, *, kernel_size: Any, stride: Any) -> Any:
        grid = tuple(q.shape[1:4])
        tokens = torch.arange(q.shape[1] * q.shape[2] * q.shape[3])
        allowed = GNA(kernel_size, stride=stride).allowed(TokenLayout(grid))
        mask = allowed(tokens[:, None], tokens[None])
        out, _ = masked_attention(*(x.flatten(1, 3) for x in (q, k, v)), mask[None, None])
        return out.unflatten(1, grid)

    peer("natten", na3d=na3d)
    made, natten = case(tokens=1_560, dtype=torch.bfloat16), Natten()
    assert natten.why_not(made) is None
    error, of_plain = natten.errors(made, natten.runner(made, 0.4)(), 0.4)
    assert error <= 2 * of_plain + 1e-3
    assert 0 < natten.pairs(made, 0.4) <= 0.4 * 2 * 1_560**2
    assert "no grid" in (natten.why_not(case(dtype=torch.bfloat16)) or "")
    assert all(tokens == t * h * w for tokens, (t, h, w) in GRIDS.items())
