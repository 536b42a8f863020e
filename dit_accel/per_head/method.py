"""Any attention method with a density of its own for every layer and head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.errors import DensityUnreachableError, OptionError
from dit_accel.grid import Grid, TokenOrder
from dit_accel.methods.base import AttentionMethod, StaticMethod
from dit_accel.methods.selecting import SelectingMethod
from dit_accel.plan import (
    EMPTY,
    FULL,
    AttentionPlan,
    BlockSparsePlan,
    DensePlan,
    JointPlan,
    block_mask_from_states,
)

Base = TypeVar("Base", bound=AttentionMethod)


@dataclass(frozen=True)
class PerHead(AttentionMethod):
    """An attention method whose density depends on layer and head.

    The plan is one for all heads: a static method's block lists differ from head to head, and a
    selecting method chooses by itself for the heads of each density. All blocks have one order.
    Where ranks share a layer's heads, each plans its own; whether the layer is dense they decide
    alike, from all of its heads.

    Attributes:
        base: the method, as it was before it had a density.
        density: the mean over all heads, at which a method sets what its heads have in common.
        densities: of every layer's heads, in (0, 1]; not exceeded, whatever text a call has.
        order: of the tokens, for the heads of a static method together; None for the one that the
            method has without a density. A window of another size needs another order: one of GNA's
            of 9 x 3 x 3 tokens computes 1.6 times the pairs in that of its default.
    """

    name: ClassVar[str] = "per_head"

    base: AttentionMethod
    density: float
    densities: tuple[tuple[float, ...], ...]
    order: TokenOrder | None = None

    def __post_init__(self) -> None:
        """Take the method's name, and check that it can be told apart by head."""
        object.__setattr__(self, "name", f"{self.base.name}, per head")
        object.__setattr__(self, "densities", tuple(map(tuple, self.densities)))
        check_base(self.base)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the plans behind where ranks send reports: their masks can't be pickled."""
        return PerHead, (self.base, self.density, self.densities, self.order)

    @property
    def pools(self) -> bool:
        """As the method's own."""
        return self.base.pools

    @property
    def softmax_gain(self) -> float:
        """As the method's own."""
        return self.base.softmax_gain

    def token_order(self, grid: Grid) -> TokenOrder:
        """Return the order set, or the method's own; see `AttentionMethod.token_order`."""
        return self.base.token_order(grid) if self.order is None else self.order

    def plan(
        self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, order: TokenOrder
    ) -> AttentionPlan:
        """Plan the call's layer; see `AttentionMethod.plan`.

        Raises:
            OptionError: if the densities are for other layers or heads than the model has.
        """
        count = query.shape[2]
        heads = count * call.head_ranks
        if call.num_layers != len(self.densities) or heads != len(self.densities[call.layer]):
            raise OptionError(
                f"densities per head are for {len(self.densities)} layers of "
                f"{len(self.densities[0])} heads, but here are {call.num_layers} layers of "
                f"{heads}: measure them on this model."
            )
        layer = self.densities[call.layer]
        own = slice(call.first_head, call.first_head + count)
        if isinstance(self.base, SelectingMethod):
            at_mean = self._at(self.density, call.layout)
            return self._selected(at_mean, layer, own, call.layout, (query, key, value), order)
        where = layer, layer[own], call.layout, order, query.device
        if where not in self._plans:
            self._plans[where] = self._listed(layer, own, call.layout, order, query.device)
        return self._plans[where]

    @cached_property
    def _plans(self) -> dict[Any, AttentionPlan]:
        """Of a static method; equal layers share one. They live as long as the acceleration."""
        return {}

    def _listed(
        self,
        layer: tuple[float, ...],
        own: slice,
        layout: TokenLayout,
        order: TokenOrder,
        device: torch.device,
    ) -> AttentionPlan:
        whole = [method.tile_states(layout, order, device)
                 for _, _, method in self._levels(layer, layout)]  # fmt: skip
        if all(bool((states == FULL).all()) for states in whole):
            return DensePlan(f"{self.name} keeps every pair on grid {layout.grid}", order)
        row = layer[own]
        levels = [method for _, _, method in self._levels(row, layout)]
        states = torch.empty(0)
        for i, (_, heads, method) in enumerate(self._levels(row, layout)):
            mine = method.tile_states(layout, order, device)
            if i == 0:
                states = mine.new_empty((1, len(row), *mine.shape))
            states[:, heads] = mine
        size = levels[0].block_size
        if levels[0].remainder == "pooled":
            kept = (states != EMPTY).to(torch.int8)
            return JointPlan(layout, order, kept, size, size, remainder=True)
        level_of = torch.empty(len(row), dtype=torch.long, device=device)
        for i, (_, heads, _) in enumerate(self._levels(row, layout)):
            level_of[heads] = i
        allowed = [method.allowed(layout, device) for method in levels]
        raster = order.permutation(layout.grid, device).int()

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            level, query, key = level_of[h], raster[q], raster[k]
            seen = (level == 0) & allowed[0](query, key)
            for i, rule in enumerate(allowed[1:], 1):
                seen = seen | ((level == i) & rule(query, key))
            return seen

        mask = block_mask_from_states(states, size, layout.video_length, mask_mod)
        return BlockSparsePlan(layout, order, mask)

    def _levels(
        self, row: tuple[float, ...], layout: TokenLayout
    ) -> Iterator[tuple[float, list[int], Any]]:
        """Yield each density of a layer, its heads, and the method at that density."""
        for density in sorted(set(row)):
            heads = [head for head, own in enumerate(row) if own == density]
            yield density, heads, self._at(density, layout)

    def _at(self, density: float, layout: TokenLayout) -> Any:
        if (density, layout) not in self._methods:
            self._methods[density, layout] = at_level(self.base, density, layout, self.order)
        return self._methods[density, layout]

    @cached_property
    def _methods(self) -> dict[Any, AttentionMethod]:
        """By density and layout: GNA searches its windows for a second."""
        return {}

    def _selected(
        self,
        base: SelectingMethod,
        layer: tuple[float, ...],
        own: slice,
        layout: TokenLayout,
        qkv: tuple[Tensor, Tensor, Tensor],
        order: TokenOrder,
    ) -> AttentionPlan:
        reason = base.dense_reason(layout)
        if reason is not None or min(layer) == 1:
            return DensePlan(reason or "every head of the layer is dense", order)
        row = layer[own]
        statistics = base.statistics(*qkv, layout)
        selection: Tensor | None = None
        for _, heads, method in self._levels(row, layout):
            index = torch.tensor(heads, device=qkv[0].device)
            query, key = (x.index_select(2, index) for x in qkv[:2])
            mine = method.choose(query, key, statistics.of_heads(index), layout, order)
            if selection is None:
                selection = mine.new_empty((len(query), len(row), *mine.shape[-2:]))
            selection[:, index] = mine
        if selection is None:
            raise RuntimeError("a layer without heads")
        plan = base.joint_plan(qkv[1], selection, statistics, layout, order)
        return replace(plan, choosing_pairs=base.choosing_pairs(layout))


def at_level(
    base: Base, density: float, layout: TokenLayout, order: TokenOrder | None = None
) -> Base:
    """Return a method at a density, or at the least that it reaches on ``layout`` in ``order``.

    A model's layers may see different tokens: one density is for all of them.
    """
    try:
        return base.at_density(density, layout, order)
    except DensityUnreachableError as error:
        return base.at_density(error.least, layout, order)


def check_base(base: AttentionMethod) -> None:
    """Raise `OptionError` unless a method's density can be told apart by head."""
    if not isinstance(base, StaticMethod | SelectingMethod) or base.name == "dense":
        raise OptionError(f"method {base.name!r} has no density that per_head could share out.")
    if isinstance(base, SelectingMethod) and base.refresh_every > 1:
        raise OptionError("per_head plans every call anew: leave refresh_every at 1.")
