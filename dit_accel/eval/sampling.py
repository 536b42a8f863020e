"""Generates what a run compares: puts candidates on a pipeline, one after the other, and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

import torch

from dit_accel.acceleration import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.bench.methods import accelerate_at
from dit_accel.errors import DensityUnreachableError
from dit_accel.eval.candidates import Candidate
from dit_accel.eval.energy import EnergyMeter
from dit_accel.eval.settings import ModelSettings
from dit_accel.generation import (
    Batch,
    GenerationRequest,
    Progress,
    at_once,
    generate_batch,
    warm_up_batch,
)
from dit_accel.models import load_pipeline

Row = dict[str, Any]


@dataclass(frozen=True)
class Sampled:
    """A batch, and what generating it took.

    Attributes:
        batch: the first of the repeats.
        speed: "generate_s" and "step_s" per sample, medians of the repeats; "peak_memory_gib" of
            the batch and "energy_j" per sample, None where unknown; "batch" and "repeats".
        acceleration: densities and operators; empty for the dense baseline.
    """

    batch: Batch
    speed: Row
    acceleration: Row = field(default_factory=dict)


class Sampler(Protocol):
    """Generates batches by one candidate at a time."""

    def sample(self, candidate: Candidate, requests: Sequence[GenerationRequest]) -> Sampled:
        """Generate requests that differ in prompt and seed alone."""
        ...


class PipelineSampler:
    """Generates with a pipeline, which it loads when it is first needed.

    Each candidate's first batch follows an untimed run of one step, sparse from that step on, so
    that no timed one pays for compiling kernels. A density out of a method's reach becomes the
    least within reach.

    Args:
        settings: which pipeline.
        repeats: how often each batch is generated; all are timed.
        progress: told of every step.
    """

    def __init__(
        self, settings: ModelSettings, repeats: int = 1, progress: Progress | None = None
    ) -> None:
        self._settings, self._repeats, self._progress = settings, repeats, progress
        self._meter = EnergyMeter(settings.device)
        self._loaded: Any = None
        self._attached: Candidate | None = None
        self._warm: set[str] = set()  # labels that have been warmed up

    def sample(self, candidate: Candidate, requests: Sequence[GenerationRequest]) -> Sampled:
        """See `Sampler`.

        Raises:
            DitAccelError: if the model can't be loaded or accelerated so.
        """
        pipe = self._pipe()
        if candidate != self._attached:
            self._attach(pipe, candidate, requests)
        device = torch.device(self._settings.device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        reached: Row = {}
        try:
            batch, joules = self._timed(pipe, candidate, requests)
        except DensityUnreachableError as error:
            # For this batch alone: the length of its text decides, and a run that was cut off
            # must end as an unbroken one.
            reached, self._attached = {"reaches": error.least}, None
            _accelerate(pipe, candidate, density=error.least)
            batch, joules = self._timed(pipe, candidate, requests)
        times, energies = [(batch.total_s, batch.denoise_s)], [joules]
        for _ in range(1, self._repeats):
            again, joules = self._timed(pipe, candidate, requests)
            times.append((again.total_s, again.denoise_s))
            energies.append(joules)
        counted = [joules for joules in energies if joules is not None]
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        speed = {
            "generate_s": median(total for total, _ in times) / len(requests),
            "step_s": median(denoising for _, denoising in times) / len(requests) / batch.steps,
            "peak_memory_gib": None if memory is None else memory / 2**30,
            "energy_j": median(counted) / len(requests) if counted else None,
            "batch": len(requests),
            "repeats": self._repeats,
        }
        return Sampled(batch, speed, {} if candidate.dense else _acceleration(pipe) | reached)

    def _attach(
        self, pipe: Any, candidate: Candidate, requests: Sequence[GenerationRequest]
    ) -> None:
        self._attached = None
        restore_pipeline(pipe)
        if candidate.label not in self._warm:
            self._warm_up(pipe, candidate, requests)
            self._warm.add(candidate.label)
        if not candidate.dense:
            _accelerate(pipe, candidate)
        self._attached = candidate

    def _timed(
        self, pipe: Any, candidate: Candidate, requests: Sequence[GenerationRequest]
    ) -> tuple[Batch, float | None]:
        """Generate once; return also the joules that it took."""
        before = self._meter.joules()
        stage = f"steps, {candidate.label}"
        batch = generate_batch(pipe, requests, stage=stage, progress=self._progress)
        after = self._meter.joules()
        return batch, None if before is None or after is None else after - before

    def _pipe(self) -> Any:
        if self._loaded is None:
            settings, stage = self._settings, f"loading {self._settings.model}"
            if self._progress is not None:
                self._progress(stage, 0, 1)
            self._loaded = load_pipeline(
                settings.model, device=settings.device, dtype=settings.dtype
            )
            if self._progress is not None:
                self._progress(stage, 1, 1)
        return self._loaded

    def _warm_up(
        self, pipe: Any, candidate: Candidate, requests: Sequence[GenerationRequest]
    ) -> None:
        """Run one step, at the least density within reach if the candidate's isn't."""

        def run() -> None:
            stage = f"warming up, {candidate.label}"
            warm_up_batch(pipe, requests, stage=stage, progress=self._progress)

        if candidate.dense:
            run()
            return
        try:
            accelerate_at(
                pipe, candidate.method, run, **at_once(candidate.method, candidate.options)
            )
        finally:
            restore_pipeline(pipe)


def _accelerate(pipe: Any, candidate: Candidate, **density: float) -> None:
    """Put a candidate on; without the quality guard, which would make bad methods look good."""
    accelerate_pipeline(pipe, candidate.method, **{"guard": False, **candidate.options, **density})


def _acceleration(pipe: Any) -> Row:
    report = acceleration_report(pipe)
    return {
        "computed_density": report.block_density,  # of all calls; dense ones count as 1
        "attended_density": report.density,
        "sparse_density": report.sparse_density,  # attended, of the sparse calls alone
        "blocks_skipped": report.blocks_skipped,
        "operators": sorted({call.operator for call in report.calls}),
        "settings": report.settings,
    }
