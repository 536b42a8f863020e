"""What may be chosen: each method with one knob, from weak to strong, and pairs of two methods."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from dit_accel.call import TokenLayout
from dit_accel.errors import DensityUnreachableError, OptionError
from dit_accel.methods.base import AttentionMethod, StaticMethod
from dit_accel.registry import list_methods, method_class, resolve_method

DENSITIES = (0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)
"""Shares of the pairs that attention methods are tried at, weak to strong."""
BLOCKS = 48
"""Least number of blocks of the video that leaves a method something to choose from."""
_BLOCK_OPTIONS = ("block_size", "query_block", "key_block")
_BLOCK_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Setting:
    """What `accelerate_pipeline` is given: methods by name, and keyword arguments.

    Attributes:
        methods: names.
        options: keyword arguments, JSON-ready; those of one method in a dict under its name.
    """

    methods: tuple[str, ...] = ("dense",)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells it from all others, for people, too: the name, and all options."""
        return f"{self} {json.dumps(self.options, sort_keys=True)}"

    def __str__(self) -> str:
        """Name the methods and their knobs."""
        parts = []
        for name in self.methods:
            own = dict(self.options.get(name, {}))
            knob = getattr(method_class(name), "strength", None)
            if knob is not None:
                parts.append(f"{name} {knob}={own[knob]:.3g}")
            elif "density" in self.options:
                pooled = " with a remainder" if own.get("remainder") == "pooled" else ""
                parts.append(f"{name}{pooled} density={self.options['density']:g}")
            else:
                parts.append(name)
        return " + ".join(parts)


@dataclass(frozen=True)
class Line:
    """One method and the values of its knob.

    Attributes:
        method: name.
        knob: "density", or the cache's strength.
        values: of the knob, weak to strong.
        own: other options of the method.
        general: keyword arguments beside them.
    """

    method: str
    knob: str
    values: tuple[float, ...]
    own: Mapping[str, Any] = field(default_factory=dict)
    general: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Of the method: "attention" or "cache"."""
        return method_class(self.method).kind

    def at(self, index: int) -> Setting:
        """Return the setting with a value of the knob."""
        value, own = self.values[index], dict(self.own)
        if self.kind == "attention":
            return Setting((self.method,), {**self.general, "density": value, self.method: own})
        return Setting((self.method,), {self.method: {**own, self.knob: value}})


def together(attention: Setting, cache: Setting) -> Setting:
    """Return both at once."""
    return Setting((*attention.methods, *cache.methods), {**attention.options, **cache.options})


def attention_lines(
    layout: TokenLayout, general: Mapping[str, Any], names: Sequence[str] | None = None
) -> list[Line]:
    """Return the attention methods that can be sparse on ``layout``, at the densities they reach.

    Args:
        layout: what is generated.
        general: keyword arguments that go with all of them, such as ``dense_steps``.
        names: methods; None for all that have a density.
    """
    lines = []
    for name in names or list_methods("attention"):
        for own in _variants(name, layout):
            values = tuple(_reached(resolve_method(name, **own), layout))
            if values:
                lines.append(Line(name, "density", values, own, general))
    return lines


def cache_lines(
    names: Sequence[str] | None = None, own: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Line]:
    """Return the caches at strengths around their usual ones.

    Args:
        names: caches; None for all.
        own: other options of each.
    """
    lines = []
    for name in names or list_methods("cache"):
        cls: Any = method_class(name)
        middle = cls.strengths[1]
        if isinstance(middle, int):
            values = tuple(range(2, max(cls.strengths) + 3))
        else:
            values = tuple(middle * 2 ** (step / 2) for step in range(-5, 6))
        values = tuple(value for value in values if value < cls.most)
        lines.append(Line(name, cls.strength, values, (own or {}).get(name, {})))
    return lines


def block_size_for(layout: TokenLayout) -> int:
    """Return the largest usual block of which there are enough to choose from."""
    enough = (size for size in _BLOCK_SIZES if layout.video_length >= BLOCKS * size)
    return next(enough, _BLOCK_SIZES[-1])


def blocks_of(name: str, size: int) -> dict[str, int]:
    """Return the options that give a method blocks of at most ``size`` tokens."""
    defaults: dict[str, Any] = {f.name: f.default for f in fields(method_class(name)) if f.init}
    return {option: min(size, defaults[option]) for option in _BLOCK_OPTIONS if option in defaults}


def _variants(name: str, layout: TokenLayout) -> Iterator[dict[str, Any]]:
    cls = method_class(name)
    own: dict[str, Any] = blocks_of(name, block_size_for(layout))
    yield own
    if issubclass(cls, StaticMethod):
        yield own | {"remainder": "pooled"}


def _reached(method: Any, layout: TokenLayout) -> Iterator[float]:
    """Yield the densities that a method reaches, and nothing if it has none."""
    if not isinstance(method, AttentionMethod):
        return
    for density in DENSITIES:
        try:
            method.at_density(density, layout)
        except (DensityUnreachableError, OptionError):
            return
        yield density
