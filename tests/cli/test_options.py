"""Texts of ``--set`` become values of the annotated types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import pytest

from dit_accel.cli.options import parse_options, parse_value
from dit_accel.errors import OptionError


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int | float, 3),
        ("0.5", int | float, 0.5),
        ("3", float, 3.0),
        ("inf", float, float("inf")),
        ("true", bool, True),
        ("None", bool | None, None),
        ("False", bool | None, False),
        ("paper", Literal["released", "paper"], "paper"),
        ("torch", str, "torch"),
        ("1,0.5,0.25", int | float | tuple[int | float, ...], (1, 0.5, 0.25)),
        ("(4, 6)", int | tuple[int, int], (4, 6)),
        ("0,2,5", int | Sequence[int], (0, 2, 5)),
    ],
)
def test_parse_value(text, hint, value):
    parsed = parse_value(text, hint)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("1.5", int),
        ("1", bool),
        ("none", int),
        ("4,6,8", tuple[int, int]),
        ("4,x", int | tuple[int, ...]),
    ],
)
def test_parse_value_refuses(text, hint):
    with pytest.raises(ValueError, match=re.escape(text)):
        parse_value(text, hint)


def test_general_and_own_options_together():
    options = ["density=0.3", "dense-steps=0.2,1", "dense_layers=0,3", "decay=2", "sink=true"]
    assert parse_options("radial", options) == {
        "density": 0.3,
        "dense_steps": (0.2, 1),
        "dense_layers": (0, 3),
        "decay": 2.0,
        "sink": True,
    }


def test_names_of_one_kind_are_alternatives_only():
    with pytest.raises(OptionError, match="give one attention method at most"):
        parse_options("gna,radial", [])
    assert parse_options("gna,radial,easycache", ["min_tokens=0"], alternatives=True) == {
        "min_tokens": 0
    }


def test_auto_takes_general_options_only():
    assert parse_options("auto", ["min_tokens=64"]) == {"min_tokens": 64}
    with pytest.raises(OptionError, match="no option 'decay'"):
        parse_options("auto", ["decay=1"])
