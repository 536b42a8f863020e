"""Which denoising step and which guidance branch a transformer call belongs to.

Pipelines differ in what they tell: some name the branch (``cache_context``), most keep the current
timestep, Stable Diffusion 3 says nothing. The step is read without waiting for the GPU: timesteps
handed out by a loop are views into the scheduler's ``timesteps``, so their storage offset is the
index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moment:
    """Where in a generation a transformer call is.

    Attributes:
        step: denoising step from 0, counted over the steps that really run; None if unknown.
        num_steps: number of steps that run; None if unknown.
        branch: "cond", "uncond", "cond_uncond" or the pipeline's own name.
        generation: counts generations from 0.
        times: the scheduler's timesteps that run, one per step; empty if unknown.
    """

    step: int | None
    num_steps: int | None
    branch: str
    generation: int
    times: tuple[float, ...] = ()


class CallTracker:
    """Counts the steps, branches and generations of one pipeline, over all its transformers."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._named_branch: str | None = None
        self._named_step: int | None = None
        self._timesteps: Tensor | None = None
        self._times: tuple[float, ...] = ()
        self._first_index = 0
        self._last_index = -1
        self._calls_in_step = 0
        self._generation = 0
        self._held: Moment | None = None
        self.latest: Moment | None = None
        """What `advance` last answered."""

    @contextmanager
    def hold(self, moment: Moment) -> Iterator[None]:
        """Make `advance` answer ``moment`` meanwhile.

        For whoever runs a transformer more or less often than the pipeline asks for: call
        `advance` once per call of the pipeline, and hold its answer, or one with another branch
        such as "perturbed", around each run.
        """
        before, self._held = self._held, moment
        try:
            yield
        finally:
            self._held = before

    def watch(self, transformer: nn.Module) -> Callable[[], None]:
        """Listen to the names that pipelines give their calls; return how to stop."""
        original = getattr(transformer, "cache_context", None)
        if original is None:
            return lambda: None

        @contextmanager
        def cache_context(name: str, **where: Any) -> Iterator[None]:
            self._named_branch, self._named_step = name, where.get("step_index")
            try:
                with original(name, **where):
                    yield
            finally:
                self._named_branch = self._named_step = None

        before = transformer.__dict__.get("cache_context")
        transformer.cache_context = cache_context  # type: ignore[assignment]

        def stop() -> None:
            if transformer.__dict__.get("cache_context") is not cache_context:
                return  # somebody listens in front of us, and passes names on
            if before is None:
                del transformer.__dict__["cache_context"]
            else:
                transformer.__dict__["cache_context"] = before

        return stop

    def advance(self, timestep: Tensor | None) -> Moment:
        """Note that a transformer is about to run.

        Args:
            timestep: the transformer's ``timestep`` argument.
        """
        self.latest = self._held if self._held is not None else self._advance(timestep)
        return self.latest

    def _advance(self, timestep: Tensor | None) -> Moment:
        timesteps: Any = getattr(getattr(self._pipe, "scheduler", None), "timesteps", None)
        index = self._index(timestep, timesteps)
        if index is None or timesteps is None:
            return Moment(None, None, self._branch(), self._generation)
        if timesteps is not self._timesteps or index < self._last_index:
            # A new generation: the scheduler was set anew, or somebody goes through it again.
            # Image-to-image generations begin in the middle of the schedule.
            self._generation += self._timesteps is not None
            self._timesteps, self._first_index, self._last_index = timesteps, index, -1
            self._times = tuple(timesteps.tolist())[index:]
        self._calls_in_step = self._calls_in_step + 1 if index == self._last_index else 0
        self._last_index = index
        return Moment(
            index - self._first_index,
            len(timesteps) - self._first_index,
            self._branch(),
            self._generation,
            self._times,
        )

    def _index(self, timestep: Tensor | None, timesteps: Tensor | None) -> int | None:
        if self._named_step is not None:
            return self._named_step
        if timesteps is None:
            return None
        for view in (getattr(self._pipe, "_current_timestep", None), timestep):
            if isinstance(view, Tensor) and _same_storage(view, timesteps):
                return int(view.storage_offset() - timesteps.storage_offset())
        if not isinstance(timestep, Tensor):
            return None
        # A copied timestep, as it is or as a share of 1000: one comparison, one wait for it.
        value = timestep.flatten()[:1].to(timesteps)
        distance = (timesteps - torch.stack([value, value * 1000])).abs()
        return int(distance.argmin()) % len(timesteps)

    def _branch(self) -> str:
        if self._named_branch is not None:
            return self._named_branch
        if not getattr(self._pipe, "do_classifier_free_guidance", False):
            return "cond"
        if hasattr(getattr(self._pipe, "transformer", None), "cache_context"):
            # Two calls per step, the conditional one first.
            return "cond" if self._calls_in_step == 0 else "uncond"
        return "cond_uncond"


def _same_storage(view: Tensor, base: Tensor) -> bool:
    return view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
