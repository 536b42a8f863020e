"""What a run's samples add up to: ``results.json``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from dit_accel.errors import OptionError
from dit_accel.eval.candidates import DENSE
from dit_accel.eval.measures import METRICS, value_of
from dit_accel.eval.statistics import by_prompt, interval
from dit_accel.eval.suites import Entry
from dit_accel.files import write_text
from dit_accel.world.worlds import shares_right

RESULTS_FILE = "results.json"
KIND = "eval"
DENSITIES = ("computed_density", "attended_density", "sparse_density", "blocks_skipped", "reaches")
Row = dict[str, Any]
Key = tuple[int, int]
"""Index of the prompt, and seed."""


def build_results(
    journal: Iterable[Row], *, entries: Sequence[Entry], labels: Sequence[str]
) -> Row:
    """Return what a run's journal says about these samples of these candidates.

    Args:
        journal: its rows; of several about one sample the last that succeeded counts.
        entries: the suite's.
        labels: of the candidates, the dense baseline first.

    Returns:
        "kind"; "manifest" of the last session, and when and at which commits there were
        "sessions"; "settings"; "methods" with their options and schedule as resolved; "summary",
        one row a candidate (see `summarise`); "problems", a sentence for each sample that failed,
        is missing or was compared with another dense sample; and "rows", one a sample.
    """
    sessions: list[Row] = []
    found: dict[tuple[str, int, int], Row] = {}
    for row in journal:
        if row.get("kind") == "session":
            sessions.append(row)
        elif row.get("kind") == "sample":
            key = row["method"], row["index"], row["seed"]
            if "clip" in row or "clip" not in found.get(key, {}):
                found[key] = {name: value for name, value in row.items() if name != "kind"}
    last = sessions[-1]
    methods: Row = {}
    for session in sessions:
        methods |= session["methods"]
    rows, problems = [], []
    for label in labels:
        for entry in entries:
            row = found.get((label, entry.index, entry.seed), {"failed": "missing"})
            if "clip" in row:
                rows.append(_without_settings(row, methods[label]))
            else:
                why = row.get("refused") or row.get("failed")
                problems.append(f"{_named(label, entry.index, entry.seed)}: {why}")
    problems += _other_references(rows)
    return {
        "kind": KIND,
        "manifest": last["manifest"],
        "sessions": [
            {name: session["manifest"][name] for name in ("date", "commit", "processes")}
            for session in sessions
        ],
        "settings": last["settings"],
        "methods": {label: methods[label] for label in labels},
        "summary": summarise(rows, labels),
        "problems": problems,
        "rows": rows,
    }


def summarise(rows: Sequence[Row], labels: Sequence[str]) -> list[Row]:
    """Return, for each candidate, means over its samples.

    A metric has "mean" and "interval"; one that the dense baseline has too, such as "following",
    also "delta", its mean difference to dense over the same samples, with "delta_interval". Times
    are medians over batches, with "speedup" and "step_speedup" over dense; memory is the most.
    """
    grouped = {label: samples_of(rows, label) for label in labels}
    dense = grouped.get(DENSE, {})
    summary = []
    for label, samples in grouped.items():
        line: Row = {"method": label, "samples": len(samples)}
        for metric in METRICS:
            line |= _metric(metric, samples, dense if label != DENSE else {})
        marks = [row["marks"] for row in samples.values() if "marks" in row]
        if marks:
            line["following_by_kind"] = shares_right(marks)
        if any("identical" in row for row in samples.values()):
            line["identical"] = sum(row.get("identical", False) for row in samples.values())
        for name in DENSITIES:
            values = [row.get("acceleration", {}).get(name) for row in samples.values()]
            known = [value for value in values if value is not None]
            if known:
                line[name] = fmean(known)
        line["speed"] = _speed(samples, dense)
        summary.append(line)
    return summary


def samples_of(rows: Iterable[Row], label: str) -> dict[Key, Row]:
    """Return a candidate's rows by prompt and seed."""
    return {(row["index"], row["seed"]): row for row in rows if row["method"] == label}


def deltas(metric: str, samples: Mapping[Key, Row], others: Mapping[Key, Row]) -> dict[Key, float]:
    """Return how much more of ``metric`` samples have than those of the same prompt and seed."""
    found = {}
    for key in samples.keys() & others.keys():
        mine, other = value_of(samples[key], metric), value_of(others[key], metric)
        if mine is not None and other is not None:
            found[key] = mine - other
    return dict(sorted(found.items()))


def averaged(values: Mapping[Key, float]) -> tuple[float, tuple[float, float]]:
    """Return the mean over prompts and its interval."""
    prompts = by_prompt((index, value) for (index, _), value in values.items())
    return fmean(prompts), interval(prompts)


def write_results(content: Row, path: Path) -> None:
    """Write results, one line a row, so that large runs stay readable and small."""
    head = {name: value for name, value in content.items() if name != "rows"}
    text = json.dumps({**head, "rows": []}, indent=1, allow_nan=False)
    rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in content["rows"])
    write_text(path, text.removesuffix("[]\n}") + f"[\n{rows}\n ]\n}}\n")


def read_results(path: Path) -> Row:
    """Return the results at ``path``, a run's folder or a copy of its ``results.json``.

    Raises:
        OptionError: if there are none.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    try:
        content: Row = json.loads(file.read_text(encoding="utf-8"))
        if content["kind"] != KIND:
            raise ValueError(f"its kind is {content['kind']!r}")
        for name in ("settings", "methods", "summary", "problems", "rows"):
            content[name]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise OptionError(
            f"{str(file)!r} has no results of `dit-accel eval` ({error}): name a run's folder or "
            f"its {RESULTS_FILE}; a run that was cut off is finished by the command that began it."
        ) from error
    return content


def _other_references(rows: Sequence[Row]) -> list[str]:
    """Name the samples whose dense one was made again after a break, and came out otherwise."""
    dense = {key: row["frames_sha256"] for key, row in samples_of(rows, DENSE).items()}
    return [
        f"{_named(row['method'], row['index'], row['seed'])}: compared with a dense sample that "
        "differs from the one kept, which this machine can't repeat; --force starts again"
        for row in rows
        if row.get("dense_sha256") not in (None, dense.get((row["index"], row["seed"])))
    ]


def _named(label: str, index: int, seed: int) -> str:
    return f"{label}, prompt {index}, seed {seed}"


def _metric(metric: str, samples: Mapping[Key, Row], dense: Mapping[Key, Row]) -> Row:
    values = {key: value_of(row, metric) for key, row in samples.items()}
    known = {key: value for key, value in values.items() if value is not None}
    if not known:
        return {}
    mean, bounds = averaged(known)
    line: Row = {"mean": mean, "interval": bounds}
    to_dense = deltas(metric, samples, dense)
    if to_dense:
        line["delta"], line["delta_interval"] = averaged(to_dense)
    return {metric: line}


def _speed(samples: Mapping[Key, Row], dense: Mapping[Key, Row]) -> Row:
    mine, baseline = _times(samples), _times(dense)
    for name, ratio in (("generate_s", "speedup"), ("step_s", "step_speedup")):
        if name in mine and name in baseline:
            mine[ratio] = baseline[name] / mine[name]
    return mine


def _times(samples: Mapping[Key, Row]) -> Row:
    speeds = [row["speed"] for row in samples.values()]
    if not speeds:
        return {}
    times: Row = {}
    for name, of in (("generate_s", median), ("step_s", median), ("energy_j", median),
                     ("peak_memory_gib", max)):  # fmt: skip
        known = [speed[name] for speed in speeds if speed[name] is not None]
        times[name] = of(known) if known else None
    return {**times, "repeats": speeds[0]["repeats"], "batch": speeds[0]["batch"]}


def _without_settings(row: Row, method: Row) -> Row:
    """Move what is the same for all samples of a method to the method."""
    if "acceleration" not in row:
        return row
    about = dict(row["acceleration"])
    for name in ("settings", "operators"):
        if name in about:
            method[name] = about.pop(name)
    return {**row, "acceleration": about}
