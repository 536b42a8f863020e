"""Whether what came of calls that nobody waited for was finite: asked at once, read later."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class LateLook:
    """Looks at a transformer's output, and tells one forward later whether it was finite.

    What is not finite in an attention call stays so in all that is computed from it, so one look at
    the end serves all layers. By the time of the next forward the device has long known the answer,
    and the host waits for nothing.
    """

    def __init__(self) -> None:
        self._asked: tuple[Tensor, torch.cuda.Event | None, list[int]] | None = None

    def ask(self, output: Tensor, layers: list[int]) -> None:
        """Start to look at the output of a forward; what was asked before must have been read.

        Args:
            output: of any shape; the same on all ranks that share a sequence.
            layers: whose calls nobody waited for.
        """
        total = output.sum(dtype=torch.float32).to("cpu", non_blocking=True)  # pinned, if on a GPU
        event = None
        if output.is_cuda:  # of the output's device, which may not be the current one
            event = torch.cuda.current_stream(output.device).record_event()
        self._asked = total, event, layers

    def read(self) -> list[int]:
        """Return the layers that were asked for if the output was not finite, else none."""
        asked, self._asked = self._asked, None
        if asked is None:
            return []
        total, event, layers = asked
        if event is not None:
            event.synchronize()
        return [] if math.isfinite(total.item()) else layers
