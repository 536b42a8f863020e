"""CFG parallelism: the conditional and the unconditional pass run on ranks of their own.

Pipelines call the transformer twice in a step and look at neither prediction before they have both.
So the ranks whose pass it is not return at once with a tensor that is filled when the second call
has run everywhere. Pipelines that put both passes into one batch get it halved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.errors import ContextParallelError
from dit_accel.parallel.groups import Axis
from dit_accel.session import arguments_by_name, like_output, sample_of
from dit_accel.tracking import CallTracker, Moment

Key = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class _Waiting:
    """The first prediction of a step: this rank's, or an empty one to be filled."""

    moment: Moment
    sample: Tensor


class GuidedRanks:
    """Splits one pipeline's guided steps over two groups of ranks.

    Args:
        axis: the two ranks that hold the same tokens.
        pipe: the pipeline.
        tracker: tells which pass a call is.
    """

    def __init__(self, axis: Axis, pipe: Any, tracker: CallTracker) -> None:
        self.axis, self.pipe, self.tracker = axis, pipe, tracker
        self._like: dict[Key, Tensor] = {}  # what predictions look like, by inputs
        self._two_passes: dict[int, bool] = {}  # by generation: whether a step has both
        self._waiting: _Waiting | None = None

    def run(
        self, transformer: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run in place of a transformer's call."""
        named = arguments_by_name(transformer, args, kwargs)
        moment = self.tracker.advance(named.get("timestep"))
        _refuse_passes_of_others(self.pipe, transformer)
        with self.tracker.hold(moment):
            if moment.branch == "cond_uncond":
                return self._halved(inner, named)
            if moment.branch == "cond":
                return self._first(inner, named, moment)
            if moment.branch == "uncond":
                return self._second(inner, named, moment)
            raise ContextParallelError(
                f"cfg=2 knows the passes 'cond' and 'uncond', but this pipeline also runs "
                f"{moment.branch!r}: choose ulysses=2 or ring=2 instead."
            )

    def _halved(self, inner: Callable[..., Any], named: dict[str, Any]) -> Any:
        size = len(named["hidden_states"])
        half = {name: _half(value, size, self.axis.rank) for name, value in named.items()}
        sample = sample_of(inner(**half))
        return like_output(self.axis.all_gather(sample).flatten(0, 1), named)

    def _first(self, inner: Callable[..., Any], named: dict[str, Any], moment: Moment) -> Any:
        if self._waiting is not None:
            self._waiting = None
            raise ContextParallelError(
                "a step had no unconditional pass, though those before it had: with cfg=2 "
                "guidance must be on in all steps or in none."
            )
        key = _key(named)
        if key not in self._like or not self._both(moment):
            output = inner(**named)
            self._like[key] = torch.empty_like(sample_of(output), device="meta")
            return output
        if self.axis.rank == 0:
            output = inner(**named)
            self._waiting = _Waiting(moment, sample_of(output))
            return output
        like = self._like[key]
        device = named["hidden_states"].device
        # Were it read before it is filled, that would show.
        empty = torch.full(like.shape, torch.nan, dtype=like.dtype, device=device)
        self._waiting = _Waiting(moment, empty)
        return like_output(empty, named)

    def _second(self, inner: Callable[..., Any], named: dict[str, Any], moment: Moment) -> Any:
        self._two_passes[moment.generation] = True
        waiting, self._waiting = self._waiting, None
        if waiting is None or waiting.moment.step != moment.step:
            return inner(**named)
        own = waiting.sample if self.axis.rank == 0 else sample_of(inner(**named))
        both = self.axis.all_gather(own)
        if self.axis.rank == 1:
            waiting.sample.copy_(both[0])
        return like_output(both[1], named)

    def _both(self, moment: Moment) -> bool:
        """Whether an unconditional pass will follow."""
        known = getattr(self.pipe, "do_classifier_free_guidance", None)
        if known is not None:
            return bool(known)
        return self._two_passes.get(moment.generation, False)


def _key(named: Mapping[str, Any]) -> Key:
    latent = named["hidden_states"]
    return tuple(latent.shape), latent.dtype


def _half(value: Any, size: int, which: int) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_half(one, size, which) for one in value)
    if isinstance(value, Tensor) and value.ndim and len(value) == size:
        return value.chunk(2)[which]
    return value


def _refuse_passes_of_others(pipe: Any, transformer: nn.Module) -> None:
    """Raise if a method runs passes of its own, or needs both passes on one rank."""
    acceleration = getattr(pipe, "_dit_accel", None)
    if acceleration is not None and acceleration.runtime.seam.interceptions(transformer):
        raise ContextParallelError(
            "cfg=2 puts the conditional and the unconditional pass on ranks of their own, but a "
            "perturbation guidance or the unconditional cache compares them: choose ulysses=2 or "
            "ring=2 instead, or leave that method out."
        )
