"""Attention in a ring: each part's queries meet the parts' keys in turn, merged by their LSE.

A part sends its keys and values to the next part while it attends to them, so that after as many
steps as there are parts every query has met every key. A sparse plan is split by these ranges of
keys: each step has the lists of its own queries and the keys at hand. Text is little: its keys are
gathered once, and a part's text queries attend densely to what comes by. So do the rows that the
quality guard probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.errors import ContextParallelError
from dit_accel.grid import RASTER
from dit_accel.guard.engine import Heads
from dit_accel.kernels.merge import merge_with_lse
from dit_accel.kernels.statistics import block_statistics
from dit_accel.methods.base import AttentionMethod, StaticMethod
from dit_accel.methods.selecting import SelectingMethod
from dit_accel.operators import Operator, SparsePlan
from dit_accel.parallel.dense import dense_with_lse
from dit_accel.parallel.groups import Axis
from dit_accel.parallel.split import QKV, Split, Streams, padded
from dit_accel.parallel.statistics import chunk_statistics, gathered_statistics, gathered_tokens
from dit_accel.plan import (
    EMPTY,
    FULL,
    PARTIAL,
    AttentionPlan,
    BlockSparsePlan,
    DensePlan,
    JointPlan,
    block_mask_from_states,
    dense_block_states,
)

Make = Callable[..., AttentionPlan]
"""``make((query, key, value), statistics)``: the plan for the whole sequence."""
Choose = Callable[[SparsePlan, Tensor], Operator]


@dataclass(frozen=True, eq=False)
class RingCall:
    """One attention call in a ring.

    Attributes:
        split: who holds what.
        call: which call, of which layout; text behind the video.
        method: whose plan it is.
        scale: of the logits.
        choose: picks who runs a part of the plan.
        lists: of the acceleration: parts of static plans, by plan and parts.
    """

    split: Split
    call: AttentionCall
    method: AttentionMethod
    scale: float | None
    choose: Choose
    lists: dict[Any, BlockSparsePlan | None]

    def plan(self, qkv: QKV, text_key: Tensor | None, make: Make) -> AttentionPlan:
        """Return the plan for the whole sequence, from this part's tokens without padding.

        Raises:
            ContextParallelError: if the method is of a kind that can't be split.
        """
        method, layout = self.method, self.call.layout
        if not isinstance(method, SelectingMethod):
            static = isinstance(method, StaticMethod) or method.name == "dense"
            if not static:
                raise ContextParallelError(
                    f"method {method.name!r} plans in a way of its own, which a ring "
                    "can't follow: choose ulysses=... instead of ring=...."
                )
            return make(qkv, None)
        local = block_statistics(
            *qkv,
            query_block=method.block_sizes[0],
            key_block=method.block_sizes[1],
            wanted=method.wanted(layout),
        )
        statistics = gathered_statistics(local, self.split, method.block_sizes)
        query, key, value = qkv
        if method.reads_tokens or text_key is not None:
            query, key = (gathered_tokens(self._even(x), self.split) for x in (query, key))
            if text_key is not None:
                # Of the text nobody reads the queries: they only have to be as many.
                query, key = (torch.cat([x, text_key], 1) for x in (query, key))
        return make((query, key, value), statistics)

    def attend(
        self, plan: AttentionPlan, q: Streams, k: Streams, v: Streams, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Attend with this part's queries, padding included.

        Args:
            plan: for the whole sequence.
            q: this part's streams; ``k`` and ``v`` likewise.
            rows: int64 ``[R]``, image queries that are to attend densely as well.

        Returns:
            The outputs of the image and of the text stream, and dense attention of ``rows``,
            ``[B, R, H, D]``.
        """
        text_key, text_value = self.text(k[1]), self.text(v[1])
        ring, image = self.split.group.ring, _Merged()
        text, probed = _Dense(q[1]), _Dense(None if rows is None else q[0][:, rows])
        if text_key is not None and text_value is not None:
            image.add(*dense_with_lse(q[0], text_key, text_value, self.scale))
            for dense in (text, probed):
                dense.meet(text_key, text_value, self.scale)
        for part, key, value in rotate(ring, k[0], v[0]):
            count = self.split.shares.count(part)
            for dense in (text, probed):
                dense.meet(key[:, :count], value[:, :count], self.scale)
            found = self._meet(plan, part, q[0], key, value)
            if found is not None:
                image.add(*found, last=part == (ring.rank + 1) % ring.size)
        out = image.result(q[0])
        if isinstance(plan, JointPlan):
            out = self._finished(plan, out).to(q[0].dtype)
        return out, text.result(), probed.result()

    def attend_densely(self, q: Streams, k: Streams, v: Streams, heads: Heads) -> Tensor:
        """Return dense attention of some heads of this part's image queries, padding included.

        It is a rotation of its own. All parts call it with the same heads, of `attend`'s streams.
        """
        (query, _), key, value = (
            (image[:, :, heads], None if text is None else text[:, :, heads])
            for image, text in (q, k, v)
        )
        return self.attend(DensePlan(""), (query, None), key, value)[0]

    def text(self, tokens: Tensor | None) -> Tensor | None:
        """Return the text tokens of all parts, without padding."""
        if tokens is None:
            return None
        every = self.split.group.ring.all_gather(tokens).movedim(0, 1).flatten(1, 2)
        return every[:, : self.split.text_length]

    def _meet(
        self, plan: AttentionPlan, part: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Attend to one part's keys; None if the plan lists none of them."""
        count = self.split.shares.count(part)
        if isinstance(plan, DensePlan):
            return dense_with_lse(query, key[:, :count], value[:, :count], self.scale)
        if isinstance(plan, BlockSparsePlan):
            lists = self._part_of(plan, part)
            return None if lists is None else self._run(lists, query, key, value)
        own = self.split.shares.count(self.split.group.ring.rank)
        key, value = key[:, :count], value[:, :count]
        out, lse = self._run(self._joint_part(plan, part, key, value), query[:, :own], key, value)
        missing = query.shape[1] - own
        if not missing:
            return out, lse
        lse = torch.cat([lse, lse.new_zeros(*lse.shape[:2], missing)], -1)
        return padded(out, query.shape[1]), lse

    def _run(
        self, plan: SparsePlan, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, lse = self.choose(plan, query).run(
            query, key, value, plan, scale=self.scale, return_lse=True
        )
        if lse is None:
            raise RuntimeError("an operator gave no LSE")
        return out, lse

    def _part_of(self, plan: BlockSparsePlan, part: int) -> BlockSparsePlan | None:
        where = (plan, self.split.shares, part)
        if where not in self.lists:
            self.lists[where] = part_of_plan(plan, self.split, part)
        return self.lists[where]

    def _joint_part(self, plan: JointPlan, part: int, key: Tensor, value: Tensor) -> JointPlan:
        """Return what a plan says of this part's queries and another's keys."""
        shares, own = self.split.shares, self.split.group.ring.rank
        rows, columns = shares.blocks(own, plan.query_block), shares.blocks(part, plan.key_block)
        pooled = self.method.pooled_levels if isinstance(self.method, SelectingMethod) else ()
        statistics = None
        if pooled or plan.remainder:
            statistics = chunk_statistics(
                plan.statistics, self.split, part, key, value, plan.key_block, pooled
            )
        return JointPlan(
            TokenLayout((1, 1, key.shape[1])),
            RASTER,
            plan.levels[:, :, rows][..., columns],
            plan.query_block,
            plan.key_block,
            statistics,
            plan.remainder,
            plan.first_order,
        )

    def _finished(self, plan: JointPlan, out: Tensor) -> Tensor:
        """Apply what a plan does to the rows of a query block, to merged outputs."""
        shares, own = self.split.shares, self.split.group.ring.rank
        rows = torch.cat(
            [shares.places[own], shares.places[own][-1:].expand(shares.length - shares.count(own))]
        )
        block = rows // plan.query_block
        if plan.row_factor is not None:
            out = out * plan.row_factor[:, :, block].transpose(1, 2).unsqueeze(-1)
        if plan.added is not None:
            out = out + plan.added[:, :, block].transpose(1, 2)
        return out

    def _even(self, tokens: Tensor) -> Tensor:
        """Pad a part's tokens so that all parts have as many."""
        return padded(tokens, self.split.shares.length)


def rotate(ring: Axis, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield ``(part, key, value)`` of all parts, this one's first.

    What comes next is under way while its predecessor is attended to.

    Args:
        ring: the parts.
        key: ``[B, N, H, D]`` of this part; ``value`` likewise.
    """
    import torch.distributed as dist

    held = torch.stack([key, value])
    next_rank, last_rank = (
        dist.get_global_rank(ring.group, (ring.rank + step) % ring.size) for step in (1, -1)
    )
    for step in range(ring.size):
        works: list[Any] = []
        arriving = held
        if step + 1 < ring.size:
            arriving = torch.empty_like(held)
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, held, next_rank, ring.group),
                    dist.P2POp(dist.irecv, arriving, last_rank, ring.group),
                ]
            )
        yield (ring.rank - step) % ring.size, held[0], held[1]
        for work in works:
            work.wait()
        held = arriving


def part_of_plan(plan: BlockSparsePlan, split: Split, part: int) -> BlockSparsePlan | None:
    """Return the lists of this part's queries and another part's keys; None if they are empty.

    They are over as many tokens as a part holds, so that all kernels can read them; the padding
    among the keys is masked.
    """
    size, shares, own = plan.video_mask.BLOCK_SIZE[0], split.shares, split.group.ring.rank
    rows, columns = shares.blocks(own, size), shares.blocks(part, size)
    blocks, count = -(-shares.length // size), shares.count(part)
    listed = dense_block_states(plan.video_mask)[..., rows, :][..., columns]
    states = listed.new_full((*listed.shape[:2], blocks, blocks), EMPTY)
    states[..., : len(rows), : len(columns)] = listed
    if count % size:
        last = states[..., len(columns) - 1]
        states[..., len(columns) - 1] = torch.where(last == FULL, PARTIAL, last)
    if not bool((states != EMPTY).any()):
        return None
    allowed = plan.video_mask.mask_mod
    queries, keys = (_filled(shares.places[which], blocks * size) for which in (own, part))

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return allowed(b, h, queries[q], keys[k]) & (k < count)

    mask = block_mask_from_states(states, size, shares.length, mask_mod)
    return BlockSparsePlan(TokenLayout((1, 1, shares.length)), RASTER, mask)


def _filled(places: Tensor, length: int) -> Tensor:
    return torch.cat([places, places[-1:].expand(length - len(places))]).int()


@dataclass(eq=False)
class _Merged:
    """Attention over some sets of keys, put together as they come."""

    output: Tensor | None = None  # [B, N, H, D]
    lse: Tensor | None = None  # [B, H, N]

    def add(self, output: Tensor, lse: Tensor, last: bool = False) -> None:
        """Merge attention over further keys; the ``last`` of them in its own dtype."""
        if self.output is None or self.lse is None:
            self.output, self.lse = output, lse
            return
        dtype = output.dtype if last else torch.promote_types(output.dtype, torch.float32)
        self.output, self.lse = merge_with_lse(self.output, self.lse, output, lse, dtype)

    def result(self, like: Tensor) -> Tensor:
        """Return what was attended, 0 where there was nothing, in the dtype of the queries."""
        return torch.zeros_like(like) if self.output is None else self.output.to(like.dtype)


class _Dense:
    """Dense attention of some queries, if there are any, to keys that come one set by one."""

    def __init__(self, query: Tensor | None) -> None:
        self.query, self.merged = query, _Merged()

    def meet(self, key: Tensor, value: Tensor, scale: float | None) -> None:
        """Attend to further keys, ``[B, N, H, D]``."""
        if self.query is not None:
            self.merged.add(*dense_with_lse(self.query, key, value, scale))

    def result(self) -> Tensor | None:
        """Return what was attended, in the dtype of the queries; None without queries."""
        return None if self.query is None else self.merged.result(self.query)
