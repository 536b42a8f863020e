"""The report's picture: colours say what the records say."""

from __future__ import annotations

import pytest
from PIL import Image

from dit_accel import QualityGuard
from dit_accel.errors import OptionError
from dit_accel.report_png import (
    HEADER,
    LEFT,
    NOT_RUN,
    OPERATORS,
    OVER,
    TOP,
    cell_size,
    density_colour,
    error_colour,
)

from .conftest import Calls, near, needle

GNA = {"window": (3, 3, 3), "block_size": 16}


def cell(picture, panel, layer, column, steps):
    """The colour in the middle of a cell of the first branch."""
    side = cell_size(2, steps)
    width = picture.width // 3
    at = panel * width + LEFT + column * side + side // 2
    return picture.getpixel((at, HEADER + TOP + layer * side + side // 2))


def test_colours_tell_density_error_and_operator(tmp_path):
    calls = Calls(**GNA, guard=QualityGuard(every=2))
    for step in range(3):
        calls.forward([needle((0, 1, 2)), near()], step)
    calls.report.save_picture(tmp_path / "report.png")
    report, budget = calls.report, 0.6
    errors = {(r.layer, r.step): r.worst for r in report.guard.records if r.errors}
    assert errors.keys() == {(0, 0), (1, 0), (1, 1)}
    with Image.open(tmp_path / "report.png") as picture:
        for call in report.calls:
            where = call.layer, call.step
            assert cell(picture, 0, *where, 3) == density_colour(call.density)
            error = errors.get(where)
            expected = NOT_RUN if error is None else error_colour(error, budget)
            assert cell(picture, 1, *where, 3) == expected
            assert (cell(picture, 2, *where, 3) == OPERATORS[0]) is not bool(call.reason)
        assert cell(picture, 1, 0, 0, 3) == OVER


def test_without_a_guard_and_of_one_forward(tmp_path):
    calls = Calls(**GNA, guard=False)
    calls.forward([near(), near()], None)
    calls.report.save_picture(tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as picture:
        assert cell(picture, 1, 1, 0, 1) == NOT_RUN


def test_nothing_to_draw(tmp_path):
    with pytest.raises(OptionError, match="generate first"):
        Calls(**GNA).report.save_picture(tmp_path / "report.png")
    assert not any(tmp_path.iterdir())
