"""When attention stays dense: early and late steps, chosen layers, and short sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dit_accel.call import AttentionCall
from dit_accel.errors import OptionError

Steps = int | float
"""A number of denoising steps (int) or a share of them (float in [0, 1])."""


@dataclass(frozen=True)
class Schedule:
    """Which calls stay dense.

    Attributes:
        first_steps: dense steps at the start; an int counts steps, a float is a share of the
            steps of the generation (rounded up).
        last_steps: likewise at the end.
        layers: indices of layers that are always dense.
        min_tokens: sequences with fewer video tokens stay dense.
        worth: says why a call had better be dense, if there is more to say.
    """

    first_steps: Steps = 0
    last_steps: Steps = 0
    layers: frozenset[int] = frozenset()
    min_tokens: int = 0
    worth: Callable[[AttentionCall], str | None] | None = field(default=None, compare=False)

    @classmethod
    def make(
        cls,
        dense_steps: Steps | tuple[Steps, Steps],
        dense_layers: int | Sequence[int],
        min_tokens: int,
    ) -> Schedule:
        """Build a schedule from the options of `accelerate_pipeline`.

        Args:
            dense_steps: first steps, or ``(first, last)``.
            dense_layers: number of first layers, or their indices.
            min_tokens: video tokens below which nothing is sparse.

        Raises:
            OptionError: on negative numbers, shares over 1 or values of another type.
        """
        pair = dense_steps if isinstance(dense_steps, tuple | list) else (dense_steps, 0)
        if len(pair) != 2:
            raise OptionError(f"dense_steps={dense_steps!r}: give a number or (first, last).")
        for value in pair:
            check_steps("dense_steps", value)
        if isinstance(dense_layers, bool | float):
            raise OptionError(f"dense_layers={dense_layers!r}: give a number or a list of layers.")
        layers = range(dense_layers) if isinstance(dense_layers, int) else dense_layers
        if (isinstance(dense_layers, int) and dense_layers < 0) or any(i < 0 for i in layers):
            raise OptionError(f"dense_layers={dense_layers!r}: layers count from 0.")
        if min_tokens < 0:
            raise OptionError(f"min_tokens={min_tokens} must not be negative.")
        return cls(pair[0], pair[1], frozenset(layers), min_tokens)

    def dense_reason(self, call: AttentionCall) -> str | None:
        """Return why this call is dense, or None if it may be sparse."""
        return self.dense_step_reason(call) or (
            f"layer {call.layer} is in dense_layers" if call.layer in self.layers else None
        )

    def dense_step_reason(self, call: AttentionCall) -> str | None:
        """Return why every layer of this call's step is dense, or None."""
        if call.layout.video_length < self.min_tokens:
            return f"{call.layout.video_length} video tokens, fewer than min_tokens"
        if self.worth is not None and (reason := self.worth(call)) is not None:
            return reason
        if call.step is None or call.num_steps is None:
            return None
        if call.step < count_steps(self.first_steps, call.num_steps):
            return "one of the dense first steps"
        if call.step >= call.num_steps - count_steps(self.last_steps, call.num_steps):
            return "one of the dense last steps"
        return None


def check_steps(name: str, value: Steps) -> None:
    """Raise `OptionError` unless ``value`` is a number of steps or a share of them."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or value < 0 or (isinstance(value, float) and value > 1):
        raise OptionError(
            f"{name}={value!r}: give a number of steps (int) or a share in [0, 1] (float)."
        )


def count_steps(steps: Steps, num_steps: int) -> int:
    """Return a number of steps, shares rounded up."""
    if isinstance(steps, int):
        return steps
    return math.ceil(steps * num_steps - 1e-9)
