"""What an accelerated pipeline really did: per call, and summed up for people and programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.plan import BlockSparsePlan, DensePlan, PastJointPlan

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class CallRecord:
    """One attention call of the last generation.

    Attributes:
        step: denoising step from 0, or None outside a pipeline.
        layer: attention layer from 0.
        branch: guidance branch.
        plan: what was run.
        operator: who ran it; "dense" for diffusers' own attention.
        reason: why it was dense; empty if it was sparse.
    """

    step: int | None
    layer: int
    branch: str
    plan: DensePlan | BlockSparsePlan | PastJointPlan
    operator: str
    reason: str = ""

    @property
    def density(self) -> float:
        """Share of (query, key) pairs attended, text included; 1 if dense."""
        return 1.0 if isinstance(self.plan, DensePlan) else self.plan.density

    @property
    def block_density(self) -> float:
        """Share of (query, key) pairs computed, whole visited blocks counted; 1 if dense."""
        return 1.0 if isinstance(self.plan, DensePlan) else self.plan.block_density


@dataclass
class Recorder:
    """Collects the records of the running generation. One per acceleration."""

    generation: int = -1
    calls: list[CallRecord] = field(default_factory=list)
    forwards: list[tuple[int | None, Any, Any]] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    tuning: dict[str, str] = field(default_factory=dict)  # where operators have tile shapes from
    notes: list[str] = field(default_factory=list)

    def begin(self, generation: int) -> None:
        """Forget the generation before; notes stay."""
        if generation != self.generation:
            self.generation = generation
            self.calls.clear()
            self.forwards.clear()

    def note(self, text: str) -> None:
        """Keep a remark once."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True)
class AccelerationReport:
    """What `acceleration_report` returns; prints as a table.

    Attributes:
        method: name of the method.
        options: its options as resolved.
        family: model family.
        settings: where schedule, options and tile shapes came from, and the schedule itself.
        calls: one record per attention call of the last generation.
        forward_s: seconds per denoising step spent in transformers.
        rejected: operators that ``backend="auto"`` passed over, with the reason.
        notes: fallbacks and warnings.
    """

    method: str
    options: dict[str, Any]
    family: str
    settings: dict[str, Any]
    calls: tuple[CallRecord, ...]
    forward_s: dict[int | None, float]
    rejected: dict[str, str]
    notes: tuple[str, ...]

    @property
    def density(self) -> float | None:
        """Mean share of pairs attended over all calls, dense ones counted as 1."""
        return _mean([call.density for call in self.calls]) if self.calls else None

    @property
    def block_density(self) -> float | None:
        """Mean share of pairs computed over all calls, dense ones counted as 1."""
        return _mean([call.block_density for call in self.calls]) if self.calls else None

    @property
    def sparse_density(self) -> float | None:
        """Mean share of pairs attended over the sparse calls alone; None if there was none."""
        sparse = [call.density for call in self.calls if not call.reason]
        return _mean(sparse) if sparse else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        steps: dict[str, dict[str, Any]] = {}
        for call in self.calls:
            row = steps.setdefault(str(call.step), {"density": [], "operators": Counter()})
            row["density"].append(call.density)
            row["operators"][call.operator] += 1
        return {
            "method": self.method,
            "options": self.options,
            "family": self.family,
            "settings": self.settings,
            "density": self.density,
            "block_density": self.block_density,
            "sparse_density": self.sparse_density,
            "attention_calls": len(self.calls),
            "transformer_s": sum(self.forward_s.values()),
            "steps": {
                step: {
                    "density": _mean(row["density"]),
                    "operators": dict(row["operators"]),
                    "transformer_s": self.forward_s.get(None if step == "None" else int(step)),
                }
                for step, row in steps.items()
            },
            "layers": [
                {
                    "step": call.step,
                    "layer": call.layer,
                    "branch": call.branch,
                    "density": call.density,
                    "operator": call.operator,
                    "dense_because": call.reason,
                }
                for call in self.calls
            ],
            "rejected_operators": self.rejected,
            "notes": list(self.notes),
        }

    def __rich__(self) -> Table:
        """Render for rich."""
        from rich.table import Table

        title = f"{self.method} on {self.family}"
        if self.density is not None:
            title += f": density {self.density:.3f}"
        if self.sparse_density is not None:
            title += f", {self.sparse_density:.3f} where sparse"
        table = Table(title=title, caption="\n".join(self._remarks()) or None)
        for column in ("attention calls", "operator", "density", "computed", "why dense"):
            table.add_column(column)
        groups: dict[tuple[str, str], list[CallRecord]] = {}
        for call in self.calls:
            groups.setdefault((call.operator, call.reason), []).append(call)
        for (operator, reason), calls in groups.items():
            table.add_row(
                str(len(calls)),
                operator,
                f"{_mean([c.density for c in calls]):.3f}",
                f"{_mean([c.block_density for c in calls]):.3f}",
                reason,
            )
        return table

    def __str__(self) -> str:
        """Render as plain text."""
        from rich.console import Console

        console = Console(width=110, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def _remarks(self) -> list[str]:
        rejected = [f"{name} passed over: {why}" for name, why in self.rejected.items()]
        tuning = self.settings.get("tuning", {}).items()
        tiles = [f"tile shapes of {name}: {source}" for name, source in tuning]
        return rejected + tiles + list(self.notes)


def forward_seconds(forwards: list[tuple[int | None, Any, Any]]) -> dict[int | None, float]:
    """Sum (step, start, end) marks per step; marks are CUDA events or seconds."""
    seconds: dict[int | None, float] = {}
    for step, start, end in forwards:
        if isinstance(start, torch.cuda.Event):
            end.synchronize()
            spent = start.elapsed_time(end) / 1e3
        else:
            spent = end - start
        seconds[step] = seconds.get(step, 0.0) + spent
    return seconds


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
