"""The kernel for Hopper, beside the portable one, against float64 on a Hopper GPU.

Elsewhere: its steps and what it hides in them, run as plain Python, and that it compiles.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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

from dit_accel import GNA
from dit_accel.call import TokenLayout
from dit_accel.errors import OperatorUnavailableError, OptionError
from dit_accel.grid import RASTER
from dit_accel.kernels.backend import why_no_gluon, why_no_hopper_kernel
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.reference import lists_to_mask, masked_attention
from dit_accel.kernels.tiles import tile_lists_from_dense
from dit_accel.kernels.tuning import HopperConfig, hopper_config
from dit_accel.operators import choose_operator, make_operators

NO_GLUON = why_no_gluon()
REFUSED = NO_GLUON or why_no_hopper_kernel(torch.device(DEVICE), torch.float16, 64, 128)
needs_gluon = pytest.mark.skipif(NO_GLUON is not None, reason=str(NO_GLUON))
needs_hopper = pytest.mark.skipif(REFUSED is not None, reason=str(REFUSED))

CONFIGS = [
    HopperConfig(),
    HopperConfig(persistent=True),
    HopperConfig(turns=False),
    HopperConfig(eager=2),
    HopperConfig(stages=2, turns=False, eager=2),
    HopperConfig(stages=2, eager=1, persistent=True),
]


def hopper(*args: Any, **options: Any) -> Any:
    from dit_accel.kernels.block_sparse_hopper import hopper_block_sparse_attention

    return hopper_block_sparse_attention(*args, **options)


KERNELS = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(block_sparse_attention, marks=pytest.mark.gpu, id="portable"),
        pytest.param(hopper, marks=pytest.mark.gpu, id="hopper"),
    ],
)


@needs_hopper
@KERNELS
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("num_video", "text", "text_first"),
    [
        pytest.param(63, 0, False, id="under-a-tile"),
        pytest.param(128, 0, False, id="one-tile"),
        pytest.param(300, 77, False, id="text-last"),
        pytest.param(300, 77, True, id="text-first"),
        pytest.param(384, 256, True, id="whole-tiles"),
        pytest.param(1480, 1, False, id="one-text-token"),
        pytest.param(2000, 200, False, id="2000-tokens"),
    ],
)
def test_matches_the_reference(
    kernel: Callable, head_size: int, dtype: torch.dtype, num_video: int, text: int, text_first
) -> None:
    torch.manual_seed(0)
    lists = tile_lists_from_dense(sparse_mask(2, 3, num_video, num_video, block=128), 128)
    qkv = random_qkv(2, num_video + text, 3, head_size, dtype=dtype)
    check_kernel(qkv, lists, text, text_first, kernel=kernel)


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration_gives_the_same(config: HopperConfig, head_size: int) -> None:
    torch.manual_seed(0)
    # More programs than multiprocessors, so that a persistent one gets several.
    lists = tile_lists_from_dense(sparse_mask(1, 4, 2900, 2900, block=128), 128)
    qkv = random_qkv(4, 2930, 4, head_size, dtype=torch.bfloat16)
    check_kernel(qkv, lists, 30, config=config, kernel=hopper)
    first, again = (hopper(*qkv, lists, text_length=30, config=config) for _ in range(2))
    assert torch.equal(first, again)


@needs_hopper
@KERNELS
@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 3), (2, 3)], ids=str)
def test_lists_may_differ_by_batch_and_head(kernel: Callable, lead: tuple[int, int]) -> None:
    torch.manual_seed(0)
    lists = tile_lists_from_dense(sparse_mask(*lead, 600, 600, block=128), 128)
    check_kernel(random_qkv(2, 605, 3, 64, dtype=torch.float16), lists, 5, kernel=kernel)


@needs_hopper
@KERNELS
@pytest.mark.parametrize("persistent", [False, True])
def test_queries_without_keys_get_zero_and_minus_infinity(kernel, persistent: bool) -> None:
    torch.manual_seed(0)
    mask = sparse_mask(700, 700, block=128)
    mask[5] = False
    mask[256:512] = False
    lists = tile_lists_from_dense(mask, 128)
    qkv = random_qkv(1, 700, 2, 128, dtype=torch.float16)
    config = HopperConfig(persistent=persistent) if kernel is hopper else None
    with poisoned_memory():
        out, lse = kernel(*qkv, lists, return_lse=True, config=config)
    empty = ~mask.any(-1)
    assert out[:, empty].abs().max() == 0
    assert (lse[:, :, empty] == float("-inf")).all()
    exact, exact_lse = masked_attention(*(x.double() for x in qkv), mask)
    assert relative_error(out, exact) < 1e-3
    assert relative_error(lse[:, :, ~empty], exact_lse[:, :, ~empty]) < 1e-5


@needs_hopper
@KERNELS
@pytest.mark.parametrize("layout", ["transposed", "packed", "odd", "expanded"])
def test_any_strides(kernel: Callable, layout: str) -> None:
    torch.manual_seed(0)
    lists = tile_lists_from_dense(sparse_mask(300, 300, block=128), 128)
    x = torch.randn(2, 307, 3, 3 * 64 + 1, device=DEVICE).half()
    qkv = {
        "transposed": [
            t.transpose(1, 2).contiguous().transpose(1, 2) for t in x[..., 1:].chunk(3, -1)
        ],
        "packed": list(x[..., 1:].contiguous().chunk(3, -1)),
        "odd": list(x[..., 1:].chunk(3, -1)),
        "expanded": [t[:1].expand(2, -1, -1, -1) for t in x[..., 1:].chunk(3, -1)],
    }[layout]
    check_kernel(qkv, lists, 7, kernel=kernel)


@needs_hopper
@KERNELS
def test_scale_and_large_scores(kernel: Callable) -> None:
    torch.manual_seed(0)
    lists = tile_lists_from_dense(sparse_mask(300, 300, block=128), 128)
    query, key, value = random_qkv(1, 300, 2, 64, dtype=torch.float16)
    query, key = 10 * query, 10 * key
    for scale in (0.01, 1.0):
        out = kernel(query, key, value, lists, scale=scale)
        exact, _ = masked_attention(
            *(x.double() for x in (query, key, value)), lists_to_mask(lists), scale
        )
        assert relative_error(out, exact) < 1e-3


@needs_hopper
@pytest.mark.gpu
def test_torch_compile_traces_it_without_a_graph_break() -> None:
    lists = tile_lists_from_dense(sparse_mask(300, 300, block=128), 128)
    qkv = random_qkv(1, 300, 1, 64, dtype=torch.float16)

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return hopper(query * 2, key, value, lists) + 1

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*qkv), call(*qkv))


def test_choice_by_dtype_head_size_block_size_and_plan() -> None:
    operator = make_operators()["hopper"]
    cuda = torch.device("cuda")
    assert "float32" in str(why_no_hopper_kernel(cuda, torch.float32, 64, 128))
    assert "96" in str(why_no_hopper_kernel(cuda, torch.float16, 96, 128))
    assert "64 is not 128" in str(why_no_hopper_kernel(cuda, torch.float16, 64, 64))
    plan = GNA(0.5).plan_layout(TokenLayout((3, 16, 16)), RASTER)
    if REFUSED is None:
        query = torch.randn(1, 768, 2, 64, dtype=torch.float16, device=DEVICE)
        choice = choose_operator("auto", make_operators(), plan, query)
        assert choice.operator.name == "hopper"
        wide = query.repeat(1, 1, 1, 3)
        choice = choose_operator("auto", make_operators(), plan, wide)
        assert choice.operator.name == "triton"
        assert choice.rejected == (("hopper", "head size 192 is not 64 or 128"),)
    else:
        with pytest.raises(OperatorUnavailableError, match="can't run here"):
            choose_operator("hopper", make_operators(), plan, torch.randn(1, 768, 2, 64))
        assert operator.why_not(plan, torch.randn(1, 768, 2, 64)) is not None


@needs_gluon
def test_bad_calls_are_refused() -> None:
    lists = tile_lists_from_dense(torch.ones(64, 64, dtype=torch.bool, device=DEVICE), 32)
    query, key, value = random_qkv(1, 64, 1, 64, dtype=torch.float16)
    with pytest.raises(OperatorUnavailableError, match="block size 32"):
        hopper(query, key, value, lists)
    with pytest.raises(OptionError, match="positive"):
        hopper(query, key, value, lists, scale=0.0)


def test_persistent_only_where_lists_are_short_and_even() -> None:
    assert hopper_config(128, 30, with_text=False).persistent
    assert not hopper_config(128, 300, with_text=False).persistent
    assert not hopper_config(128, 30, with_text=True).persistent


class Pointer:
    """What a kernel's pointer is to the code below: a tensor and an offset."""

    def __init__(self, data: torch.Tensor, offset: Any = 0) -> None:
        self.data, self.offset = data.flatten(), offset

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.data, self.offset + more)

    def __sub__(self, less: Any) -> Pointer:
        return Pointer(self.data, self.offset - less)


def _load(pointer: Pointer, mask: Any = True, other: int = 0) -> torch.Tensor:
    mask, offset = torch.broadcast_tensors(torch.as_tensor(mask), torch.as_tensor(pointer.offset))
    inside = torch.where(mask, offset, 0)
    return torch.where(mask, pointer.data[inside].long(), other)


# Enough of Gluon for the functions that say which steps a program takes.
PLAIN = SimpleNamespace(
    int32=torch.int64,
    int64=torch.int64,
    load=_load,
    cdiv=lambda a, b: -(-a // b),
    where=lambda c, a, b: torch.where(torch.as_tensor(c), torch.as_tensor(a), torch.as_tensor(b)),
    minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
    maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
    arange=lambda first, end, layout: torch.arange(first, end),
    constexpr=None,
    SliceLayout=lambda dim, parent: None,
)


@needs_gluon
@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize(
    ("num_video", "text"), [(63, 0), (128, 5), (300, 77), (256, 128), (900, 0), (1000, 300)]
)
def test_steps_cover_the_mask_once(monkeypatch, num_video: int, text: int, text_first) -> None:
    from dit_accel.kernels import hopper_steps as kernel

    monkeypatch.setattr(kernel, "gl", PLAIN)
    monkeypatch.setattr(kernel, "TILE", 128)
    monkeypatch.setattr(kernel, "ROWS", 64)
    torch.manual_seed(0)
    dense = sparse_mask(2, 3, num_video, num_video, block=128).cpu()
    dense[:, 1, 130:300] = False
    lists = tile_lists_from_dense(dense, 128)
    expected = lists_to_mask(lists, text, text_first)
    pointers = (
        lists.full_count, lists.full_index, lists.partial_count,
        lists.partial_index, lists.partial_slot, lists.bits.view(torch.int32),
    )  # fmt: skip
    rows = lists.full_count.shape[-1]
    programs = (rows + -(-text // 128)) * 6
    sizes = (
        3, num_video, text, text if text_first else 0, 0 if text_first else num_video, programs,
        3 * rows, rows, lists.full_index.shape[-1], lists.partial_index.shape[-1],
    )  # fmt: skip
    loaded = tuple(Pointer(x) for x in pointers)
    total = num_video + text
    seen = torch.zeros(2, 3, total, total + 128, dtype=torch.int64)
    for program in range(programs):
        work = kernel.program_work.fn(torch.tensor(program), loaded, sizes)
        b, h, first, end = (int(x) for x in work[:4])
        end = min(end, first + 128)
        masked, steps = int(work[8]), int(work[9])
        for step in map(torch.tensor, range(steps)):
            n = int(kernel.key_row.fn(step, work, loaded, sizes))
            words = [kernel.mask_words.fn(m, step, work, loaded, sizes, None) for m in (0, 1)]
            bits = (torch.cat(words)[:, :, None] >> torch.arange(32) & 1).flatten(1)
            assert step < masked or bits.all()
            seen[b, h, first:end, n : n + 128] += bits[: end - first]
    assert torch.equal(seen[..., :total], expected.expand(2, 3, -1, -1).long())
    assert not seen[..., total:].any()


@needs_gluon
@pytest.mark.skipif(importlib.util.find_spec("triton.backends.nvidia") is None, reason="no NVIDIA")
def test_compiles_for_hopper_without_a_gpu() -> None:
    """In a process of its own: here Triton interprets, and keeps what it made of its library."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_for_hopper.py")
    command = [sys.executable, str(script)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    # What an H100 has for one program.
    assert all(int(shared) <= 232_448 for shared in found.stdout.split())
