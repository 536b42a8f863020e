"""Caches of the transformer's stack of blocks: a gate, a scope and a predictor make each of them.

* The **gate** says when: `gates`.
* The **scope** says what: runs of consecutive blocks. Past a run's blocks, the streams are what
  they were before it plus the run's residual.
* The **predictor** says with what: the residual of the last full step, or an extrapolation.

Rules that all of them keep, so that a method need not: state belongs to one transformer and one
guidance branch, known by name; it begins anew with every generation, whenever attention changes
its kind or the order of tokens, and after a step that the branch did not take part in; the first
and the last step run in full unless asked otherwise; what does not fit the tokens at hand is
dropped and the step runs in full. Nothing is modified in place.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel import compat
from dit_accel.caching.base import Cache, check_count, few_steps, note_idle
from dit_accel.caching.gates import Gate, Limits, Look
from dit_accel.caching.predictors import Predictor, When
from dit_accel.errors import OptionError
from dit_accel.pipelines.base import PipelineFamily, Streams
from dit_accel.report import StepRecord
from dit_accel.schedule import Steps, check_steps, count_steps
from dit_accel.session import Forward, Seam, Session
from dit_accel.tracking import Moment


@dataclass(frozen=True)
class Setting:
    """What a gate is made for: one branch of one generation.

    Attributes:
        family: of the pipeline.
        transformer: that runs.
        moment: the first step of this transformer and branch.
        kwargs: the transformer's arguments by name.
        num_blocks: of its stack.
        limits: steps that run in full in any case.
    """

    family: PipelineFamily
    transformer: nn.Module
    moment: Moment
    kwargs: Mapping[str, Any]
    num_blocks: int
    limits: Limits

    @property
    def num_steps(self) -> int:
        """Denoising steps of the generation."""
        return self.moment.num_steps or 0

    @property
    def start(self) -> int:
        """The step before which this branch knows nothing."""
        return self.moment.step or 0


@dataclass(frozen=True)
class StackCache(Cache):
    """A cache over the stack of blocks. Subclasses give gate, scope and predictor.

    Args:
        first_steps: steps that run in full at the start: a number, or a share (rounded up).
        last_steps: likewise at the end.
        max_reuses: reuses in a row after which a step runs in full; None for no limit.
        min_steps: generations of fewer steps run in full: their steps differ too much.
    """

    first_steps: Steps = field(default=1, kw_only=True)
    last_steps: Steps = field(default=1, kw_only=True)
    max_reuses: int | None = field(default=None, kw_only=True)
    min_steps: int = field(default=8, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options that all of them have."""
        check_steps("first_steps", self.first_steps)
        check_steps("last_steps", self.last_steps)
        check_count("min_steps", self.min_steps, 0)
        if self.max_reuses is not None:
            check_count("max_reuses", self.max_reuses, 1)

    @abstractmethod
    def gate(self, setting: Setting) -> Gate:
        """Return a new gate for one branch of one generation.

        Raises:
            OptionError: if this model or schedule lacks what the gate needs.
        """

    def scope(self, num_blocks: int) -> tuple[range, ...]:
        """Return the runs of blocks that may be skipped, ascending; all blocks by default."""
        return (range(num_blocks),)

    def predictor(self, setting: Setting) -> Predictor:
        """Return a new predictor for one run."""
        return Predictor()

    def limits(self, num_steps: int) -> Limits:
        """Return which of ``num_steps`` steps run in full in any case."""
        first = max(count_steps(self.first_steps, num_steps), 1)
        return Limits(first, count_steps(self.last_steps, num_steps), self.max_reuses)

    def session(self, pipe: Any, seam: Seam) -> Session:
        """See `SessionMethod.session`."""
        return StackSession(self, seam)


@dataclass
class _Branch:
    """What is kept for one transformer and branch."""

    gate: Gate
    predictors: dict[range, Predictor]
    regime: Any
    last_step: int | None = None
    reuses: int = 0  # in a row

    @property
    def bytes_held(self) -> int:
        values = {id(value): value for value in vars(self.gate).values()}.values()
        held = sum(value.nbytes for value in values if isinstance(value, Tensor))
        return held + sum(predictor.bytes_held for predictor in self.predictors.values())


@dataclass
class _Running:
    """One forward that is under way."""

    forward: Forward
    branch: _Branch | None  # None: everything runs, nothing is kept
    why: str = ""  # it runs in full
    full: bool | None = None  # None until decided
    first: Streams | None = None  # entering block 0
    head: Streams | None = None  # entering the run at hand
    value: float | None = None
    ran: list[bool] = field(default_factory=list)


class StackSession(Session):
    """Runs, skips and replaces blocks as a `StackCache` says."""

    def __init__(self, cache: StackCache, seam: Seam) -> None:
        self.cache, self.seam = cache, seam
        self.peak_bytes = 0
        self._runs: dict[int, dict[int, range]] = {}  # by transformer: the run of each block
        self._blocks: dict[int, list[nn.Module]] = {}
        self._branches: dict[Any, _Branch] = {}
        self._running: _Running | None = None

    def attach(self, transformer: nn.Module) -> None:
        """See `Session.attach`."""
        compat.refuse_other_caches(transformer)
        blocks = self.seam.family.blocks(transformer)
        scope = self.cache.scope(len(blocks))
        runs = {index: run for run in scope for index in run}
        if not runs:
            raise OptionError(
                f"{self.cache.name} would skip none of the {len(blocks)} blocks of "
                f"{type(transformer).__name__}: lower its number of blocks that always run."
            )
        self._runs[id(transformer)], self._blocks[id(transformer)] = runs, blocks
        for index, block in enumerate(blocks):
            self.seam.intercept(block, partial(self._run, index))

    def begin(self) -> None:
        """See `Session.begin`."""
        self._branches.clear()
        self.peak_bytes = 0

    @property
    def bytes_held(self) -> int:
        """Bytes of all tensors kept between steps."""
        return sum(branch.bytes_held for branch in self._branches.values())

    def enter(self, forward: Forward) -> None:
        """See `Session.enter`."""
        compat.refuse_other_caches(forward.transformer)
        moment, transformer = forward.moment, forward.transformer
        if self.seam.family.blocks(transformer) != self._blocks[id(transformer)]:
            raise OptionError(
                "blocks of the transformer were replaced since accelerate_pipeline: call it again."
            )
        branch, why = None, self._why_bypassed(forward)
        if not why:
            branch = self._branches.get(forward.key)
            if branch is None or branch.regime != forward.regime or _gap(branch, moment):
                self._forget_branch(moment.branch)
                branch = self._branches[forward.key] = self._new_branch(forward)
            why = self._why_full(branch, moment)
        self._running = _Running(forward, branch, why)

    def leave(self, output: Any) -> None:
        """See `Session.leave`."""
        running, self._running = self._running, None
        if running is None or output is None:
            return
        moment, branch = running.forward.moment, running.branch
        full = running.full is not False
        if not running.ran:
            self._warn("its blocks did not run one by one, so none could be skipped")
        self.seam.recorder.steps.append(
            StepRecord(
                moment.step,
                moment.branch,
                tuple(running.ran),
                running.why if full else "",
                running.value,
            )
        )
        if branch is None or moment.step is None:
            return
        branch.gate.finished(output[0] if isinstance(output, tuple) else output.sample, full)
        branch.last_step = moment.step
        branch.reuses = 0 if full else branch.reuses + 1
        self.peak_bytes = max(self.peak_bytes, self.bytes_held)
        self.seam.recorder.cache_bytes = self.peak_bytes
        self._forget_what_is_past(moment)

    # ------------------------------------------------------------------------ one block

    def _run(self, index: int, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        running, family = self._running, self.seam.family
        if running is None or running.branch is None:
            if running is not None:
                running.ran.append(True)
            return inner(*args, **kwargs)
        transformer = running.forward.transformer
        own_args, own_kwargs = compat.split_inputs(
            self._blocks[id(transformer)][index], args, kwargs
        )
        streams = family.streams_in(own_args, own_kwargs)
        if index == 0 and running.branch.gate.first_blocks:
            running.first = streams
        if index == running.branch.gate.first_blocks:
            modulate = partial(
                family.modulated, self._blocks[id(transformer)][index], own_args, own_kwargs
            )
            self._decide(running, running.branch, streams, modulate)
        run = self._runs[id(transformer)].get(index)
        if run is None:
            running.ran.append(True)
            return inner(*args, **kwargs)
        step = running.forward.moment.step or 0
        skipped = running.full is False and running.branch.gate.skips(run, step)
        if index == run.start and (skipped or self._keeps(running.branch, run, running.forward)):
            running.head = streams
        running.ran.append(not skipped)
        output = family.as_output(streams) if skipped else inner(*args, **kwargs)
        if index < run.stop - 1 or running.head is None:
            return output
        # The end of the run: what was added between its blocks (control residuals) is part of
        # what it adds.
        head, running.head = running.head, None
        predictor, when = running.branch.predictors[run], _when(running.forward.moment)
        if skipped:
            return family.as_output(head.map(torch.add, predictor.predict(when)))
        predictor.update(when, family.streams_out(output).map(torch.sub, head))
        return output

    def _keeps(self, branch: _Branch, run: range, forward: Forward) -> bool:
        """Whether a later step may use what a run adds in this one."""
        step, total = forward.moment.step or 0, forward.moment.num_steps or 0
        predictor = branch.predictors[run]
        if predictor.every_step:
            return True
        if predictor.order:
            return step + 1 < total
        forced = self.cache.limits(total).forced(step + 1, total)
        return not forced and branch.gate.keeps(run, step)

    def _decide(
        self,
        running: _Running,
        branch: _Branch,
        streams: Streams,
        modulate: Callable[[], Tensor],
    ) -> None:
        forward, gate = running.forward, branch.gate
        residual = None
        if gate.first_blocks and running.first is not None:
            residual = streams.video - running.first.video
            running.first = None
        parallel = compat.parallel_config(forward.transformer)
        look = Look(
            forward.moment,
            forward.kwargs["hidden_states"],
            residual,
            modulate,
            partial(self.seam.family.volume, forward.transformer, dict(forward.kwargs)),
            partial(compat.sum_over_sequence, parallel),
        )
        if not running.why and not all(p.fits(streams) for p in branch.predictors.values()):
            running.why = "the tokens have another shape, type or device than before"
        if running.why:
            running.full = True
        else:
            running.full = not gate.reusable(look)
            running.value = gate.value
            if running.full:
                running.why = "the gate"
        gate.settled(look, running.full)

    # ----------------------------------------------------------------------- decisions

    def _why_bypassed(self, forward: Forward) -> str:
        """Return why this forward neither uses nor changes what is kept."""
        moment = forward.moment
        if moment.step is None or moment.num_steps is None:
            return "no known step"
        if moment.num_steps < self.cache.min_steps:
            why = few_steps(self.cache.min_steps)
            note_idle(self.seam, self.cache, why)
            return why
        branch = self._branches.get(forward.key)
        if branch is not None and branch.last_step == moment.step:
            return "a second call of the same branch in one step"
        return ""

    def _why_full(self, branch: _Branch, moment: Moment) -> str:
        """Return why the step has to run in full, whatever the gate says."""
        step, total = moment.step or 0, moment.num_steps or 0
        limits = self.cache.limits(total)
        if step < limits.first:
            return "one of the first steps"
        if step >= total - limits.last:
            return "one of the last steps"
        if branch.last_step is None:
            return "nothing kept from the step before"
        if not all(predictor.ready for predictor in branch.predictors.values()):
            return "nothing kept yet"
        if limits.max_reuses is not None and branch.reuses >= limits.max_reuses:
            return "max_reuses in a row"
        return ""

    def _new_branch(self, forward: Forward) -> _Branch:
        blocks = self._blocks[id(forward.transformer)]
        setting = Setting(
            self.seam.family,
            forward.transformer,
            forward.moment,
            forward.kwargs,
            len(blocks),
            self.cache.limits(forward.moment.num_steps or 0),
        )
        runs = dict.fromkeys(self._runs[id(forward.transformer)].values())
        predictors = {run: self.cache.predictor(setting) for run in runs}
        return _Branch(self.cache.gate(setting), predictors, forward.regime)

    def _forget_branch(self, name: str) -> None:
        """Drop what is kept of a branch that begins anew, maybe on another transformer."""
        for key in [key for key in self._branches if key[1] == name]:
            del self._branches[key]

    def _forget_what_is_past(self, moment: Moment) -> None:
        """Drop what no later step can use, so that nothing outlives a generation."""
        step, over = moment.step or 0, (moment.step or 0) + 1 == moment.num_steps
        for key, branch in list(self._branches.items()):
            stale = branch.last_step is not None and branch.last_step < step - 1
            if stale or (over and key[1] == moment.branch):
                del self._branches[key]

    def _warn(self, why: str) -> None:
        text = f"{self.cache.name} did nothing: {why}."
        if text not in self.seam.recorder.notes:
            self.seam.recorder.note(text)
            warnings.warn(text, stacklevel=2)


def _gap(branch: _Branch, moment: Moment) -> bool:
    """Whether the branch did not take part in the step before."""
    return branch.last_step is not None and branch.last_step + 1 != moment.step


def _when(moment: Moment) -> When:
    step = moment.step or 0
    time = moment.times[step] if step < len(moment.times) else float(step)
    return When(step, time)
