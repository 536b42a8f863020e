"""What PSA, Rectified SpaAttn and PISA share: they choose by looking at query and key."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.errors import DensityUnreachableError, GridMismatchError, OptionError, did_you_mean
from dit_accel.grid import HILBERT, IMAGE_PATCHES, RASTER, Grid, TokenOrder, as_grid, check_tokens
from dit_accel.kernels.statistics import BlockStatistics, block_statistics
from dit_accel.methods.base import AttentionMethod, check_density
from dit_accel.plan import AttentionPlan, DensePlan, JointPlan

BLOCK_SIZES = (16, 32, 64, 128)

ORDERS = {"raster": RASTER, "hilbert": HILBERT, "patches": IMAGE_PATCHES}
"""Token orders by name; "patches" are 8 x 8 tokens of a frame."""


@dataclass(frozen=True)
class SelectingMethod(AttentionMethod):
    """A method that decides block by block from the tokens of each call.

    Tokens are put into the method's `token_order` and cut into blocks; the last may be short, and
    is counted as short everywhere. Text is never part of a block: its keys are exact for every
    query, its queries see all keys.

    Attributes:
        refresh_every: how many denoising steps a layer's plan serves: 1 plans every call anew. The
            method itself keeps nothing; who runs it keeps the plan.
    """

    reads_tokens: ClassVar[bool] = False
    """Whether `choose` reads video queries and keys, beside their statistics."""

    refresh_every: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options that all share."""
        if not is_int(self.refresh_every) or self.refresh_every < 1:
            raise OptionError(
                f"refresh_every={self.refresh_every!r} must be an integer of at least 1: the "
                "number of steps that one plan serves."
            )

    @property
    def pools(self) -> bool:
        """Always: what is left out is at least weighed by its blocks' means."""
        return True

    @property
    @abstractmethod
    def block_sizes(self) -> tuple[int, int]:
        """Tokens per query block and per key block."""

    @abstractmethod
    def least_share(self, layout: TokenLayout) -> float:
        """Return the smallest share of the video's pairs that `at_density` can keep."""

    def choosing_pairs(self, layout: TokenLayout) -> float:
        """Return the cost of a choice in (query, key) pairs; a score alone is half a pair."""
        rows, columns = self.blocks(layout)
        return rows * columns / 2

    @property
    def remedy(self) -> str:
        """What makes `least_share` smaller."""
        return "smaller blocks"

    @abstractmethod
    def with_share(self, share: float, layout: TokenLayout) -> Self:
        """Return this method with options that compute ``share`` of the video's pairs."""

    @abstractmethod
    def dense_reason(self, layout: TokenLayout) -> str | None:
        """Say why every block is exact on ``layout``, whatever the tokens; None if not so."""

    @abstractmethod
    def choose(
        self,
        query: Tensor,
        key: Tensor,
        statistics: BlockStatistics,
        layout: TokenLayout,
        order: TokenOrder,
    ) -> Tensor:
        """Return `select`'s answer for tokens that are already in ``order``."""

    @abstractmethod
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        selection: Tensor,
        layout: TokenLayout,
    ) -> Tensor:
        """Return `reference`'s answer for tokens that are already in order."""

    @abstractmethod
    def joint_plan(
        self,
        key: Tensor,
        selection: Tensor,
        statistics: BlockStatistics,
        layout: TokenLayout,
        order: TokenOrder,
    ) -> JointPlan:
        """Return the plan that computes what `attend` does."""

    def wanted(self, layout: TokenLayout) -> frozenset[str]:
        """Name the statistics needed beyond the means; see `block_statistics`."""
        return frozenset()

    @property
    def pooled_levels(self) -> tuple[int, ...]:
        """Group sizes of the pooled keys and values that the plan needs."""
        return ()

    def select(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        grid: tuple[int, ...],
        text_length: int = 0,
    ) -> Tensor:
        """Choose the key blocks of each query block.

        Args:
            query: ``[B, N, H, D]``, video tokens in raster order and then ``text_length`` of text;
                any float dtype.
            key: likewise.
            value: likewise.
            grid: video tokens as (T, H, W).
            text_length: text tokens.

        Returns:
            ``[B, H, Q, K]`` over blocks of `token_order`: bool, True for an exact block (PSA: int8,
            the level, 0 for a block left out).

        Raises:
            OptionError: if the tensors do not fit together.
            GridMismatchError: if grid and text do not explain N.
        """
        layout, order = self._layout(query, key, value, grid, text_length)
        index = order.permutation(layout.grid, query.device)
        q, k, v = (reordered(x, index) for x in (query, key, value))
        return self.choose(q, k, self.statistics(q, k, v, layout), layout, order)

    def reference(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        grid: tuple[int, ...],
        text_length: int = 0,
        selection: Tensor | None = None,
    ) -> Tensor:
        """Compute the method plainly, in the dtype of the inputs.

        Args:
            query: ``[B, N, H, D]``, as for `select`.
            key: likewise.
            value: likewise.
            grid: video tokens as (T, H, W).
            text_length: text tokens.
            selection: what to attend to, as `select` returns it, which is asked if None.

        Returns:
            ``[B, N, H, D]``, in the order of ``query``.

        Raises:
            OptionError: if the tensors or the selection do not fit.
            GridMismatchError: if grid and text do not explain N.
        """
        layout, order = self._layout(query, key, value, grid, text_length)
        index = order.permutation(layout.grid, query.device)
        q, k, v = (reordered(x, index) for x in (query, key, value))
        if selection is None:
            selection = self.choose(q, k, self.statistics(q, k, v, layout), layout, order)
        batch, _, heads, _ = query.shape
        rows, columns = self.blocks(layout)
        shape, full = tuple(selection.shape), (batch, heads, rows, columns)
        if shape[-2:] != full[-2:] or not fits(shape[:-2], full[:-2]):
            raise OptionError(
                f"selection has shape {shape}, but these tokens have {full}: (batch, heads, query "
                "blocks, key blocks)."
            )
        out = self.attend(q, k, v, selection, layout)
        return reordered(out, torch.argsort(index))

    def plan(
        self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, order: TokenOrder
    ) -> AttentionPlan:
        """Choose by the tokens, text behind the video; see `AttentionMethod.plan`."""
        return self.plan_by(None, call, query, key, value, order)[0]

    def plan_by(
        self,
        selection: Tensor | None,
        call: AttentionCall,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        order: TokenOrder,
        statistics: BlockStatistics | None = None,
    ) -> tuple[AttentionPlan, Tensor | None]:
        """Return the plan of an earlier call's ``selection``, or of a new one, and what it was.

        Means and the like are those of this call in either case: ``statistics``, or if None what
        is made of the tokens.
        """
        reason = self.dense_reason(call.layout)
        if reason is not None:
            return DensePlan(reason, order), None
        if statistics is None:
            statistics = self.statistics(query, key, value, call.layout)
        cost = 0.0
        if selection is None:
            selection = self.choose(query, key, statistics, call.layout, order)
            cost = self.choosing_pairs(call.layout)
        plan = self.joint_plan(key, selection, statistics, call.layout, order)
        return replace(plan, choosing_pairs=cost), selection

    def at_density(
        self, density: float, layout: TokenLayout, order: TokenOrder | None = None
    ) -> Self:
        """Return this method with a budget that makes `JointPlan.density` come to ``density``.

        Counted are all pairs, text and choosing included, a mean of tokens as one key. The budget
        is the same whatever the tokens and their order are, and is met on average over the query
        blocks, and over the steps that a choice serves.
        """
        check_density(density)
        if density == 1:
            return self.with_share(1.0, layout)  # dense, for which nothing is chosen
        video, total = layout.video_length**2, layout.num_tokens**2
        beside = total - video + self.choosing_pairs(layout) / self.refresh_every
        share = (density * total - beside) / video
        least = self.least_share(layout)
        if share < least - 1e-9:
            raise self._unreachable(density, (least * video + beside) / total, layout)
        return self.with_share(min(share, 1.0), layout)

    def blocks(self, layout: TokenLayout) -> tuple[int, int]:
        """Return how many query blocks and key blocks ``layout`` has."""
        rows, columns = self.block_sizes
        return -(-layout.video_length // rows), -(-layout.video_length // columns)

    def _unreachable(self, density: float, least: float, layout: TokenLayout) -> Exception:
        text = f" and {layout.text_length} text tokens" if layout.text_length else ""
        least = min(math.ceil(least * 1e4) / 1e4, 1.0)  # so that asking for it works
        return DensityUnreachableError(
            f"density={density} is out of reach: on grid {layout.grid}{text}, method "
            f"{self.name!r} with key blocks of {self.block_sizes[1]} tokens keeps at least {least} "
            f"(it reaches {least} to 1). Ask for that, or choose {self.remedy}.",
            least,
        )

    def statistics(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout
    ) -> BlockStatistics:
        """Return what choosing and attending need of tokens that are already in order."""
        query_block, key_block = self.block_sizes
        return block_statistics(
            query,
            key,
            value,
            query_block=query_block,
            key_block=key_block,
            text_length=layout.text_length,
            wanted=self.wanted(layout),
            pooled_levels=self.pooled_levels,
        )

    def _layout(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, ...], text_length: int
    ) -> tuple[TokenLayout, TokenOrder]:
        if query.ndim != 4 or not query.shape == key.shape == value.shape:
            shapes = [tuple(x.shape) for x in (query, key, value)]
            raise OptionError(
                f"query, key and value must share one shape [B, N, H, D], but have {shapes}."
            )
        if text_length < 0:
            raise GridMismatchError(f"{text_length=} must not be negative.")
        full: Grid = as_grid(grid)
        check_tokens(query.shape[1], full, text_length)
        return TokenLayout(full, text_length), self.token_order(full)


def reordered(tokens: Tensor, index: Tensor) -> Tensor:
    """Put the video tokens of ``[B, N, H, D]`` into the order of ``index``; text stays behind."""
    return torch.cat([tokens[:, index], tokens[:, len(index) :]], 1)


def mixed_counts(
    choose: Callable[[int], Tensor], count: float, rows: int, device: torch.device
) -> Tensor:
    """Choose ``count`` blocks per row on average, where ``choose(k)`` chooses k in every row.

    A part of the rows, spread evenly, gets one block more than the others: rounding all rows alike
    would miss the density by far where there are few blocks.
    """
    fewer = int(count + 1e-6)
    share = count - fewer
    mask = choose(fewer)
    if share < 1e-6:
        return mask
    row = torch.arange(rows, device=device, dtype=torch.float64)
    more = ((row + 1) * share).floor() > (row * share).floor()
    return torch.where(more[:, None], choose(fewer + 1), mask)


def named_order(name: str) -> TokenOrder:
    """Return the order of that name in `ORDERS`.

    Raises:
        OptionError: if there is none.
    """
    if name not in ORDERS:
        raise OptionError(f"order={name!r} is unknown.{did_you_mean(str(name), ORDERS)}")
    return ORDERS[name]


def check_block(option: str, size: Any) -> None:
    """Raise `OptionError` unless ``size`` is one of `BLOCK_SIZES`."""
    if not is_int(size) or size not in BLOCK_SIZES:
        raise OptionError(f"{option}={size!r} must be one of {BLOCK_SIZES} tokens.")


def check_share(option: str, value: Any, meaning: str) -> None:
    """Raise `OptionError` unless ``value`` is a number in [0, 1]."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise OptionError(f"{option}={value!r} must be in [0, 1]: {meaning}.")


def is_int(value: Any) -> bool:
    """Whether ``value`` is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def fits(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether ``shape`` broadcasts to ``full`` without new dimensions."""
    return len(shape) == len(full) and all(a in (1, b) for a, b in zip(shape, full, strict=True))
