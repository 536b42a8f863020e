"""Finds methods and model families: by scanning folders, and by entry points of other packages.

A third party registers a class under the entry point group of its kind (`kinds.KINDS`), or under
``dit_accel.families``; nothing here has to change.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from dit_accel.errors import OptionError, UnknownMethodError, UnknownPipelineError, did_you_mean
from dit_accel.kinds import KINDS, Method

if TYPE_CHECKING:
    from dit_accel.pipelines.base import PipelineFamily

T = TypeVar("T")


def list_methods(kind: str | None = None) -> list[str]:
    """Return the names of all methods, or of those of one kind, sorted.

    Args:
        kind: "attention", "cache", "guidance", "resolution", or None for all.

    Raises:
        OptionError: if there is no such kind.
    """
    if kind is not None and kind not in KINDS:
        raise OptionError(f"unknown kind of method {kind!r}.{did_you_mean(kind, KINDS)}")
    return sorted(name for name, cls in _methods().items() if kind in (None, cls.kind))


def list_families() -> list[str]:
    """Return the names of all model families, sorted."""
    return sorted(_families())


def method_class(name: str) -> type[Method]:
    """Return the config class of the method called ``name``, whatever its kind.

    Raises:
        UnknownMethodError: if there is none; the message names the nearest.
    """
    found = _methods().get(name)
    if found is None:
        raise UnknownMethodError(f"unknown method {name!r}.{did_you_mean(name, _methods())}")
    return found


def family_class(name: str) -> type[PipelineFamily]:
    """Return the family called ``name``.

    Raises:
        UnknownPipelineError: if there is none; the message names the nearest.
    """
    found = _families().get(name)
    if found is None:
        raise UnknownPipelineError(f"unknown family {name!r}.{did_you_mean(name, _families())}")
    return found


def option_names(cls: type[Method]) -> list[str]:
    """Return the names of a method's options."""
    return [f.name for f in fields(cls) if f.init]


def resolve_method(method: str | Method, **options: Any) -> Method:
    """Return ``method`` itself, or make the method of that name from ``options``.

    Raises:
        UnknownMethodError: if no method has that name.
        OptionError: if an option is unknown or has an impossible value, or if options are given
            beside a method object.
    """
    if isinstance(method, Method):
        if options:
            raise OptionError(
                f"options {sorted(options)} given beside a {type(method).__name__} object: "
                f"put them into the object."
            )
        return method
    if not isinstance(method, str):
        raise OptionError(f"method={method!r}: give a name or a method object.")
    cls = method_class(method)
    valid = option_names(cls)
    for name in options:
        if name not in valid:
            raise OptionError(
                f"method {method!r} has no option {name!r}.{did_you_mean(name, valid)}"
            )
    try:
        return cls(**options)
    except TypeError as error:
        raise OptionError(f"method {method!r}: {error}") from error


@lru_cache(maxsize=1)
def _methods() -> Mapping[str, type[Method]]:
    found: dict[str, type[Method]] = {}
    for group in KINDS.values():
        found |= discover(group, Method, group)
    return MappingProxyType(found)


@lru_cache(maxsize=1)
def _families() -> Mapping[str, type[PipelineFamily]]:
    from dit_accel.pipelines.base import PipelineFamily

    families = discover("dit_accel.pipelines", PipelineFamily, "dit_accel.families")  # type: ignore[type-abstract]
    return families


def discover(package: str, base: type[T], group: str) -> Mapping[str, type[T]]:
    """Return by name the concrete classes of a package (if it exists) and of an entry point group.

    Args:
        package: the package whose modules define them.
        base: what they derive from; each has a ``name``.
        group: the entry point group of other packages.
    """
    classes: list[Any] = []
    spec = find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    for info in pkgutil.iter_modules(folders, package + "."):
        module = importlib.import_module(info.name)
        classes += [
            value
            for value in vars(module).values()
            if inspect.isclass(value) and value.__module__ == module.__name__
        ]
    classes += [point.load() for point in entry_points(group=group)]
    return MappingProxyType(
        {cls.name: cls for cls in classes if issubclass(cls, base) and not inspect.isabstract(cls)}
    )
