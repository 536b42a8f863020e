"""Whole methods, choice and kernels together, against their float64 references.

On a GPU by the Triton kernels in its dtypes, elsewhere by the torch operators in float64.
"""

from __future__ import annotations

import pytest
import torch
from selecting_checks import dense, in_order, random_inputs

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.errors import DensityUnreachableError
from dit_accel.kernels.joint_reference import joint_attention
from dit_accel.methods.base import AttentionMethod, StaticMethod
from dit_accel.methods.gna import GNA
from dit_accel.methods.pisa import PISA
from dit_accel.methods.psa import PSA
from dit_accel.methods.radial import Radial
from dit_accel.methods.rectified import RectifiedSpaAttn
from dit_accel.operators import make_operators
from dit_accel.plan import DensePlan, JointPlan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATOR = "triton" if DEVICE == "cuda" else "torch"
HEADS = 2 if DEVICE == "cuda" else 1  # the torch operators flatten them away
dtypes = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float64, id="fp64", marks=pytest.mark.skipif(DEVICE == "cuda",
                     reason="the kernels take no float64")),
        pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
        pytest.param(torch.float32, id="fp32", marks=pytest.mark.gpu),
    ],
)  # fmt: skip

GRID = (7, 15, 17)  # 1785 tokens: 56 blocks of 32, the last ragged
METHODS: dict[str, AttentionMethod] = {
    "psa": PSA(query_block=32, key_block=16),
    "psa-wide": PSA(query_block=64, key_block=32, order="raster"),
    "rectified": RectifiedSpaAttn(block_size=32, neighbours=False),
    "rectified-gain": RectifiedSpaAttn(block_size=32, neighbours=False, gain_aware=True),
    "pisa": PISA(block_size=32),
    "pisa-weighted": PISA(block_size=32, covariance_weighted=True, order="hilbert"),
    "pisa-zeroth": PISA(block_size=32, terms=0, order="hilbert"),
    "gna-pooled": GNA(block_size=32, remainder="pooled"),
    "radial-pooled": Radial(block_size=16, rule="paper", remainder="pooled"),
}
methods = pytest.mark.parametrize("name", METHODS)


def run(
    method: AttentionMethod, layout: TokenLayout, qkv: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, JointPlan | DensePlan]:
    """Output in raster order, the same by the float64 definition, and the plan."""
    order = method.token_order(layout.grid)
    ordered, back = in_order(method, layout, qkv)
    plan = method.plan(AttentionCall(layout), *ordered, order)
    if isinstance(plan, DensePlan):
        exact = dense(*(x.double() for x in qkv))
        return exact.to(qkv[0].dtype), exact, plan
    out, _ = make_operators()[OPERATOR].run(*ordered, plan, None, False)
    return out[:, back], exact_output(method, layout, qkv, plan), plan


def exact_output(method, layout, qkv, plan, dtype=torch.float64):
    """The method's maths for the choice that the plan holds, done plainly in ``dtype``."""
    qkv = [x.to(dtype) for x in qkv]
    text = layout.text_length
    if isinstance(method, StaticMethod):
        ordered, back = in_order(method, layout, qkv)
        blocks = {"query_block": plan.query_block, "key_block": plan.key_block}
        out, _ = joint_attention(*ordered, plan.levels, **blocks, text_length=text, remainder=True)
        return out[:, back]
    return method.reference(*qkv, grid=layout.grid, text_length=text, selection=plan.levels)


def check(method, layout, qkv, plan, out, exact):
    """Error at most twice that of the plain maths in the same dtype."""
    dtype = out.dtype
    assert out.isfinite().all()
    error = float((out.double() - exact).norm() / exact.norm())
    if isinstance(plan, DensePlan) or dtype == torch.float64:
        assert error <= 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
        return
    plain = exact_output(method, layout, qkv, plan, dtype)
    allowed = float((plain.double() - exact).norm() / exact.norm())
    assert error <= 2 * allowed + torch.finfo(dtype).eps / 4


def inputs(layout: TokenLayout, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value that have something to choose: slow waves and noise."""
    qkv = random_inputs(layout, batch=1, heads=HEADS, size=32)
    wave = torch.linspace(0, 9, layout.num_tokens, dtype=torch.float64)[:, None, None].sin()
    qkv = [qkv[0] + 2 * wave, qkv[1] + 2 * wave, qkv[2] + qkv[1]]
    return [x.to(DEVICE, dtype) for x in qkv]


def sparse(name: str, layout: TokenLayout) -> AttentionMethod:
    """The method with 45 % of the video's pairs, or the fewest that it has."""
    video, total = layout.video_length**2, layout.num_tokens**2
    try:
        return METHODS[name].at_density((0.45 * video + total - video) / total, layout)
    except DensityUnreachableError as error:
        return METHODS[name].at_density(error.least, layout)


@dtypes
@pytest.mark.parametrize("text", [0, 77, 226, 256, 512])
@methods
def test_text_of_any_length(name: str, text: int, dtype: torch.dtype) -> None:
    layout = TokenLayout(GRID, text)
    method = sparse(name, layout)
    qkv = inputs(layout, dtype)
    out, exact, plan = run(method, layout, qkv)
    assert isinstance(plan, JointPlan)
    check(method, layout, qkv, plan, out, exact)


@dtypes
@pytest.mark.parametrize("density", [0.05, 0.1, 0.25, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("name", [name for name in METHODS if "pooled" not in name])
def test_density_is_met_within_a_tenth(name: str, density: float, dtype: torch.dtype) -> None:
    layout = TokenLayout(GRID)
    method = METHODS[name].at_density(density, layout)
    qkv = inputs(layout, dtype)
    out, exact, plan = run(method, layout, qkv)
    assert isinstance(plan, DensePlan) == (density == 1)
    if isinstance(plan, JointPlan):
        assert plan.density == pytest.approx(density, rel=0.1)
    check(method, layout, qkv, plan, out, exact)


@dtypes
@methods
@pytest.mark.parametrize("kind", ["equal-scores", "one-peak", "rising", "huge"])
def test_awkward_tokens(name: str, kind: str, dtype: torch.dtype) -> None:
    """All scores alike; one key that takes all; maxima that grow to the last block; large ones."""
    layout = TokenLayout(GRID, 77)
    query, key, value = inputs(layout, dtype)
    if kind == "equal-scores":
        query = torch.zeros_like(query)
    elif kind == "one-peak":
        key[:, 1700] = 30 * query[:, :1].mean(1)
    elif kind == "rising":
        query[..., 0] = 4
        key[..., 0] = torch.linspace(-6, 6, layout.num_tokens, device=DEVICE)[None, :, None]
    else:
        query, key = 20 * query, 20 * key
    method = sparse(name, layout)
    out, exact, plan = run(method, layout, [query, key, value])
    check(method, layout, [query, key, value], plan, out, exact)


@dtypes
@pytest.mark.parametrize("level", [2, 4, 8])
def test_keys_constant_in_groups_make_levels_exact(level: int, dtype: torch.dtype) -> None:
    layout = TokenLayout((1, 10, 24), 7)
    query, key, value = inputs(layout, dtype)
    key[:, :240] = key[:, :240:level].repeat_interleave(level, 1)
    value[:, :240] = value[:, :240:level].repeat_interleave(level, 1)
    end = {2: (0.1, 1.0, 1.0, 1.0), 4: (0.1, 0.1, 1.0, 1.0), 8: (0.1, 0.1, 0.1, 1.0)}[level]
    method = PSA(ends=end, mode="top_k", query_block=16, key_block=16, order="raster")
    out, _, plan = run(method, layout, [query, key, value])
    assert isinstance(plan, JointPlan)
    assert set(plan.levels.unique().tolist()) == {1, level}
    exact = dense(query.double(), key.double(), value.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]
    assert (out.double() - exact).norm() / exact.norm() <= tolerance


@dtypes
@pytest.mark.parametrize("tokens", [1, 13, 32, 33])
@methods
def test_one_or_two_blocks(name: str, tokens: int, dtype: torch.dtype) -> None:
    layout = TokenLayout((1, 1, tokens), 5)
    method = METHODS[name]
    qkv = inputs(layout, dtype)
    order = method.token_order(layout.grid)
    ordered, _ = in_order(method, layout, qkv)
    plan = method.plan(AttentionCall(layout), *ordered, order)
    if isinstance(plan, JointPlan):
        out, exact, plan = run(method, layout, qkv)
        check(method, layout, qkv, plan, out, exact)
    elif not isinstance(plan, DensePlan):
        pytest.fail(f"unexpected {plan}")
