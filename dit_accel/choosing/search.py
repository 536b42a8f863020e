"""Looks for the best setting with few trials: coarse to fine, then pairs of what was best alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dit_accel.choosing.budget import SURELY_SLOWER, WORTHWHILE, Budget
from dit_accel.choosing.choice import Point
from dit_accel.choosing.settings import Line, Setting, together

Measure = Callable[[Setting, float], Point | None]
"""Measures a setting, as far as it may be faster than a speed-up; None if it can't be run."""
Predict = Callable[[Setting], float | None]
"""Foretells a setting's speed-up; None if it can't."""

KEPT = 3
"""Methods of a kind that are looked at closely."""
PAIRS = 5
"""Pairs of an attention method and a cache that are tried."""
OCTAVE_DB = 4.0
"""Decibels that halving the time saved brings, roughly: ranks methods that miss the budget."""


@dataclass
class _Trace:
    """What is known of one line: what may be chosen lies above ``low`` or at it, below ``high``.

    The strongest value is no part of that where it is within a budget of quality all the same.
    """

    line: Line
    high: int
    low: int = -1
    points: dict[int, Point] = field(default_factory=dict)
    refused: bool = False

    @property
    def strongest(self) -> int:
        """Index of the last value."""
        return len(self.line.values) - 1


@dataclass
class Search:
    """Tries settings until the best for a budget is known well enough.

    Along a line a stronger value is faster and further from dense, so that the last value within
    a budget of quality, or the first that is fast enough, is found by halving. A method whose
    middle value promises little is left at that. Of the others the strongest value comes next: some
    caches hardly change from a certain strength on, or even come nearer to dense again. For a
    budget of quality, what is slower than the best found so far is run no further.

    Attributes:
        budget: what is asked for.
        lines: what may be chosen, the most promising first.
        measure: runs a setting.
        predict: foretells speed-ups; lines on which nothing would pay are not tried.
        most: trials after which it ends.
    """

    budget: Budget
    lines: Sequence[Line]
    measure: Measure
    predict: Predict
    most: int = 40
    points: list[Point] = field(default_factory=list)
    idle: dict[str, str] = field(default_factory=dict)

    def run(self) -> list[Point]:
        """Return all points that were measured."""
        traces = [_Trace(line, len(line.values)) for line in self.lines if self._may_pay(line)]
        for trace in traces:
            self._step(trace)
        kept: list[_Trace] = []
        for kind in dict.fromkeys(trace.line.kind for trace in traces):
            of_kind = [t for t in traces if t.line.kind == kind and t.points]
            kept += sorted(of_kind, key=self._promise, reverse=True)[:KEPT]
        for trace in sorted(kept, key=self._promise, reverse=True):
            while self._step(trace):
                continue
        self._try_pairs(kept)
        return self.points

    def _may_pay(self, line: Line) -> bool:
        """Whether the strongest value is foretold to be worth it."""
        told = self.predict(line.at(-1))
        if told is None or told >= WORTHWHILE:
            return True
        self.idle[str(line.at(-1))] = f"predicted {told:.2f}x, not worth trying"
        return False

    def _step(self, trace: _Trace) -> bool:
        """Try the next value of a line; return whether there was one."""
        index = self._next(trace)
        if index is None or len(self.points) >= self.most:
            return False
        point = self._measure(trace.line.at(index))
        if point is None:
            trace.refused = True
            return False
        trace.points[index] = point
        if self._may_be_stronger(point):
            trace.low = max(trace.low, index)
        else:
            trace.high = min(trace.high, index)
        return True

    def _measure(self, setting: Setting) -> Point | None:
        point = self.measure(setting, self._best_speedup())
        if point is not None:
            self.points.append(point)
        return point

    def _next(self, trace: _Trace) -> int | None:
        """Return the value of a line to try next; None when it is settled."""
        for_quality = self.budget.target_speedup is None
        if trace.refused or trace.low == trace.strongest:
            return None
        worth_a_look = for_quality or trace.high > trace.strongest
        if trace.points and trace.strongest not in trace.points and worth_a_look:
            return trace.strongest
        nearest_over = trace.points.get(trace.high)
        to_beat = max(WORTHWHILE, self._best_speedup())
        if for_quality and nearest_over is not None and nearest_over.speedup <= to_beat:
            return None  # what is weaker is slower still
        return None if trace.high - trace.low < 2 else (trace.low + trace.high) // 2

    def _may_be_stronger(self, point: Point) -> bool:
        if self.budget.target_speedup is not None:
            return point.speedup < self.budget.target_speedup
        too_slow = point.speedup < SURELY_SLOWER * self._best_speedup()
        return too_slow or point.margin_db(self.budget) >= 0

    def _best_speedup(self) -> float:
        """Return the speed-up of what would be chosen for a budget of quality alone."""
        if self.budget.target_speedup is not None:
            return 0.0  # what is nearer to dense is chosen, not what is faster
        good = (point for point in self.points if point.margin_db(self.budget) >= 0)
        return max((point.speedup for point in good), default=0.0)

    def _promise(self, trace: _Trace) -> float:
        """Return how much a line may gain: for its best point, the time saved at the budget."""
        target = self.budget.target_speedup
        if target is not None:
            # Quality at the speed asked for.
            return max(
                -_error_db(p) + OCTAVE_DB * math.log2(max(_saved(p), 1e-3) / _saved_at(target))
                for p in trace.points.values()
            )
        # By the worst prompts: few prompts, of what was given up, say that, too.
        tails = ((p, self.budget.tail_db(p.psnr_db, p.error)) for p in trace.points.values())
        return max(
            max(_saved(p), 1e-3) * 2 ** (min(tail_db, 2 * OCTAVE_DB) / OCTAVE_DB)
            for p, tail_db in tails
        )

    def _try_pairs(self, traces: Sequence[_Trace]) -> None:
        """Try attention methods with caches, the fastest that are expected to keep to the budget.

        Speeds multiply and squared errors add, as they would if neither changed the other.
        """
        of: dict[str, list[Point]] = {"attention": [], "cache": []}
        for trace in traces:
            worth = [p for p in trace.points.values() if p.speedup >= WORTHWHILE]
            of[trace.line.kind] += worth
        expected = [_pair(a, c) for a in of["attention"] for c in of["cache"]]
        target = self.budget.target_speedup
        if target is not None:
            fits = [p for p in expected if p.speedup >= target]
            fits.sort(key=_error_db)
        else:
            fits = [p for p in expected if p.margin_db(self.budget) >= -0.5]
            fits.sort(key=lambda point: -point.speedup)
        for pair in fits[:PAIRS]:
            if len(self.points) >= self.most:
                return
            if target is None and pair.speedup <= max(WORTHWHILE, self._best_speedup()):
                return
            self._measure(pair.setting)


def _pair(attention: Point, cache: Point) -> Point:
    """Return what is expected of two settings at once."""
    # One may have been given up earlier than the other: the prompts that both have.
    both = zip(attention.psnr_db, cache.psnr_db, strict=False)
    psnr = tuple(-10 * math.log10(10 ** (-a / 10) + 10 ** (-c / 10)) for a, c in both)
    errors = zip(attention.error, cache.error, strict=False)
    error = tuple(math.hypot(a, c) for a, c in errors)
    speedup = attention.speedup * cache.speedup
    setting = together(attention.setting, cache.setting)
    return Point(setting, attention.seconds / cache.speedup, speedup, psnr, error)


def _saved(point: Point) -> float:
    return _saved_at(point.speedup)


def _saved_at(speedup: float) -> float:
    return 1 - 1 / speedup if speedup > 1 else 0.0


def _error_db(point: Point) -> float:
    """Return how far from dense, in dB: the smaller the nearer."""
    if point.low_psnr is not None:
        return -point.low_psnr
    return 20 * math.log10(max(point.mean_error, 1e-9))
