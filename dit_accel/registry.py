"""Finds methods and model families: by scanning two folders, and by entry points of other packages.

A third party registers a class under the entry point groups ``dit_accel.methods`` or
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
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from dit_accel.errors import OptionError, UnknownMethodError, UnknownPipelineError, did_you_mean
from dit_accel.methods.base import AttentionMethod

if TYPE_CHECKING:
    from dit_accel.pipelines.base import PipelineFamily

T = TypeVar("T")


def list_methods() -> list[str]:
    """Return the names of all methods, sorted."""
    return sorted(_methods())


def list_families() -> list[str]:
    """Return the names of all model families, sorted."""
    return sorted(_families())


def method_class(name: str) -> type[AttentionMethod]:
    """Return the config class of the method called ``name``.

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


def resolve_method(method: str | AttentionMethod, **options: Any) -> AttentionMethod:
    """Return ``method`` itself, or make the method of that name from ``options``.

    Raises:
        UnknownMethodError: if no method has that name.
        OptionError: if an option is unknown or has an impossible value, or if options are given
            beside a method object.
    """
    if isinstance(method, AttentionMethod):
        if options:
            raise OptionError(
                f"options {sorted(options)} given beside a {type(method).__name__} object: "
                f"put them into the object."
            )
        return method
    if not isinstance(method, str):
        raise OptionError(f"method={method!r}: give a name or a method object.")
    cls = method_class(method)
    valid = [f.name for f in fields(cls) if f.init]
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
def _methods() -> Mapping[str, type[AttentionMethod]]:
    import dit_accel.methods as package

    return _discover(package, AttentionMethod, "dit_accel.methods")  # type: ignore[type-abstract]


@lru_cache(maxsize=1)
def _families() -> Mapping[str, type[PipelineFamily]]:
    import dit_accel.pipelines as package
    from dit_accel.pipelines.base import PipelineFamily

    return _discover(package, PipelineFamily, "dit_accel.families")  # type: ignore[type-abstract]


def _discover(package: Any, base: type[T], group: str) -> Mapping[str, type[T]]:
    classes: list[Any] = []
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
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
