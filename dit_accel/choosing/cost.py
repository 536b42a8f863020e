"""Predicts what a forward and a generation take, from what one dense forward took.

All but self-attention takes what it took densely: one dense forward was measured, and of it the
time of attention is exchanged. Blocks that a cache leaves out take nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dit_accel.choosing.times import AttentionTimes, Place
from dit_accel.methods.base import AttentionMethod
from dit_accel.schedule import Steps, count_steps


@dataclass(frozen=True)
class Workload:
    """What one transformer forward does, and how many there are.

    Attributes:
        place: one self-attention call.
        layers: self-attention calls of a forward.
        steps: denoising steps.
        forwards: of a step: 2 with guidance in two passes.
    """

    place: Place
    layers: int
    steps: int = 1
    forwards: int = 1


@dataclass(frozen=True)
class CostModel:
    """Times of a workload.

    Attributes:
        workload: what is run.
        dense_s: seconds of one dense forward, measured.
        times: knows what attention calls take.
    """

    workload: Workload
    dense_s: float
    times: AttentionTimes

    def forward_s(
        self, method: AttentionMethod | None, *, layers: int | None = None, run: float = 1.0
    ) -> float | None:
        """Return the seconds of a forward; None if attention's time is not known.

        Args:
            method: at its density; None for dense.
            layers: how many are sparse; None for all.
            run: share of the block calls that run.
        """
        saved = 0.0
        if method is not None:
            dense = self.times.seconds(None, self.workload.place)
            sparse = self.times.seconds(method, self.workload.place)
            if dense is None or sparse is None:
                return None
            count = self.workload.layers if layers is None else layers
            saved = count * (dense - sparse)
        # Attention was measured apart from the rest, and may have been slower there.
        return max(self.dense_s - saved, 0.02 * self.dense_s) * run

    def generation_s(
        self,
        method: AttentionMethod | None,
        *,
        dense_steps: Steps | Sequence[Steps] = 0,
        layers: int | None = None,
        run: float = 1.0,
    ) -> float | None:
        """Return the seconds of all forwards of a generation.

        Args:
            method: at its density; None for dense.
            dense_steps: steps without it, as in `accelerate_pipeline`.
            layers: how many layers are sparse in the others; None for all.
            run: share of all block calls that run; a cache's full steps may be anywhere.
        """
        sparse_s, work = self.forward_s(method, layers=layers), self.workload
        if sparse_s is None:
            return None
        pair = list(dense_steps) if isinstance(dense_steps, Sequence) else [dense_steps]
        dense = min(sum(count_steps(steps, work.steps) for steps in pair), work.steps)
        seconds = dense * self.dense_s + (work.steps - dense) * sparse_s
        return seconds * work.forwards * run

    def speedup(
        self,
        method: AttentionMethod | None,
        *,
        dense_steps: Steps | Sequence[Steps] = 0,
        layers: int | None = None,
        run: float = 1.0,
    ) -> float | None:
        """Return how many times faster than dense a generation is; see `generation_s`."""
        seconds = self.generation_s(method, dense_steps=dense_steps, layers=layers, run=run)
        dense = self.workload.steps * self.workload.forwards * self.dense_s
        return None if seconds is None else dense / seconds
