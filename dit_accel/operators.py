"""Who can run a block-sparse plan on this machine, and why the others can't.

One check words both the refusal of an explicit choice and the note that `auto` leaves in the
report, so what is said and what is done can't drift apart.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel.call import text_back, text_last
from dit_accel.errors import OperatorUnavailableError, OptionError, did_you_mean
from dit_accel.kernels.backend import why_no_gluon, why_no_hopper_kernel
from dit_accel.kernels.precision import (
    PRECISIONS,
    check_precision,
    why_no_hopper_precision,
    why_no_precision,
)
from dit_accel.kernels.statistics import block_statistics
from dit_accel.kernels.tuning import Tuning
from dit_accel.plan import BlockSparsePlan, JointPlan
from dit_accel.tuning_file import Tunings

UNCOMPILED = ("cpu", "mps")
"""Devices on which FlexAttention is not compiled."""

SparsePlan = BlockSparsePlan | JointPlan

POOLED = "the plan has pooled blocks or stand-ins, which only this package's operators know"

AttentionOutput = tuple[Tensor, Tensor | None]
"""Output ``[B, N, H, D]`` and, where asked for, its natural-log LSE, float32 ``[B, H, N]``."""


@dataclass(frozen=True)
class Operator(ABC):
    """A way to compute block-sparse attention."""

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = ()
    """What it can round to, beside computing in the tensors' own dtype."""

    precision: str | None = None
    """What it rounds to here; None for nothing."""
    tunings: Tunings = field(default_factory=Tunings, compare=False)

    @abstractmethod
    def why_not_here(self) -> str | None:
        """Return why this machine can't run it at all, or None."""

    @cached_property
    def unavailable(self) -> str | None:
        """`why_not_here`, asked once: it looks at files and drivers, and calls are many."""
        return self.why_not_here()

    def why_not(self, plan: SparsePlan, query: Tensor) -> str | None:
        """Return why it can't run this plan on these tensors, or None."""
        return self.unavailable

    def tuning(self, device: torch.device) -> Tuning | None:
        """Return where its tile shapes for a device come from; None if it has none to choose."""
        return None

    @abstractmethod
    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: SparsePlan,
        scale: float | None,
        return_lse: bool,
    ) -> AttentionOutput:
        """Attend ``[B, N, H, D]`` by ``plan``; rows as ``plan.layout`` says."""


@dataclass(frozen=True)
class TritonOperator(Operator):
    """This package's Triton kernel: any size, any head size up to 256, text in place."""

    name: ClassVar[str] = "triton"
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS

    def tuning(self, device: torch.device) -> Tuning:
        """Return the settings measured on this card, if they were."""
        return self.tunings.of(device)

    def why_not_here(self) -> str | None:
        """Need the package and an NVIDIA GPU of compute capability 8.0 or newer."""
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        from dit_accel.kernels.block_sparse import why_unavailable

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        reason = why_unavailable(device, torch.float16, 64)
        return "no NVIDIA GPU was found" if reason and device.type == "cpu" else reason

    def why_not(self, plan: SparsePlan, query: Tensor) -> str | None:
        """Check device, dtype, head size and block size too."""
        if reason := self.unavailable:
            return reason
        size = _smallest_block(plan)
        if self.precision is not None:
            if isinstance(plan, JointPlan):
                return "pooled blocks and stand-ins are attended in the tensors' own dtype alone"
            head_size = query.shape[-1]
            return why_no_precision(self.precision, query.device, query.dtype, head_size, size)
        from dit_accel.kernels.block_sparse import why_unavailable

        if size < 16:
            return f"block size {size} is under 16"
        return why_unavailable(query.device, query.dtype, query.shape[-1])

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: SparsePlan,
        scale: float | None,
        return_lse: bool,
    ) -> AttentionOutput:
        """Run `block_sparse_attention`, or `joint_sparse_attention`, of `dit_accel.kernels`."""
        if isinstance(plan, JointPlan):
            from dit_accel.kernels.joint import joint_sparse_attention

            joint = joint_sparse_attention(
                query,
                key,
                value,
                **joint_options(plan, query, key, value, scale),
                text_first=plan.layout.text_first,
                return_lse=return_lse,
            )
            return joint if isinstance(joint, tuple) else (joint, None)
        options = _text_and_scale(plan, scale, return_lse)
        if self.precision is not None:
            from dit_accel.kernels.block_sparse_quantised import quantised_block_sparse_attention

            result = quantised_block_sparse_attention(
                query, key, value, plan.tiles, self.precision, **options
            )
        else:
            from dit_accel.kernels.block_sparse import block_sparse_attention

            config = self.tuning(query.device).kernel_config(query.shape[-1], query.element_size())
            result = block_sparse_attention(query, key, value, plan.tiles, config=config, **options)
        return result if isinstance(result, tuple) else (result, None)


@dataclass(frozen=True)
class HopperOperator(Operator):
    """This package's Gluon kernel for Hopper: exact blocks of 128, head sizes 64 and 128."""

    name: ClassVar[str] = "hopper"
    precisions: ClassVar[tuple[str, ...]] = ("fp8", "int8_fp8")

    def tuning(self, device: torch.device) -> Tuning:
        """Return the settings measured on this card, if they were."""
        return self.tunings.of(device)

    def why_not_here(self) -> str | None:
        """Need triton 3.6 or newer and a GPU of compute capability 9.0."""
        if not torch.cuda.is_available():
            return "no NVIDIA GPU was found"
        device = torch.device("cuda")
        return why_no_gluon() or why_no_hopper_kernel(device, torch.float16, 64, 128)

    def why_not(self, plan: SparsePlan, query: Tensor) -> str | None:
        """Check device, dtype, head size and block size too."""
        if reason := self.unavailable:
            return reason
        if isinstance(plan, JointPlan):
            return "the plan has pooled blocks or stand-ins"
        call = query.device, query.dtype, query.shape[-1], int(plan.video_mask.BLOCK_SIZE[0])
        if self.precision is not None:
            return why_no_hopper_precision(self.precision, *call)
        return why_no_hopper_kernel(*call)

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: SparsePlan,
        scale: float | None,
        return_lse: bool,
    ) -> AttentionOutput:
        """Run `hopper_block_sparse_attention` of `dit_accel.kernels`."""
        tiles, options = _exact(plan).tiles, _text_and_scale(plan, scale, return_lse)
        if self.precision is not None:
            from dit_accel.kernels import block_sparse_hopper_quantised as rounding

            result = rounding.hopper_quantised_attention(
                query, key, value, tiles, self.precision, **options
            )
        else:
            from dit_accel.kernels.block_sparse_hopper import hopper_block_sparse_attention

            config = self.tuning(query.device).hopper_config(
                query.shape[-1], tiles.longest, plan.layout.text_length > 0
            )
            result = hopper_block_sparse_attention(
                query, key, value, tiles, config=config, **options
            )
        return result if isinstance(result, tuple) else (result, None)


@dataclass(frozen=True)
class FlexOperator(Operator):
    """PyTorch's FlexAttention, compiled on a GPU; elsewhere its slow but exact eager form."""

    name: ClassVar[str] = "flex"

    compiled: dict[str, Any] = field(default_factory=dict, compare=False)

    def why_not_here(self) -> str | None:
        """Need a torch that has it."""
        if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
            return f"torch {torch.__version__} has no FlexAttention"
        return None

    def why_not(self, plan: SparsePlan, query: Tensor) -> str | None:
        """Its generated kernel needs block sizes of at least 16, and no pooled blocks."""
        if isinstance(plan, JointPlan):
            return POOLED
        if query.device.type not in UNCOMPILED and plan.video_mask.BLOCK_SIZE[0] < 16:
            return f"block size {plan.video_mask.BLOCK_SIZE[0]} is under 16"
        return self.unavailable

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: SparsePlan,
        scale: float | None,
        return_lse: bool,
    ) -> AttentionOutput:
        """Run ``flex_attention`` with the plan's `BlockMask`, video first."""
        from torch.nn.attention.flex_attention import flex_attention

        plan = _exact(plan)
        run: Any = flex_attention
        if query.device.type not in UNCOMPILED:
            if "flex" not in self.compiled:
                # fullgraph: beyond torch's limit of recompilations it raises, where it would
                # otherwise run eagerly, with all scores in memory, without a word.
                compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
                self.compiled["flex"] = compiled
            run = self.compiled["flex"]
        q, k, v = (text_last(x, plan.layout).transpose(1, 2) for x in (query, key, value))
        try:
            result = run(q, k, v, block_mask=plan.block_mask, scale=scale, return_lse=return_lse)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise OperatorUnavailableError(
                "FlexAttention was compiled for as many shapes and masks as torch allows "
                f"({torch._dynamo.config.recompile_limit}): call torch._dynamo.reset(), or take "
                "another backend."
            ) from error
        out, lse = result if return_lse else (result, None)
        out = text_back(out.transpose(1, 2), plan.layout, dim=1)
        return out, None if lse is None else text_back(lse.float(), plan.layout, dim=2)


@dataclass(frozen=True)
class FlashAttention4Operator(Operator):
    """flash-attn-4's block-sparse forward on Hopper and Blackwell, for plans of whole blocks."""

    name: ClassVar[str] = "flash-attn-4"

    def why_not_here(self) -> str | None:
        """Need the package and compute capability 9.0 or newer."""
        try:
            if importlib.util.find_spec("flash_attn.cute") is None:
                raise ModuleNotFoundError
        except ModuleNotFoundError:
            return "the package flash-attn-4 is not installed"
        if not torch.cuda.is_available():
            return "no CUDA device"
        if torch.cuda.get_device_capability()[0] < 9:
            return "it needs a Hopper or Blackwell GPU (compute capability 9.0 or newer)"
        return None

    def why_not(self, plan: SparsePlan, query: Tensor) -> str | None:
        """It takes 128-token blocks without per-token masks, in half precision."""
        if reason := self.unavailable:
            return reason
        if isinstance(plan, JointPlan):
            return POOLED
        if query.dtype not in (torch.float16, torch.bfloat16):
            return f"dtype {query.dtype} is not float16 or bfloat16"
        if plan.video_mask.BLOCK_SIZE != (128, 128):
            return f"block size {plan.video_mask.BLOCK_SIZE[0]} is not 128"
        if plan.layout.text_length:
            return "text tokens share the sequence"
        if not plan.has_whole_blocks_only:
            return "the plan masks tokens inside blocks"
        return None

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: SparsePlan,
        scale: float | None,
        return_lse: bool,
    ) -> AttentionOutput:
        """Run its CuTe forward with the plan's full-block lists."""
        sparsity = importlib.import_module("flash_attn.cute.block_sparsity")
        interface = importlib.import_module("flash_attn.cute.interface")
        batch, _, heads, _ = query.shape
        partial, full = _exact(plan).block_lists
        lists = [x.expand(batch, heads, *x.shape[2:]).contiguous() for x in (*partial, *full)]
        out, lse = interface.flash_attn_func(
            query,
            key,
            value,
            softmax_scale=scale,
            block_sparse_tensors=sparsity.BlockSparseTensorsTorch(*lists, block_size=(128, 128)),
            return_lse=True,
        )
        return out, lse if return_lse else None


@dataclass(frozen=True)
class TorchOperator(Operator):
    """Plain torch: gathers the visited blocks of each query block. Runs anywhere, pays on CPUs."""

    name: ClassVar[str] = "torch"

    def why_not_here(self) -> str | None:
        """Always possible."""
        return None

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: SparsePlan,
        scale: float | None,
        return_lse: bool,
    ) -> AttentionOutput:
        """Run `gathered_attention`, or `gathered_joint_attention`, of `dit_accel.kernels`."""
        q, k, v = (text_last(x, plan.layout) for x in (query, key, value))
        if isinstance(plan, JointPlan):
            from dit_accel.kernels.joint_gather import gathered_joint_attention

            options = joint_options(plan, query, key, value, scale)
            out, lse = gathered_joint_attention(q, k, v, **options, return_lse=return_lse)
        else:
            from dit_accel.kernels.gather import gathered_attention

            table = plan.key_rows
            out, lse = gathered_attention(q, k, v, table, scale=scale, return_lse=return_lse)
        out = text_back(out, plan.layout, dim=1)
        return out, None if lse is None else text_back(lse, plan.layout, dim=2)


OPERATORS: tuple[type[Operator], ...] = (
    HopperOperator, TritonOperator, FlashAttention4Operator, FlexOperator, TorchOperator,
)  # fmt: skip


def make_operators(precision: str | None = None) -> Mapping[str, Operator]:
    """Return one of each operator, by name, to run in ``precision``.

    What a card was tuned to is read on first use, once for all of them.
    """
    tunings = Tunings()
    return MappingProxyType({cls.name: cls(precision, tunings) for cls in OPERATORS})


def list_operators() -> list[Operator]:
    """Return all operators, for the command ``dit-accel doctor`` and other displays."""
    return list(make_operators().values())


def check_backend(backend: str, precision: str | None = None) -> None:
    """Raise `OptionError` unless ``backend`` is "auto" or the name of an operator.

    Likewise if ``precision`` is unknown, or something that this operator doesn't have anywhere.
    """
    names = [*(cls.name for cls in OPERATORS), "auto"]
    if backend not in names:
        raise OptionError(f"unknown backend {backend!r}.{did_you_mean(backend, names)}")
    check_precision(precision)
    having = [cls.name for cls in OPERATORS if precision in cls.precisions]
    if precision is not None and backend not in ("auto", *having):
        raise OptionError(
            f"backend {backend!r} has no {precision=}: choose backend='auto' or one of {having}."
        )


@dataclass(frozen=True)
class Choice:
    """The operator that runs, and why those before it in the order of preference don't."""

    operator: Operator
    rejected: tuple[tuple[str, str], ...]


def choose_operator(
    backend: str, operators: Mapping[str, Operator], plan: SparsePlan, query: Tensor
) -> Choice:
    """Pick the operator named ``backend``, or for "auto" the fastest that can run.

    Raises:
        OperatorUnavailableError: if an operator asked for by name can't run this call.
    """
    if backend != "auto":
        operator = operators[backend]
        if reason := operator.why_not(plan, query):
            remedy = "backend='auto'" if operator.precision is None else "no precision"
            raise OperatorUnavailableError(
                f"backend {backend!r} can't run here: {reason}. Use {remedy}, or see "
                "`dit-accel doctor`."
            )
        return Choice(operator, ())
    preferred = ["hopper", "triton", "flash-attn-4", "flex", "torch"]
    precision = operators["triton"].precision
    if precision is not None:
        # On Hopper the portable kernel is the faster one in 8 bits, except at head size 128 in fp8.
        gluon = precision == "fp8" and query.shape[-1] == 128
        order = ("hopper", "triton") if gluon else ("triton", "hopper")
        preferred = [name for name in order if precision in operators[name].precisions]
    elif query.device.type in UNCOMPILED:
        preferred = ["torch"]
    rejected: list[tuple[str, str]] = []
    for name in preferred:
        reason = operators[name].why_not(plan, query)
        if reason is None:
            return Choice(operators[name], tuple(rejected))
        rejected.append((name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
    if precision is not None:
        raise OperatorUnavailableError(
            f"{precision=} can't run here: {reasons}. Leave precision out to attend in the "
            "tensors' own dtype."
        )
    raise OperatorUnavailableError(f"no operator can run this call ({reasons}).")


def _smallest_block(plan: SparsePlan) -> int:
    if isinstance(plan, JointPlan):
        return min(plan.query_block, plan.key_block)
    return int(plan.video_mask.BLOCK_SIZE[0])


def _exact(plan: SparsePlan) -> BlockSparsePlan:
    """Return ``plan``, which `why_not` found to hold no pooled blocks."""
    if isinstance(plan, JointPlan):
        raise OperatorUnavailableError(f"this operator can't run the plan: {POOLED}.")
    return plan


def _text_and_scale(plan: SparsePlan, scale: float | None, return_lse: bool) -> dict[str, Any]:
    """The arguments that our exact kernels have in common."""
    text = {"text_length": plan.layout.text_length, "text_first": plan.layout.text_first}
    return {**text, "scale": scale, "return_lse": return_lse}


def joint_options(
    plan: JointPlan, query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> dict[str, Any]:
    """The arguments that the joint kernels have in common."""
    statistics = plan.statistics
    if statistics is None and plan.remainder:
        # A static pattern's plan serves many calls: what their keys and values are is new in each.
        layout = plan.layout
        start = layout.text_length if layout.text_first else 0
        q, k, v = (x[:, start : start + layout.video_length] for x in (query, key, value))
        statistics = block_statistics(
            q, k, v, query_block=plan.query_block, key_block=plan.key_block
        )
    return {
        "levels": plan.levels,
        "query_block": plan.query_block,
        "key_block": plan.key_block,
        "text_length": plan.layout.text_length,
        "statistics": statistics,
        "remainder": plan.remainder,
        "first_order": plan.first_order,
        "row_factor": plan.row_factor,
        "added": plan.added,
        "scale": scale,
    }
