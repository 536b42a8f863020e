"""Which calls stay dense."""

from __future__ import annotations

import pytest

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.schedule import Schedule

LAYOUT = TokenLayout((2, 3, 4), text_length=5)


def dense_steps(schedule: Schedule, num_steps: int) -> list[int]:
    calls = [AttentionCall(LAYOUT, step=i, num_steps=num_steps) for i in range(num_steps)]
    return [call.step for call in calls if schedule.dense_reason(call)]


@pytest.mark.parametrize(
    ("steps", "num_steps", "dense"),
    [
        (0, 5, []),
        (2, 5, [0, 1]),
        ((1, 1), 5, [0, 4]),
        ((0, 2), 5, [3, 4]),
        (1.0, 3, [0, 1, 2]),
        # The published settings of Radial: 12 of 50 steps, 2 of 8, 1 of 4.
        (0.24, 50, list(range(12))),
        (0.24, 8, [0, 1]),
        (0.24, 4, [0]),
        (9, 4, [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_numbers_and_shares_of_steps(steps, num_steps, dense):
    assert dense_steps(Schedule.make(steps, 0, 0), num_steps) == dense


def test_layers_by_number_or_index():
    for layers, dense in ((2, {0, 1}), ([0, 3], {0, 3}), ((), set())):
        schedule = Schedule.make(0, layers, 0)
        calls = [AttentionCall(LAYOUT, layer=i, num_layers=5) for i in range(5)]
        assert {c.layer for c in calls if schedule.dense_reason(c)} == dense


def test_min_tokens_counts_video_tokens():
    call = AttentionCall(LAYOUT)
    assert Schedule.make(0, 0, 24).dense_reason(call) is None
    assert "min_tokens" in Schedule.make(0, 0, 25).dense_reason(call)


def test_outside_a_loop_no_step_is_early():
    assert Schedule.make(10, 0, 0).dense_reason(AttentionCall(LAYOUT)) is None
