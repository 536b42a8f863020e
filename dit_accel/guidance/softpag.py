"""Soft perturbed-attention guidance: single heads, moved by degrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import nn

from dit_accel.errors import OptionError, did_you_mean
from dit_accel.guidance.attention import HeadPerturbation, Scope, Target
from dit_accel.guidance.base import Guidance, Perturbation, Switch
from dit_accel.guidance.heads import Head, settle_heads
from dit_accel.session import Seam


@dataclass(frozen=True)
class SoftPAG(Guidance):
    """Guide away from what the model predicts when chosen heads attend less than they do.

    Args:
        heads: pairs (layer, head) from 0, a text such as "12:3,12:7", or the path of a JSON file
            of heads. Layers are blocks in running order; on FLUX and HunyuanVideo dual-stream
            blocks come first. In Stable Diffusion 3.5 the joint attention is meant.
        strength: how far the heads are moved, in [0, 1]; one number, or one per head.
        perturbation: toward what. "identity": every token its own value. "uniform": the mean
            value. "query_mean": what the mean query sees; needs an attention method ("dense" will
            do), which shows the queries.
        scope: which queries are perturbed: "joint", text and image as in the paper's code, or
            "image" alone, where text shares the sequence.
    """

    name: ClassVar[str] = "softpag"
    paper: ClassVar[str] = "SoftPAG and HeadHunter, 2506.10978"

    heads: tuple[Head, ...] | str
    strength: float | tuple[float, ...] = 0.5
    perturbation: Target = "identity"
    scope: Scope = "joint"

    def __post_init__(self) -> None:
        """Check the options, the file of heads included."""
        super().__post_init__()
        check_choice("perturbation", self.perturbation, get_args(Target))
        check_choice("scope", self.scope, get_args(Scope))
        heads, file = settle_heads(self.heads)
        if file is None:
            object.__setattr__(self, "heads", heads)
        if isinstance(self.strength, list):
            object.__setattr__(self, "strength", tuple(self.strength))
        if isinstance(self.strength, tuple) and len(self.strength) != len(heads):
            raise OptionError(
                f"strength has {len(self.strength)} values for {len(heads)} heads: give one for "
                "all, or one each."
            )
        for value in self.strengths:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value <= 1:
                raise OptionError(f"strength={value!r} must be in [0, 1].")

    @property
    def strengths(self) -> tuple[float, ...]:
        """One strength per head."""
        if isinstance(self.strength, tuple):
            return self.strength
        return (self.strength,) * len(settle_heads(self.heads)[0])

    @property
    def idle(self) -> str:
        """See `Guidance.idle`."""
        return super().idle or ("" if any(self.strengths) else "strength is 0")

    @property
    def sees_queries(self) -> bool:
        """See `Guidance.sees_queries`."""
        return self.perturbation == "query_mean"

    def perturb(self, transformer: nn.Module, seam: Seam, switch: Switch) -> Perturbation:
        """See `Guidance.perturb`."""
        heads, file = settle_heads(self.heads)
        if file is not None:
            file.check(transformer, seam, self.perturbation, self.scope)
        by_layer: dict[int, dict[int, float]] = {}
        for (layer, head), strength in zip(heads, self.strengths, strict=True):
            by_layer.setdefault(layer, {})[head] = strength
        return HeadPerturbation(by_layer, self.perturbation, self.scope, transformer, seam, switch)


def check_choice(name: str, value: object, valid: tuple[str, ...]) -> None:
    """Raise `OptionError` unless ``value`` is one of ``valid``."""
    if value not in valid:
        raise OptionError(f"unknown {name} {value!r}.{did_you_mean(str(value), valid)}")
