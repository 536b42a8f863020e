"""What the quality guard found and did, call by call and summed up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from dit_accel.guard.options import QualityGuard

if TYPE_CHECKING:
    from rich.table import Table

ROWS = 8
"""Layers that the table shows."""


@dataclass(frozen=True)
class GuardRecord:
    """One sparse call that the guard probed or repaired.

    Attributes:
        step: denoising step from 0, or None outside a pipeline.
        layer: attention layer from 0.
        branch: guidance branch.
        errors: per head, relative L2 error of the sparse output; empty if not probed. Infinite
            where it is not finite.
        not_finite: heads whose sparse output held NaN or infinity.
        tripped: heads that went over the budget here.
        dense: heads that were computed densely here.
    """

    step: int | None
    layer: int
    branch: str
    errors: tuple[float, ...]
    not_finite: tuple[int, ...] = ()
    tripped: tuple[int, ...] = ()
    dense: tuple[int, ...] = ()

    @property
    def worst(self) -> float | None:
        """Largest error of a head; None if not probed."""
        return max(self.errors) if self.errors else None


@dataclass(frozen=True)
class GuardReport:
    """What the guard did in one generation.

    Attributes:
        options: its options.
        records: what it found and did; calls that were neither probed nor repaired have none.
        dense_layers: (layer, branch) of layers that went dense as a whole.
        dense_from: step from which on all layers went dense, if one did.
    """

    options: QualityGuard
    records: tuple[GuardRecord, ...]
    dense_layers: tuple[tuple[int, str], ...] = ()
    dense_from: int | None = None

    @property
    def probes(self) -> int:
        """Calls that were compared with dense attention."""
        return sum(bool(record.errors) for record in self.records)

    @property
    def trips(self) -> int:
        """Times that a head went over the budget."""
        return sum(len(record.tripped) for record in self.records)

    @property
    def not_finite(self) -> int:
        """Heads, counted in each call, whose sparse output was not finite."""
        return sum(len(record.not_finite) for record in self.records)

    @property
    def repairs(self) -> int:
        """Heads, counted in each call, that were computed densely after a sparse run."""
        return sum(len(record.dense) for record in self.records)

    @property
    def worst(self) -> float | None:
        """Largest error of a head in any probe; None if nothing was probed."""
        return max((max(record.errors) for record in self.records if record.errors), default=None)

    def worst_by(self, key: Callable[[GuardRecord], Any]) -> dict[Any, float]:
        """Return the largest error of the probes that share a key, e.g. their layer."""
        found: dict[Any, float] = {}
        for record in self.records:
            if record.errors:
                where = key(record)
                found[where] = max(found.get(where, 0.0), *record.errors)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values; an infinite error is None."""
        by_step = self.worst_by(lambda record: record.step)
        by_layer = self.worst_by(lambda record: record.layer)
        return {
            "options": asdict(self.options),
            "probes": self.probes,
            "worst_error": finite_or_none(self.worst),
            "trips": self.trips,
            "repairs": self.repairs,
            "not_finite": self.not_finite,
            "dense_layers": [list(where) for where in self.dense_layers],
            "dense_from_step": self.dense_from,
            "worst_error_by_step": {str(s): finite_or_none(e) for s, e in by_step.items()},
            "worst_error_by_layer": {str(i): finite_or_none(e) for i, e in by_layer.items()},
            "calls": [
                {
                    "step": record.step,
                    "layer": record.layer,
                    "branch": record.branch,
                    "errors": [finite_or_none(error) for error in record.errors],
                    "not_finite_heads": list(record.not_finite),
                    "tripped_heads": list(record.tripped),
                    "dense_heads": list(record.dense),
                }
                for record in self.records
            ],
        }

    def table(self) -> Table:
        """Return a row for each of the worst layers."""
        from rich.table import Table

        title = f"quality guard: {self.probes} probes"
        if self.worst is not None:
            title += f", worst error {self.worst:.3f} (budget {self.options.max_error:g})"
        layers: dict[int, list[GuardRecord]] = {}
        for record in self.records:
            layers.setdefault(record.layer, []).append(record)
        worst = sorted(layers.items(), key=lambda item: _badness(item[1]), reverse=True)
        remarks = self._remarks()
        if len(worst) > ROWS:
            remarks.append(f"{len(worst) - ROWS} layers with less error are not shown")
        table = Table(title=title, caption="\n".join(remarks))
        for column in ("layer", "probes", "worst error", "at step", "mean", "trips", "repairs"):
            table.add_column(column)
        for layer, records in worst[:ROWS]:
            table.add_row(str(layer), *_row(records))
        return table

    def _remarks(self) -> list[str]:
        remarks = []
        if not self.trips and not self.not_finite:
            remarks.append("every probed head stayed within the budget")
        if self.trips:
            did = "none repaired" if self.options.action == "report" else "repaired"
            remarks.append(f"{self.trips} times a head went over the budget: {did}")
        if self.not_finite:
            remarks.append(f"{self.not_finite} outputs of heads were not finite")
        if self.dense_layers:
            remarks.append(f"{len(self.dense_layers)} layers went dense as a whole")
        if self.dense_from is not None:
            remarks.append(f"all layers went dense at step {self.dense_from}")
        return remarks


def finite_or_none(value: float | None) -> float | None:
    """Return ``value`` as JSON has it."""
    return value if value is not None and isfinite(value) else None


def _badness(records: Sequence[GuardRecord]) -> tuple[bool, float]:
    """Return what puts a layer's records in order."""
    errors = [error for record in records for error in record.errors]
    return any(record.not_finite for record in records), max(errors, default=0.0)


def _row(records: Sequence[GuardRecord]) -> tuple[str, ...]:
    """Return what the table says of one layer."""
    probed = [record for record in records if record.errors]
    worst = max(probed, key=lambda record: max(record.errors), default=None)
    errors = [error for record in probed for error in record.errors]
    return (
        str(len(probed)),
        "" if worst is None else f"{max(worst.errors):.3f}",
        "" if worst is None else str(worst.step),
        f"{sum(errors) / len(errors):.3f}" if errors else "",
        str(sum(len(record.tripped) for record in records)),
        str(sum(len(record.dense) for record in records)),
    )
