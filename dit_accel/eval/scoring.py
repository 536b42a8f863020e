"""Measuring videos that exist already: the work of ``dit-accel eval score``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_accel.environment import environment
from dit_accel.errors import DitAccelError, VideoError
from dit_accel.eval.backbones import BACKBONES, Backbone
from dit_accel.eval.clips import Clip
from dit_accel.eval.dimensions import NO_BACKBONES, load_dimensions
from dit_accel.eval.dimensions.base import Dimension, weighted_mean
from dit_accel.eval.fidelity import fidelity, find_convention
from dit_accel.eval.lpips import installed_lpips
from dit_accel.eval.semantic import make_semantic_reader, mean_values
from dit_accel.eval.vbench import official_results, vbench_scores
from dit_accel.eval.videos import Video, read_video

Row = dict[str, Any]
Progress = Callable[[str, int, int], None]
FLICKER = "temporal_flickering"
FLICKER_SAMPLES = 5  # still videos of a prompt that VBench takes into account


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What to measure of videos.

    Attributes:
        dimensions: names; None takes all whose networks are here.
        backbones: networks by name, instead of our own.
        world: a drawn world whose checker reads how prompts are followed.
        dense: a folder with the dense run's videos, under the same file names.
        convention: how fidelity to them is computed.
        official: values by dimension from VBench's own tool, for what isn't measured here.
        device: a torch device.

    Raises:
        OptionError: if there is no such convention.
    """

    dimensions: Sequence[str] | None = None
    backbones: Mapping[str, Backbone] = field(default_factory=lambda: NO_BACKBONES)
    world: str | None = None
    dense: Path | None = None
    convention: str = "ours"
    official: Mapping[str, float] = field(default_factory=dict)
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check what can be checked without videos."""
        find_convention(self.convention)


def score_clips(
    clips: Sequence[Clip], scoring: Scoring, *, progress: Progress | None = None
) -> Row:
    """Return what was measured of each clip, and of all together.

    What can't be read or measured is named in its row, and the rest goes on.

    Args:
        clips: with their prompts.
        scoring: what to measure.
        progress: told of every clip.

    Returns:
        "environment", "settings", "left_out" (why dimensions were not measured), "values" (of the
        data set, by dimension), "scores" (VBench's, where complete), "fidelity" and "following"
        (means), "problems" (a sentence each), and "rows".

    Raises:
        OptionError: if a named dimension, convention or world doesn't exist.
        BackboneError: if a named dimension's network can't be loaded.
    """
    dimensions, left_out = load_dimensions(
        scoring.dimensions, device=scoring.device, backbones=scoring.backbones
    )
    measurer = _Measurer(scoring, dimensions)
    rows = []
    for done, clip in enumerate(clips):
        if progress is not None:
            progress("videos", done, len(clips))
        rows.append(measurer.measure(clip))
    if progress is not None:
        progress("videos", len(clips), len(clips))
    return {
        "environment": environment(scoring.device),
        "settings": _settings(scoring, dimensions),
        "left_out": left_out,
        **summarise(rows, dimensions, scoring.official),
        "rows": rows,
    }


def summarise(
    rows: Sequence[Row], dimensions: Mapping[str, Dimension], official: Mapping[str, float]
) -> Row:
    """Return "values", "scores", "fidelity", "following", "counted" and "problems" of rows.

    Args:
        rows: as `score_clips` returns them.
        dimensions: that were measured.
        official: values of dimensions that weren't.
    """
    values, counted = {}, {}
    for name, dimension in dimensions.items():
        kept = _that_count(rows, name)
        counted[name] = len(kept)
        if kept:
            weights = [dimension.weight(row["frames"]) for row in kept]
            values[name] = weighted_mean([row["values"][name] for row in kept], weights)
    values = {**official, **values}
    return {
        "values": values,
        "counted": counted,
        "scores": vbench_scores(values),
        "fidelity": mean_values(row.get("fidelity", {}) for row in rows),
        "following": mean_values(row.get("following", {}) for row in rows),
        "problems": [f"{row['video']}: {why}" for row in rows for why in row["problems"]],
    }


def as_official(result: Row) -> dict[str, Any]:
    """Return what `score_clips` returned in the layout of VBench's ``..._eval_results.json``."""
    videos = {
        name: [(row["video"], row["values"][name]) for row in _that_count(result["rows"], name)]
        for name in result["counted"]
    }
    return official_results(result["values"], videos)


def _that_count(rows: Sequence[Row], name: str) -> list[Row]:
    """Return the rows that a dimension's value of the data set is made of."""
    kept = [row for row in rows if name in row["values"] and row["counts"].get(name, True)]
    if name != FLICKER:
        return kept
    taken: dict[str, int] = {}
    few = []
    for row in kept:
        taken[row["prompt"]] = taken.get(row["prompt"], 0) + 1
        if taken[row["prompt"]] <= FLICKER_SAMPLES:
            few.append(row)
    return few


class _Measurer:
    """Measures one clip after the other."""

    def __init__(self, scoring: Scoring, dimensions: Mapping[str, Dimension]) -> None:
        self._scoring, self._dimensions = scoring, dimensions
        world, device = scoring.world, scoring.device
        self._read_semantics = make_semantic_reader(world, device) if world else None
        rules = find_convention(scoring.convention)
        self._lpips = installed_lpips(rules.lpips_net, device) if scoring.dense else None

    def measure(self, clip: Clip) -> Row:
        problems: list[str] = []
        row: Row = {"video": clip.path.name, "prompt": clip.prompt, "values": {}, "counts": {}}
        row["problems"] = problems
        try:
            video = read_video(clip.path)
        except VideoError as error:
            problems.append(_without_path(error, clip.path))
            return row
        frames, _, height, width = video.frames.shape
        row |= {"frames": frames, "height": height, "width": width, "fps": video.fps}
        for name, dimension in self._dimensions.items():
            try:
                row["values"][name] = dimension.measure(video.frames, video.fps, clip.prompt)
                if type(dimension).counts is not Dimension.counts:
                    row["counts"][name] = dimension.counts(video.frames, video.fps)
            except (DitAccelError, RuntimeError) as error:  # such as too little memory
                problems.append(f"{name}: {error}".splitlines()[0])
        if self._read_semantics is not None:
            try:
                row["following"] = self._read_semantics(video.frames, clip.prompt)
            except VideoError as error:
                problems.append(str(error))
        if self._scoring.dense is not None:
            try:
                row["fidelity"] = self._fidelity(clip, video, self._scoring.dense)
            except DitAccelError as error:
                problems.append(f"fidelity: {error}")
        return row

    def _fidelity(self, clip: Clip, video: Video, folder: Path) -> dict[str, float]:
        dense = read_video(folder / clip.path.name)
        if dense.frames.shape != video.frames.shape:
            raise VideoError(
                f"it has {_described(video.frames)}, the dense one {_described(dense.frames)}."
            )
        actual, expected = (one.frames.to(self._scoring.device) for one in (video, dense))
        return fidelity(actual, expected, convention=self._scoring.convention, lpips=self._lpips)


def _settings(scoring: Scoring, dimensions: Mapping[str, Dimension]) -> Row:
    networks = {}
    for name, dimension in dimensions.items():
        needed = dimension.backbone_name
        if needed is not None:
            brought = needed in scoring.backbones
            networks[name] = "brought by the user" if brought else BACKBONES[needed].title
    return {
        "networks": networks,
        "world": scoring.world,
        "dense": None if scoring.dense is None else str(scoring.dense),
        "convention": scoring.convention if scoring.dense else None,
        "official": sorted(scoring.official),
    }


def _described(frames: Tensor) -> str:
    return f"{len(frames)} frames of {frames.shape[3]} x {frames.shape[2]}"


def _without_path(error: VideoError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
