"""Who did what: for each step and block, whether it was cached, dense, or sparse at a density.

A sparse method and a cache fill this one table together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dit_accel.report import CallRecord, StepRecord

CACHED, DENSE = ".", "#"
SPARSE = "123456789"
LEGEND = "one mark per block: # dense, 1 to 9 sparse at tenths of density, . cached"


@dataclass(frozen=True)
class PolicyRow:
    """One run of a transformer.

    Attributes:
        step: denoising step from 0; None outside a pipeline.
        branch: guidance branch.
        marks: a mark per block, as in `LEGEND`.
    """

    step: int | None
    branch: str
    marks: str


def policy_rows(
    calls: Sequence[CallRecord], steps: Sequence[StepRecord], layer_blocks: Sequence[int | None]
) -> tuple[PolicyRow, ...]:
    """Return the table from what was recorded.

    Args:
        calls: attention calls.
        steps: what a cache did; empty without one.
        layer_blocks: the block that each attention layer is part of; None for those outside.
    """
    num_blocks = 1 + max((b for b in layer_blocks if b is not None), default=-1)
    rows: dict[tuple[int | None, str], list[str]] = {}
    for step in steps:
        marks = [DENSE if ran else CACHED for ran in step.ran]
        rows[step.step, step.branch] = marks or [DENSE] * num_blocks
    for call in calls:
        block = layer_blocks[call.layer] if call.layer < len(layer_blocks) else None
        if block is None:
            continue
        marks = rows.setdefault((call.step, call.branch), [DENSE] * num_blocks)
        if not call.reason:
            tenths = min(max(round(call.density * 10), 1), 9)
            marks[block] = SPARSE[tenths - 1]
    return tuple(PolicyRow(*key, "".join(marks)) for key, marks in rows.items())


def policy_text(rows: Sequence[PolicyRow]) -> str:
    """Return the table as lines, successive steps that are alike in one."""
    lines = []
    for branch in dict.fromkeys(row.branch for row in rows):
        groups: list[tuple[list[int | None], str]] = []
        for row in (row for row in rows if row.branch == branch):
            if groups and groups[-1][1] == row.marks:
                groups[-1][0].append(row.step)
            else:
                groups.append(([row.step], row.marks))
        for steps, marks in groups:
            span = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]}-{steps[-1]}"
            lines.append(f"{branch:>11} {span:>7}  {marks}")
    return "\n".join(lines)
