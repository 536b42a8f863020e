"""Perturbed-attention guidance: whole layers of `SoftPAG` at full strength."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import nn

from dit_accel.guidance.attention import (
    HeadPerturbation,
    Scope,
    Target,
    all_heads,
    heads_per_layer,
)
from dit_accel.guidance.base import Guidance, Perturbation, Switch, settle_layers
from dit_accel.guidance.softpag import check_choice
from dit_accel.session import Seam


@dataclass(frozen=True)
class PAG(Guidance):
    """Guide away from what the model predicts when whole layers' tokens see themselves alone.

    Args:
        layers: numbers of blocks in running order.
        scope: as in `SoftPAG`. With "image", an image token sees itself alone; in diffusers' own
            form for Stable Diffusion 3 it also sees the text.
    """

    name: ClassVar[str] = "pag"
    paper: ClassVar[str] = "Perturbed-Attention Guidance, 2403.17377"
    target: ClassVar[Target] = "identity"

    layers: tuple[int, ...]
    scope: Scope = "joint"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_choice("scope", self.scope, get_args(Scope))
        object.__setattr__(self, "layers", settle_layers(self.layers))

    def perturb(self, transformer: nn.Module, seam: Seam, switch: Switch) -> Perturbation:
        """See `Guidance.perturb`."""
        heads = all_heads(self.layers, heads_per_layer(seam.family, transformer), 1.0)
        return HeadPerturbation(heads, self.target, self.scope, transformer, seam, switch)
