"""Who can compute an attention case: this package's operators, and the peers that are installed.

A contender says why it can't run a case, or returns a function to time. Sparse ones compute the
tiles on the case's lists; dense ones all pairs; NATTEN, which takes no lists, a sliding window of
the same density.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.bench.cases import SAMPLED_ROWS, Case
from dit_accel.call import TokenLayout
from dit_accel.errors import DensityUnreachableError
from dit_accel.grid import Grid
from dit_accel.kernels.reference import masked_attention
from dit_accel.methods.gna import GNA
from dit_accel.operators import Operator, make_operators

GRIDS: Mapping[int, Grid] = MappingProxyType(
    {
        75_600: (21, 45, 80),
        32_760: (21, 30, 52),
        118_800: (33, 45, 80),
        65_536: (1, 256, 256),
        16_384: (1, 128, 128),
        4_096: (1, 64, 64),
        1_560: (13, 10, 12),
    }
)
"""Token grids of common lengths, for contenders that want one: the Wan, HunyuanVideo and FLUX
resolutions of `dit_accel.bench.architectures`, and a toy."""

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender(ABC):
    """One way to compute a case. ``exact`` ones must pass the error bound of our own kernels."""

    name: ClassVar[str]
    dense: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    package: ClassVar[str | None] = None
    needs_gpu: ClassVar[bool] = True

    def why_not_here(self, device: str) -> str | None:
        """Return why it can't run anything on ``device`` ("cuda" or "cpu"), or None."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        return "it needs a CUDA device" if self.needs_gpu and device != "cuda" else None

    @abstractmethod
    def why_not(self, case: Case) -> str | None:
        """Return why it can't run ``case`` where it can run at all, or None."""

    @abstractmethod
    def runner(self, case: Case, density: float) -> Run:
        """Return what to time: it returns ``[1, N, H, D]``."""

    def pairs(self, case: Case, density: float) -> int:
        """Pairs of tokens that it computes, over all heads."""
        heads = case.qkv[0].shape[2]
        return heads * case.tokens**2 if self.dense else case.pairs()

    def errors(self, case: Case, out: Tensor, density: float) -> tuple[float, float]:
        """Relative errors against float64, of ``out`` and of the plain formula, in some rows."""
        return case.sampled_errors(out, self.dense)


@dataclass(frozen=True)
class ByOperator(Contender):
    """One of `dit_accel.operators`, given the lists."""

    operator: Operator

    @property
    def name(self) -> str:  # type: ignore[override]
        """The operator's name."""
        return self.operator.name

    def why_not_here(self, device: str) -> str | None:
        """Ask the operator."""
        return self.operator.unavailable

    def why_not(self, case: Case) -> str | None:
        """Ask the operator; only ours read the bits of masked tiles."""
        ours = ("hopper", "triton", "torch")
        if case.patterns is not None and self.name not in ours:
            return "lists of masked tiles"
        return self.operator.why_not(case.plan, case.qkv[0])

    def runner(self, case: Case, density: float) -> Run:
        """Run the operator as the product does."""
        return lambda: self.operator.run(*case.qkv, case.plan, None, False)[0]


@dataclass(frozen=True)
class Sdpa(Contender):
    """Torch's dense attention, by its own choice or one of its backends."""

    name: ClassVar[str] = "sdpa"
    dense: ClassVar[bool] = True
    needs_gpu: ClassVar[bool] = False
    backend: ClassVar[SDPBackend | None] = None

    def why_not(self, case: Case) -> str | None:
        """Its named backends need half precision."""
        return None if self.backend is None else _why_not_half(case)

    def runner(self, case: Case, density: float) -> Run:
        """Call it heads first, without copies."""
        return partial(sdpa, *case.qkv, self.backend)


@dataclass(frozen=True)
class CudnnDense(Sdpa):
    """cuDNN's dense attention, as torch calls it."""

    name: ClassVar[str] = "cudnn"
    needs_gpu: ClassVar[bool] = True
    backend: ClassVar[SDPBackend | None] = SDPBackend.CUDNN_ATTENTION


@dataclass(frozen=True)
class FlashAttention2(Sdpa):
    """FlashAttention-2, as torch brings it."""

    name: ClassVar[str] = "flash-attn-2"
    needs_gpu: ClassVar[bool] = True
    backend: ClassVar[SDPBackend | None] = SDPBackend.FLASH_ATTENTION


@dataclass(frozen=True)
class FlashAttention4Dense(Contender):
    """flash-attn-4 without lists."""

    name: ClassVar[str] = "flash-attn-4-dense"
    dense: ClassVar[bool] = True

    def why_not_here(self, device: str) -> str | None:
        """As its block-sparse form."""
        return make_operators()["flash-attn-4"].unavailable

    def why_not(self, case: Case) -> str | None:
        """As its block-sparse form, but for the lists."""
        return make_operators()["flash-attn-4"].why_not(case.plan, case.qkv[0])

    def runner(self, case: Case, density: float) -> Run:
        """Call its CuTe forward."""
        interface = importlib.import_module("flash_attn.cute.interface")
        return lambda: _first(interface.flash_attn_func(*case.qkv))


@dataclass(frozen=True)
class Sage(Contender):
    """SageAttention: dense, with quantised queries and keys, so not exact."""

    name: ClassVar[str] = "sage"
    dense: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    package: ClassVar[str | None] = "sageattention"

    def why_not(self, case: Case) -> str | None:
        """Need half precision."""
        return _why_not_half(case)

    def runner(self, case: Case, density: float) -> Run:
        """Let it choose its kernel."""
        attention = importlib.import_module("sageattention").sageattn
        return partial(attention, *case.qkv, tensor_layout="NHD", is_causal=False)


@dataclass(frozen=True)
class Natten(Contender):
    """NATTEN's 3-d neighbourhood attention, with the window that our GNA takes at this density."""

    name: ClassVar[str] = "natten"
    package: ClassVar[str | None] = "natten"

    def why_not(self, case: Case) -> str | None:
        """Need half precision and a token grid."""
        if case.patterns is not None:
            return "lists of masked tiles"
        if case.tokens not in GRIDS:
            return f"no grid is known for {case.tokens} tokens, only for {sorted(GRIDS)}"
        return _why_not_half(case)

    def runner(self, case: Case, density: float) -> Run:
        """Call ``na3d`` on ``[1, T, H, W, heads, D]``."""
        window, stride = self._window(case, density)
        attention = importlib.import_module("natten").na3d
        grid = GRIDS[case.tokens]
        video = [x.unflatten(1, grid) for x in case.qkv]
        return lambda: attention(*video, kernel_size=window, stride=stride).flatten(1, 3)

    def pairs(self, case: Case, density: float) -> int:
        """Every query sees one window."""
        window, _ = self._window(case, density)
        return case.qkv[0].shape[2] * case.tokens * math.prod(window)

    def errors(self, case: Case, out: Tensor, density: float) -> tuple[float, float]:
        """Compare with the definition of our GNA, which is the same."""
        window, stride = self._window(case, density)
        layout = TokenLayout(GRIDS[case.tokens])
        allowed = GNA(window, stride=stride).allowed(layout, out.device)
        rows = torch.linspace(0, case.tokens - 1, SAMPLED_ROWS, device=out.device).long()
        mask = allowed(rows[:, None], torch.arange(case.tokens, device=out.device)[None])
        query, key, value = case.qkv
        exact, _ = masked_attention(
            query[:, rows].double(), key.double(), value.double(), mask[None, None]
        )
        plain, _ = masked_attention(query[:, rows], key, value, mask[None, None])
        error, of_plain = (float((x - exact).norm() / exact.norm()) for x in (out[:, rows], plain))
        return error, of_plain

    def _window(self, case: Case, density: float) -> tuple[Grid, Grid]:
        """Window and stride in tokens: every frame, and within frames strided windows."""
        layout = TokenLayout(GRIDS[case.tokens])
        method = GNA(stride=(1, 0.25, 0.25))
        try:
            method = method.at_density(density, layout)
        except DensityUnreachableError as error:
            method = method.at_density(error.least, layout)
        t, h, w = method.axes(layout.grid)
        return (t.window, h.window, w.window), (t.stride, h.stride, w.stride)


def make_contenders() -> Mapping[str, Contender]:
    """Return one of each contender, by name; ours first."""
    found: list[Contender] = [ByOperator(operator) for operator in make_operators().values()]
    found += [
        CudnnDense(), FlashAttention2(), Sdpa(), FlashAttention4Dense(), Sage(), Natten(),
    ]  # fmt: skip
    return MappingProxyType({contender.name: contender for contender in found})


def default_contenders(device: str) -> tuple[list[str], dict[str, str]]:
    """Return who is measured, and why others are not: on a GPU plain torch takes too long."""
    chosen, left_out = [], {}
    for name, contender in make_contenders().items():
        reason = contender.why_not_here(device)
        if reason is None and device == "cuda" and name in ("torch", "sdpa"):
            reason = "left out unless it is named"
        if reason is None:
            chosen.append(name)
        else:
            left_out[name] = reason
    return chosen, left_out


def baseline_name(device: str) -> str:
    """Return the dense contender that ratios are taken to."""
    return "cudnn" if device == "cuda" else "sdpa"


def sdpa(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend | None = None) -> Tensor:
    """Dense attention ``[B, N, H, D]`` by torch, with a backend of its or its own choice."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def cudnn_dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense attention ``[B, N, H, D]`` by cuDNN."""
    return sdpa(query, key, value, SDPBackend.CUDNN_ATTENTION)


def _why_not_half(case: Case) -> str | None:
    dtype = case.qkv[0].dtype
    half = dtype in (torch.float16, torch.bfloat16)
    return None if half else f"dtype {dtype} is not float16 or bfloat16"


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
