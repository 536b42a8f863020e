"""What each head loses at each density, measured on the queries and keys of dense generations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel.acceleration import accelerate_pipeline, restore_pipeline
from dit_accel.calibration import PipelineCall, run_latents
from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.compat import dense_attention
from dit_accel.errors import DensityUnreachableError, OptionError
from dit_accel.grid import Grid, TokenOrder
from dit_accel.methods.base import AttentionMethod, StaticMethod
from dit_accel.operators import Operator, choose_operator, make_operators
from dit_accel.parallel.pipeline import is_spread
from dit_accel.per_head.method import at_level
from dit_accel.plan import AttentionPlan, DensePlan

LEVELS = (0.05, 0.06, 0.07, 0.085, 0.1, 0.12, 0.15, 0.18, 0.21, 0.25, 0.3, 0.35, 0.42, 0.5, 0.6,
          0.7, 0.85, 1.0)  # fmt: skip
"""Densities that heads may get, as far as the method reaches them.

A head can't be between two levels. With steps of a factor 1.5, a mean halfway between two costs
.2 dB where errors fall as 1 / density: about what sharing out gains for the evenest methods.
"""
_ASKED = (*(round(0.05 * 1.1**i, 3) for i in range(32)), 1.0)
"""Densities asked of static methods, which have few patterns on a small grid, but need all."""
_AT = (0.3, 0.6, 0.9)
"""Where in a generation heads are looked at, as shares of its steps."""


@dataclass(frozen=True)
class HeadCurves:
    """Costs and errors by layer, head and level.

    Attributes:
        layout: of the first call.
        text_lengths: of each layer's first call: some layers may see the video alone.
        levels: densities asked for.
        cost: ``[layers, levels]``, the share of pairs computed, tokens in the level's own order.
        error: ``[layers, heads, levels]``, |out - dense|^2 of the head over the |dense|^2 of all
            its layer's heads, mean over the calls.
    """

    layout: TokenLayout
    text_lengths: tuple[int, ...]
    levels: tuple[float, ...]
    cost: tuple[tuple[float, ...], ...]
    error: tuple[tuple[tuple[float, ...], ...], ...]

    def to_row(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        layout = self.layout
        return {
            "grid": list(layout.grid),
            "text_length": layout.text_length,
            "text_first": layout.text_first,
            "text_lengths": list(self.text_lengths),
            "levels": list(self.levels),
            "cost": self.cost,
            "error": self.error,
        }

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> HeadCurves:
        """Undo `to_row`."""
        t, h, w = row["grid"]
        return cls(
            TokenLayout((t, h, w), row["text_length"], row["text_first"]),
            tuple(row["text_lengths"]),
            tuple(row["levels"]),
            tuple(map(tuple, row["cost"])),
            tuple(tuple(map(tuple, layer)) for layer in row["error"]),
        )


def measure_curves(pipe: Any, method: AttentionMethod, calls: Sequence[PipelineCall]) -> HeadCurves:
    """Generate densely, and in three steps of each generation attend by every level beside it.

    Args:
        pipe: a pipeline, not accelerated.
        method: whose densities are tried.
        calls: keyword arguments of ``pipe(...)``; see `dit_accel.calibration`.

    Raises:
        OptionError: if attention of one size can't be seen, or only a part of it on each rank.
    """
    if is_spread(pipe):
        raise OptionError(
            "per_head measures whole calls, of which each rank has a part: measure on one GPU, "
            "before parallelize_pipeline, or give the file of what was measured there."
        )
    meter = _Meter(method)
    try:
        accelerate_pipeline(pipe, meter, dense_steps=0, dense_layers=0, min_tokens=0)
        for call in calls:
            run_latents(pipe, call)
    finally:
        restore_pipeline(pipe)
    return meter.seen.curves()


@dataclass
class _Seen:
    """Sums over the calls so far."""

    layout: TokenLayout | None = None
    levels: tuple[float, ...] = ()
    num_layers: int = 0
    text_lengths: dict[int, int] = field(default_factory=dict)
    cost: dict[int, list[float]] = field(default_factory=dict)
    error: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)
    methods: dict[Any, AttentionMethod] = field(default_factory=dict)
    plans: dict[Any, AttentionPlan] = field(default_factory=dict)
    operators: Mapping[str, Operator] = field(default_factory=make_operators)

    def curves(self) -> HeadCurves:
        if self.layout is None or len(self.error) != self.num_layers:
            raise OptionError(
                "per_head saw no self-attention to measure: probe with at least four steps."
            )
        layers = range(self.num_layers)
        errors = [(self.error[layer] / self.calls[layer]).tolist() for layer in layers]
        return HeadCurves(
            self.layout,
            tuple(self.text_lengths[layer] for layer in layers),
            self.levels,
            tuple(tuple(self.cost[layer]) for layer in layers),
            tuple(tuple(map(tuple, of_layer)) for of_layer in errors),
        )


@dataclass(frozen=True)
class _Meter(AttentionMethod):
    """Attends densely, and measures what a method would have given."""

    name: ClassVar[str] = "per_head meter"

    base: AttentionMethod
    seen: _Seen = field(default_factory=_Seen, compare=False)

    def token_order(self, grid: Grid) -> TokenOrder:
        """Return the method's own; see `AttentionMethod.token_order`."""
        return self.base.token_order(grid)

    def plan(
        self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, order: TokenOrder
    ) -> AttentionPlan:
        """Measure in some of the calls; see `AttentionMethod.plan`."""
        if _looked_at(call):
            self._measure(call, (query, key, value), order)
        return DensePlan("measured for per_head", order)

    def _measure(
        self, call: AttentionCall, qkv: tuple[Tensor, Tensor, Tensor], order: TokenOrder
    ) -> None:
        seen = self.seen
        if seen.layout is None:
            seen.layout, seen.num_layers = call.layout, call.num_layers
            seen.levels = tuple(_reached(self.base, call.layout))
        if call.layout.grid != seen.layout.grid:
            raise OptionError("per_head: give probes of one size.")
        dense = dense_attention(*qkv, mask=None, scale=None, backend=None)
        size = dense.double().square().sum()
        costs, errors = [], []
        for level in seen.levels:
            where = level, call.layout
            if where not in seen.methods:
                seen.methods[where] = at_level(self.base, level, call.layout)
            method = seen.methods[where]
            mine = method.token_order(call.layout.grid)
            index = _reordering(call.layout, order, mine, dense.device)
            tokens = qkv[0][:, index], qkv[1][:, index], qkv[2][:, index]
            plan = self._plan(level, method, call, tokens, mine)
            if isinstance(plan, DensePlan):
                costs.append(1.0)
                errors.append(torch.zeros(dense.shape[2], dtype=torch.float64))
                continue
            operator = choose_operator("auto", seen.operators, plan, tokens[0]).operator
            out, _ = operator.run(*tokens, plan, method.scaled(None, dense.shape[-1]), False)
            costs.append(plan.block_density)
            lost = (out - dense[:, index]).double().square().sum((0, 1, 3)) / size
            errors.append(lost.cpu())
        layer = call.layer
        seen.text_lengths.setdefault(layer, call.layout.text_length)
        seen.cost[layer] = costs
        seen.error[layer] = seen.error.get(layer, 0) + torch.stack(errors, -1)
        seen.calls[layer] = seen.calls.get(layer, 0) + 1

    def _plan(
        self,
        level: float,
        method: AttentionMethod,
        call: AttentionCall,
        qkv: tuple[Tensor, Tensor, Tensor],
        order: TokenOrder,
    ) -> AttentionPlan:
        if level == 1:
            return DensePlan("all pairs", order)
        if not isinstance(method, StaticMethod):
            return method.plan(call, *qkv, order)
        where = level, call.layout, order, qkv[0].device
        if where not in self.seen.plans:
            self.seen.plans[where] = method.plan(call, *qkv, order)
        return self.seen.plans[where]


def _looked_at(call: AttentionCall) -> bool:
    """Whether to measure this call: three steps of a generation, one branch of two."""
    if call.branch == "uncond" or call.step is None or call.num_steps is None:
        return False
    return call.step in {int(share * call.num_steps) for share in _AT}


def _reordering(
    layout: TokenLayout, given: TokenOrder, wanted: TokenOrder, device: torch.device
) -> Tensor:
    """Return the index that takes tokens, text last, from one order of the video to another."""
    index = torch.arange(layout.num_tokens, device=device)
    place = given.permutation(layout.grid, device).argsort()
    index[: layout.video_length] = place[wanted.permutation(layout.grid, device)]
    return index


def _reached(method: AttentionMethod, layout: TokenLayout) -> list[float]:
    """Return the levels that a method reaches, and its least density among them."""
    least: list[float] = []
    try:
        method.at_density(LEVELS[0], layout)
    except DensityUnreachableError as error:
        least = [error.least]
    if not isinstance(method, StaticMethod):
        return least + [level for level in LEVELS if level > max(least, default=0)]
    patterns: dict[AttentionMethod, float] = {}
    for level in least + [asked for asked in _ASKED if asked > max(least, default=0)]:
        patterns.setdefault(at_level(method, level, layout), level)
    return list(patterns.values())
