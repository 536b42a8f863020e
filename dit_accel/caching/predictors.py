"""What stands for blocks that do not run: predictions of the residual they would add.

A predictor holds tensors of one transformer, guidance branch and run of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.pipelines.base import Streams


@dataclass(frozen=True)
class When:
    """A point of the trajectory: the step, and its time on the scheduler's axis."""

    step: int
    time: float


class Predictor:
    """The residual of the last full step, as it was."""

    order = 0
    every_step = False  # whether to be updated also where no later step can use it

    def __init__(self) -> None:
        self._points: list[tuple[When, Streams]] = []  # the newest first

    @property
    def ready(self) -> bool:
        """Whether there is anything to predict from."""
        return bool(self._points)

    @property
    def bytes_held(self) -> int:
        """Bytes of the tensors held."""
        return sum(
            tokens.nbytes
            for _, streams in self._points
            for tokens in (streams.video, streams.text)
            if tokens is not None
        )

    def update(self, when: When, residual: Streams) -> None:
        """Learn what a full step added."""
        self._points = [(when, residual), *self._points[: self.order]]

    def predict(self, when: When) -> Streams:
        """Return what the blocks would add at ``when``."""
        return self._points[0][1]

    def fits(self, head: Streams) -> bool:
        """Whether the residuals belong to tokens like these."""
        held = self._points[0][1]
        return _like(held.video, head.video) and (held.text is None or _like(held.text, head.text))


class Taylor(Predictor):
    """Extrapolation through the last full steps by the polynomial in time.

    TaylorSeer (arXiv 2503.06923) with the scheduler's own, uneven times in place of step numbers.

    Args:
        order: of the polynomial; as many full steps and one are kept.
        horizon: steps beyond the last full one at which extrapolation stops; later steps get the
            value there.
    """

    def __init__(self, order: int, horizon: int) -> None:
        super().__init__()
        self.order, self.horizon = order, horizon

    def predict(self, when: When) -> Streams:
        """See `Predictor.predict`."""
        last = self._points[0][0]
        beyond = when.step - last.step
        time = when.time
        if beyond > self.horizon:
            time = last.time + (when.time - last.time) * self.horizon / beyond
        times = [point.time for point, _ in self._points]
        weights = lagrange_weights(times, time)

        def combine(*values: Tensor) -> Tensor:
            total = sum(w * v.float() for w, v in zip(weights, values, strict=True))
            return torch.as_tensor(total).to(values[0].dtype)

        newest, *older = (streams for _, streams in self._points)
        return newest.map(combine, *older)


def lagrange_weights(times: list[float], time: float) -> list[float]:
    """Return the weights of values at ``times`` in the polynomial through them, at ``time``.

    The same polynomial as by Newton's divided differences; one pass over the tensors.
    """
    weights = []
    for i, own in enumerate(times):
        weight = 1.0
        for j, other in enumerate(times):
            if i != j:
                weight *= (time - other) / (own - other)
        weights.append(weight)
    return weights


def _like(held: Tensor, now: Tensor | None) -> bool:
    return (
        now is not None
        and held.shape == now.shape
        and held.dtype == now.dtype
        and held.device == now.device
    )
