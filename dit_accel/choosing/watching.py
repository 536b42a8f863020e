"""What judges of speed have in common: which forward just ran, how, and for how long."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from dit_accel.choosing.times import Place, heads_of
from dit_accel.methods.base import AttentionMethod
from dit_accel.parallel.split import Split
from dit_accel.report import forward_seconds
from dit_accel.running import RunningForward
from dit_accel.session import Forward, Session

if TYPE_CHECKING:
    from dit_accel.runtime import Runtime


class Ran(NamedTuple):
    """A forward that ran to its end.

    Attributes:
        transformer: its id.
        place: its attention calls.
        method: with its options set for these tokens.
        split: how the tokens are spread over ranks.
        dense: whether all of its attention was.
        marks: when it began and ended; see `seconds`.
    """

    transformer: int
    place: Place
    method: AttentionMethod
    split: Split | None
    dense: bool
    marks: tuple[int | None, Any, Any]

    @property
    def seconds(self) -> float:
        """How long it took; on a GPU this waits for its end."""
        return sum(forward_seconds([self.marks]).values())


@dataclass
class Watch(Session):
    """A session that is told of every forward with attention calls.

    Attributes:
        runtime: of the acceleration.
    """

    runtime: Runtime
    _entered: tuple[Forward, RunningForward, int] | None = field(default=None, init=False)

    def attach(self, transformer: nn.Module) -> None:
        """Nothing is intercepted."""

    def enter(self, forward: Forward) -> None:
        """Note what runs; see `Session.enter`."""
        running = self.runtime._running
        if running is not None:
            self._entered = forward, running, len(self.runtime.recorder.calls)

    def leave(self, output: Any) -> None:
        """Tell what has run, unless it broke off; see `Session.leave`."""
        entered, self._entered = self._entered, None
        if entered is None or output is None:
            return
        forward, running, before = entered
        recorder, latents = self.runtime.recorder, forward.kwargs["hidden_states"]
        calls = recorder.calls[before:]
        if not calls:
            return
        shape = *heads_of(forward.transformer), len(latents), latents.dtype, latents.device
        self.ran(
            Ran(
                id(forward.transformer),
                Place(running.layouts[0], *shape),
                running.method,
                running.split,
                all(call.reason for call in calls),
                recorder.forwards[-1],
            )
        )

    @abstractmethod
    def ran(self, forward: Ran) -> None:
        """A forward has run."""
