"""Attention in 8 bits: the kernels against the literal formula, and that against exact attention.

On the GPU if there is one, else in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from block_sparse_checks import DEVICE, poisoned_memory, random_qkv, relative_error, sparse_mask
from torch import Tensor

from dit_accel import GNA, sparse_attention
from dit_accel.call import TokenLayout
from dit_accel.errors import GridMismatchError, OperatorUnavailableError, OptionError
from dit_accel.grid import RASTER
from dit_accel.kernels.block_sparse_quantised import quantised_block_sparse_attention
from dit_accel.kernels.precision import (
    PRECISIONS,
    check_device,
    why_no_hopper_precision,
    why_no_precision,
)
from dit_accel.kernels.quantise import quantise
from dit_accel.kernels.quantised_reference import (
    accuracy,
    key_blocks,
    quantised_attention,
    rounded,
    to_e4m3,
)
from dit_accel.kernels.reference import lists_to_mask, masked_attention
from dit_accel.kernels.tiles import TileLists, tile_lists_from_dense
from dit_accel.kernels.tuning import KernelConfig, quantised_config
from dit_accel.operators import choose_operator, make_operators

REFUSED = {
    name: why_no_precision(name, torch.device(DEVICE), torch.float16, 64, 64) for name in PRECISIONS
}
precisions = pytest.mark.parametrize(
    "precision",
    [
        pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
        for name, reason in REFUSED.items()
    ],
)
BOUNDS = {"fp8": 0.08, "int8_fp8": 0.06, "int8": 0.02}
"""Relative error to exact attention of normally distributed tensors whose values average out."""


def offset_qkv(*shape: int, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    """Keys and values with means as far from zero as those of trained models."""
    query, key, value = random_qkv(*shape, dtype=dtype)
    shift = torch.randn(1, 1, *shape[2:], device=DEVICE)
    return [query, (key + 4 * shift).to(dtype), (value + shift).to(dtype)]


def check(
    qkv: list[Tensor],
    lists: TileLists,
    precision: str,
    text: int = 0,
    text_first: bool = False,
    config: Any = None,
    scale: float | None = None,
    kernel: Callable[..., Any] = quantised_block_sparse_attention,
) -> None:
    """The kernel is the formula, up to the rounding of float32 sums and of the output."""
    with poisoned_memory():
        given = {} if config is None else {"config": config}
        out, lse = kernel(
            *qkv, lists, precision, text_length=text, text_first=text_first, scale=scale,
            return_lse=True, **given,
        )  # fmt: skip
    assert out.dtype == qkv[0].dtype
    assert out.is_contiguous()
    mask = lists_to_mask(lists, text, text_first)
    blocks = key_blocks(lists.num_tokens, text, text_first, min(lists.block_size, 128)).to(DEVICE)
    formula, formula_lse = quantised_attention(*qkv, mask, precision, blocks, scale)
    exact, exact_lse = masked_attention(*(x.double() for x in qkv), mask, scale)
    # A number on the edge of two roundings may fall either way, which is rare.
    assert relative_error(out, formula) < torch.finfo(out.dtype).eps + 0.1 * BOUNDS[precision]
    assert relative_error(lse, formula_lse) < 2e-4  # 8-bit products have short sums on Hopper
    error = accuracy(out, exact)["relative_error"]
    assert error < 1.1 * accuracy(formula, exact)["relative_error"] + torch.finfo(out.dtype).eps
    assert relative_error(lse, exact_lse) < 0.01


@precisions
@pytest.mark.parametrize(
    ("num_video", "block", "text", "text_first", "head_size"),
    [
        pytest.param(63, 64, 0, False, 64, id="one-ragged-tile"),
        pytest.param(100, 32, 7, False, 40, id="block32-text7-head40"),
        pytest.param(100, 128, 77, True, 64, id="block128-text77-first"),
        pytest.param(256, 128, 0, False, 128, id="whole-tiles-head128"),
        pytest.param(300, 64, 140, True, 96, id="block64-text140-head96"),
        pytest.param(520, 256, 5, False, 32, id="block256"),
        pytest.param(130, 64, 5, True, 256, id="head256"),
        pytest.param(1000, 128, 13, False, 64, id="1000-tokens"),
    ],
)
def test_matches_the_formula(
    num_video: int, block: int, text: int, text_first: bool, head_size: int, precision: str
) -> None:
    torch.manual_seed(0)
    lists = tile_lists_from_dense(sparse_mask(num_video, num_video, block=block), block)
    check(offset_qkv(1, num_video + text, 2, head_size), lists, precision, text, text_first)


@pytest.mark.gpu
@precisions
@pytest.mark.parametrize("head_size", [64, 128])
def test_bfloat16(precision: str, head_size: int) -> None:
    torch.manual_seed(0)
    lists = tile_lists_from_dense(sparse_mask(2, 3, 2000, 2000, block=128), 128)
    qkv = offset_qkv(2, 2077, 3, head_size, dtype=torch.bfloat16)
    check(qkv, lists, precision, 77, True)


NO_HOPPER = why_no_hopper_precision("fp8", torch.device(DEVICE), torch.float16, 64, 128)


def hopper(*args: Any, **options: Any) -> Any:
    from dit_accel.kernels.block_sparse_hopper_quantised import hopper_quantised_attention

    return hopper_quantised_attention(*args, **options)


@pytest.mark.gpu
@pytest.mark.skipif(NO_HOPPER is not None, reason=str(NO_HOPPER))
@pytest.mark.parametrize("precision", ["fp8", "int8_fp8"])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("num_video", "text", "text_first"),
    [(63, 0, False), (128, 0, False), (300, 77, True), (384, 256, True), (2000, 200, False)],
)
def test_hopper(num_video, text, text_first, dtype, head_size, precision: str) -> None:
    torch.manual_seed(0)
    mask = sparse_mask(2, 3, num_video, num_video, block=128)
    lists = tile_lists_from_dense(mask, 128)
    qkv = offset_qkv(2, num_video + text, 3, head_size, dtype=dtype)
    check(qkv, lists, precision, text, text_first, kernel=hopper)
    given = {"text_length": text, "text_first": text_first}
    portable = quantised_block_sparse_attention(*qkv, lists, precision, **given)
    first, again = (hopper(*qkv, lists, precision, **given) for _ in range(2))
    assert torch.equal(first, again)
    assert relative_error(first, portable.double()) < 2 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.skipif(NO_HOPPER is not None, reason=str(NO_HOPPER))
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("eager", [1, 2])
def test_hopper_gives_the_same_with_every_setting(eager: int, head_size: int) -> None:
    torch.manual_seed(0)
    lists = tile_lists_from_dense(sparse_mask(1, 2, 1900, 1900, block=128), 128)
    qkv = offset_qkv(1, 1930, 2, head_size, dtype=torch.bfloat16)
    kernel = partial(hopper, eager=eager)
    check(qkv, lists, "fp8", 30, kernel=kernel)
    assert torch.equal(*(kernel(*qkv, lists, "fp8", text_length=30) for _ in range(2)))


@pytest.mark.gpu
@pytest.mark.skipif(NO_HOPPER is not None, reason=str(NO_HOPPER))
def test_hopper_gives_zero_to_queries_without_keys() -> None:
    mask = sparse_mask(700, 700, block=128)
    mask[5] = False
    mask[256:512] = False
    lists = tile_lists_from_dense(mask, 128)
    with poisoned_memory():
        out, lse = hopper(*offset_qkv(1, 700, 2, 128), lists, "fp8", return_lse=True)
    empty = ~mask.any(-1)
    assert out[:, empty].abs().max() == 0
    assert (lse[:, :, empty] == float("-inf")).all()


@precisions
@pytest.mark.parametrize(
    "config",
    [
        KernelConfig(64, 128, 4, 3, use_tma=True),
        KernelConfig(128, 64, 8, 3, use_tma=True),
        KernelConfig(128, 128, 8, 2),
        KernelConfig(32, 32, 4, 2),
    ],
    ids=str,
)
def test_every_tile_shape_gives_the_same(config: KernelConfig, precision: str) -> None:
    torch.manual_seed(0)
    lists = tile_lists_from_dense(sparse_mask(300, 300, block=128), 128)
    check(offset_qkv(1, 321, 1, 64), lists, precision, 21, True, config)


@precisions
@pytest.mark.parametrize("lead", [(2, 1), (1, 3), (2, 3)], ids=str)
def test_lists_may_differ_by_batch_and_head(lead: tuple[int, int], precision: str) -> None:
    torch.manual_seed(0)
    lists = tile_lists_from_dense(sparse_mask(*lead, 70, 70, block=32), 32)
    check(offset_qkv(2, 75, 3, 32), lists, precision, 5)


@precisions
def test_any_strides_and_scale(precision: str) -> None:
    torch.manual_seed(0)
    lists = tile_lists_from_dense(sparse_mask(100, 100, block=64), 64)
    query, key, value = offset_qkv(2, 107, 2, 32)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    key = torch.stack([key, key], dim=2)[:, :, 1]
    value = value.repeat_interleave(2, dim=-1)[..., ::2]
    check([query, key, value], lists, precision, 7, scale=0.3)


@precisions
def test_queries_without_keys_get_zero_and_minus_infinity(precision: str) -> None:
    mask = sparse_mask(96, 96, block=32)
    mask[5] = False
    mask[64:] = False
    lists = tile_lists_from_dense(mask, 32)
    with poisoned_memory():
        out, lse = quantised_block_sparse_attention(
            *offset_qkv(1, 96, 2, 32), lists, precision, return_lse=True
        )
    empty = ~mask.any(-1)
    assert out[:, empty].abs().max() == 0
    assert (lse[:, :, empty] == float("-inf")).all()
    assert lse[:, :, ~empty].isfinite().all()


@precisions
def test_zeros_and_huge_numbers(precision: str) -> None:
    """A block of zeros has no scale, and float16's largest numbers stay finite."""
    torch.manual_seed(0)
    lists = tile_lists_from_dense(sparse_mask(100, 100, block=32), 32)
    query, key, value = random_qkv(1, 100, 1, 32, dtype=torch.float16)
    zero = torch.zeros_like(query)
    out = quantised_block_sparse_attention(zero, zero, zero, lists, precision)
    assert out.abs().max() == 0
    huge = query, 1000 * key, 10_000 * value
    out, lse = quantised_block_sparse_attention(*huge, lists, precision, return_lse=True)
    exact, exact_lse = masked_attention(*(x.double() for x in huge), lists_to_mask(lists))
    assert accuracy(out, exact)["cosine"] > 0.9
    assert relative_error(lse, exact_lse) < 0.02


@precisions
def test_error_to_exact_attention(precision: str) -> None:
    torch.manual_seed(0)
    query, key, value = offset_qkv(1, 512, 2, 64)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=DEVICE)
    lists = tile_lists_from_dense(torch.ones(512, 512, dtype=torch.bool, device=DEVICE), 128)
    out = quantised_block_sparse_attention(query, key, value - value.mean(1), lists, precision)
    centred = (value - value.mean(1)).double()
    exact, _ = masked_attention(query.double(), key.double(), centred, mask)
    found = accuracy(out, exact)
    assert found["relative_error"] < BOUNDS[precision]
    assert found["cosine"] > 1 - BOUNDS[precision] ** 2


def test_taking_off_the_mean_key_is_what_keeps_int8_exact() -> None:
    torch.manual_seed(0)
    keys = torch.randn(1, 256, 1, 64).double() + 30 * torch.randn(1, 1, 1, 64).double()
    query = torch.randn(1, 256, 1, 64).double()

    def scores(k: Tensor) -> Tensor:
        low = rounded(k, k.abs().amax((1, 3), keepdim=True), "int8")
        return torch.einsum("bnhd,bmhd->bhnm", query, low).softmax(-1)

    exact = torch.einsum("bnhd,bmhd->bhnm", query, keys).softmax(-1)
    centred = accuracy(scores(keys - keys.mean(1, keepdim=True)), exact)["relative_error"]
    assert centred < 0.2 * accuracy(scores(keys), exact)["relative_error"]


def test_e4m3_of_the_reference() -> None:
    exact = torch.tensor([0, 1, 1.125, 448, -448, 2.0**-9, 2.0**-6]).double()
    assert torch.equal(to_e4m3(exact), exact)
    rough = torch.tensor([1.07, 1.19, 1e6, 2.0**-11]).double()
    assert to_e4m3(rough).tolist() == [1.125, 1.25, 448, 0]


@precisions
def test_one_pass_rounds_as_the_reference(precision: str) -> None:
    torch.manual_seed(0)
    qkv = offset_qkv(2, 170, 2, 40)
    query, key, value = (x.double() for x in qkv)
    made = quantise(
        *qkv, precision, num_video=150, text_first=True, key_block=32, scale=0.5
    )  # fmt: skip
    low = "fp8" if precision == "fp8" else "int8"

    def rows(x: Tensor) -> Tensor:
        """Padded rows, video first, as ``[B, N, H, D]`` with the text first."""
        video, text = x[:, :, :150], x[:, :, 256 : 256 + 20]
        return torch.cat([text, video], 2).transpose(1, 2)[..., :40]

    assert (made.query.float()[:, :, 150:256] == 0).all()
    factor = made.query_factor.double()[..., None] / (0.5 * torch.tensor(2.0).log().reciprocal())
    want = rounded(query, query.abs().amax(-1, keepdim=True), low)
    assert relative_error(rows(made.query.double() * factor), want) < 2e-3
    blocks = key_blocks(150, 20, True, 32).to(DEVICE)
    centred = key - key.mean(1, keepdim=True)
    peaks = torch.stack([centred[:, blocks == b].abs().amax((1, 3)) for b in range(6)], 1)
    want = rounded(centred, peaks[:, blocks][..., None], low)
    scale = made.key_scale.double().repeat_interleave(32, -1)[..., None]
    assert relative_error(rows(made.key.double() * scale), want) < 2e-3
    if precision == "int8":
        assert torch.equal(rows(made.value), qkv[2])
        return
    centred = value - value.mean(1, keepdim=True)
    want = rounded(centred, centred.abs().amax(1, keepdim=True), "fp8")
    place = torch.arange(16).reshape(2, 4, 2).transpose(0, 1).flatten()
    stored = made.value.double().unflatten(-1, (-1, 16))
    plain = torch.zeros_like(stored)
    plain[..., place.to(DEVICE)] = stored
    values = rows(plain.flatten(-2).mT)
    assert relative_error(values * made.value_scale.double()[:, None], want) < 2e-3


def test_torch_compile_traces_it_without_a_graph_break() -> None:
    lists = tile_lists_from_dense(sparse_mask(64, 64, block=32), 32)
    qkv = random_qkv(1, 64, 1, 32, dtype=torch.float16)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return quantised_block_sparse_attention(query * 2, key, value, lists, "int8") + 1

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*qkv), call(*qkv))


def test_bad_calls_are_refused() -> None:
    lists = tile_lists_from_dense(torch.ones(64, 64, dtype=torch.bool, device=DEVICE), 32)
    query, key, value = random_qkv(2, 64, 3, 32, dtype=torch.float16)
    run = quantised_block_sparse_attention
    with pytest.raises(OptionError, match="Did you mean 'fp8'"):
        run(query, key, value, lists, "pf8")
    with pytest.raises(GridMismatchError, match="64 video tokens"):
        run(query, key, value, lists, "int8", text_length=3)
    with pytest.raises(OperatorUnavailableError, match="float32"):
        run(query.float(), key.float(), value.float(), lists, "int8")
    wide = random_qkv(1, 64, 1, 320, dtype=torch.float16)
    with pytest.raises(OperatorUnavailableError, match="256"):
        run(*wide, lists, "int8")
    small = tile_lists_from_dense(torch.ones(64, 64, dtype=torch.bool, device=DEVICE), 16)
    with pytest.raises(OperatorUnavailableError, match="at least 32"):
        run(query, key, value, small, "int8")


def test_who_can_run_what(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    cuda = torch.device("cuda")
    for capability, possible in (((7, 5), []), ((8, 6), ["int8"]), ((8, 9), list(PRECISIONS))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        reasons = {p: why_no_precision(p, cuda, torch.bfloat16, 128, 128) for p in PRECISIONS}
        assert [p for p, reason in reasons.items() if reason is None] == possible
        assert all(f"has {capability}" in reason for reason in reasons.values() if reason)
    with pytest.raises(OperatorUnavailableError, match=r"NVIDIA GPU.*Leave precision out"):
        check_device("fp8", torch.device("cpu"))
    check_device(None, torch.device("cpu"))


def test_the_choice_keeps_to_the_precision() -> None:
    plan = GNA(0.5).plan_layout(TokenLayout((3, 16, 16)), RASTER)
    query = torch.randn(1, 768, 2, 64).half().to(DEVICE)
    operators = make_operators("int8")
    assert choose_operator("auto", operators, plan, query).operator.name == "triton"
    with pytest.raises(OperatorUnavailableError, match=r"int8.* can.t run here.*float32"):
        choose_operator("auto", operators, plan, query.float())
    pooled = GNA(0.5, remainder="pooled").plan_layout(TokenLayout((3, 16, 16)), RASTER)
    with pytest.raises(OperatorUnavailableError, match="own dtype alone"):
        choose_operator("triton", operators, pooled, query)


@pytest.mark.parametrize(("precision", "head_size", "hopper"), [
    ("fp8", 128, True), ("fp8", 64, False), ("int8_fp8", 128, False), ("int8", 128, False),
])  # fmt: skip
def test_on_hopper_fp8_at_head_size_128_takes_its_kernel(
    precision: str, head_size: int, hopper: bool
) -> None:
    plan = GNA(0.5).plan_layout(TokenLayout((3, 16, 16)), RASTER)
    query = torch.randn(1, 768, 2, head_size).half().to(DEVICE)
    operators = {**make_operators(precision)}
    for name in ("hopper", "triton"):
        operators[name] = Mock(wraps=operators[name], precisions=operators[name].precisions)
        operators[name].precision = precision
        operators[name].why_not = lambda plan, query: None
    choice = choose_operator("auto", operators, plan, query)
    assert choice.operator is operators["hopper" if hopper else "triton"]


@precisions
def test_sparse_attention_takes_a_precision(precision: str) -> None:
    torch.manual_seed(0)
    qkv = random_qkv(1, 2 * 12 * 11 + 5, 2, 32, dtype=torch.float16)
    options: dict[str, Any] = {"grid": (2, 12, 11), "text_length": 5}
    method = GNA((1.0, 0.5, 0.5), block_size=32)
    exact = sparse_attention(*(x.double() for x in qkv), method, **options, backend="torch")
    out = sparse_attention(*qkv, method, **options, precision=precision)
    assert out.dtype == torch.float16
    assert 1e-5 < accuracy(out, exact)["relative_error"] < 2 * BOUNDS[precision]
    with pytest.raises(OptionError, match="backend 'flex' has no"):
        sparse_attention(*qkv, method, **options, backend="flex", precision=precision)


def test_configurations_fit_their_gpus() -> None:
    for precision in PRECISIONS:
        for head_size in (64, 128, 256):
            assert quantised_config((9, 0), head_size, precision).use_tma
            assert not quantised_config((8, 9), head_size, precision).use_tma
