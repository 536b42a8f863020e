"""Context parallelism of one acceleration: deals tokens out for a forward, attends over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from dit_accel.call import AttentionCall
from dit_accel.errors import ContextParallelError
from dit_accel.grid import TokenOrder
from dit_accel.guard.engine import Guard
from dit_accel.kernels.statistics import BlockStatistics
from dit_accel.kernels.tiles import tile_lengths
from dit_accel.methods.base import AttentionMethod, StaticMethod
from dit_accel.methods.selecting import SelectingMethod
from dit_accel.operators import Operator, SparsePlan, choose_operator
from dit_accel.parallel.groups import SequenceGroup
from dit_accel.parallel.guarded import guarded
from dit_accel.parallel.ring import RingCall
from dit_accel.parallel.shares import Shares, deal, imbalance
from dit_accel.parallel.split import QKV, Split, Streams
from dit_accel.pipelines.base import ForwardInputs, PipelineFamily, TokenShuffle
from dit_accel.plan import (
    EMPTY,
    AttentionPlan,
    BlockSparsePlan,
    DensePlan,
    JointPlan,
    dense_block_states,
)
from dit_accel.planning import Planner
from dit_accel.report import Recorder
from dit_accel.running import RunningForward

UNIT = 128
"""Tokens that stay together on a ring where no method says how many."""


class ContextParallel:
    """What one acceleration knows of ranks that share its sequences.

    Args:
        planner: asks methods for plans.
        recorder: for notes.
        backend: "auto", or the operator that must run.
        operators: by name.
        record: ``record(call, plan, operator, dtype, reason)``.
    """

    def __init__(
        self,
        planner: Planner,
        recorder: Recorder,
        backend: str,
        operators: Mapping[str, Operator],
        record: Callable[..., None],
    ) -> None:
        self.planner, self.recorder = planner, recorder
        self.backend, self.operators, self.record = backend, operators, record
        self._shares: dict[Any, Shares] = {}
        self._lists: dict[Any, BlockSparsePlan | None] = {}

    def enter(
        self,
        parallel_config: Any,
        family: PipelineFamily,
        inputs: ForwardInputs,
        method: AttentionMethod,
        wanted: TokenOrder,
        shuffle: TokenShuffle,
    ) -> tuple[Split, dict[str, Any]]:
        """Deal the tokens of a forward out; return where they are, and the arguments to run with.

        Args:
            parallel_config: of the transformer.
            family: whose pipeline it is.
            inputs: of the forward.
            method: that attends.
            wanted: the method's order of the video tokens.
            shuffle: is told which tokens are where.

        Raises:
            ContextParallelError: if these inputs can't be spread over ranks.
        """
        group = SequenceGroup.of(parallel_config)
        _check(inputs, group)
        device = inputs.kwargs["hidden_states"].device
        grid = inputs.layouts[0].grid
        key = (grid, method, wanted, inputs.tail_first, group.ring.size, group.ulysses.size, device)
        if key not in self._shares:
            unit, work = _unit(method), None
            if group.ring.size > 1 and isinstance(method, StaticMethod):
                layout = replace(inputs.layouts[0], text_first=False)
                work = _work(self.planner.static_plan(method, layout, wanted, device), unit)
            shares = deal(
                wanted.permutation(grid, device),
                ring=group.ring.size,
                ulysses=group.ulysses.size,
                unit=unit if group.ring.size > 1 else 1,
                work=work,
                tail=inputs.tail_first,
            )
            if work is not None:
                self.recorder.note(
                    f"each of {group.ring.size} ring parts attends to as many pairs, to within "
                    f"{100 * imbalance(work, shares, unit):.1f} %"
                )
            self._shares[key] = shares
        shares = self._shares[key]
        shuffle.gather, shuffle.scatter = shares.gather, shares.scatter
        shuffle.rank, shuffle.ranks = group.rank, group.ranks
        text = max(layout.text_length for layout in inputs.layouts) - inputs.tail_first
        split = Split(group, shares, text, inputs.layouts[0].text_first, inputs.tail_first)
        kwargs = inputs.kwargs
        if split.text_padding:
            kwargs = family.pad_text(kwargs, split.text_padding)
        return split, kwargs

    def ring(
        self,
        split: Split,
        query: Streams,
        key: Streams,
        value: Streams,
        call: AttentionCall,
        running: RunningForward,
        reason: str | None,
        scale: float | None,
        guard: Guard | None,
    ) -> Streams:
        """Attend in a ring, and record it.

        Args:
            split: who holds what.
            query: this part's streams; ``key`` and ``value`` likewise.
            call: which call, of the layout of this layer.
            running: the forward that it is part of.
            reason: why it is dense; None if it isn't.
            scale: of the logits.
            guard: that watches sparse calls, if one does.
        """
        call = replace(call, layout=replace(call.layout, text_first=False))
        method, chosen = self.planner.method_of(call, running), list[Operator]()
        if reason is None:
            scale = method.scaled(scale, query[0].shape[-1])
        ring = RingCall(split, call, method, scale, partial(self._choose, chosen), self._lists)
        plan: AttentionPlan = DensePlan(reason or "")
        if reason is None:
            own = split.shares.count(split.group.ring.rank)
            q, k, v = (stream[0][:, :own] for stream in (query, key, value))
            text = ring.text(key[1]) if isinstance(method, SelectingMethod) else None

            def make(qkv: QKV, known: BlockStatistics | None) -> AttentionPlan:
                return self.planner.plan(*qkv, call, running, known)

            plan = ring.plan((q, k, v), text, make)
        share = 0.0
        if guard is None or isinstance(plan, DensePlan):
            image, out_text, _ = ring.attend(plan, query, key, value)
        else:
            (image, out_text), share = guarded(guard, ring, plan, query, key, value, running.sample)
        name = chosen[0].name if chosen else "dense"
        self.record(call, plan, name, query[0], reason or getattr(plan, "reason", ""))
        self.recorder.repaired(share)
        return image, out_text

    def _choose(self, chosen: list[Operator], plan: SparsePlan, query: Tensor) -> Operator:
        choice = choose_operator(self.backend, self.operators, plan, query)
        self.recorder.rejected.update(choice.rejected)
        chosen.append(choice.operator)
        return choice.operator


def _check(inputs: ForwardInputs, group: SequenceGroup) -> None:
    if not inputs.mask_explained:
        raise ContextParallelError(
            "the text mask has holes, which context parallelism can't follow: give prompts whose "
            "padding comes last."
        )
    if inputs.keep_order is not None:
        raise ContextParallelError(
            f"this model can't be spread over ranks: {inputs.keep_order}. Use CFG parallelism "
            "(cfg=2), or generate on every rank by itself."
        )
    if group.ring.size == 1:
        return
    if len(inputs.layouts) > 1:
        raise ContextParallelError(
            "samples with texts of different lengths can't share a ring: choose ulysses=..., or "
            "generate them one by one."
        )
    if inputs.tail_first:
        raise ContextParallelError(
            "a reference image can't be dealt out to a ring: choose ulysses=... instead."
        )


def _unit(method: AttentionMethod) -> int:
    """Tokens that must stay together: the larger of a method's blocks."""
    if isinstance(method, StaticMethod):
        return method.block_size
    return max(method.block_sizes) if isinstance(method, SelectingMethod) else UNIT


def _work(plan: AttentionPlan, unit: int) -> Tensor | None:
    """Return how many pairs each query block of a static plan visits; None if all do as many."""
    if isinstance(plan, BlockSparsePlan):
        visited = (dense_block_states(plan.video_mask)[0, 0] != EMPTY).double()
    elif isinstance(plan, JointPlan):
        visited = (plan.levels[0, 0] != 0).double()
    else:
        return None
    lengths = tile_lengths(plan.layout.video_length, unit, visited.device).double()
    return (visited @ lengths) * lengths
