"""Every operator against the float64 definition, through `sparse_attention`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_pipelines import TINY_PIPELINES, run_tiny

from dit_accel import (
    GNA,
    Dense,
    Radial,
    SlidingWindow,
    accelerate_pipeline,
    acceleration_report,
    attention_mask,
    operators,
    sparse_attention,
)
from dit_accel.call import TokenLayout
from dit_accel.errors import OperatorUnavailableError
from dit_accel.grid import RASTER
from dit_accel.kernels.reference import masked_attention
from dit_accel.methods.base import AttentionMethod, StaticMethod
from dit_accel.operators import choose_operator, list_operators, make_operators

GRIDS = [(1, 9, 11), (3, 5, 7), (13, 3, 4), (21, 4, 3)]
METHODS: list[Any] = [
    Radial(decay=0.05, block_size=16),
    Radial(rule="paper", block_size=16),
    GNA((1.0, 0.5, 0.5), block_size=16),
    GNA(0.5, stride=2, causal=(True, False, False), block_size=32),
    GNA(0.5, block_size=8),
    SlidingWindow((0.5, 0.5), block_size=16),
    Dense(),
]


def names(value: Any) -> str | None:
    if isinstance(value, AttentionMethod):
        return f"{value.name}{METHODS.index(value)}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


def expected(method, grid, text, q, k, v, scale) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(method, StaticMethod):
        mask = attention_mask(method, grid=grid, text_length=text)
    else:
        mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool)
    return masked_attention(q.double(), k.double(), v.double(), mask, scale)


@pytest.mark.parametrize("backend", ["torch", "flex"])
@pytest.mark.parametrize("text", [0, 7])
@pytest.mark.parametrize("grid", GRIDS, ids=names)
@pytest.mark.parametrize("method", METHODS, ids=names)
def test_against_the_definition(method, grid, text, backend):
    torch.manual_seed(0)
    count = grid[0] * grid[1] * grid[2] + text
    q, k, v = (torch.randn(2, count, 3, 16) for _ in range(3))
    out, lse = sparse_attention(
        q, k, v, method, grid=grid, text_length=text, scale=0.3, backend=backend, return_lse=True
    )
    want, want_lse = expected(method, grid, text, q, k, v, 0.3)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS[:-1], ids=names)
def test_text_rows_are_as_if_dense(method):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3 * 5 * 7 + 9, 2, 16) for _ in range(3))
    out = sparse_attention(q, k, v, method, grid=(3, 5, 7), text_length=9)
    dense = sparse_attention(q, k, v, Dense(), grid=(3, 5, 7), text_length=9)
    torch.testing.assert_close(out[:, -9:], dense[:, -9:])
    assert not torch.allclose(out[:, :-9], dense[:, :-9], atol=1e-3)


@pytest.mark.parametrize("backend", ["torch", "flex"])
def test_text_first_is_text_last_moved(backend):
    torch.manual_seed(0)
    layout = TokenLayout((3, 5, 7), 9)
    q, k, v = (torch.randn(1, layout.num_tokens, 2, 16) for _ in range(3))
    method = GNA((1.0, 0.4, 0.4), block_size=16)
    last = method.plan_layout(layout, RASTER)
    first = replace(last, layout=replace(layout, text_first=True))
    operator = make_operators()[backend]

    def roll(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        return x.roll(9, dim)

    out, lse = operator.run(q, k, v, last, None, True)
    moved, moved_lse = operator.run(roll(q), roll(k), roll(v), first, None, True)
    torch.testing.assert_close(moved, roll(out))
    torch.testing.assert_close(moved_lse, roll(lse, 2))


def test_flex_past_the_limit_of_recompilations_is_an_error_not_eager(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(operators, "UNCOMPILED", ())
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile(*a, **k, backend="eager"))
    operator = make_operators()["flex"]
    with torch._dynamo.config.patch(recompile_limit=2):
        for width in (4, 5):
            attend_with(operator, width)
        with pytest.raises(OperatorUnavailableError, match=r"as torch allows \(2\)"):
            attend_with(operator, 6)
    torch._dynamo.reset()


def attend_with(operator: operators.Operator, width: int) -> None:
    layout = TokenLayout((3, 4, width), 0)
    q = torch.randn(1, layout.num_tokens, 2, 16)
    plan = GNA((1.0, 0.4, 0.4), block_size=16).plan_layout(layout, RASTER)
    operator.run(q, q, q, plan, None, False)


def test_strided_inputs_are_not_copied_wrongly():
    torch.manual_seed(0)
    packed = torch.randn(1, 2, 105, 3 * 16)  # heads first, q, k, v interleaved
    q, k, v = (x.transpose(1, 2) for x in packed.split(16, dim=-1))
    method = GNA(0.5, block_size=16)
    strided = sparse_attention(q, k, v, method, grid=(3, 5, 7))
    plain = sparse_attention(*(x.contiguous() for x in (q, k, v)), method, grid=(3, 5, 7))
    torch.testing.assert_close(strided, plain)


def test_grouping_of_axes():
    """An image and a sequence are grids with leading ones."""
    torch.manual_seed(0)
    x = torch.randn(1, 60, 2, 16)
    flat = sparse_attention(x, x, x, GNA((1, 1, 7), block_size=16), grid=(60,))
    assert torch.equal(
        flat, sparse_attention(x, x, x, GNA((1, 1, 7), block_size=16), grid=(1, 1, 60))
    )


def test_auto_says_whom_it_passed_over_and_an_explicit_choice_raises():
    plan = GNA(0.5, block_size=16).plan_layout(TokenLayout((3, 5, 7)), RASTER)
    query = torch.randn(1, 105, 2, 16, dtype=torch.float64)
    for operator in list_operators():
        reason = operator.why_not(plan, query)
        if reason is None:
            assert choose_operator(operator.name, make_operators(), plan, query).rejected == ()
        else:
            with pytest.raises(OperatorUnavailableError, match="can't run here"):
                choose_operator(operator.name, make_operators(), plan, query)
    assert choose_operator("auto", make_operators(), plan, query).operator.name == "torch"


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let "auto" go through the operators in the order for GPUs, on a CPU."""
    monkeypatch.setattr(operators, "UNCOMPILED", ())


@pytest.mark.parametrize(
    ("head_size", "dtype", "block_size", "taken", "reasons"),
    [
        (300, torch.float32, 16, "flex", {"triton": "head sizes up to 256, not 300"}),
        (16, torch.float64, 16, "flex", {"triton": "not in torch.float64"}),
        (16, torch.float32, 8, "torch", {"triton": "under 16", "flex": "under 16"}),
    ],
    ids=["head size", "dtype", "block size"],
)
def test_a_shape_that_a_kernel_does_not_serve_goes_to_the_next(
    as_on_a_gpu, monkeypatch, head_size, dtype, block_size, taken, reasons
):
    chosen = make_operators()
    for name in ("hopper", "triton"):
        monkeypatch.setitem(chosen[name].__dict__, "unavailable", None)  # as if there were a GPU
    plan = GNA(0.5, block_size=block_size).plan_layout(TokenLayout((3, 5, 7)), RASTER)
    query = torch.randn(1, 105, 2, head_size, dtype=dtype)
    choice = choose_operator("auto", chosen, plan, query)
    assert choice.operator.name == taken
    rejected = dict(choice.rejected)
    for name, reason in reasons.items():
        assert reason in rejected[name]
        with pytest.raises(OperatorUnavailableError, match=f"backend '{name}' can't run here"):
            choose_operator(name, chosen, plan, query)
    with pytest.raises(OperatorUnavailableError, match=r"head size|dtype"):
        choose_operator("hopper", chosen, plan, query)


def test_the_report_says_whom_auto_passed_over(as_on_a_gpu):
    """Through a whole pipeline; an explicit choice raises in the first step instead."""
    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    options = {"dense_steps": 0, "min_tokens": 0, "block_size": 8}
    accelerate_pipeline(pipe, "gna", **options)
    run_tiny(pipe, arguments)
    report = acceleration_report(pipe)
    assert {call.operator for call in report.calls} == {"torch"}
    assert {"triton", "flash-attn-4", "flex"} <= report.rejected.keys()
    assert "flex passed over: block size 8 is under 16" in str(report)
    accelerate_pipeline(pipe, "gna", backend="flex", **options)
    with pytest.raises(OperatorUnavailableError, match="block size 8 is under 16"):
        run_tiny(pipe, arguments)
