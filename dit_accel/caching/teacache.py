"""TeaCache: a fitted polynomial of how much the input changes tells how much the output will."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch

from dit_accel.caching.base import check_threshold
from dit_accel.caching.gates import Accumulated, Gate, mask_from, polynomial, relative_l1
from dit_accel.caching.stack import Setting, StackCache
from dit_accel.errors import OptionError
from dit_accel.session import Seam, Session


@dataclass(frozen=True)
class TeaCache(StackCache):
    """Reuse the whole stack until the estimated output changes add up to a threshold.

    Where the indicator follows from the timesteps alone (Wan), all steps are decided at once
    before the first; elsewhere each decision compares the first block's modulated input.

    Args:
        threshold: reuse while the sum of estimated relative L1 changes is less.
        coefficients: of the polynomial that estimates the output's change from the indicator's,
            highest power first. None: as published for the model, which must have some.
        indicator: "modulated", the first block's normed and modulated tokens; "time" or
            "time_projection", embeddings of the timestep.
        first_steps, last_steps, max_reuses, min_steps: see `StackCache`.
    """

    name: ClassVar[str] = "teacache"
    paper: ClassVar[str] = "TeaCache, 2411.19108"
    strength: ClassVar[str] = "threshold"
    strengths: ClassVar[tuple[float, ...]] = (0.05, 0.1, 0.2)

    threshold: float = 0.1
    coefficients: tuple[float, ...] | None = None
    indicator: Literal["modulated", "time", "time_projection"] = "modulated"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_threshold("threshold", self.threshold)
        if self.indicator not in ("modulated", "time", "time_projection"):
            raise OptionError(f"indicator={self.indicator!r}: modulated, time or time_projection.")

    def session(self, pipe: Any, seam: Seam) -> Session:
        """Refuse models without coefficients."""
        if not self.coefficients:
            raise OptionError(
                "no TeaCache coefficients are published for this model: fit them with `dit-accel "
                "calibrate`, give coefficients=(...), or choose first_block_cache or easycache, "
                "which need none."
            )
        return super().session(pipe, seam)

    def gate(self, setting: Setting) -> Gate:
        """Decide all steps at once if the indicator allows it."""
        estimate = partial(polynomial, self.coefficients or ())
        if self.indicator == "modulated":
            return Accumulated(lambda look: look.modulated, self.threshold, estimate)
        distances = time_distances(setting, self.indicator)
        total = 0.0

        def spend(step: int, reuses: int) -> tuple[float, bool]:
            nonlocal total
            total = (total if reuses else 0.0) + max(estimate(distances[step]), 0.0)
            return total, total < self.threshold

        return mask_from(spend, setting.num_steps, setting.start, setting.limits)


def time_distances(setting: Setting, indicator: str) -> list[float]:
    """Return the relative L1 distance of each step's time embedding to the one before it.

    Raises:
        OptionError: if the model mixes the prompt into its time embedding.
    """
    times = torch.tensor(setting.moment.times, device=setting.kwargs["hidden_states"].device)
    with torch.no_grad():
        found = setting.family.time_embeddings(setting.transformer, times)
    if found is None:
        raise OptionError(
            f"indicator={indicator!r}: the time embedding of {type(setting.transformer).__name__} "
            "depends on the prompt too: take indicator='modulated'."
        )
    rows = found[0] if indicator == "time" else found[1]
    return [0.0, *(relative_l1(new, old) for old, new in pairwise(rows))]
