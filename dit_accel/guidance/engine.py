"""Runs the perturbed pass and adds what it says.

The same ``scale * (e_cond - e_perturbed)`` is added to every prediction that a step asks the
transformer for. Whatever pipelines make of these (classifier-free guidance with any scale, Stable
Diffusion 3's own layer skipping), the weights of the predictions sum to one, so exactly this much
is added to the result, and nobody has to know the pipeline's guidance scale. (Giving the
conditional prediction ``scale / cfg`` of the difference would come to the same, if one knew
``cfg``.)

Blocks below the first perturbed one would compute what they did in the conditional pass, so what
that left there is used, unless a cache of blocks has a say in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel import compat
from dit_accel.errors import OptionError
from dit_accel.guidance.base import Guidance, Perturbation, Switch
from dit_accel.pipelines.base import Streams
from dit_accel.report import StepRecord
from dit_accel.session import (
    Forward,
    OutputSession,
    Seam,
    arguments_by_name,
    like_output,
    sample_of,
)
from dit_accel.tracking import Moment

PERTURBED = "perturbed"
"""The branch's name: caches and attention methods keep its state apart by it."""


@dataclass
class _Prefix:
    """What the conditional pass leaves behind the last block that is not perturbed."""

    keeping: bool = False
    kept: Streams | None = None


class GuidanceSession(OutputSession):
    """Stands in front of the whole transformer, of what is perturbed and of the blocks before."""

    def __init__(self, method: Guidance, seam: Seam) -> None:
        self.method, self.seam = method, seam
        self.switch = Switch()
        self._perturbations: dict[int, Perturbation] = {}  # by transformer
        self._prefix = _Prefix()
        self._difference: tuple[Moment, Tensor] | None = None  # scaled, of the step at hand
        self._cond_alone: Moment | None = None  # no unconditional pass has followed yet
        self._running: Perturbation | None = None

    @property
    def needs_attention_method(self) -> bool:
        """See `Session.needs_attention_method`."""
        return self.method.sees_queries

    def attach(self, transformer: nn.Module) -> None:
        """See `Session.attach`."""
        compat.refuse_other_caches(transformer)
        perturbation = self.method.perturb(transformer, self.seam, self.switch)
        if self.method.idle:
            self.seam.recorder.note(f"{self.method.name} guides nothing: {self.method.idle}")
            return
        self._perturbations[id(transformer)] = perturbation
        for index, block in enumerate(self._blocks(transformer)[: perturbation.first]):
            last = index == perturbation.first - 1
            self.seam.intercept(block, partial(self._run_before, last), innermost=True)
        self.seam.intercept(transformer, partial(self._run, transformer))

    def begin(self) -> None:
        """See `Session.begin`."""
        self._difference = None

    def enter(self, forward: Forward) -> None:
        """See `Session.enter`."""
        compat.refuse_other_caches(forward.transformer)
        self._running = self._perturbations.get(id(forward.transformer))
        if self._running is not None:
            self._running.enter(forward)

    def leave(self, output: Any) -> None:
        """See `Session.leave`."""
        if self._running is not None:
            self._running.leave()
        self._running = None

    def attended(
        self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], scale: float | None, output: Tensor
    ) -> Tensor:
        """See `OutputSession.attended`."""
        if self._running is None or not self.switch.is_on:
            return output
        return self._running.attended(layer, qkv, scale, output)

    # ------------------------------------------------------------------ one transformer call

    def _run(
        self, transformer: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        named = arguments_by_name(transformer, args, kwargs)
        moment = self.seam.tracker.advance(named.get("timestep"))
        with self.seam.tracker.hold(moment):
            if not self.method.guides(moment):
                return inner(**named)
            # Stable Diffusion 3 can skip layers by itself, in a call of its own.
            other = moment.branch not in ("cond", "cond_uncond") or bool(named.get("skip_layers"))
            if not self.method.extra_pass:
                return self._in_place(transformer, inner, named, moment)
            if other:
                return self._add(inner(**named), named, moment)
            return self._guided(transformer, inner, named, moment)

    def _guided(
        self,
        transformer: nn.Module,
        inner: Callable[..., Any],
        named: dict[str, Any],
        moment: Moment,
    ) -> Any:
        """Run the conditional pass, then the perturbed one."""
        batched = moment.branch == "cond_uncond"
        prefix = self._prefix = _Prefix(keeping=self._shares(transformer))
        try:
            output = inner(**named)
            prefix.keeping = False
            cond = sample_of(output)
            if batched:
                named, cond = _second_half(named), cond.chunk(2)[1]
                if prefix.kept is not None:
                    # A cache may have run this half alone.
                    prefix.kept = prefix.kept.map(lambda tokens: tokens[-len(cond) :])
            with (
                self.seam.tracker.hold(replace(moment, branch=PERTURBED)),
                self.switch.on(slice(None), len(cond)),
            ):
                shared = prefix.kept is not None
                perturbed = sample_of(inner(**named))
        finally:
            self._prefix = _Prefix()
        self._record(transformer, replace(moment, branch=PERTURBED), shared=shared)
        wide = torch.promote_types(cond.dtype, torch.float32)
        difference = self.method.settled_scale * (cond.to(wide) - perturbed.to(wide))
        self._difference = moment, difference
        return self._add(output, named, moment)

    def _add(self, output: Any, named: Mapping[str, Any], moment: Moment) -> Any:
        """Add the step's difference to a prediction, or to both of a batch."""
        made, difference = self._difference or (None, None)
        if made is None or difference is None or made.step != moment.step:
            raise OptionError(
                f"{self.method.name} needs a step's conditional pass before its pass "
                f"{moment.branch!r}, and this pipeline runs none: use extra_pass=False, or leave "
                "the guidance out."
            )
        sample = sample_of(output)
        repeated = torch.cat([difference] * (len(sample) // len(difference)))
        return like_output((sample.to(repeated.dtype) + repeated).to(sample.dtype), named)

    def _in_place(
        self,
        transformer: nn.Module,
        inner: Callable[..., Any],
        named: dict[str, Any],
        moment: Moment,
    ) -> Any:
        """Perturb the unconditional pass itself."""
        size = len(named["hidden_states"])
        samples = {"uncond": slice(None), "cond_uncond": slice(0, size // 2)}.get(moment.branch)
        alone = self._cond_alone
        if samples is None or named.get("skip_layers"):
            if (
                alone is not None
                and alone.generation == moment.generation
                and alone.step != moment.step
            ):
                raise OptionError(
                    f"{self.method.name} with extra_pass=False perturbs the unconditional pass, "
                    "and this generation has none: turn on classifier-free guidance (a guidance "
                    "scale over 1, with a negative prompt where the pipeline wants one) or leave "
                    "extra_pass out."
                )
            if moment.branch == "cond":
                self._cond_alone = moment
            return inner(**named)
        self._cond_alone = None
        with self.switch.on(samples, size):
            output = inner(**named)
        self._record(transformer, moment, whole=samples == slice(None))
        return output

    # ------------------------------------------------------------------------------ blocks

    def _run_before(self, last: bool, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block below the first perturbed one, or pass on what it gave before."""
        prefix, family = self._prefix, self.seam.family
        if self.switch.is_on and prefix.kept is not None:
            # Only what leaves the last of these blocks is read.
            return family.as_output(prefix.kept if last else family.streams_in(args, kwargs))
        output = inner(*args, **kwargs)
        if last and prefix.keeping:
            prefix.kept = family.streams_out(output)
        return output

    def _blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return self.seam.family.blocks(transformer)

    def _shares(self, transformer: nn.Module) -> bool:
        """Whether nobody else decides about the blocks below the first perturbed one."""
        below = self._blocks(transformer)[: self._perturbations[id(transformer)].first]
        shares = all(self.seam.interceptions(block) == 1 for block in below)
        if not shares:
            self.seam.recorder.note(
                f"{self.method.name} shares no layers between passes: a cache acts on them, and "
                "keeps a state for each pass"
            )
        return shares

    def _record(
        self, transformer: nn.Module, moment: Moment, *, shared: bool = False, whole: bool = True
    ) -> None:
        """Note which blocks ran; skipped ones do where a part of the batch is not perturbed."""
        perturbation = self._perturbations[id(transformer)]
        start = perturbation.first if shared else 0
        ran = tuple(
            index >= start and not (whole and index in perturbation.skipped)
            for index in range(len(self._blocks(transformer)))
        )
        self.seam.recorder.perturbed.append(StepRecord(moment.step, moment.branch, ran))


def _second_half(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the second half of a batch."""
    size = len(named["hidden_states"])

    def half(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(half, value))
        if isinstance(value, Tensor) and value.ndim and len(value) == size:
            return value[size // 2 :]
        return value

    return {name: half(value) for name, value in named.items()}
