"""The contract of a perturbation guidance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ClassVar

from torch import Tensor, nn

from dit_accel.errors import OptionError
from dit_accel.schedule import Steps, check_steps, count_steps
from dit_accel.session import Forward, Seam, Session, SessionMethod
from dit_accel.tracking import Moment

DEFAULT_SCALE = 3.0


@dataclass(frozen=True)
class Guidance(SessionMethod):
    """Guides away from what the model predicts when a part of it is perturbed.

    The pipeline's prediction ``e`` becomes ``e + scale * (e_cond - e_perturbed)``, with or without
    classifier-free guidance in ``e``.

    Args:
        scale: of that difference; 3.0 by default, and 0 leaves everything as it is.
        start: first step that is guided: a number, or a share of the steps (rounded up).
        stop: the first step that no longer is, likewise.
        extra_pass: False perturbs classifier-free guidance's unconditional pass instead of adding
            one. There is no scale then: the pipeline's own guidance scale takes its part.
    """

    kind: ClassVar[str] = "guidance"

    scale: float | None = field(default=None, kw_only=True)
    start: Steps = field(default=0, kw_only=True)
    stop: Steps = field(default=1.0, kw_only=True)
    extra_pass: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options that all of them have."""
        check_steps("start", self.start)
        check_steps("stop", self.stop)
        if type(self.start) is type(self.stop) and self.start >= self.stop:
            raise OptionError(
                f"start={self.start!r} is not before stop={self.stop!r}: no step would be guided."
            )
        if self.scale is None:
            return
        if not self.extra_pass:
            raise OptionError(
                f"scale={self.scale!r} has no effect with extra_pass=False: leave it out, and set "
                "the pipeline's own guidance scale."
            )
        number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        if not number or not isfinite(self.scale):
            raise OptionError(f"scale={self.scale!r} must be a finite number.")

    @property
    def settled_scale(self) -> float:
        """The scale that holds."""
        return DEFAULT_SCALE if self.scale is None else self.scale

    @property
    def idle(self) -> str:
        """Why nothing is guided at all; empty if something is."""
        return "scale is 0" if self.scale == 0 else ""

    @property
    def sees_queries(self) -> bool:
        """Whether it needs an attention method, which shows it queries and keys."""
        return False

    def guides(self, moment: Moment) -> bool:
        """Whether this step is guided; outside a pipeline's loop all are."""
        if moment.step is None or moment.num_steps is None:
            return True
        start, stop = (count_steps(steps, moment.num_steps) for steps in (self.start, self.stop))
        return start <= moment.step < stop

    @abstractmethod
    def perturb(self, transformer: nn.Module, seam: Seam, switch: Switch) -> Perturbation:
        """Intercept what is perturbed while ``switch`` is on.

        Raises:
            OptionError: if the transformer has no such layers or heads.
        """

    def session(self, pipe: Any, seam: Seam) -> Session:
        """See `SessionMethod.session`."""
        from dit_accel.guidance.engine import GuidanceSession

        return GuidanceSession(self, seam)


class Switch:
    """Says which samples of the running pass are perturbed."""

    def __init__(self) -> None:
        self._samples: slice | None = None
        self._batch: int | None = None

    @contextmanager
    def on(self, samples: slice, batch: int) -> Iterator[None]:
        """Perturb these samples of a batch of this size meanwhile."""
        self._samples, self._batch = samples, batch
        try:
            yield
        finally:
            self._samples = self._batch = None

    def samples(self, tokens: Tensor) -> slice | None:
        """Return which samples of ``tokens``, ``[B, ...]``, are perturbed; None for none.

        A cache may run a part of the batch alone: that is the part to leave as it is.
        """
        return self._samples if len(tokens) == self._batch else None

    @property
    def is_on(self) -> bool:
        """Whether anything is perturbed."""
        return self._samples is not None


@dataclass
class Perturbation(ABC):
    """What is perturbed in one transformer.

    Attributes:
        first: the first block that differs from the plain pass.
        skipped: blocks that don't run in a perturbed pass.
    """

    first: int
    skipped: frozenset[int] = frozenset()

    def enter(self, forward: Forward) -> None:
        """A pass is about to run; ``switch`` says if it is perturbed."""
        return None

    def leave(self) -> None:
        """The pass is over."""
        return None

    def attended(
        self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], scale: float | None, output: Tensor
    ) -> Tensor:
        """See `OutputSession.attended`."""
        return output


def check_layers(layers: Sequence[int], transformer: nn.Module, blocks: int) -> None:
    """Raise `OptionError` if a transformer has no block of one of these numbers."""
    beyond = [layer for layer in layers if layer >= blocks]
    if beyond:
        raise OptionError(
            f"layer {beyond[0]} is out of range: {type(transformer).__name__} has {blocks} blocks, "
            f"0 to {blocks - 1}."
        )


def settle_layers(layers: object) -> tuple[int, ...]:
    """Return given layers as a tuple.

    Raises:
        OptionError: if they are no list of distinct block numbers, or none.
    """
    found = (layers,) if isinstance(layers, int) else layers
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise OptionError(f"layers={layers!r}: give block numbers, such as [7, 8].")
    if not found:
        raise OptionError("layers is empty: give block numbers, such as [7, 8].")
    for layer in found:
        if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
            raise OptionError(f"layers={layers!r}: {layer!r} is no block number from 0.")
    if len(set(found)) < len(found):
        raise OptionError(f"layers={layers!r}: a layer is given twice.")
    return tuple(found)
