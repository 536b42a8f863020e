"""The contract of an attention method: one frozen dataclass that turns a call into a plan."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.errors import DensityUnreachableError, OptionError
from dit_accel.grid import RASTER, Grid, TokenOrder
from dit_accel.kernels.tiles import tile_lengths
from dit_accel.kinds import Method
from dit_accel.plan import (
    EMPTY,
    FULL,
    AttentionPlan,
    BlockSparsePlan,
    DensePlan,
    JointPlan,
    TokenPredicate,
    block_mask_from_states,
    dense_block_states,
    visited_pairs,
)


@dataclass(frozen=True)
class AttentionMethod(Method):
    """What to attend to. Subclasses are frozen dataclasses whose fields are the user's options.

    A method never names a model family: all it knows of a call is the `AttentionCall`.
    """

    kind: ClassVar[str] = "attention"

    @property
    def pools(self) -> bool:
        """Whether plans hold pooled blocks or stand-ins, beside tokens attended exactly."""
        return False

    @property
    def softmax_gain(self) -> float:
        """Factor on the logits, beside the usual scale, of every call that it plans."""
        return 1.0

    def scaled(self, scale: float | None, head_size: int) -> float | None:
        """Return the scale of the logits with `softmax_gain` in it; None for the usual one."""
        if self.softmax_gain == 1:
            return scale
        return self.softmax_gain * (head_size**-0.5 if scale is None else scale)

    @abstractmethod
    def plan(
        self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, order: TokenOrder
    ) -> AttentionPlan:
        """Decide one call.

        Args:
            call: what the tokens are and when this is.
            query: ``[B, N, H, D]`` after QK-norm and rotary embedding; likewise ``key``, ``value``.
            order: order in which the video tokens arrive (this method's `token_order`).
        """

    def token_order(self, grid: Grid) -> TokenOrder:
        """Return the order of the video tokens in which this method's blocks are compact."""
        return RASTER

    def at_density(
        self, density: float, layout: TokenLayout, order: TokenOrder | None = None
    ) -> Self:
        """Return this method with its options set so that at most ``density`` of the pairs stay.

        The pairs counted are those that a kernel computes, text included: what
        `BlockSparsePlan.block_density` of the plan for ``layout`` says. 1 means exactly dense.

        Args:
            density: in (0, 1].
            layout: of the calls.
            order: of the video tokens, where something else has decided on it, such as the other
                layers of a model whose layers see different tokens; None for `token_order`.

        Raises:
            OptionError: if ``density`` lies outside (0, 1].
            DensityUnreachableError: if even its sparsest pattern keeps more.
        """
        raise OptionError(f"method {self.name!r} has no density: leave density out.")


@dataclass(frozen=True)
class StaticMethod(AttentionMethod):
    """A method whose pattern follows from the token layout alone."""

    block_size: int = field(default=128, kw_only=True)  # tokens per block of the lists
    remainder: Literal["none", "pooled"] = field(default="none", kw_only=True)
    """What stands for the blocks left out: nothing, or one key each, the mean of its tokens.

    "pooled" is PISA's zeroth order (arXiv 2602.01077) put under a static pattern; blocks that the
    pattern keeps in part are then kept whole.
    """

    def __post_init__(self) -> None:
        """Check the options that all static methods have."""
        size = self.block_size
        if not isinstance(size, int) or size < 1 or size & (size - 1):
            raise OptionError(f"block_size={size!r} must be a power of two.")
        if self.remainder not in ("none", "pooled"):
            raise OptionError(f"remainder={self.remainder!r} must be 'none' or 'pooled'.")

    @property
    def pools(self) -> bool:
        """Only with ``remainder="pooled"``."""
        return self.remainder == "pooled"

    @abstractmethod
    def allowed(self, layout: TokenLayout, device: torch.device | str = "cpu") -> TokenPredicate:
        """Return the definition of the pattern: ``(query, key) -> bool`` over raster indices."""

    @abstractmethod
    def tile_states(
        self, layout: TokenLayout, order: TokenOrder, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return int8 ``[Q, K]``, the state of each pair of video blocks: EMPTY, PARTIAL or FULL.

        Blocks hold successive tokens of ``order``. PARTIAL is always a safe answer; EMPTY and FULL
        must be true.
        """

    def attention_mask(self, layout: TokenLayout, device: torch.device | str = "cpu") -> Tensor:
        """Return bool ``[N, N]`` in raster order, text last: the definition, written out."""
        count = layout.video_length
        index = torch.arange(count, device=device)
        mask = torch.ones(layout.num_tokens, layout.num_tokens, dtype=torch.bool, device=device)
        mask[:count, :count] = self.allowed(layout, device)(index[:, None], index[None, :])
        return mask

    def plan(
        self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, order: TokenOrder
    ) -> AttentionPlan:
        """Plan from the layout alone; see `AttentionMethod.plan`."""
        return self.plan_layout(call.layout, order, query.device)

    def plan_layout(
        self, layout: TokenLayout, order: TokenOrder, device: torch.device | str = "cpu"
    ) -> AttentionPlan:
        """Return the plan of every call with this layout: dense if the pattern keeps all pairs."""
        plan = self.plan_block_sparse(layout, order, device)
        if bool((dense_block_states(plan.video_mask) == FULL).all()):
            return DensePlan(f"{self.name} keeps every pair on grid {layout.grid}", order)
        if self.remainder == "pooled":
            kept = (dense_block_states(plan.video_mask) != EMPTY).to(torch.int8)
            size = self.block_size
            return JointPlan(layout, order, kept, size, size, remainder=True)
        return plan

    def plan_block_sparse(
        self, layout: TokenLayout, order: TokenOrder, device: torch.device | str = "cpu"
    ) -> BlockSparsePlan:
        """Return the plan as block lists, even where they list every block."""
        allowed = self.allowed(layout, device)
        raster = order.permutation(layout.grid, device).int()

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return allowed(raster[q], raster[k])

        states = self.tile_states(layout, order, device)
        mask = block_mask_from_states(states, self.block_size, layout.video_length, mask_mod)
        return BlockSparsePlan(layout, order, mask)

    def block_density(self, layout: TokenLayout, order: TokenOrder | None = None) -> float:
        """Share of all pairs, text included, that lie in visited blocks; cheap to ask.

        The same number as ``block_density`` of the plan in that order.
        """
        states = self.tile_states(layout, order or self.token_order(layout.grid))
        video, total = layout.video_length, layout.num_tokens
        pairs = visited_pairs(states != EMPTY, self.block_size, video)
        if self.remainder == "pooled":
            rows = tile_lengths(video, self.block_size, states.device).double()
            pairs += float(rows @ (states == EMPTY).double().sum(-1))
        return (pairs + total**2 - video**2) / total**2


def check_density(density: float) -> None:
    """Raise `OptionError` unless ``density`` is a number in (0, 1]."""
    number = isinstance(density, int | float) and not isinstance(density, bool)
    if not number or not 0 < density <= 1:
        raise OptionError(
            f"density={density!r} must be in (0, 1]: the share of (query, key) pairs to keep."
        )


def unreachable(
    method: StaticMethod, density: float, layout: TokenLayout, least: float
) -> Exception:
    """Return the error that says how sparse ``method`` can be at most on ``layout``."""
    reachable = min(math.ceil(least * 1e4) / 1e4, 1.0)  # rounded up, so that asking for it works
    text = f" and {layout.text_length} text tokens" if layout.text_length else ""
    return DensityUnreachableError(
        f"density={density} is out of reach: on grid {layout.grid}{text}, method {method.name!r} "
        f"with block_size={method.block_size} keeps at least {reachable}. Ask for that, "
        "or choose a smaller block_size.",
        reachable,
    )
