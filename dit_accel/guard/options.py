"""The quality guard's options, and what ``accelerate_pipeline(guard=...)`` may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from dit_accel.errors import OptionError, did_you_mean

Action = Literal["head", "layer", "step", "report"]


@dataclass(frozen=True)
class QualityGuard:
    """Compare sparse attention with dense attention in a few rows, and repair what is too wrong.

    In a probed call the output of ``rows`` query rows is also computed densely. A head whose
    relative L2 error there is over ``max_error`` is recomputed densely, in this very call, and
    stays dense until the generation ends, or until the sparse method is seen to be well under the
    budget again. A layer with more than half of its heads over the budget is not run sparsely
    again in this generation. The first sparse call of every layer and branch is probed, and every
    ``every``-th after that, layers in turn. Values that are not finite are looked for in every
    sparse call, and repaired likewise. On a GPU, where sequences under 65,536 tokens are attended
    to so fast that a look would cost several percent, these are probed a quarter as often, and
    what is not finite between two probes is only told, a step later, from the transformer's output
    (``every=1`` looks at all calls). The first trip of a generation raises a `QualityWarning`.

    Ranks that share a sequence, by Ulysses or in a ring, decide alike for all heads.

    Rows are chosen without random numbers, and all is forgotten between generations, so the same
    seed gives the same output again. On a GPU each call that is looked at waits for one small
    vector.

    The default budget is for what is broken, not for what is merely less exact. On the bundled
    models, 8 steps and a prompt or two, the attention methods as they come (22 to 42 dB from dense)
    mostly had worst heads of 0.21 to 0.68: no head trips, or a few. gna with 5 % of the pairs on
    tiny-wan (17.8 dB) had heads of 0.9; repaired, it came to 22.4 dB, with a budget of 0.5 to 25.4.
    A repaired head is not always a nearer picture: gna as published on tiny-hunyuan had a head of
    1.2, and fell from 28.5 to 26.9 dB. Larger models were not measured.

    Args:
        max_error: most relative L2 error of a head's output over the probed rows and the head's
            channels; 0 is dense attention, 1 as wrong as zeros. A batch has the error of its
            worst entry.
        rows: query rows per probe, spread evenly over the video tokens, shifted from probe to
            probe. The probe costs about ``rows / tokens`` of a dense call.
        every: a layer is probed in one of so many sparse calls.
        layers: which layers are probed; None for all.
        action: what goes dense when a head is over the budget: that "head", its whole "layer", or
            from the next layer on all that is left of the generation ("step"). "report" measures
            and warns, but repairs only what is not finite.
        release: a dense head is sparse again once a later probe finds its sparse error to be less
            than ``release * max_error``; 0 for never.

    Raises:
        OptionError: on impossible values.
    """

    max_error: float = 0.6
    rows: int = 64
    every: int = 4
    layers: tuple[int, ...] | None = None
    action: Action = "head"
    release: float = 0.5

    def __post_init__(self) -> None:
        """Check the options."""
        if not _is_number(self.max_error) or not 0 < self.max_error < math.inf:
            raise OptionError(f"max_error={self.max_error!r} must be a finite number over 0.")
        for name in ("rows", "every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"{name}={value!r} must be a whole number, 1 or more.")
        if not _is_number(self.release) or not 0 <= self.release <= 1:
            raise OptionError(f"release={self.release!r} must be a number in [0, 1].")
        if self.action not in get_args(Action):
            hint = did_you_mean(str(self.action), get_args(Action))
            raise OptionError(f"unknown action {self.action!r}.{hint}")
        self._check_layers()

    def _check_layers(self) -> None:
        if self.layers is None:
            return
        whole = isinstance(self.layers, tuple | list) and all(
            isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0
            for layer in self.layers
        )
        if not whole:
            raise OptionError(f"layers={self.layers!r} must be layer numbers, counted from 0.")
        object.__setattr__(self, "layers", tuple(self.layers))

    def probes(self, layer: int, earlier: int, *, seldom: bool = False) -> bool:
        """Return whether a layer's sparse call is probed, after ``earlier`` sparse calls of it.

        With ``seldom`` the calls between two probes are four times as many, unless all are probed.
        """
        if self.layers is not None and layer not in self.layers:
            return False
        every = 4 * self.every if seldom and self.every > 1 else self.every
        return earlier == 0 or (earlier + layer) % every == 0


GuardChoice = bool | str | QualityGuard | Mapping[str, Any] | None
"""True or "on", False or "off", a `QualityGuard`, its options by name, or None: the default."""


def settle_guard(choice: GuardChoice) -> QualityGuard | None:
    """Return the guard that was asked for; None for none.

    Raises:
        OptionError: if the choice is none, an option is unknown, or its value impossible.
    """
    if isinstance(choice, QualityGuard):
        return choice
    if isinstance(choice, Mapping):
        valid = [f.name for f in fields(QualityGuard)]
        for name in choice:
            if name not in valid:
                hint = did_you_mean(str(name), valid)
                raise OptionError(f"the quality guard has no option {name!r}.{hint}")
        return QualityGuard(**choice)
    if choice is None or choice is True or choice == "on":
        return QualityGuard()
    if choice is False or choice == "off":
        return None
    raise OptionError(
        f"guard={choice!r}: give True, False, 'on', 'off' or QualityGuard(max_error=...)."
    )


def guard_option(choice: GuardChoice) -> dict[str, Any] | bool | None:
    """Return a choice as a JSON-ready value that equal choices share; None for the default.

    Raises:
        OptionError: see `settle_guard`.
    """
    guard = settle_guard(choice)
    if guard is None:
        return False
    layers = None if guard.layers is None else list(guard.layers)
    return None if guard == QualityGuard() else {**asdict(guard), "layers": layers}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
