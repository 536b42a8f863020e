"""The joint Triton kernel against float64, on the GPU if there is one, else in the interpreter."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.errors import GridMismatchError, OperatorUnavailableError, OptionError
from dit_accel.kernels.joint import joint_sparse_attention, level_lists
from dit_accel.kernels.joint_reference import LEVELS, joint_attention
from dit_accel.kernels.statistics import BlockStatistics, block_statistics
from dit_accel.kernels.tuning import KernelConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.gpu  # the interpreter cannot do bfloat16
all_dtypes = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)],
    ids=["fp32", "fp16", "bf16"],
)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let `torch.empty` return NaN, so that an element which nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(8, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def random_qkv(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(*shape, device=DEVICE).to(dtype) for _ in range(3)]


def random_levels(
    tokens: int, query_block: int, key_block: int, lead=(1, 2), of=(*LEVELS, 0)
) -> Tensor:
    shape = (*lead, -(-tokens // query_block), -(-tokens // key_block))
    return torch.tensor(of, dtype=torch.int8)[torch.randint(len(of), shape)].to(DEVICE)


def in_poison(tensor: Tensor) -> Tensor:
    """The same values, with NaN behind the last element of the memory and of each last axis."""
    *lead, last = tensor.shape
    around = tensor.new_full((*lead[:-1], lead[-1] + 130, last + 3), float("nan"))
    around[..., : lead[-1], :last] = tensor
    return around[..., : lead[-1], :last]


def poisoned_behind(tensor: Tensor) -> Tensor:
    """The same values, contiguous, with NaN behind them."""
    around = tensor.new_full((tensor.numel() + 10_000,), float("nan"))
    around[: tensor.numel()] = tensor.flatten()
    return around[: tensor.numel()].view(tensor.shape)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.isfinite().all()
    return float((actual.double() - expected).norm() / expected.norm())


def statistics_of(
    qkv: list[Tensor], query_block: int, key_block: int, text_length: int = 0
) -> BlockStatistics:
    statistics = block_statistics(
        *qkv,
        query_block=query_block,
        key_block=key_block,
        text_length=text_length,
        wanted=frozenset({"moment"}),
        pooled_levels=LEVELS[1:],
        backend="torch",
    )
    return replace(
        statistics,
        key_mean=poisoned_behind(statistics.key_mean),
        value_mean=poisoned_behind(statistics.value_mean),
        moment=poisoned_behind(statistics.moment),
        pooled={
            level: tuple(map(poisoned_behind, means)) for level, means in statistics.pooled.items()
        },
    )


def check(
    qkv: list[Tensor],
    levels: Tensor,
    query_block: int,
    key_block: int,
    text_length: int = 0,
    text_first: bool = False,
    config: KernelConfig | None = None,
    **options: Any,
) -> Tensor:
    """Error against float64 at most twice that of the plain formula in the same dtype.

    ``qkv`` has the text last; with ``text_first`` the kernel gets it, and answers, the other way.
    """
    statistics = statistics_of(qkv, query_block, key_block, text_length)
    given = [x.roll(text_length, 1) if text_first else x for x in qkv]
    sizes: dict[str, Any] = {"query_block": query_block, "key_block": key_block}
    sizes["text_length"] = text_length
    with poisoned_memory():
        out, lse = joint_sparse_attention(
            *map(in_poison, given),
            levels,
            text_first=text_first,
            statistics=statistics,
            return_lse=True,
            config=config,
            **sizes,
            **options,
        )
    assert out.dtype == qkv[0].dtype
    assert out.is_contiguous()
    if text_first:
        out, lse = out.roll(-text_length, 1), lse.roll(-text_length, -1)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    exact, exact_lse = joint_attention(*(x.double() for x in qkv), levels, **sizes, **wide)
    plain, plain_lse = joint_attention(*qkv, levels, **sizes, **options)
    rounding = torch.finfo(qkv[0].dtype).eps / 4
    assert relative_error(out, exact) <= 2 * relative_error(plain, exact) + rounding
    seen = exact_lse.isfinite()
    assert (lse[~seen] == float("-inf")).all()
    # The kernel's log-sum is float32, of keys and pooled keys in the dtype of the inputs.
    limit = 2 * relative_error(plain_lse[seen], exact_lse[seen]) + 1e-6
    assert relative_error(lse[seen], exact_lse[seen]) <= limit
    return out


@all_dtypes
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="levels"),
        pytest.param({"remainder": True}, id="remainder"),
        pytest.param({"remainder": True, "first_order": True}, id="first-order"),
    ],
)
@pytest.mark.parametrize(
    ("tokens", "query_block", "key_block", "text", "text_first", "head_size"),
    [
        pytest.param(63, 64, 32, 0, False, 16, id="63-64x32"),
        pytest.param(100, 16, 16, 7, False, 40, id="100-16x16-text7-head40"),
        pytest.param(100, 64, 128, 13, True, 64, id="100-64x128-text13-first"),
        pytest.param(333, 128, 64, 5, True, 32, id="333-128x64-text5-first"),
        pytest.param(333, 128, 128, 0, False, 24, id="333-128x128-head24"),
    ],
)
def test_matches_the_reference(
    tokens: int, query_block: int, key_block: int, text: int, text_first: bool, head_size: int,
    options: dict[str, bool], dtype: torch.dtype,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    levels = random_levels(tokens, query_block, key_block)
    qkv = random_qkv(1, tokens + text, 2, head_size, dtype=dtype)
    check(qkv, levels, query_block, key_block, text, text_first, **options)


@all_dtypes
@pytest.mark.parametrize("queries", [16, 61, 128])
def test_other_queries_than_keys(queries: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key, value = random_qkv(1, 203, 2, 32, dtype=dtype)
    levels = random_levels(203, 32, 16)
    statistics = statistics_of((query, key, value), 32, 16, 0)
    sizes = {"query_block": 32, "key_block": 16, "remainder": True, "first_order": True}
    whole, whole_lse = joint_sparse_attention(
        query, key, value, levels, statistics=statistics, return_lse=True, **sizes
    )
    rows = -(-queries // 32)
    with poisoned_memory():
        part, lse = joint_sparse_attention(
            query[:, :queries], key, value, levels[:, :, :rows], statistics=statistics,
            return_lse=True, **sizes,
        )  # fmt: skip
    assert torch.equal(part, whole[:, :queries])
    assert torch.equal(lse, whole_lse[..., :queries])


def test_other_queries_than_keys_are_refused_beside_text() -> None:
    query, key, value = random_qkv(1, 70, 2, 16, dtype=torch.float32)
    levels = random_levels(64, 32, 16)
    with pytest.raises(OptionError, match="only without text"):
        joint_sparse_attention(
            query[:, :38], key, value, levels, query_block=32, key_block=16, text_length=6
        )


@pytest.mark.parametrize("of", [(1,), (2,), (4,), (8,), (0,), (1, 8), (4, 0)], ids=str)
def test_every_mix_of_levels(of: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    levels = random_levels(203, 64, 32, of=of)
    qkv = random_qkv(1, 206, 2, 16, dtype=torch.float16)
    check(qkv, levels, 64, 32, 3, remainder=True, first_order=True)


@pytest.mark.parametrize(
    "lead", [(1, 1), (2, 1), (1, 3), (2, 3)], ids=["shared", "per-batch", "per-head", "per-both"]
)
def test_levels_may_differ_by_batch_and_head(lead: tuple[int, int]) -> None:
    torch.manual_seed(0)
    levels = random_levels(70, 32, 16, lead)
    row_factor = torch.rand(2, 3, 3, device=DEVICE)
    added = torch.randn(2, 3, 3, 16, device=DEVICE)
    qkv = random_qkv(2, 75, 3, 16, dtype=torch.float32)
    check(qkv, levels, 32, 16, 5, remainder=True, first_order=True,
          row_factor=row_factor, added=added)  # fmt: skip


def test_row_factor_and_added_leave_text_alone() -> None:
    torch.manual_seed(0)
    levels = random_levels(100, 32, 32, of=(1, 0))
    row_factor = torch.rand(1, 2, 4, device=DEVICE)
    added = torch.randn(1, 2, 4, 32, device=DEVICE)
    qkv = random_qkv(1, 107, 2, 32, dtype=torch.float32)
    out = check(qkv, levels, 32, 32, 7, row_factor=row_factor, added=added)
    bare = check(qkv, levels, 32, 32, 7)
    # Two kernels, which a compiler may round differently.
    torch.testing.assert_close(out[:, 100:], bare[:, 100:])
    assert not torch.allclose(out[:, :100], bare[:, :100])


@all_dtypes
def test_remainder_counts_right_when_the_maximum_grows_in_its_sweep(dtype: torch.dtype) -> None:
    """Each centroid scores higher than those before it, and the first order is far from nothing.

    Mass of the remainder that is not rescaled with the running sum is exponentially too large.
    """
    torch.manual_seed(0)
    tokens, block, head_size = 500, 16, 16
    query, key, value = random_qkv(1, tokens, 2, head_size, dtype=torch.float32)
    query[..., 0] = 4
    key[..., 0] = torch.linspace(-6, 6, tokens, device=DEVICE)[None, :, None]
    value = value + key
    levels = random_levels(tokens, 128, block, of=(0,))
    levels[..., 0] = 1
    qkv = [x.to(dtype) for x in (query, key, value)]
    config = KernelConfig(block_m=128, block_n=16, num_warps=4, num_stages=2)
    kwargs = {"remainder": True, "first_order": True, "config": config}
    out = check(qkv, levels, 128, block, **kwargs)
    zeroth = check(qkv, levels, 128, block, **{**kwargs, "first_order": False})
    assert relative_error(out, zeroth.double()) > 0.1


def test_rows_with_nothing_listed() -> None:
    torch.manual_seed(0)
    levels = random_levels(96, 32, 16)
    levels[:, :, 1] = 0
    qkv = random_qkv(1, 96, 2, 32, dtype=torch.float16)
    out = check(qkv, levels, 32, 16)
    assert out[:, 32:64].abs().max() == 0
    row_factor = torch.rand(1, 2, 3, device=DEVICE)
    added = torch.randn(1, 2, 3, 32, device=DEVICE)
    out = check(qkv, levels, 32, 16, row_factor=row_factor, added=added)
    expected = added[:, None, :, 1].half().expand(1, 32, 2, 32)
    torch.testing.assert_close(out[:, 32:64], expected, rtol=0, atol=0)


@pytest.mark.parametrize("text_first", [False, True], ids=["text-last", "text-first"])
@pytest.mark.parametrize(
    "config",
    [
        KernelConfig(128, 64, 4, 2, use_tma=True),
        KernelConfig(64, 64, 4, 3),
        KernelConfig(32, 16, 4, 2),
    ],
    ids=str,
)
def test_every_tile_shape_gives_the_same(config: KernelConfig, text_first: bool) -> None:
    torch.manual_seed(0)
    levels = random_levels(300, 128, 128)
    qkv = random_qkv(1, 321, 2, 64, dtype=torch.float16)
    check(qkv, levels, 128, 128, 21, text_first, config, remainder=True, first_order=True)


def test_copy_engine_loads_the_exact_tiles() -> None:
    torch.manual_seed(0)
    levels = random_levels(100, 64, 32)
    qkv = random_qkv(2, 107, 2, 32, dtype=torch.float16)
    sizes = {"query_block": 64, "key_block": 32, "text_length": 7}
    statistics = statistics_of(qkv, 64, 32, 7)
    outs = [
        joint_sparse_attention(
            *qkv, levels, **sizes, statistics=statistics, remainder=True,
            config=KernelConfig(64, 64, 4, 2, use_tma),
        )
        for use_tma in (False, True)
    ]  # fmt: skip
    torch.testing.assert_close(outs[0], outs[1])


def test_level_lists_are_ascending_level_by_level() -> None:
    torch.manual_seed(0)
    levels = random_levels(1100, 1100, 1, lead=(2, 2))  # longer than one chunk of the kernel
    counts, index = level_lists(levels)
    assert counts.shape == (2, 2, 1, 4)
    for row, count, blocks in zip(
        levels.flatten(0, 2), counts.flatten(0, 2), index.flatten(0, 2), strict=True
    ):
        expected = [(row == level).nonzero()[:, 0] for level in LEVELS]
        assert count.tolist() == [len(e) for e in expected]
        assert blocks[: count.sum()].tolist() == torch.cat(expected).tolist()


def test_scale_is_used() -> None:
    torch.manual_seed(0)
    qkv = random_qkv(1, 64, 2, 16, dtype=torch.float32)
    check(qkv, random_levels(64, 32, 16), 32, 16, remainder=True, first_order=True, scale=0.7)


def test_torch_compile_traces_it_without_a_graph_break() -> None:
    qkv = random_qkv(1, 64, 2, 16, dtype=torch.float16)
    statistics = statistics_of(qkv, 32, 32)
    levels = random_levels(64, 32, 32)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return 1 + joint_sparse_attention(
            query * 2, key, value, levels, query_block=32, key_block=32,
            statistics=statistics, remainder=True, first_order=True,
        )  # fmt: skip

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*qkv), call(*qkv))


def test_bad_calls_are_refused() -> None:
    qkv = random_qkv(1, 64, 2, 16, dtype=torch.float16)
    levels = torch.ones(1, 1, 2, 2, dtype=torch.int8, device=DEVICE)
    blocks: dict[str, Any] = {"query_block": 32, "key_block": 32}

    def refused(error: type[Exception], match: str, *tensors: Tensor, **options: Any) -> None:
        tensors = tensors or (*qkv, levels)
        with pytest.raises(error, match=match):
            joint_sparse_attention(*tensors, **{**blocks, **options})

    refused(GridMismatchError, "2 query blocks", *qkv, levels[..., :1])
    refused(GridMismatchError, "text_length=33", text_length=33)
    refused(OptionError, "one shape", qkv[0], qkv[1][:, 1:], qkv[2], levels)
    refused(OptionError, "dtype", qkv[0], qkv[1].float(), qkv[2], levels)
    refused(OptionError, "int8", *qkv, levels.int())
    refused(OptionError, "2 heads", *qkv, levels.expand(1, 3, 2, 2))
    refused(OptionError, "power of two", query_block=48)
    refused(OptionError, "too large", key_block=256)
    refused(OptionError, "positive", scale=-1.0)
    refused(OptionError, "row_factor must", row_factor=torch.ones(1, 2, 3, device=DEVICE))
    refused(OptionError, "added must", added=torch.ones(1, 2, 2, 8, device=DEVICE))
    refused(OperatorUnavailableError, "float64", *(x.double() for x in qkv), levels)


@pytest.mark.gpu
def test_a_level_without_means_ends_the_program_on_a_gpu() -> None:
    # In a process of its own: nothing runs on the device after a failed assertion.
    script = """
import torch
from dit_accel.kernels.joint import joint_sparse_attention
qkv = torch.randn(3, 1, 64, 2, 16, device="cuda", dtype=torch.float16).unbind()
levels = torch.full((1, 1, 2, 2), 4, dtype=torch.int8, device="cuda")
joint_sparse_attention(*qkv, levels, query_block=32, key_block=32)
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert "level" in done.stderr + done.stdout


def test_missing_statistics_are_named() -> None:
    qkv = random_qkv(1, 64, 2, 16, dtype=torch.float16)
    levels = torch.ones(1, 1, 2, 2, dtype=torch.int8, device=DEVICE)
    statistics = statistics_of(qkv, 32, 32)

    def refused(match: str, levels: Tensor = levels, **options: Any) -> None:
        with pytest.raises(OptionError, match=match):
            joint_sparse_attention(*qkv, levels, query_block=32, key_block=32, **options)

    refused("needs statistics", remainder=True)
    refused("remainder=True", first_order=True, statistics=statistics)
    no_moment = replace(statistics, moment=None)
    refused("moment", remainder=True, first_order=True, statistics=no_moment)
    refused("key_mean", remainder=True, statistics=statistics_of(qkv, 32, 16))
    if DEVICE == "cpu":
        refused(r"level \[4\]", 4 * levels)
        refused(r"level \[4\]", 4 * levels, statistics=replace(statistics, pooled={}))
