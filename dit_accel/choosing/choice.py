"""What was measured, what was chosen from it and why; and its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit_accel.choosing.budget import WORTHWHILE, Budget, low_quantile
from dit_accel.choosing.settings import Setting
from dit_accel.errors import OptionError
from dit_accel.files import write_text
from dit_accel.tuning_file import cache_folder

Row = dict[str, Any]
KIND = "dit-accel choice"


@dataclass(frozen=True)
class Point:
    """What one setting did to the prompts that were tried: fewer where it was hopeless.

    Attributes:
        setting: what was run.
        seconds: of the denoising loops.
        speedup: over the dense pipeline's; of what could be chosen, as timed a second time.
        psnr_db: of each prompt's frames against dense, at most 100; empty where none were decoded.
        error: of each prompt's last latents, mean|a - dense| / mean|dense|.
        density: share of attention pairs computed, dense calls counted as 1; None: not recorded.
        blocks_run: share of the block calls that ran; None without a cache.
        predicted: speed-up that the cost model foretold, if it did.
    """

    setting: Setting
    seconds: float
    speedup: float
    psnr_db: tuple[float, ...]
    error: tuple[float, ...]
    density: float | None = None
    blocks_run: float | None = None
    predicted: float | None = None

    @property
    def low_psnr(self) -> float | None:
        """What nine prompts in ten reach; see `low_quantile`."""
        return low_quantile(self.psnr_db) if self.psnr_db else None

    @property
    def mean_error(self) -> float:
        """Mean over the prompts."""
        return sum(self.error) / len(self.error)

    def margin_db(self, budget: Budget) -> float:
        """Return by how much it keeps to a budget of quality."""
        return budget.margin_db(self.psnr_db, self.error)

    def __str__(self) -> str:
        """Say it in a line."""
        psnr = "" if self.low_psnr is None else f", {self.low_psnr:.1f} dB for nine prompts in ten"
        told = "" if self.predicted is None else f" (predicted {self.predicted:.2f}x)"
        error = f"error {self.mean_error:.3f} ({len(self.error)} prompts)"
        return f"{self.setting}: {self.speedup:.2f}x{told}{psnr}, {error}"

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Point:
        """Return the point of a JSON row."""
        setting = row["setting"]
        made = Setting(tuple(setting["methods"]), setting["options"])
        values = {**row, "setting": made, "psnr_db": tuple(row["psnr_db"])}
        return cls(**{**values, "error": tuple(row["error"])})


@dataclass(frozen=True)
class Choice:
    """What was chosen for a budget.

    Attributes:
        budget: what was asked for.
        chosen: the point taken; None: the pipeline stays dense.
        why: in a sentence.
        points: all that were measured.
        refused: settings that this pipeline can't run, and why.
        sources: where predicted times came from.
    """

    budget: Budget
    chosen: Point | None
    why: str
    points: tuple[Point, ...]
    refused: Mapping[str, str]
    sources: tuple[str, ...] = ()

    @property
    def frontier(self) -> tuple[Point, ...]:
        """The points that no other beats in speed and quality at once, slow to fast."""
        return frontier(self.points)

    def to_dict(self) -> Row:
        """Return everything as JSON-ready values."""
        return {
            "budget": asdict(self.budget),
            "chosen": None if self.chosen is None else str(self.chosen.setting),
            "why": self.why,
            "frontier": [str(point.setting) for point in self.frontier],
            "points": [asdict(point) for point in self.points],
            "refused": dict(self.refused),
            "times_from": list(self.sources),
        }

    def lines(self) -> list[str]:
        """Return the choice and the frontier for people, a line a point."""
        marks = {id(self.chosen): " (chosen)"}
        frontier = [f"{point}{marks.get(id(point), '')}" for point in self.frontier]
        if self.chosen is not None and not any("(chosen)" in line for line in frontier):
            frontier.append(f"{self.chosen} (chosen)")
        return [self.why, *frontier]


def frontier(points: Sequence[Point]) -> tuple[Point, ...]:
    """Return the points that no other beats in speed and quality at once, slow to fast."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.speedup, -_quality(point))):
        if not best or _quality(point) > _quality(best[-1]):
            best.append(point)
    return tuple(reversed(best))


def choose(
    points: Sequence[Point],
    budget: Budget,
    refused: Mapping[str, str],
    sources: Sequence[str],
    *,
    prompts: int | None = None,
    ended: str = "",
) -> Choice:
    """Return the fastest point within the budget of quality, or the best one that is fast enough.

    What was given up early, under this budget or another, is not chosen.

    Args:
        points: all that were measured.
        budget: what is asked for.
        refused: settings that this pipeline can't run, and why.
        sources: where predicted times came from.
        prompts: how many are tried of what is not given up; None: as many as of any point.
        ended: why no more settings were tried, if more would have been.

    Raises:
        OptionError: if a speed is asked for that nothing reaches, or not at the quality asked for.
    """
    target = max(budget.target_speedup or 0.0, WORTHWHILE)
    if prompts is None:
        prompts = max((len(point.error) for point in points), default=0)
    whole = [point for point in points if len(point.error) == prompts]
    good = [p for p in whole if p.speedup >= target and p.margin_db(budget) >= 0]
    if not good and budget.target_speedup is not None:
        raise OptionError(_until(ended, _unmet(points, budget)))
    if not good:
        why = (
            f"method='auto' stays dense: nothing that was tried keeps to {budget} and is "
            f"{WORTHWHILE}x faster"
        )
        faster = [point for point in points if point.speedup >= WORTHWHILE]
        if faster:
            why += f". The nearest to dense that is faster: {max(faster, key=_quality)}"
        return Choice(budget, None, _until(ended, why), tuple(points), refused, tuple(sources))
    if budget.target_speedup is None:
        best = max(good, key=lambda point: point.speedup)
        reason = f"the fastest of {len(points)} settings tried that keeps to {budget}"
    else:
        best = max(good, key=_quality)
        reason = f"the nearest to dense of {len(points)} settings tried that gives {budget}"
    why = _until(ended, f"method='auto' took {best.setting}: {reason}")
    return Choice(budget, best, why, tuple(points), refused, tuple(sources))


def save(path: Path, where: Row, seen: Row, points: Sequence[Point]) -> None:
    """Write points, what was generated, and the circumstances that this was measured under."""
    content: Row = {"kind": KIND, "circumstances": where, "generated": seen}
    content["points"] = [asdict(point) for point in points]
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def load(path: Path) -> tuple[Row, Row, list[Point]]:
    """Return the circumstances of a file, what was generated, and the points.

    Raises:
        OptionError: if it can't be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["kind"] != KIND:
            raise ValueError(f"its kind is {content['kind']!r}")
        where, seen = content["circumstances"], content["generated"]
        return where, seen, [Point.read(row) for row in content["points"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OptionError(
            f"calibration {str(path)!r} can't be read as a choice of `dit-accel calibrate --method "
            f"auto` ({error}): make it anew."
        ) from error


def kept_path(where: Row | None) -> Path | None:
    """Return the file in the user's cache folder; None if there is no place for it."""
    folder = cache_folder()
    if folder is None or where is None:
        return None
    digest = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()[:16]
    return folder / "choices" / f"{digest}.json"


def _until(ended: str, text: str) -> str:
    """Return a text, with why no more was tried."""
    more = f"{text.removesuffix('.')}. More may be found with more time: {ended}."
    return more if ended else text


def _quality(point: Point) -> float:
    return -point.mean_error if point.low_psnr is None else point.low_psnr


def _unmet(points: Sequence[Point], budget: Budget) -> str:
    """Say what can be had instead."""
    fastest = max(points, key=lambda point: point.speedup, default=None)
    if fastest is None:
        return f"{budget} is out of reach: no setting could be tried on this pipeline."
    text = f"{budget} is out of reach here. The fastest tried is {fastest}."
    fast = [p for p in points if p.speedup >= (budget.target_speedup or 0)]
    if budget.of_quality and fast:
        text += f" At that speed the nearest to dense is {max(fast, key=_quality)}."
    good = [p for p in points if p.margin_db(budget) >= 0]
    if budget.of_quality and good:
        best = max(good, key=lambda point: point.speedup)
        text += f" At that quality the fastest is {best}."
    return text + " Ask for less of one of them."
