"""VBench's score and file layout: how dimensions add up, and what the official tool reads.

VBench: Huang et al. 2024, arXiv 2311.17982.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from dit_accel.errors import OptionError

Group = Literal["quality", "semantic"]


@dataclass(frozen=True)
class Scale:
    """Where a dimension belongs, which values count as 0 and 1, and how much it counts."""

    group: Group
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


SCALES: Mapping[str, Scale] = MappingProxyType(
    {
        "subject_consistency": Scale("quality", 0.1462),
        "background_consistency": Scale("quality", 0.2615),
        "temporal_flickering": Scale("quality", 0.6293),
        "motion_smoothness": Scale("quality", 0.706, 0.9975),
        "dynamic_degree": Scale("quality", weight=0.5),
        "aesthetic_quality": Scale("quality"),
        "imaging_quality": Scale("quality"),
        "object_class": Scale("semantic"),
        "multiple_objects": Scale("semantic"),
        "human_action": Scale("semantic"),
        "color": Scale("semantic"),
        "spatial_relationship": Scale("semantic"),
        "scene": Scale("semantic", high=0.8222),
        "appearance_style": Scale("semantic", 0.0009, 0.2855),
        "temporal_style": Scale("semantic", high=0.364),
        "overall_consistency": Scale("semantic", high=0.364),
    }
)
"""VBench's dimensions in its order."""

QUALITY_SHARE, SEMANTIC_SHARE = 0.8, 0.2
CUSTOM_DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
"""What the official tool measures of videos of other prompts than its own."""

SAMPLE_NUMBER = re.compile(r"-\d+$")


def normalised(name: str, value: float) -> float:
    """Return a dimension's value of a data set on VBench's scale of 0 to 1, without its weight."""
    scale = SCALES[name]
    return (value - scale.low) / (scale.high - scale.low)


def vbench_scores(values: Mapping[str, float]) -> dict[str, float]:
    """Return VBench's "quality", "semantic" and "total", each only if all it needs is there.

    The official script takes a missing dimension for 0, which gives a number that looks like a
    score and is none.

    Args:
        values: of a data set, by dimension; names that VBench doesn't have are ignored.
    """
    scores: dict[str, float] = {}
    groups: tuple[Group, ...] = ("quality", "semantic")
    for group in groups:
        members = {name: scale for name, scale in SCALES.items() if scale.group == group}
        if members.keys() <= values.keys():
            total = sum(scale.weight * normalised(n, values[n]) for n, scale in members.items())
            scores[group] = total / sum(scale.weight for scale in members.values())
    if len(scores) == len(groups):
        scores["total"] = QUALITY_SHARE * scores["quality"] + SEMANTIC_SHARE * scores["semantic"]
    return scores


def measured_of(values: Mapping[str, float], group: Group) -> tuple[int, int]:
    """Return how many of a group's dimensions are there, and of how many."""
    members = [name for name, scale in SCALES.items() if scale.group == group]
    return sum(name in values for name in members), len(members)


def video_name(prompt: str, sample: int, suffix: str = ".mp4") -> str:
    """Return the file name of a prompt's ``sample``-th video, from 0."""
    return f"{prompt}-{sample}{suffix}"


def prompt_of(path: Path) -> str:
    """Return the prompt that a file name holds: its stem without the number of the sample."""
    return SAMPLE_NUMBER.sub("", path.stem)


def read_values(path: Path) -> dict[str, float]:
    """Return the values in an ``..._eval_results.json`` of the official tool, by dimension.

    Raises:
        OptionError: if it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(entry[0]) for name, entry in content.items() if name in SCALES}
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise OptionError(f"{str(path)!r} is no result of VBench's tool: {error}") from error


def official_results(
    values: Mapping[str, float], videos: Mapping[str, Sequence[tuple[str, float]]]
) -> dict[str, Any]:
    """Return VBench's dimensions as its tool writes them to ``..._eval_results.json``.

    Args:
        values: of the data set, by dimension.
        videos: by dimension, path and value of each video that counts.
    """
    return {
        name: [
            values[name],
            [{"video_path": path, "video_results": _official(name, v)} for path, v in videos[name]],
        ]
        for name in SCALES
        if name in values and name in videos
    }


def _official(name: str, value: float) -> float | bool:
    """Return one video's value in the tool's unit."""
    if name == "dynamic_degree":
        return bool(value)
    return 100 * value if name == "imaging_quality" else value
