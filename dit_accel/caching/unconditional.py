"""A cache of the unconditional pass: guidance needs a difference, and that changes slowly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_accel import compat
from dit_accel.caching.base import Cache, check_count, few_steps, note_idle
from dit_accel.report import StepRecord
from dit_accel.schedule import Steps, check_steps, count_steps
from dit_accel.session import Seam, Session, arguments_by_name, like_output, sample_of
from dit_accel.tracking import Moment


@dataclass(frozen=True)
class UnconditionalCache(Cache):
    """Run the unconditional pass every few steps; between, make it from the conditional one.

    Experimental: where early steps are skipped, a picture's composition may change.

    Args:
        every: both passes run in one step of so many; 1 skips nothing.
        first_steps: steps that run both passes at the start: a number, or a share (rounded up).
        last_steps: likewise at the end.
        min_steps: generations of fewer steps run in full.
    """

    name: ClassVar[str] = "unconditional_cache"
    paper: ClassVar[str] = "FasterCache's CFG-Cache, 2410.19355"
    strength: ClassVar[str] = "every"
    strengths: ClassVar[tuple[float, ...]] = (2, 3, 5)

    every: int = 5
    first_steps: Steps = field(default=0.35, kw_only=True)
    last_steps: Steps = field(default=1, kw_only=True)
    min_steps: int = field(default=8, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options."""
        check_count("every", self.every, 1)
        check_count("min_steps", self.min_steps, 0)
        check_steps("first_steps", self.first_steps)
        check_steps("last_steps", self.last_steps)

    def session(self, pipe: Any, seam: Seam) -> Session:
        """See `SessionMethod.session`."""
        return UnconditionalSession(self, seam)

    def runs_both(self, moment: Moment, refreshed: int) -> bool:
        """Whether this step runs both passes; ``refreshed`` is the last step that did."""
        step, total = moment.step, moment.num_steps or 0
        if step is None:
            return True
        first = max(count_steps(self.first_steps, total), 1)
        last = total - count_steps(self.last_steps, total)
        return step < first or step >= last or step - refreshed >= self.every


@dataclass
class _Kept:
    transformer: int
    step: int
    difference: Tensor


class UnconditionalSession(Session):
    """Stands in front of the whole transformer."""

    def __init__(self, cache: UnconditionalCache, seam: Seam) -> None:
        self.cache, self.seam = cache, seam
        self._kept: _Kept | None = None
        self._cond: Tensor | None = None  # of the step at hand
        self._passes_skipped: int | None = None  # None: there was no unconditional pass

    def attach(self, transformer: nn.Module) -> None:
        """See `Session.attach`."""
        compat.refuse_other_caches(transformer)
        self.seam.intercept(transformer, partial(self._run, transformer))

    def begin(self) -> None:
        """See `Session.begin`."""
        self._kept = self._cond = self._passes_skipped = None

    @property
    def bytes_held(self) -> int:
        """Bytes of the tensors kept."""
        held = (self._kept.difference if self._kept else None, self._cond)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def _run(
        self, transformer: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        named = arguments_by_name(transformer, args, kwargs)
        moment = self.seam.tracker.advance(named.get("timestep"))
        with self.seam.tracker.hold(moment):
            if moment.branch == "cond_uncond":
                return self._batched(transformer, inner, named, moment)
            if moment.branch == "uncond" and self._cond is not None:
                return self._alone(transformer, inner, named, moment, self._cond)
            output = inner(**named)
        if moment.branch in ("cond", "uncond"):
            self._record(moment, True, transformer)
        if moment.branch == "cond":
            self._cond = sample_of(output)
            if _is_last(moment):
                self._end()
        return output

    def _end(self) -> None:
        """Let go of everything: the last step is under way."""
        self._kept = self._cond = None
        if self._passes_skipped is None:
            note_idle(self.seam, self.cache, "there was no unconditional pass")

    def _alone(
        self,
        transformer: nn.Module,
        inner: Callable[..., Any],
        named: dict[str, Any],
        moment: Moment,
        cond: Tensor,
    ) -> Any:
        """Run or make the unconditional pass of a pipeline that runs both in turn."""
        kept, self._cond = self._usable(transformer, moment, cond), None
        self._record(moment, kept is None, transformer)
        if kept is None:
            output = inner(**named)
            self._keep(transformer, moment, sample_of(output) - cond)
            return output
        return like_output(cond + kept, named)

    def _batched(
        self,
        transformer: nn.Module,
        inner: Callable[..., Any],
        named: dict[str, Any],
        moment: Moment,
    ) -> Any:
        """Run both passes or the conditional half of the batch [uncond, cond]."""
        size = len(named["hidden_states"])
        half = {
            name: value[size // 2 :]
            if isinstance(value, Tensor) and value.ndim and len(value) == size
            else value
            for name, value in named.items()
        }
        kept = self._usable(transformer, moment, half["hidden_states"])
        output = inner(**(named if kept is None else half))
        self._record(replace(moment, branch="uncond"), kept is None, transformer)
        self._record(replace(moment, branch="cond"), True, transformer)
        if kept is None:
            uncond, cond = sample_of(output).chunk(2)
            self._keep(transformer, moment, uncond - cond)
            return output
        cond = sample_of(output)
        return like_output(torch.cat([cond + kept, cond]), named)

    def _usable(self, transformer: nn.Module, moment: Moment, like: Tensor) -> Tensor | None:
        """Return the kept difference if this step may do with it."""
        kept = self._kept
        if (moment.num_steps or 0) < self.cache.min_steps:
            note_idle(self.seam, self.cache, few_steps(self.cache.min_steps))
            return None
        if kept is None or kept.transformer != id(transformer):
            return None
        if kept.difference.shape != like.shape or self.cache.runs_both(moment, kept.step):
            return None
        return kept.difference

    def _keep(self, transformer: nn.Module, moment: Moment, difference: Tensor) -> None:
        over = moment.step is None or _is_last(moment)
        self._kept = None if over else _Kept(id(transformer), moment.step or 0, difference)
        recorder = self.seam.recorder
        recorder.cache_bytes = max(recorder.cache_bytes, self.bytes_held)

    def _record(self, moment: Moment, ran: bool, transformer: nn.Module) -> None:
        blocks = (ran,) * len(self.seam.family.blocks(transformer))
        why = ("conditional" if moment.branch == "cond" else "refreshed") if ran else ""
        if moment.branch == "uncond":
            self._passes_skipped = (self._passes_skipped or 0) + (not ran)
        self.seam.recorder.steps.append(StepRecord(moment.step, moment.branch, blocks, why))


def _is_last(moment: Moment) -> bool:
    return moment.step is not None and moment.step + 1 == moment.num_steps
