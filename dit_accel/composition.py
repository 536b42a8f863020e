"""Methods that run together: at most one of each kind, and whose option a keyword is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dit_accel.errors import OptionError, did_you_mean
from dit_accel.kinds import KINDS, Method
from dit_accel.registry import method_class, option_names, resolve_method

MethodChoice = str | Method | Sequence[str | Method]
"""A name (or several with commas), a method object, or a list of these."""


def members(choice: MethodChoice) -> list[str | Method]:
    """Return the single names and objects of a choice.

    Raises:
        OptionError: if it is none, or an item is neither a name nor a method object.
    """
    if isinstance(choice, str):
        return [name.strip() for name in choice.split(",")]
    if isinstance(choice, Method):
        return [choice]
    if not isinstance(choice, Sequence) or not choice:
        raise OptionError(f"method={choice!r}: give a name, a method object or a list of them.")
    return [member for item in choice for member in members(item)]


def compose(
    choice: MethodChoice,
    options: Mapping[str, Any],
    defaults: Callable[[str], Mapping[str, Any]] = lambda name: {},
) -> dict[str, Method]:
    """Return the chosen methods by kind, in the order of `KINDS`.

    Args:
        choice: names and objects; "auto" must have been settled.
        options: values by option name. Each goes to the named method that has such an option; a
            dict under a method's own name goes to that method.
        defaults: published options of the method with a name, which ``options`` override.

    Raises:
        UnknownMethodError: if a name is unknown.
        OptionError: if two methods are of one kind, or an option belongs to none of them or to
            more than one.
    """
    chosen = members(choice)
    classes = [method_class(m) if isinstance(m, str) else type(m) for m in chosen]
    _refuse_two_of_a_kind(classes)
    routed = _route(chosen, options)
    found: dict[str, Method] = {}
    for member in chosen:
        if isinstance(member, str):
            settled = method_class(member).options_from(defaults(member), routed[member])
            member = resolve_method(member, **settled)
        found[member.kind] = member
    return {kind: found[kind] for kind in KINDS if kind in found}


def check_general(choice: MethodChoice, given: Mapping[str, Any]) -> None:
    """Refuse the options that go with attention methods where none is chosen.

    Raises:
        OptionError: naming the options that would do nothing.
    """
    chosen = members(choice)
    kinds = {(method_class(m) if isinstance(m, str) else m).kind for m in chosen}
    # A resolution method brings attention of its own, which an operator has to run too. The guard
    # may be set for whatever comes.
    useful = ("guard", "backend", "precision") if "resolution" in kinds else ("guard",)
    useless = [n for n, value in given.items() if value not in (None, "auto") and n not in useful]
    if "attention" not in kinds and useless:
        raise OptionError(
            f"{', '.join(useless)}: goes with attention methods, and none is chosen. Add one to "
            "method=[...] or leave it out."
        )


def _refuse_two_of_a_kind(classes: Sequence[type[Method]]) -> None:
    by_kind: dict[str, str] = {}
    for cls in classes:
        if cls.kind in by_kind:
            kind = "attention method" if cls.kind == "attention" else cls.kind
            raise OptionError(
                f"{by_kind[cls.kind]!r} and {cls.name!r} are both of the kind {cls.kind!r}: give "
                f"one {kind} at most."
            )
        by_kind[cls.kind] = cls.name


def _route(chosen: Sequence[str | Method], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return each named method's share of the options."""
    names = [member for member in chosen if isinstance(member, str)]
    valid = {name: option_names(method_class(name)) for name in names}
    objects = {m.name: option_names(type(m)) for m in chosen if isinstance(m, Method)}
    routed: dict[str, dict[str, Any]] = {name: {} for name in names}
    # A method's own dict comes last: it overrides what is given for all.
    for option, value in sorted(options.items(), key=lambda item: item[0] in routed):
        if option in routed and isinstance(value, Mapping):
            routed[option] |= value
            continue
        owners = [name for name in names if option in valid[name]]
        if len(owners) == 1:
            routed[owners[0]][option] = value
        elif owners:
            example = f"{owners[0]}={{{option!r}: {value!r}}}"
            raise OptionError(
                f"option {option!r} belongs to {' and '.join(map(repr, owners))}: say whose, as in "
                f"{example}."
            )
        elif option in objects or any(option in own for own in objects.values()):
            raise OptionError(
                f"options [{option!r}] given beside a method object: put them into the object."
            )
        else:
            every = {o for own in (*valid.values(), *objects.values()) for o in own}
            whose = " and ".join(repr(name) for name in (*valid, *objects))
            raise OptionError(
                f"method {whose} has no option {option!r}.{did_you_mean(option, every)}"
            )
    return routed
