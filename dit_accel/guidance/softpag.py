"""Soft perturbed-attention guidance: single heads, moved by degrees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

from torch import nn

from dit_accel.errors import OptionError, did_you_mean
from dit_accel.guidance.attention import HeadPerturbation, Scope, Target
from dit_accel.guidance.base import Guidance, Perturbation, Switch
from dit_accel.guidance.heads import Head, HeadFile, is_name, named_heads, settle_heads
from dit_accel.session import Seam, Session

DEFAULT_STRENGTH = 0.5


@dataclass(frozen=True)
class SoftPAG(Guidance):
    """Guide away from what the model predicts when chosen heads attend less than they do.

    Args:
        heads: pairs (layer, head) from 0, a text such as "12:3,12:7", the path of a JSON file of
            heads, or the name of a set that the model's folder brings. Layers are blocks in
            running order; on FLUX and HunyuanVideo dual-stream blocks come first. In Stable
            Diffusion 3.5 the joint attention is meant.
        strength: how far the heads are moved, in [0, 1]; one number, or one per head. None: what
            the file of heads recommends, or 0.5. It may recommend a ``scale``, too.
        perturbation: toward what. "identity": every token its own value. "uniform": the mean
            value. "query_mean": what the mean query sees; needs an attention method ("dense" will
            do), which shows the queries.
        scope: which queries are perturbed: "joint", text and image as in the paper's code, or
            "image" alone, where text shares the sequence.
    """

    name: ClassVar[str] = "softpag"
    paper: ClassVar[str] = "SoftPAG and HeadHunter, 2506.10978"

    heads: tuple[Head, ...] | str
    strength: float | tuple[float, ...] | None = None
    perturbation: Target = "identity"
    scope: Scope = "joint"

    def __post_init__(self) -> None:
        """Check the options, the file of heads included."""
        super().__post_init__()
        check_choice("perturbation", self.perturbation, get_args(Target))
        check_choice("scope", self.scope, get_args(Scope))
        if isinstance(self.strength, list):
            object.__setattr__(self, "strength", tuple(self.strength))
        if not is_name(self.heads):  # a name is settled by the pipeline's folder
            self._settle(*settle_heads(self.heads))
        for value in self.strengths:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value <= 1:
                raise OptionError(f"strength={value!r} must be in [0, 1].")

    def _settle(self, heads: tuple[Head, ...], file: HeadFile | None) -> None:
        """Take from a file of heads what was not given."""
        if file is None:
            object.__setattr__(self, "heads", heads)
        elif self.scale is None and self.extra_pass:
            object.__setattr__(self, "scale", file.scale)
        if self.strength is None:
            brought = None if file is None else file.strength
            settled = DEFAULT_STRENGTH if brought is None else brought
            object.__setattr__(self, "strength", settled)
        if isinstance(self.strength, tuple) and len(self.strength) != len(heads):
            raise OptionError(
                f"strength has {len(self.strength)} values for {len(heads)} heads: give one for "
                "all, or one each."
            )

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths given: one per head, or one for all, or none for a set by name."""
        if self.strength is None:
            return ()
        return self.strength if isinstance(self.strength, tuple) else (self.strength,)

    @property
    def idle(self) -> str:
        """See `Guidance.idle`."""
        return super().idle or ("" if any(self.strengths) else "strength is 0")

    @property
    def sees_queries(self) -> bool:
        """See `Guidance.sees_queries`."""
        return self.perturbation == "query_mean"

    def session(self, pipe: Any, seam: Seam) -> Session:
        """See `SessionMethod.session`; finds heads given by name."""
        if not is_name(self.heads):
            return super().session(pipe, seam)
        return replace(self, heads=str(named_heads(pipe, str(self.heads)))).session(pipe, seam)

    def perturb(self, transformer: nn.Module, seam: Seam, switch: Switch) -> Perturbation:
        """See `Guidance.perturb`."""
        heads, file = settle_heads(self.heads)
        if file is not None:
            file.check(seam.family, transformer, self.perturbation, self.scope)
        strengths = self.strengths * (len(heads) // len(self.strengths))
        by_layer: dict[int, dict[int, float]] = {}
        for (layer, head), strength in zip(heads, strengths, strict=True):
            by_layer.setdefault(layer, {})[head] = strength
        return HeadPerturbation(by_layer, self.perturbation, self.scope, transformer, seam, switch)


def check_choice(name: str, value: object, valid: tuple[str, ...]) -> None:
    """Raise `OptionError` unless ``value`` is one of ``valid``."""
    if value not in valid:
        raise OptionError(f"unknown {name} {value!r}.{did_you_mean(str(value), valid)}")
