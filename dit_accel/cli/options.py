"""``--set name=value``, typed by the methods' dataclasses and `accelerate_pipeline`'s signature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import typer

from dit_accel.errors import OptionError, did_you_mean

if TYPE_CHECKING:
    import torch

GuardSwitch = Annotated[
    bool | None,
    typer.Option(
        "--guard/--no-guard",
        help="Compare sparse attention with dense in a few rows, and repair it. [default: guard]",
        show_default=False,
    ),
]
GuardError = Annotated[
    float | None, typer.Option(help="Most relative error of a head that the guard lets pass.")
]

DTYPES = ("float32", "float16", "bfloat16")
GENERAL = ("density", "dense_steps", "dense_layers", "min_tokens", "backend", "precision")
"""Options of `accelerate_pipeline` that go with every attention method."""


def parse_options(
    method: str,
    assignments: Sequence[str],
    general: Sequence[str] = GENERAL,
    *,
    alternatives: bool = False,
) -> dict[str, Any]:
    """Return keyword arguments for `accelerate_pipeline` from texts such as ``density=0.3``.

    Everything that can be checked without a pipeline is checked. ``general`` are the options
    allowed beside the methods' own.

    Args:
        method: a name, or several with commas.
        assignments: texts; ``name.option=value`` is for one method alone.
        general: options allowed beside the methods' own.
        alternatives: whether the methods are to choose among, rather than to run together.

    Raises:
        UnknownMethodError: if there is no such method.
        OptionError: on an unknown option, or a value that it can't have.
    """
    own = {name: method_hints(name) for name in names_of(method)}
    valid = _general_hints(general)
    for hints in own.values():
        valid |= hints
    valid |= {f"{name}.{option}": own[name][option] for name in own for option in own[name]}
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise OptionError(f"--set {assignment!r}: write name=value.")
        if name not in valid:
            raise OptionError(
                f"method {method!r} has no option {name!r}.{did_you_mean(name, valid)}"
            )
        try:
            value = parse_value(text.strip(), valid[name])
        except ValueError:
            raise OptionError(
                f"--set {assignment!r}: {text!r} is not {describe(valid[name])}."
            ) from None
        owner, dot, option = name.partition(".")
        if dot:
            values.setdefault(owner, {})[option] = value
        else:
            values[name] = value
    _check(method, values, alternatives)
    return values


def names_of(method: str) -> list[str]:
    """Return the names in ``a,b``."""
    from dit_accel.composition import members

    return [str(name) for name in members(method)]


def guard_options(on: bool | None, max_error: float | None) -> dict[str, Any]:
    """Return the ``guard`` that --guard, --no-guard and --guard-error ask for, if they do.

    Raises:
        OptionError: if they contradict each other, or on an impossible error.
    """
    from dit_accel.guard.options import QualityGuard

    if on is False and max_error is not None:
        raise OptionError("--no-guard and --guard-error contradict each other: give one of them.")
    if max_error is not None:
        return {"guard": QualityGuard(max_error=max_error)}
    return {} if on is None else {"guard": on}


def pick_dtype(name: str) -> torch.dtype | None:
    """Return the torch dtype called ``name``; None, the model's choice, for "auto".

    Raises:
        OptionError: if it is none of `DTYPES`.
    """
    import torch

    if name == "auto":
        return None
    if name not in DTYPES:
        raise OptionError(f"unknown dtype {name!r}.{did_you_mean(name, (*DTYPES, 'auto'))}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def parse_value(text: str, hint: Any) -> Any:
    """Read ``text`` as a value of the annotated type.

    Raises:
        ValueError: if it can't be one.
    """
    for candidate in _alternatives(hint):
        try:
            return _parse_one(text, candidate)
        except ValueError:
            continue
    raise ValueError(text)


def describe(hint: Any) -> str:
    """Return a type annotation in words for messages and tables."""
    words = [_describe_one(candidate) for candidate in _alternatives(hint)]
    return " or ".join(dict.fromkeys(words))


def _alternatives(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, UnionType):
        for member in get_args(hint):
            yield from _alternatives(member)
    else:
        yield hint


def _parse_one(text: str, hint: Any) -> Any:
    if hint is NoneType:
        return _lookup(text, {"none": None})
    if hint is bool:
        return _lookup(text, {"true": True, "false": False})
    if hint in (int, float):
        return hint(text)
    if hint is str:
        return text
    origin = get_origin(hint)
    if origin is Literal:
        return _lookup(text, {str(value).lower(): value for value in get_args(hint)})
    if origin is not None and issubclass(origin, Sequence):
        return _parse_tuple(text, hint)
    raise ValueError(text)


def _lookup(text: str, values: dict[str, Any]) -> Any:
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _parse_tuple(text: str, hint: Any) -> tuple[Any, ...]:
    parts = [part.strip() for part in text.strip("()[] ").rstrip(",").split(",")]
    members = get_args(hint)
    if get_origin(hint) is not tuple or members[1:] == (...,):
        members = members[:1] * len(parts)
    if len(parts) != len(members):
        raise ValueError(text)
    return tuple(map(parse_value, parts, members))


def _describe_one(hint: Any) -> str:
    if hint is NoneType:
        return "none"
    if hint is bool:
        return "true or false"
    if get_origin(hint) is Literal:
        return " or ".join(str(value) for value in get_args(hint))
    if get_origin(hint) is tuple and get_args(hint)[1:] != (...,):
        return "(" + ", ".join(describe(member) for member in get_args(hint)) + ")"
    if get_args(hint):
        return f"a list of {describe(get_args(hint)[0])}"
    return str(hint.__name__)


def method_hints(method: str) -> dict[str, Any]:
    """Return the types of a method's options; "auto" is settled by the pipeline and has none."""
    from dit_accel.registry import method_class

    if method == "auto":
        return {}
    cls = method_class(method)
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def _general_hints(names: Sequence[str]) -> dict[str, Any]:
    """Return the types of `accelerate_pipeline`'s own options."""
    from dit_accel.acceleration import accelerate_pipeline

    hints = get_type_hints(accelerate_pipeline)
    return {name: hints[name] for name in names}


def _check(method: str, values: dict[str, Any], alternatives: bool) -> None:
    """Refuse impossible values before a model is loaded."""
    from dit_accel.composition import check_general, compose
    from dit_accel.methods.base import check_density
    from dit_accel.operators import check_backend
    from dit_accel.schedule import Schedule

    check_backend(values.get("backend", "auto"), values.get("precision"))
    if values.get("density") is not None:
        check_density(values["density"])
    schedule = (values.get(name) for name in ("dense_steps", "dense_layers", "min_tokens"))
    Schedule.make(*(0 if value is None else value for value in schedule))
    names = [name for name in names_of(method) if name != "auto"]
    given = {name: value for name, value in values.items() if name not in GENERAL}
    if "auto" not in names_of(method):
        check_general(names, {name: value for name, value in values.items() if name in GENERAL})
    # What an option without a default will be may only be known with the model's family.
    if alternatives or not names or any(_required(name) - given.keys() for name in names):
        return
    compose(names, given)


def _required(method: str) -> set[str]:
    from dit_accel.registry import method_class

    return {
        f.name
        for f in fields(method_class(method))
        if f.init and f.default is MISSING and f.default_factory is MISSING
    }
