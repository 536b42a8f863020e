"""Spreads the generations of one pipeline over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from dit_accel import compat
from dit_accel.errors import ContextParallelError, OptionError
from dit_accel.parallel.groups import Axis
from dit_accel.parallel.guided import GuidedRanks
from dit_accel.parallel.launch import (
    DEGREES,
    TIMEOUT_S,
    Degrees,
    agree,
    join_ranks,
    rank_mesh,
)
from dit_accel.pipelines.base import Undo
from dit_accel.session import Interception, arguments_by_name
from dit_accel.tracking import CallTracker

_ATTRIBUTE = "_dit_accel_parallel"


def parallelize_pipeline(
    pipe: Any, *, ulysses: int = 1, ring: int = 1, cfg: int = 1, timeout_s: float = TIMEOUT_S
) -> Any:
    """Run each generation of a pipeline on several GPUs, one process each.

    Every process calls it, and then the pipeline, with the same arguments and the same seed; each
    gets the whole result. Processes are those that ``torchrun`` started. Before or after
    `accelerate_pipeline`; context parallelism that diffusers' ``enable_parallelism`` turned on
    works likewise.

    Args:
        pipe: a pipeline of a known family, on this process's device.
        ulysses: ranks that share the heads (arXiv 2309.14509); must divide their number.
        ring: parts of the sequence that pass their keys and values around (arXiv 2310.01889).
        cfg: 2 to run the conditional and the unconditional pass on ranks of their own.
        timeout_s: how long a rank waits for the others before it gives up.

    Returns:
        The same pipeline.

    Raises:
        OptionError: for impossible numbers.
        ContextParallelError: if the processes aren't as many as ``ulysses * ring * cfg``, differ in
            versions or model, or can't talk to one another; on every rank.
    """
    import torch.distributed as dist

    degrees = Degrees(ulysses, ring, cfg)
    if pipe.__dict__.get(_ATTRIBUTE) is not None:
        raise OptionError("this pipeline is spread over ranks already: unparallelize_pipeline it.")
    join_ranks(pipe.transformer.device.type, timeout_s)
    degrees.check_world(dist.get_world_size())
    agree(_fingerprint(pipe, degrees))
    parallel = _ParallelPipeline(pipe, degrees, timeout_s)
    object.__setattr__(pipe, _ATTRIBUTE, parallel)
    return pipe


def unparallelize_pipeline(pipe: Any) -> Any:
    """Undo `parallelize_pipeline`; the process group stays. Returns the pipeline."""
    parallel = pipe.__dict__.pop(_ATTRIBUTE, None)
    if parallel is not None:
        parallel.undo()
    return pipe


def is_spread(pipe: Any) -> bool:
    """Return whether several ranks share the generations of a pipeline, by us or by diffusers."""
    transformers = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    shared = any(compat.parallel_config(transformer) is not None for transformer in transformers)
    return shared or _ATTRIBUTE in vars(pipe)


class _ParallelPipeline:
    """What was done to one pipeline, and how to undo it."""

    def __init__(self, pipe: Any, degrees: Degrees, timeout_s: float) -> None:
        from dit_accel.acceleration import family_of

        family = family_of(pipe)
        self.pipe, self.degrees = pipe, degrees
        self.tracker = CallTracker(pipe)
        self._undo: list[Undo] = []
        self._own_plan = family.split_plan() is not None
        self._undone = False  # an interception that others stand in front of stays
        self._checked: int | None = None  # generation whose inputs were compared
        shape = degrees.cfg, degrees.ring, degrees.ulysses
        mesh = rank_mesh(pipe.transformer.device.type, shape, DEGREES, timeout_s)
        cfg = mesh["cfg"]
        axis = Axis(cfg.size(), cfg.get_local_rank(), cfg.get_group())
        self.guided = GuidedRanks(axis, pipe, self.tracker) if degrees.cfg > 1 else None
        try:
            for name in family.components:
                transformer = getattr(pipe, name, None)
                if transformer is not None:
                    self._spread(transformer, family.split_plan(), mesh)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Take everything back, the last change first."""
        self._undone = True
        while self._undo:
            self._undo.pop()()

    def _spread(self, transformer: Any, plan: dict[str, Any] | None, mesh: Any) -> None:
        ring, ulysses = self.degrees.ring, self.degrees.ulysses
        if ring * ulysses > 1:
            if getattr(transformer, "_cp_plan", None) is None and plan is None:
                raise ContextParallelError(
                    f"{type(transformer).__name__} can't be spread over ranks: choose cfg=2."
                )
            compat.spread_over_ranks(transformer, ring, ulysses, mesh, plan)
            self._undo.append(partial(compat.gathered_from_ranks, transformer, plan))
        self._undo.append(self.tracker.watch(transformer))
        interception = Interception(transformer)
        interception.runs.append(partial(self._run, transformer))
        self._undo.append(interception.remove)

    def _run(
        self, transformer: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run in place of a transformer's call."""
        named = arguments_by_name(transformer, args, kwargs)
        if self._undone:
            return inner(**named)
        self._check_attention(transformer)
        moment = self.tracker.advance(named.get("timestep"))
        if moment.generation != self._checked or moment.step is None:
            self._checked = moment.generation
            agree({"inputs of the transformer": _sums(named)})
        with self.tracker.hold(moment):
            if self.guided is not None:
                return self.guided.run(transformer, inner, **named)
            return inner(**named)

    def _check_attention(self, transformer: nn.Module) -> None:
        """Refuse to run stock processors that know nothing of ranks."""
        own = getattr(transformer, "_parallel_config", None) is not None and self._own_plan
        acceleration = getattr(self.pipe, "_dit_accel", None)
        if own and (acceleration is None or not acceleration.runtime.attends):
            raise ContextParallelError(
                f"diffusers' own attention of {type(transformer).__name__} can't follow a split "
                "sequence: call accelerate_pipeline with an attention method, for example 'dense'."
            )


def _fingerprint(pipe: Any, degrees: Degrees) -> dict[str, Any]:
    """What must be the same on all ranks."""
    names = ("torch", "diffusers", "dit-accel")
    acceleration = getattr(pipe, "_dit_accel", None)
    config = dict(pipe.transformer.config)
    return {
        **{f"version of {name}": version(name) for name in names},
        "pipeline": type(pipe).__name__,
        **{f"a model of {name}": str(config[name]) for name in config if name[0] != "_"},
        "split": str(degrees),
        "methods": str(getattr(acceleration, "methods", "")),
    }


def _sums(named: dict[str, Any]) -> tuple[float, ...]:
    """Tell inputs apart: ranks that began with other noise or another prompt would mix them."""
    names = ("hidden_states", "encoder_hidden_states", "timestep")
    tensors = [named[name] for name in names if isinstance(named.get(name), torch.Tensor)]
    return tuple(tensor.double().sum().item() for tensor in tensors)
