"""The Triton kernel against float64, on the GPU if there is one, else in the interpreter."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from block_sparse_checks import (
    DEVICE,
    check_kernel,
    poisoned_memory,
    random_qkv,
    relative_error,
    sparse_mask,
)
from torch import Tensor

from dit_accel.errors import GridMismatchError, OperatorUnavailableError, OptionError
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.reference import lists_to_mask, masked_attention
from dit_accel.kernels.tiles import tile_lists_from_dense
from dit_accel.kernels.tuning import KernelConfig

needs_gpu = pytest.mark.gpu  # the interpreter cannot do bfloat16
SMALL = KernelConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)


check = partial(check_kernel, kernel=block_sparse_attention)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)],
    ids=["fp32", "fp16", "bf16"],
)
@pytest.mark.parametrize(
    ("num_video", "block", "text", "text_first", "head_size"),
    [
        pytest.param(63, 64, 0, False, 64, id="one-ragged-tile"),
        pytest.param(63, 16, 7, True, 16, id="block16-text7-first"),
        pytest.param(100, 32, 7, False, 40, id="block32-text7-head40"),
        pytest.param(100, 128, 77, True, 64, id="block128-text77-first"),
        pytest.param(256, 128, 0, False, 128, id="whole-tiles-head128"),
        pytest.param(300, 64, 77, False, 96, id="block64-text77-head96"),
        pytest.param(130, 64, 5, True, 256, id="head256"),
        pytest.param(2000, 128, 13, False, 64, id="2000-tokens"),
    ],
)
def test_matches_the_reference(
    num_video: int, block: int, text: int, text_first: bool, head_size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    lists = tile_lists_from_dense(sparse_mask(num_video, num_video, block=block), block)
    qkv = random_qkv(1, num_video + text, 1, head_size, dtype=dtype)
    check(qkv, lists, text, text_first)


@pytest.mark.parametrize(
    "lead", [(1, 1), (2, 1), (1, 3), (2, 3)], ids=["shared", "per-batch", "per-head", "per-both"]
)
def test_lists_may_differ_by_batch_and_head(lead: tuple[int, int]) -> None:
    torch.manual_seed(0)
    lists = tile_lists_from_dense(sparse_mask(*lead, 70, 70, block=32), 32)
    check(random_qkv(2, 75, 3, 32, dtype=torch.float16), lists, 5)


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _packed(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=2)[:, :, 1]


def _strided_heads(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def _odd_offset(x: Tensor) -> Tensor:
    padded = torch.cat([torch.zeros_like(x[:, :, :1, :1]).expand_as(x[..., :1]), x], dim=-1)
    return padded[..., 1:]


@pytest.mark.parametrize("relayout", [_transposed, _packed, _strided_heads, _odd_offset])
@pytest.mark.parametrize("use_tma", [False, True], ids=["pointers", "tma"])
def test_any_strides(relayout, use_tma: bool) -> None:
    torch.manual_seed(0)
    lists = tile_lists_from_dense(sparse_mask(100, 100, block=64), 64)
    query, key, value = random_qkv(2, 107, 2, 32, dtype=torch.float16)
    config = replace(SMALL, use_tma=use_tma)
    qkv = [relayout(query), relayout(key), _transposed(value)]
    assert not qkv[0].is_contiguous()
    check(qkv, lists, 7, config=config)


@pytest.mark.parametrize("text_first", [False, True], ids=["text-last", "text-first"])
@pytest.mark.parametrize(
    "config",
    [
        KernelConfig(128, 64, 4, 2, use_tma=True),
        KernelConfig(128, 64, 8, 3, use_tma=True),
        KernelConfig(64, 64, 4, 3),
        KernelConfig(32, 16, 4, 2),
    ],
    ids=str,
)
def test_every_tile_shape_gives_the_same(config: KernelConfig, text_first: bool) -> None:
    torch.manual_seed(0)
    lists = tile_lists_from_dense(sparse_mask(300, 300, block=128), 128)
    check(random_qkv(1, 321, 1, 64, dtype=torch.float16), lists, 21, text_first, config)


def test_queries_without_keys_get_zero_and_minus_infinity() -> None:
    mask = sparse_mask(96, 96, block=32)
    mask[5] = False
    mask[64:] = False
    lists = tile_lists_from_dense(mask, 32)
    qkv = random_qkv(1, 96, 2, 32, dtype=torch.float16)
    with poisoned_memory():
        out, lse = block_sparse_attention(*qkv, lists, return_lse=True)
    empty = ~mask.any(-1)
    assert out[:, empty].abs().max() == 0
    assert (lse[:, :, empty] == float("-inf")).all()
    exact, exact_lse = masked_attention(*(x.double() for x in qkv), mask)
    assert relative_error(out, exact) < 1e-3
    assert relative_error(lse[:, :, ~empty], exact_lse[:, :, ~empty]) < 1e-5


def test_large_scores_do_not_overflow() -> None:
    lists = tile_lists_from_dense(sparse_mask(100, 100, block=32), 32)
    query, key, value = random_qkv(1, 100, 1, 32, dtype=torch.float32)
    query, key = 100 * query, 100 * key
    out = block_sparse_attention(query, key, value, lists)
    expected, _ = masked_attention(
        query.double(), key.double(), value.double(), lists_to_mask(lists)
    )
    assert relative_error(out, expected) < 1e-4


def test_scale_is_used() -> None:
    lists = tile_lists_from_dense(sparse_mask(64, 64, block=32), 32)
    qkv = random_qkv(1, 64, 1, 32, dtype=torch.float32)
    out = block_sparse_attention(*qkv, lists, scale=0.01)
    expected, _ = masked_attention(*(x.double() for x in qkv), lists_to_mask(lists), 0.01)
    assert relative_error(out, expected) < 1e-5


def test_torch_compile_traces_it_without_a_graph_break() -> None:
    lists = tile_lists_from_dense(sparse_mask(64, 64, block=32), 32)
    qkv = random_qkv(1, 64, 1, 32, dtype=torch.float16)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return block_sparse_attention(query * 2, key, value, lists) + 1

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*qkv), call(*qkv))


def test_bad_calls_are_refused() -> None:
    lists = tile_lists_from_dense(torch.ones(64, 64, dtype=torch.bool, device=DEVICE), 32)
    query, key, value = random_qkv(2, 64, 3, 32, dtype=torch.float16)
    with pytest.raises(GridMismatchError, match="64 video tokens"):
        block_sparse_attention(query, key, value, lists, text_length=3)
    with pytest.raises(OptionError, match="one shape"):
        block_sparse_attention(query, key[:, :-1], value, lists)
    with pytest.raises(OptionError, match="dtype"):
        block_sparse_attention(query, key.float(), value, lists)
    with pytest.raises(OptionError, match="positive"):
        block_sparse_attention(query, key, value, lists, scale=0.0)
    with pytest.raises(OperatorUnavailableError, match="float64"):
        block_sparse_attention(query.double(), key.double(), value.double(), lists)
    wide = random_qkv(1, 64, 1, 320, dtype=torch.float16)
    with pytest.raises(OperatorUnavailableError, match="256"):
        block_sparse_attention(*wide, lists)
    per_head = tile_lists_from_dense(sparse_mask(1, 2, 64, 64, block=32), 32)
    with pytest.raises(OptionError, match="3 heads"):
        block_sparse_attention(query, key, value, per_head)
