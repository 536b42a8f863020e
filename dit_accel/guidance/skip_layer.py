"""Skip-layer guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_accel.guidance.base import Guidance, Perturbation, Switch, check_layers, settle_layers
from dit_accel.schedule import Steps
from dit_accel.session import Seam


@dataclass(frozen=True)
class SkipLayerGuidance(Guidance):
    """Guide away from what the model predicts without some of its blocks.

    Args:
        layers: numbers of the blocks to skip, in running order.
    """

    name: ClassVar[str] = "slg"
    paper: ClassVar[str] = "Spatiotemporal Skip Guidance, 2411.18664; as in Stable Diffusion 3.5"

    layers: tuple[int, ...]
    start: Steps = field(default=0.01, kw_only=True)
    stop: Steps = field(default=0.2, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        object.__setattr__(self, "layers", settle_layers(self.layers))

    def perturb(self, transformer: nn.Module, seam: Seam, switch: Switch) -> Perturbation:
        """See `Guidance.perturb`."""
        blocks = seam.family.blocks(transformer)
        check_layers(self.layers, transformer, len(blocks))
        if not self.idle:
            for layer in self.layers:
                seam.intercept(blocks[layer], partial(_skip, seam, switch), innermost=True)
        return Skipping(first=min(self.layers), skipped=frozenset(self.layers))


class Skipping(Perturbation):
    """Blocks that pass their tokens on."""


def _skip(seam: Seam, switch: Switch, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Pass the perturbed samples' tokens on, and run a block on the others."""
    streams = seam.family.streams_in(args, kwargs)
    samples = switch.samples(streams.video)
    if samples is None:
        return inner(*args, **kwargs)
    if samples == slice(None):
        return seam.family.as_output(streams)

    def pass_on(ran: Tensor, came: Tensor) -> Tensor:
        return torch.cat([came[samples], ran[samples.stop :]])

    ran = seam.family.streams_out(inner(*args, **kwargs))
    return seam.family.as_output(ran.map(pass_on, streams))
