"""What the tests of both block-sparse kernels share: inputs, and the check against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.reference import lists_to_mask, masked_attention
from dit_accel.kernels.tiles import TileLists

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


def sparse_mask(*shape: int, block: int) -> Tensor:
    """A mask of full, mixed and empty tiles, some ragged, that leaves no query without keys."""
    mask = (torch.rand(*shape) < 0.5).to(DEVICE)
    tiles = -(-shape[-1] // block)
    kinds = 4 if tiles < 8 else 16
    kind = torch.randint(0, kinds, (*shape[:-2], tiles, tiles), device=DEVICE)
    kind[..., torch.arange(tiles), torch.arange(tiles)] = 0
    kind[..., 0, -1] = 0
    kind = kind.repeat_interleave(block, -1).repeat_interleave(block, -2)
    kind = kind[..., : shape[-2], : shape[-1]]
    return (kind == 0) | ((kind == 1) & mask)


def random_qkv(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(*shape, device=DEVICE).to(dtype) for _ in range(3)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.isfinite().all()
    return float((actual.double() - expected).norm() / expected.norm())


def check_kernel(
    qkv: list[Tensor],
    lists: TileLists,
    text_length: int = 0,
    text_first: bool = False,
    config: Any = None,
    *,
    kernel: Callable[..., Any],
) -> None:
    """Error against float64 at most twice that of the plain formula in the same dtype."""
    with poisoned_memory():
        out, lse = kernel(
            *qkv,
            lists,
            text_length=text_length,
            text_first=text_first,
            return_lse=True,
            config=config,
        )
    assert out.dtype == qkv[0].dtype
    assert out.is_contiguous()
    mask = lists_to_mask(lists, text_length, text_first)
    exact, exact_lse = masked_attention(*(x.double() for x in qkv), mask)
    plain, plain_lse = masked_attention(*qkv, mask)
    rounding = torch.finfo(qkv[0].dtype).eps / 4
    assert relative_error(out, exact) <= 2 * relative_error(plain, exact) + rounding
    # The kernel's log-sum is float32 whatever the inputs are.
    assert relative_error(lse, exact_lse) <= 2 * relative_error(plain_lse, exact_lse) + 1e-6
