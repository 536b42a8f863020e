"""Asks methods for plans, and keeps those that serve more than one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.grid import TokenOrder
from dit_accel.kernels.statistics import BlockStatistics
from dit_accel.methods.base import AttentionMethod, StaticMethod
from dit_accel.methods.selecting import SelectingMethod
from dit_accel.plan import AttentionPlan, DensePlan
from dit_accel.running import RunningForward


class Planner:
    """The plans of one acceleration.

    Args:
        method: of the acceleration; None if attention stays as it is.
        density: asked for; None for the method's own options.
        min_tokens: shorter videos are dense anyway, however few blocks a density leaves them.
    """

    def __init__(
        self, method: AttentionMethod | None, density: float | None, min_tokens: int
    ) -> None:
        self.method, self.density, self.min_tokens = method, density, min_tokens
        self._methods: dict[tuple[TokenLayout, TokenOrder | None], AttentionMethod] = {}
        self._plans: dict[Any, AttentionPlan] = {}
        self._selections: dict[Any, tuple[int, Tensor]] = {}  # of the running generation, by step

    def begin(self) -> None:
        """Forget what belongs to one generation: a new one is about to run."""
        self._selections.clear()

    def method_for(self, layout: TokenLayout, order: TokenOrder | None = None) -> AttentionMethod:
        """Return the method with its options set for the requested density on ``layout``.

        Args:
            layout: of the calls.
            order: that other layers have chosen; None for the method's own on ``layout``.
        """
        if (layout, order) not in self._methods:
            method, density = self.method, self.density
            if method is None:
                raise RuntimeError("asked for an attention method where none is attached")
            short = layout.video_length < self.min_tokens
            if density is not None and density < 1 and not short:
                method = method.at_density(density, layout, order)
            self._methods[layout, order] = method
        return self._methods[layout, order]

    def method_of(self, call: AttentionCall, running: RunningForward) -> AttentionMethod:
        """Return the method with its options set for one call of a forward.

        Some layers see the video alone, and samples have texts of different lengths: the share of
        the density that text takes in one call is the video's in another.
        """
        first, own = running.layouts[0], call.layout
        alike = (first.grid, first.text_length) == (own.grid, own.text_length)
        if alike or running.resolution is not None:
            return running.method
        return self.method_for(own, running.wanted)

    def plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: AttentionCall,
        running: RunningForward,
        known: BlockStatistics | None = None,
    ) -> AttentionPlan:
        """Return what a call attends to.

        Args:
            query: ``[B, N, H, D]`` in the order that the method wants; likewise the others.
            key: of the call.
            value: of the call.
            call: which call.
            running: the forward that it is part of.
            known: the tokens' statistics, if they have been made already.
        """
        method, order = self.method_of(call, running), running.wanted
        if self.density == 1 and running.resolution is None:
            return DensePlan("density=1", order)
        if isinstance(method, StaticMethod):
            return self.static_plan(method, call.layout, order, query.device)
        if not isinstance(method, SelectingMethod):
            return method.plan(call, query, key, value, order)
        if method.refresh_every == 1:
            return method.plan_by(None, call, query, key, value, order, known)[0]
        # By the choice that this layer and branch made a few steps ago, while that serves.
        transformer, sample = running.transformer, running.sample
        where = (transformer, sample, call.layer, call.branch, call.layout, order, len(query))
        made, selection = self._selections.get(where, (None, None))
        step = call.step
        if step is None or made is None or not made <= step < made + method.refresh_every:
            selection, made = None, step
        plan, selection = method.plan_by(selection, call, query, key, value, order, known)
        if made is not None and selection is not None:
            self._selections[where] = made, selection
        return plan

    def static_plan(
        self, method: StaticMethod, layout: TokenLayout, order: TokenOrder, device: torch.device
    ) -> AttentionPlan:
        """Return the plan of all calls with this layout."""
        where = (method, layout, order, device)
        if where not in self._plans:
            self._plans[where] = method.plan_layout(layout, order, device)
        return self._plans[where]
