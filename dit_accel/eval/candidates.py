"""What is compared in one run: the dense baseline and methods, each with its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dit_accel.bench.methods import block_options
from dit_accel.errors import OptionError

DENSE = "dense"


@dataclass(frozen=True)
class Candidate:
    """One way of generating.

    Attributes:
        label: names it in a run: the method's name, with the density that was asked for.
        method: a method, or several with commas; `DENSE` leaves the pipeline as it is.
        options: keyword arguments for `accelerate_pipeline`.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dense(self) -> bool:
        """Whether it is the baseline."""
        return self.method == DENSE


def make_candidates(
    methods: Sequence[str],
    *,
    densities: Sequence[float] = (),
    block_size: int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Candidate, ...]:
    """Return the candidates of a run, the dense baseline first even if it is not named.

    Args:
        methods: names; joined by ``+`` they go together, the attention method first.
        densities: shares of pairs to ask of every attention method; none: published options.
        block_size: tokens per block for models of few tokens; None: the methods' own.
        options: by method, further options.

    Raises:
        OptionError: if a method is named twice.
    """
    from dit_accel.registry import list_methods

    found = [Candidate(DENSE, DENSE)]
    for name in methods:
        if name == DENSE:
            continue
        own = {**block_options(name.split("+")[0], block_size), **(options or {}).get(name, {})}
        sparse = bool(set(name.split("+")) & set(list_methods("attention")))
        for density in densities if sparse and densities else [None]:
            asked = {} if density is None else {"density": density}
            label = name if density is None else f"{name}@{density:g}"
            found.append(Candidate(label, name.replace("+", ","), {**own, **asked}))
    labels = [candidate.label for candidate in found]
    for label in labels:
        if labels.count(label) > 1:
            raise OptionError(f"--methods: {label!r} is named twice.")
    return tuple(found)
