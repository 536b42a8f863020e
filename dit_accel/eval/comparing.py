"""Two runs beside each other: paired differences, and a check that quality did not drop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dit_accel.eval.measures import METRICS, value_of
from dit_accel.eval.results import Key, averaged, deltas, samples_of

Row = dict[str, Any]


@dataclass
class Comparison:
    """What two runs have in common.

    Attributes:
        rows: one for each method and metric: "first" and "second" (means over the shared samples),
            "delta" (second less first) with "delta_interval", and the number of "prompts".
        problems: a sentence for all that could not be compared, or is not what it seems.
    """

    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much worse a run may be than a baseline, in means over prompts; None: any amount.

    Attributes:
        psnr_drop: dB of PSNR to dense.
        ssim_drop: of SSIM to dense.
        following_drop: share of the attributes that come out, in [0, 1].
        slowdown: share of time per sample, such as 0.1 for a tenth more.
    """

    psnr_drop: float | None = None
    ssim_drop: float | None = None
    following_drop: float | None = None
    slowdown: float | None = None


def compare_runs(first: Row, second: Row, *, whole: bool = True) -> Comparison:
    """Compare the methods and prompts that two runs share, sample by sample.

    Args:
        first: results of `read_results`.
        second: likewise.
        whole: whether methods of the second run that the first lacks are problems, too.
    """
    found = Comparison()
    labels = list(first["methods"])
    for label in labels:
        if label not in second["methods"]:
            found.problems.append(f"{label} is in the first run only")
    if whole:
        extra = [label for label in second["methods"] if label not in labels]
        found.problems += [f"{label} is in the second run only" for label in extra]
    for name, which in ((first, "first"), (second, "second")):
        found.problems += [f"{which} run: {problem}" for problem in name["problems"]]
    for label in (label for label in labels if label in second["methods"]):
        mine, other = samples_of(first["rows"], label), samples_of(second["rows"], label)
        shared = _comparable(label, mine, other, found.problems)
        for metric, (title, _) in METRICS.items():
            row = _paired(metric, {k: mine[k] for k in shared}, {k: other[k] for k in shared})
            if row:
                found.rows.append({"method": label, "metric": metric, "title": title, **row})
    return found


def check_run(run: Row, baseline: Row, limits: Limits) -> Comparison:
    """Compare a run with its baseline, and add a problem for each limit that it breaks."""
    found = compare_runs(baseline, run, whole=False)
    drops = {
        "psnr_db": limits.psnr_drop,
        "ssim": limits.ssim_drop,
        "following": limits.following_drop,
    }
    for metric, limit in drops.items():
        rows = [row for row in found.rows if row["metric"] == metric]
        if limit is not None and not rows:
            found.problems.append(f"{METRICS[metric][0]} was asked for, but not measured in both")
        for row in rows:
            if limit is not None and -row["delta"] > limit:
                found.problems.append(
                    f"{row['method']}: {row['title']} dropped by {-row['delta']:.4g}, more than "
                    f"{limit:g} ({row['first']:.4g} to {row['second']:.4g})"
                )
    if limits.slowdown is not None:
        found.problems += _slower(run, baseline, limits.slowdown)
    return found


def _comparable(
    label: str, first: Mapping[Key, Row], second: Mapping[Key, Row], problems: list[str]
) -> list[Key]:
    """Return the samples that both have, of one size and prompt; name the others."""
    for one, other, which in ((first, second, "second"), (second, first, "first")):
        missing = sorted(one.keys() - other.keys())
        if missing:
            problems.append(f"{label}: the {which} run lacks {_listed(missing)}")
    shared = sorted(first.keys() & second.keys())
    renamed = [k for k in shared if first[k]["prompt"] != second[k]["prompt"]]
    if renamed:
        problems.append(f"{label}: the runs have other texts for {_listed(renamed)}")
    resized = [k for k in shared if first[k]["size"] != second[k]["size"]]
    if resized:
        sizes = ("x".join(map(str, run[resized[0]]["size"])) for run in (first, second))
        problems.append(
            f"{label}: sizes differ, {' and '.join(sizes)} (frames x height x width), for "
            f"{_listed(resized)}"
        )
    return [key for key in shared if key not in {*renamed, *resized}]


def _paired(metric: str, first: Mapping[Key, Row], second: Mapping[Key, Row]) -> Row:
    differences = deltas(metric, second, first)
    if not differences:
        return {}
    delta, bounds = averaged(differences)
    before = {key: value_of(first[key], metric) for key in differences}
    return {
        "prompts": len({index for index, _ in differences}),
        "first": (mean := averaged({k: v for k, v in before.items() if v is not None})[0]),
        "second": mean + delta,
        "delta": delta,
        "delta_interval": bounds,
    }


def _slower(run: Row, baseline: Row, limit: float) -> list[str]:
    times = [
        {line["method"]: line["speed"].get("generate_s") for line in results["summary"]}
        for results in (run, baseline)
    ]
    problems = []
    for label, before in times[1].items():
        now = times[0].get(label)
        if now and before and now / before - 1 > limit:
            more = f"{now / before - 1:.0%} more than {before:.3g} s"
            problems.append(f"{label}: a sample takes {now:.3g} s, {more}")
    return problems


def _listed(keys: Sequence[Key]) -> str:
    """Name the first samples, and how many more there are."""
    named = ", ".join(f"prompt {index} (seed {seed})" for index, seed in keys[:3])
    return named + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
