"""What an accelerated pipeline really did: per call, and summed up for people and programs."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.kinds import Method
from dit_accel.plan import BlockSparsePlan, DensePlan, PastJointPlan
from dit_accel.policy import LEGEND, PolicyRow, policy_text

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from dit_accel.calibration import Calibration
    from dit_accel.choosing.choice import Choice
    from dit_accel.guard.records import GuardReport
    from dit_accel.parallel.reports import KnownShares


@dataclass(frozen=True)
class CallRecord:
    """One attention call of the last generation.

    Attributes:
        step: denoising step from 0, or None outside a pipeline.
        layer: attention layer from 0.
        branch: guidance branch.
        plan: what was run.
        operator: who ran it; "dense" for diffusers' own attention.
        precision: what its products were rounded to: "fp8" and the like, or the tensors' dtype.
        reason: why it was dense; empty if it was sparse.
        repaired: share of the heads that the quality guard computed densely after a sparse run.
    """

    step: int | None
    layer: int
    branch: str
    plan: DensePlan | BlockSparsePlan | PastJointPlan | KnownShares
    operator: str
    precision: str
    reason: str = ""
    repaired: float = 0.0

    @property
    def density(self) -> float:
        """Share of (query, key) pairs attended, text included; 1 if dense."""
        sparse = 1.0 if isinstance(self.plan, DensePlan) else self.plan.density
        return sparse + self.repaired * (1 - sparse)

    @property
    def block_density(self) -> float:
        """Share of (query, key) pairs computed, whole visited blocks counted; 1 if dense.

        Repaired heads were computed twice, so it may be over 1.
        """
        sparse = 1.0 if isinstance(self.plan, DensePlan) else self.plan.block_density
        return sparse + self.repaired


@dataclass(frozen=True)
class StepRecord:
    """One run of a transformer under a cache.

    Attributes:
        step: denoising step from 0, or None outside a pipeline.
        branch: guidance branch.
        ran: per block of the stack, whether it ran.
        why: why the step ran in full; empty if it reused.
        value: what the cache's gate compared with its threshold, if it did.
        attention_reused: attention modules whose output was reused inside blocks that ran.
    """

    step: int | None
    branch: str
    ran: tuple[bool, ...]
    why: str = ""
    value: float | None = None
    attention_reused: int = 0


@dataclass
class Recorder:
    """Collects the records of the running generation. One per acceleration."""

    generation: int = -1
    calls: list[CallRecord] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    perturbed: list[StepRecord] = field(default_factory=list)
    cache_bytes: int = 0
    layer_blocks: tuple[int | None, ...] = ()
    forwards: list[tuple[int | None, Any, Any]] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    tuning: dict[str, str] = field(default_factory=dict)  # where operators have tile shapes from
    notes: list[str] = field(default_factory=list)

    def begin(self, generation: int) -> None:
        """Forget the generation before; notes stay."""
        if generation != self.generation:
            self.generation = generation
            self.calls.clear()
            self.steps.clear()
            self.perturbed.clear()
            self.cache_bytes = 0
            self.forwards.clear()

    def repaired(self, share: float) -> None:
        """Note that this share of the heads of the latest call was computed densely as well."""
        if share:
            self.calls[-1] = replace(self.calls[-1], repaired=share)

    def note(self, text: str) -> None:
        """Keep a remark once."""
        if text not in self.notes:
            self.notes.append(text)

    def warn_switched_off(self, off: int, total: int) -> None:
        """Tell, once, that somebody replaced attention backends after acceleration."""
        text = (
            f"{off} of {total} attention layers no longer run through accelerate_pipeline: their "
            "processors or backends were changed after it (set_attention_backend, "
            "set_attn_processor, load_ip_adapter, ...). They run without the method; call "
            "accelerate_pipeline again to switch it back on."
        )
        if text not in self.notes:
            self.note(text)
            warnings.warn(text, stacklevel=2)


@dataclass(frozen=True)
class AccelerationReport:
    """What `acceleration_report` returns; prints as a table.

    Attributes:
        methods: the methods, their options as resolved.
        family: model family.
        settings: where schedule, options and tile shapes came from, and the schedule itself.
        calls: one record per attention call of the last generation.
        steps: with a cache, one record per run of a transformer.
        cache_bytes: most bytes that the cache held between steps.
        policy: per run of a transformer, what became of each block.
        forward_s: seconds per denoising step spent in transformers.
        rejected: operators that ``backend="auto"`` passed over, with the reason.
        notes: fallbacks and warnings.
        perturbed: with a guidance, one record per perturbed pass; blocks below the first perturbed
            one did not run where the conditional pass's were shared.
        calibration: how the cache's strength was chosen, if it was.
        guard: what the quality guard found and did; None if it was off.
        choice: what was measured and chosen for a budget, if there was one.
    """

    methods: tuple[Method, ...]
    family: str
    settings: dict[str, Any]
    calls: tuple[CallRecord, ...]
    steps: tuple[StepRecord, ...]
    cache_bytes: int
    policy: tuple[PolicyRow, ...]
    forward_s: dict[int | None, float]
    rejected: dict[str, str]
    notes: tuple[str, ...]
    perturbed: tuple[StepRecord, ...] = ()
    calibration: Calibration | None = None
    guard: GuardReport | None = None
    choice: Choice | None = None

    @property
    def method(self) -> str:
        """The methods' names."""
        return " + ".join(method.name for method in self.methods)

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """The methods' options as resolved, by name of the method."""
        return {method.name: asdict(method) for method in self.methods}

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

    @property
    def block_calls(self) -> int:
        """Calls of transformer blocks that there would be without the cache."""
        return sum(len(step.ran) for step in self.steps)

    @property
    def blocks_skipped(self) -> float | None:
        """Share of these that a cache left out; None without a cache."""
        ran = sum(sum(step.ran) for step in self.steps)
        return 1 - ran / self.block_calls if self.block_calls else None

    @property
    def perturbed_share(self) -> float | None:
        """Share of all blocks that ran in the perturbed passes; None without one."""
        if not self.perturbed:
            return None
        return _mean([sum(step.ran) / len(step.ran) for step in self.perturbed])

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
                    "precision": call.precision,
                    "dense_because": call.reason,
                    "repaired_share": call.repaired,
                }
                for call in self.calls
            ],
            "cache": self._cache_dict() if self.steps else None,
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "choice": self.choice.to_dict() if self.choice else None,
            "guidance": self._guidance_dict() if self.perturbed else None,
            "guard": self.guard.to_dict() if self.guard else None,
            "policy": {
                "legend": LEGEND,
                "rows": [[row.step, row.branch, row.marks] for row in self.policy],
            },
            "rejected_operators": self.rejected,
            "notes": list(self.notes),
        }

    def _cache_dict(self) -> dict[str, Any]:
        return {
            "block_calls": self.block_calls,
            "block_calls_run": sum(sum(step.ran) for step in self.steps),
            "blocks_skipped": self.blocks_skipped,
            "attention_reused": sum(step.attention_reused for step in self.steps),
            "peak_bytes": self.cache_bytes,
            "steps": [
                {
                    "step": step.step,
                    "branch": step.branch,
                    "blocks_run": sum(step.ran),
                    "full_because": step.why,
                    "value": step.value if step.value is None or isfinite(step.value) else None,
                }
                for step in self.steps
            ],
        }

    def _guidance_dict(self) -> dict[str, Any]:
        return {
            "extra_passes": sum(step.branch == "perturbed" for step in self.perturbed),
            "blocks_share": self.perturbed_share,
            "steps": [
                {"step": step.step, "branch": step.branch, "blocks_run": sum(step.ran)}
                for step in self.perturbed
            ],
        }

    def save_picture(self, path: str | Path) -> None:
        """Write a PNG of layers by steps: density, measured error and operator.

        Raises:
            OptionError: if there is no attention call to draw.
        """
        from dit_accel.report_png import save_report_picture

        save_report_picture(self, path)

    def tables(self) -> list[Table]:
        """Return what attention, the cache and the guard did, as far as they are attached."""
        tables = []
        if self.calls or not self.steps:
            tables.append(self._attention_table())
        if self.steps:
            tables.append(self._cache_table())
        if self.guard and self.guard.records:
            tables.append(self.guard.table())
        return tables

    def _attention_table(self) -> Table:
        from rich.table import Table

        title = f"{self.method} on {self.family}"
        if self.density is not None:
            title += f": density {self.density:.3f}"
        if self.sparse_density is not None:
            title += f", {self.sparse_density:.3f} where sparse"
        table = Table(title=title, caption="\n".join(self._remarks()) or None)
        for column in (
            "attention calls",
            "operator",
            "precision",
            "density",
            "computed",
            "why dense",
        ):
            table.add_column(column)
        groups: dict[tuple[str, str, str], list[CallRecord]] = {}
        for call in self.calls:
            groups.setdefault((call.operator, call.precision, call.reason), []).append(call)
        for (operator, precision, reason), calls in groups.items():
            table.add_row(
                str(len(calls)),
                operator,
                precision,
                f"{_mean([c.density for c in calls]):.3f}",
                f"{_mean([c.block_density for c in calls]):.3f}",
                reason,
            )
        return table

    def _cache_table(self) -> Table:
        from rich.table import Table

        title = f"{self.method} on {self.family}: {self.blocks_skipped:.1%} of blocks skipped"
        caption = [f"at most {self.cache_bytes / 2**20:.1f} MiB kept between steps"]
        if not self.calls:
            caption += self._remarks()
        table = Table(title=title, caption="\n".join(caption))
        for column in ("branch", "steps", "blocks run", "attention reused", "why in full"):
            table.add_column(column)
        groups: dict[tuple[str, str], list[StepRecord]] = {}
        for step in self.steps:
            groups.setdefault((step.branch, step.why), []).append(step)
        for (branch, why), steps in groups.items():
            run, total = (sum(f(s.ran) for s in steps) for f in (sum, len))
            reused = str(sum(step.attention_reused for step in steps))
            table.add_row(branch, str(len(steps)), f"{run} of {total}", reused, why)
        return table

    def __rich__(self) -> Group:
        """Render for rich."""
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = list(self.tables())
        if self.steps:
            parts.append(Text(f"{LEGEND}\n{policy_text(self.policy)}"))
        return Group(*parts)

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
        curve = self.calibration.lines() if self.calibration else []
        curve += self.choice.lines() if self.choice else []
        return rejected + tiles + curve + self._guidance_remarks() + list(self.notes)

    def _guidance_remarks(self) -> list[str]:
        if not self.perturbed:
            return []
        extra = sum(step.branch == "perturbed" for step in self.perturbed)
        if not extra:
            return [f"{len(self.perturbed)} unconditional passes perturbed, none added"]
        return [f"{extra} perturbed passes added, {self.perturbed_share:.0%} of the blocks in each"]


def time_mark(like: Any) -> Any:
    """Note the time: an event in the GPU's queue, or seconds."""
    if isinstance(like, torch.cuda.Event) or (isinstance(like, Tensor) and like.is_cuda):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


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
