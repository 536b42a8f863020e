"""What a user asks for instead of knobs, and whether measured prompts keep to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dit_accel.errors import OptionError

WORTHWHILE = 1.05
"""Speed-up below which attention, or a whole pipeline, stays dense."""
USUAL_PSNR = 30.0
"""Decibels that ``method="auto"`` keeps to if it is given prompts to try and no budget."""
_COVERED, _CONFIDENCE = 1.2816, 1.2816
"""Normal quantiles: nine prompts in ten, with a confidence of nine in ten."""
MISSES = 0.1
"""Share of the prompts that may miss a budget of quality."""
SURELY_SLOWER = 0.9
"""Of another speed-up: what a few prompts may scatter by."""


@dataclass(frozen=True)
class Budget:
    """What is asked for; None asks for nothing.

    Attributes:
        min_psnr: dB of frames or images against those of the dense pipeline, from the same noise;
            nine prompts in ten are to reach it.
        max_error: mean|latents - dense latents| / mean|dense latents|, likewise.
        target_speedup: least speed-up of the denoising loop, in wall-clock time.

    Raises:
        OptionError: if a number is impossible.
    """

    min_psnr: float | None = None
    max_error: float | None = None
    target_speedup: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, least in (("min_psnr", 0), ("max_error", 0), ("target_speedup", 1)):
            value = getattr(self, name)
            if value is None:
                continue
            if not _is_number(value) or not least < value < math.inf:
                raise OptionError(f"{name}={value!r} must be a finite number over {least}.")

    @property
    def of_quality(self) -> bool:
        """Whether anything is asked of the output, rather than of the time alone."""
        return self.min_psnr is not None or self.max_error is not None

    def margin_db(self, psnr_db: Sequence[float], error: Sequence[float]) -> float:
        """Return by how many dB the prompts of a setting keep to the budget of quality.

        Counted from what nine prompts in ten reach, of all (`low_quantile`) and of those tried; an
        error counts as an amplitude.
        """
        surely = [low_quantile(each) for each in self._margins(psnr_db, error)]
        return min([self.tail_db(psnr_db, error), *surely])

    def tail_db(self, psnr_db: Sequence[float], error: Sequence[float]) -> float:
        """Return by how many dB nine in ten of these prompts keep to the budget of quality."""
        margins = self._margins(psnr_db, error)
        return min((sorted(each)[int(MISSES * len(each))] for each in margins), default=math.inf)

    def hopeless(
        self,
        psnr_db: Sequence[float],
        error: Sequence[float],
        speedup: float,
        prompts: int,
        to_beat: float = 0.0,
    ) -> bool:
        """Return whether a setting can't be chosen any more, whatever the other prompts bring.

        Args:
            psnr_db: of the prompts so far; not looked at without ``min_psnr``.
            error: likewise, of their latents.
            speedup: over these prompts.
            prompts: how many are to be tried in all.
            to_beat: speed-up of a setting that could be chosen instead.
        """
        if speedup < SURELY_SLOWER * max(self.target_speedup or 0.0, WORTHWHILE, to_beat):
            return True
        each = self._margins(psnr_db, error)
        return any(sum(one < 0 for one in of) > int(MISSES * prompts) for of in each)

    def _margins(self, psnr_db: Sequence[float], error: Sequence[float]) -> list[list[float]]:
        """Return the dB by which each prompt keeps to each budget of quality."""
        margins = []
        if self.min_psnr is not None:
            margins.append([one - self.min_psnr for one in psnr_db])
        if self.max_error is not None:
            margins.append([20 * math.log10(self.max_error / max(one, 1e-9)) for one in error])
        return margins

    def __str__(self) -> str:
        """Say it in a few words."""
        parts = [] if self.min_psnr is None else [f"at least {self.min_psnr:g} dB"]
        parts += [] if self.max_error is None else [f"an error of at most {self.max_error:g}"]
        parts += [] if self.target_speedup is None else [f"at least {self.target_speedup:g}x"]
        return " and ".join(parts) or "nothing"


def low_quantile(values: Sequence[float]) -> float:
    """Return what nine values in ten exceed, with a confidence of nine in ten.

    A one-sided tolerance limit of a normal distribution (Natrella 1963, section 2-5.2, the closed
    approximation): the fewer values there are, the further below their mean.
    """
    count, mean = len(values), sum(values) / len(values)
    if count == 1:
        return mean - 3.0  # nothing is known of the spread; what prompts of one model often have
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    if spread == 0:
        return mean
    a = 1 - _CONFIDENCE**2 / (2 * (count - 1))
    b = _COVERED**2 - _CONFIDENCE**2 / count
    return mean - spread * (_COVERED + math.sqrt(_COVERED**2 - a * b)) / a


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
