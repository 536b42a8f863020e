"""Remainder reuse: what a sparse pattern leaves out is computed now and then, and kept between.

The idea of FlashBlock, for sparse attention: attention outside a plan's exact blocks changes slowly
from step to step. At a refresh it is computed, with its log-sum-exp (LSE); in the steps between,
the kept part is merged with the fresh exact part as two parts of one softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_accel import compat
from dit_accel.caching.base import (
    Cache,
    check_count,
    check_threshold,
    few_steps,
    note_idle,
)
from dit_accel.call import AttentionCall
from dit_accel.errors import OptionError
from dit_accel.kernels.merge import merge
from dit_accel.plan import (
    EMPTY,
    FULL,
    PARTIAL,
    AttentionPlan,
    BlockSparsePlan,
    block_mask_from_states,
    dense_block_states,
)
from dit_accel.report import StepRecord
from dit_accel.session import AttentionSession, Forward, Seam, Session

RunPlan = Callable[..., tuple[Tensor, Tensor | None]]
"""``run(query, key, value, plan)``: output ``[B, N, H, D]`` and LSE ``[B, H, N]``."""


@dataclass(frozen=True)
class RemainderCache(Cache):
    """Add to a static sparse method what it leaves out, from the last step that computed it.

    Goes with radial, gna and sliding_window. A refresh costs as much as dense attention, a step
    between as much as the sparse method. Every layer and branch holds an attention output.

    Args:
        refresh_every: the remainder is computed in one sparse step of so many.
        budget_gib: most memory to take; more is refused before it is taken.
        offload: keep the remainders in CPU memory, at the price of moving them.
        min_steps: in generations of fewer steps the sparse method runs by itself.
    """

    name: ClassVar[str] = "remainder_cache"
    paper: ClassVar[str] = "after FlashBlock: outside attention reused across steps"
    strength: ClassVar[str] = "refresh_every"
    strengths: ClassVar[tuple[float, ...]] = (2, 3, 5)
    skips_blocks: ClassVar[bool] = False

    refresh_every: int = 3
    budget_gib: float = 8.0
    offload: bool = False
    min_steps: int = field(default=8, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options."""
        check_count("refresh_every", self.refresh_every, 1)
        check_threshold("budget_gib", self.budget_gib)
        check_count("min_steps", self.min_steps, 0)

    def session(self, pipe: Any, seam: Seam) -> Session:
        """See `SessionMethod.session`."""
        return RemainderSession(self, seam)


@dataclass
class _Kept:
    step: int
    output: Tensor  # [B, V, H, D], of the video queries
    lse: Tensor  # [B, H, V]


class RemainderSession(AttentionSession):
    """Keeps remainders by transformer, branch, sample and layer."""

    def __init__(self, cache: RemainderCache, seam: Seam) -> None:
        self.cache, self.seam = cache, seam
        self._kept: dict[Any, _Kept] = {}
        self._complements: dict[BlockSparsePlan, BlockSparsePlan | None] = {}
        self._forward: Forward | None = None
        self._reused = self._computed = 0

    def attach(self, transformer: nn.Module) -> None:
        """See `Session.attach`."""
        compat.refuse_other_caches(transformer)

    def begin(self) -> None:
        """See `Session.begin`."""
        self._kept.clear()

    @property
    def bytes_held(self) -> int:
        """Bytes of all remainders."""
        return sum(kept.output.nbytes + kept.lse.nbytes for kept in self._kept.values())

    def enter(self, forward: Forward) -> None:
        """See `Session.enter`."""
        self._forward, self._reused, self._computed = forward, 0, 0

    def leave(self, output: Any) -> None:
        """See `Session.leave`."""
        forward, self._forward = self._forward, None
        if forward is None or output is None:
            return
        moment, recorder = forward.moment, self.seam.recorder
        recorder.cache_bytes = max(recorder.cache_bytes, self.bytes_held)
        if moment.step is None or moment.step + 1 == moment.num_steps:
            self._kept = {k: kept for k, kept in self._kept.items() if k[1] != moment.branch}
        why = "" if self._reused else "remainder computed" if self._computed else "dense attention"
        ran = (True,) * len(self.seam.family.blocks(forward.transformer))
        recorder.steps.append(
            StepRecord(moment.step, moment.branch, ran, why, attention_reused=self._reused)
        )

    def attend(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        call: AttentionCall,
        sample: int,
        plan: AttentionPlan,
        run: RunPlan,
    ) -> Tensor:
        """See `AttentionSession.attend`."""
        if not isinstance(plan, BlockSparsePlan):
            raise OptionError(
                "remainder_cache needs a method that lists blocks by the token grid and leaves "
                "the rest out: radial, gna or sliding_window with remainder='none'."
            )
        if (call.num_steps or 0) < self.cache.min_steps:
            short = call.num_steps is not None
            why = few_steps(self.cache.min_steps) if short else "no known step"
            note_idle(self.seam, self.cache, why)
            return run(*qkv, plan)[0]
        if plan not in self._complements:
            self._complements[plan] = complement(plan)
        outside = self._complements[plan]
        output, lse = run(*qkv, plan)
        if outside is None or lse is None:
            return output
        layout = plan.layout
        start = layout.text_length if layout.text_first else 0
        video = slice(start, start + layout.video_length)
        kept = self._remainder(qkv, video, call, sample, outside, run)
        merged = merge(output[:, video], lse[:, :, video], kept.output, kept.lse)
        if layout.text_length == 0:
            return merged
        output = output.clone()
        output[:, video] = merged
        return output

    def _remainder(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        video: slice,
        call: AttentionCall,
        sample: int,
        outside: BlockSparsePlan,
        run: RunPlan,
    ) -> _Kept:
        """Return the kept remainder of this layer, or compute it."""
        forward, step = self._forward, call.step
        query, key, value = (x[:, video] for x in qkv)
        where = (*forward.key, sample, call.layer) if forward is not None else None
        kept = self._kept.get(where)
        if kept is not None and self._serves(kept, step, query):
            self._reused += 1
            return _Kept(kept.step, kept.output.to(query.device), kept.lse.to(query.device))
        self._computed += 1
        output, lse = run(query, key, value, outside)
        if lse is None:
            raise RuntimeError("an operator gave no LSE")
        fresh = _Kept(step or 0, output, lse)
        if step is not None and step + 1 != call.num_steps and self.cache.refresh_every > 1:
            self._check_budget(fresh, call)
            self._kept[where] = fresh
            if self.cache.offload:
                self._kept[where] = _Kept(step, output.to("cpu"), lse.to("cpu"))
        return fresh

    def _serves(self, kept: _Kept, step: int | None, query: Tensor) -> bool:
        """Whether a remainder is recent enough and belongs to tokens like these."""
        recent = step is not None and 0 <= step - kept.step < self.cache.refresh_every
        return recent and kept.output.shape == query.shape and kept.output.dtype == query.dtype

    def _check_budget(self, fresh: _Kept, call: AttentionCall) -> None:
        """Say what all layers of this branch will take, and refuse more than the budget."""
        if any(key[1] == call.branch for key in self._kept):
            return
        layer = fresh.output.nbytes + fresh.lse.nbytes
        wanted = (self.bytes_held + layer * call.num_layers) / 2**30
        place = "CPU memory" if self.cache.offload else "device memory"
        self.seam.recorder.note(
            f"remainder_cache keeps up to {wanted:.2f} GiB in {place} from branch "
            f"{call.branch!r} on"
        )
        if wanted > self.cache.budget_gib:
            raise OptionError(
                f"remainder_cache would take {wanted:.2f} GiB of {place} for {call.num_layers} "
                f"layers, more than budget_gib={self.cache.budget_gib}: raise the budget, set "
                "offload=True, or choose a cache that keeps less (profiling_cache)."
            )


def complement(plan: BlockSparsePlan) -> BlockSparsePlan | None:
    """Return the plan of the video pairs that ``plan`` leaves out, without text; None if none."""
    mask = plan.video_mask
    states = dense_block_states(mask)
    flipped = torch.where(states == PARTIAL, PARTIAL, torch.where(states == EMPTY, FULL, EMPTY))
    if not bool((flipped != EMPTY).any()):
        return None

    def left_out(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ~mask.mask_mod(b, h, q, k)

    return BlockSparsePlan(
        replace(plan.layout, text_length=0),
        plan.order,
        block_mask_from_states(
            flipped.to(torch.int8), mask.BLOCK_SIZE[0], plan.layout.video_length, left_out
        ),
    )
