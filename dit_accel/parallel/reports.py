"""One report of what all ranks did."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from dit_accel.guard.records import GuardReport
from dit_accel.plan import DensePlan
from dit_accel.report import AccelerationReport, CallRecord

T = TypeVar("T")


@dataclass(frozen=True)
class KnownShares:
    """What a report keeps of a plan that another rank ran."""

    density: float
    block_density: float


def report_of_ranks(report: AccelerationReport) -> AccelerationReport:
    """Put the reports of all ranks together; every rank calls it, and gets the same.

    A call that several ranks ran, each for a share of the heads, counts once, with the mean of
    their densities. Calls that only some ranks ran, because each has a guidance pass of its own,
    are all there. Times and bytes are those of the rank that has most.
    """
    import torch.distributed as dist

    own = replace(report, calls=tuple(_portable(call) for call in report.calls))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return merged(every)


def merged(reports: Sequence[AccelerationReport]) -> AccelerationReport:
    """Put reports of one generation together, those of rank 0 first."""
    times: dict[int | None, float] = defaultdict(float)
    for report in reports:
        for step, seconds in report.forward_s.items():
            times[step] = max(times[step], seconds)
    rejected = {name: why for report in reports for name, why in report.rejected.items()}

    def all_of(records: Callable[[AccelerationReport], Iterable[T]]) -> tuple[T, ...]:
        by_call = _by_call([records(report) for report in reports], lambda one: _place(one))
        return tuple(found[0] for found in by_call)

    return replace(
        reports[0],
        calls=tuple(
            _mean(found)
            for found in _by_call(
                [report.calls for report in reports],
                lambda call: (call.step, call.layer, call.branch),
            )
        ),
        steps=all_of(lambda report: report.steps),
        perturbed=all_of(lambda report: report.perturbed),
        policy=all_of(lambda report: report.policy),
        guard=_one_guard([report.guard for report in reports if report.guard is not None]),
        cache_bytes=max(report.cache_bytes for report in reports),
        forward_s=dict(times),
        rejected=rejected,
        notes=tuple(dict.fromkeys(note for report in reports for note in report.notes)),
    )


def _one_guard(reports: Sequence[GuardReport]) -> GuardReport | None:
    """Put together what the guards of ranks found; those that share a sequence found the same."""
    if not reports:
        return None
    by_call = _by_call(
        [report.records for report in reports],
        lambda record: (record.step, record.layer, record.branch),
    )
    layers = {where for report in reports for where in report.dense_layers}
    first = [report.dense_from for report in reports if report.dense_from is not None]
    return replace(
        reports[0],
        records=tuple(found[0] for found in by_call),
        dense_layers=tuple(sorted(layers)),
        dense_from=min(first, default=None),
    )


def _place(record: Any) -> Hashable:
    return record.step, record.branch


def _by_call(records: Sequence[Iterable[T]], place: Callable[[T], Hashable]) -> Iterable[list[T]]:
    """Group records of the same call, in the order in which calls first occur."""
    found: dict[Hashable, list[T]] = defaultdict(list)
    for of_rank in records:
        seen: Counter[Hashable] = Counter()
        for record in of_rank:
            where = place(record)
            found[where, seen[where]].append(record)
            seen[where] += 1
    return found.values()


def _portable(call: CallRecord) -> CallRecord:
    """Return a record that can be sent: without masks and tensors."""
    if isinstance(call.plan, DensePlan):
        return call
    return replace(call, plan=KnownShares(call.plan.density, call.plan.block_density))


def _mean(calls: Sequence[CallRecord]) -> CallRecord:
    if len(calls) == 1 or any(isinstance(call.plan, DensePlan) for call in calls):
        return calls[0]
    density, block_density = (
        sum(getattr(call.plan, name) for call in calls) / len(calls)
        for name in ("density", "block_density")
    )
    return replace(calls[0], plan=KnownShares(density, block_density))
