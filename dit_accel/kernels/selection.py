"""Which blocks to keep, from a score or weight for each pair of blocks: read this first.

All functions take ``[B, H, Q, K]``, choose along the last dimension and never wait for the GPU.
They keep a first part of one ranking: forced blocks, then by descending score, ties by lower index.
NaN is never kept unless forced; a score of -inf forbids a block, unless its row has nothing better.
`selection_triton.py` makes the same choice without sorting.

Shares of a row are compared in whole numbers: each weight in units of 2**-30 of the row's largest,
the share in units of 2**-20 and rounded up. Sums are then the same in whatever order they are made,
and a share that is met up to rounding errors counts as met.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit_accel.errors import OptionError
from dit_accel.kernels.backend import Backend, use_triton
from dit_accel.kernels.joint_reference import LEVELS

WEIGHT_BITS = 30
SHARE_BITS = 20


def top_k_mask(
    scores: Tensor, k: int, *, forced: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Keep the ``k`` best of each row.

    Args:
        scores: ``[B, H, Q, K]``, any float dtype.
        k: how many to keep; fewer are kept if fewer are allowed, more if more are forced.
        forced: bool, broadcastable to ``scores``: always kept, and counted in ``k``.
        backend: "torch", "triton", or "auto": Triton for CUDA tensors that its kernel can take.

    Returns:
        Bool, of the shape of ``scores``.

    Raises:
        OptionError: if ``k`` is negative.
        OperatorUnavailableError: if ``backend="triton"`` cannot run here.
    """
    if k < 0:
        raise OptionError(f"{k=} must not be negative.")
    if _use_triton(backend, scores):
        from dit_accel.kernels.selection_triton import select_prefix

        return select_prefix(scores, forced, counts=(k,)).view(torch.bool)
    ranking = _rank(scores, forced)
    return ranking.scatter(ranking.rank <= k)


def cumulative_mask(
    weights: Tensor,
    share: float,
    at_least: int = 0,
    crossing: bool = True,
    *,
    forced: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Keep the largest weights of each row whose sum is at most ``share`` of the row's.

    Args:
        weights: ``[B, H, Q, K]``, not negative (below 0 counts as 0), any float dtype. Rows need
            not sum to 1; in a row without any weight all weigh the same.
        share: from 0 to 1.
        at_least: how many to keep at least, forced ones included.
        crossing: keep also the one with which the sum crosses ``share`` (Rectified SpaAttn's rule).
        forced: bool, broadcastable to ``weights``: always kept; their weights count first.
        backend: "torch", "triton", or "auto": Triton for CUDA tensors that its kernel can take.

    Returns:
        Bool, of the shape of ``weights``.

    Raises:
        OptionError: if ``share`` is not in [0, 1] or ``at_least`` negative.
        OperatorUnavailableError: if ``backend="triton"`` cannot run here.
    """
    _check_share(share)
    if at_least < 0:
        raise OptionError(f"{at_least=} must not be negative.")
    if _use_triton(backend, weights):
        from dit_accel.kernels.selection_triton import select_prefix

        return select_prefix(
            weights, forced, counts=(at_least,), shares=(share,), crossing=crossing
        ).view(torch.bool)
    ranking = _rank(weights, forced)
    mass = _mass(weights, ranking)
    return ranking.scatter((ranking.rank <= at_least) | mass.within(share, crossing))


def assign_levels(
    weights: Tensor,
    ends: Mapping[int, float],
    *,
    mode: Literal["threshold", "top_k"] = "threshold",
    at_least: int = 1,
    forced: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Give each block the finest level whose end its place in the ranking does not pass (PSA).

    Place is the sum of the weights up to and with the block, as a share of its row ("threshold",
    PSA; without the published code's extra block per level, floor and alignment), or
    its rank as a share of K, rounded down to whole blocks ("top_k").

    Args:
        weights: ``[B, H, Q, K]``, as for `cumulative_mask`.
        ends: end of each level's part of the ranking, from 0 to 1 and not falling as levels get
            coarser, for some or all of levels 1, 2, 4, 8.
        mode: "threshold" or "top_k".
        at_least: how many of each row get the finest of the levels at least, forced ones included:
            with 0, a row where one block outweighs all ends would attend to nothing.
        forced: bool, broadcastable to ``weights``: get the finest level; their weights count first.
        backend: "torch", "triton", or "auto": Triton for CUDA tensors that its kernel can take.

    Returns:
        Int8, of the shape of ``weights``: a level, or 0 for a block that is left out.

    Raises:
        OptionError: for other levels, ends that fall or are not in [0, 1], or another mode.
        OperatorUnavailableError: if ``backend="triton"`` cannot run here.
    """
    _check_ends(ends, mode, at_least)
    levels = sorted(ends)
    columns = weights.shape[-1]
    # The small number keeps 100 * 0.29 = 28.999999999999996 from being 28.
    counts = [int(columns * ends[level] + 1e-6) * (mode == "top_k") for level in levels]
    counts = [max(count, at_least) for count in counts]
    if _use_triton(backend, weights):
        from dit_accel.kernels.selection_triton import select_prefix

        shares = [ends[level] for level in levels] if mode == "threshold" else []
        return select_prefix(weights, forced, counts=counts, shares=shares, levels=levels)
    ranking = _rank(weights, forced)
    mass = _mass(weights, ranking) if mode == "threshold" else None
    chosen = torch.zeros_like(weights, dtype=torch.int8)
    for level, count in zip(reversed(levels), reversed(counts), strict=True):
        within = ranking.rank <= count
        if mass is not None:
            within = within | mass.within(ends[level], crossing=False)
        chosen = chosen.masked_fill(ranking.scatter(within), level)
    return chosen


def _use_triton(backend: Backend, scores: Tensor) -> bool:
    def why_unavailable() -> str | None:
        from dit_accel.kernels import selection_triton

        return selection_triton.why_unavailable(scores)

    return use_triton(backend, scores, why_unavailable)


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise OptionError(f"{share=} must lie between 0 and 1.")


def _check_ends(ends: Mapping[int, float], mode: str, at_least: int) -> None:
    if not ends or not set(ends) <= set(LEVELS):
        raise OptionError(f"ends={dict(ends)} must name levels out of {LEVELS}.")
    for share in ends.values():
        _check_share(share)
    in_order = [ends[level] for level in sorted(ends)]
    if in_order != sorted(in_order):
        raise OptionError(
            f"ends={dict(ends)} must not fall as levels get coarser: each is where a level's part "
            "of the ranking ends and the next begins."
        )
    if mode not in ("threshold", "top_k"):
        raise OptionError(f"{mode=} must be 'threshold' or 'top_k'.")
    if at_least < 0:
        raise OptionError(f"{at_least=} must not be negative.")


def share_units(share: float) -> int:
    """The share in units of ``2 ** -SHARE_BITS``, so rounded that rounding errors pass."""
    return math.ceil(share * 2**SHARE_BITS) + 1


@dataclass(frozen=True, eq=False)
class _Ranking:
    """Rows in ranked order; ``rank`` counts from 1, forced blocks first."""

    order: Tensor
    candidate: Tensor  # may be kept without being forced; in ranked order
    rank: Tensor  # in ranked order
    forced: Tensor

    def scatter(self, kept: Tensor) -> Tensor:
        """Bring ``kept``, in ranked order, back to columns, and add what is forced."""
        columns = torch.empty_like(kept).scatter_(-1, self.order, kept & self.candidate)
        return columns | self.forced


@dataclass(frozen=True, eq=False)
class _Mass:
    """Running sums along the ranking, in whole units."""

    before: Tensor
    with_it: Tensor
    total: Tensor

    def within(self, share: float, crossing: bool) -> Tensor:
        # total * share in two parts, neither of which overflows.
        units = share_units(share)
        low = self.total & (2**SHARE_BITS - 1)
        limit = (self.total >> SHARE_BITS) * units + (low * units >> SHARE_BITS)
        return (self.before if crossing else self.with_it) <= limit


def _candidates(scores: Tensor, forced: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which blocks may be chosen, before any is forced; and what is forced, in full shape."""
    allowed = scores > float("-inf")
    hopeless = ~allowed.any(-1, keepdim=True)
    candidate = allowed | (hopeless & ~scores.isnan())
    if forced is None:
        return candidate, torch.zeros_like(candidate)
    return candidate, forced.expand_as(candidate)


def _rank(scores: Tensor, forced: Tensor | None) -> _Ranking:
    candidate, always = _candidates(scores, forced)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    in_order = (candidate & ~always).gather(-1, order)
    rank = in_order.cumsum(-1) + always.sum(-1, keepdim=True)
    return _Ranking(order, in_order, rank, always)


def _mass(weights: Tensor, ranking: _Ranking) -> _Mass:
    candidate, always = _candidates(weights, None)[0], ranking.forced
    largest_finite = torch.finfo(weights.dtype).max
    weights = weights.masked_fill(~candidate, 0).clamp(0, largest_finite)
    if weights.dtype != torch.float64:
        weights = weights.float()
    peak = weights.amax(-1, keepdim=True)
    # A row without any weight: all the same.
    ratio = torch.where(peak > 0, weights / peak, candidate.to(weights.dtype))
    units = (ratio * 2**WEIGHT_BITS).long()
    forced_units = units.masked_fill(~always, 0).sum(-1, keepdim=True)
    in_order = units.gather(-1, ranking.order) * ranking.candidate
    with_it = in_order.cumsum(-1) + forced_units
    return _Mass(with_it - in_order, with_it, units.sum(-1, keepdim=True))
