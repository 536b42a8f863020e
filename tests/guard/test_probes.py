"""What a probe measures, and the options."""

from __future__ import annotations

import pytest
import torch

from dit_accel import QualityGuard
from dit_accel.call import TokenLayout
from dit_accel.errors import OptionError
from dit_accel.guard.engine import probe_rows, probe_sums
from dit_accel.guard.options import settle_guard
from dit_accel.guard.reference import probe_error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_engine_measures_what_the_reference_says(dtype):
    torch.manual_seed(0)
    query, key, value, output = torch.randn(4, 2, 50, 3, 16).to(dtype).unbind()
    rows = torch.tensor([3, 17, 40])
    wrong, size = probe_sums(query, key, value, output, rows, 0.3)
    expected = probe_error(query, key, value, output, rows, 0.3)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close((wrong / size).sqrt().double(), expected, rtol=tolerance, atol=0)


def test_the_reference_by_hand():
    """Two keys with equal logits: dense attention is the mean of their values."""
    query, key = torch.zeros(2, 1, 2, 1, 4)
    value = torch.tensor([1.0, 3.0])[None, :, None, None].expand(1, 2, 1, 4)
    output = torch.full((1, 2, 1, 4), 3.0)
    assert float(probe_error(query, key, value, output, torch.tensor([0]))) == pytest.approx(0.5)
    zeros = probe_error(query, key, value, torch.zeros_like(output), torch.tensor([0, 1]))
    assert float(zeros) == pytest.approx(1)


@pytest.mark.parametrize("text", [(0, False), (5, False), (5, True)])
@pytest.mark.parametrize("count", [1, 7, 64, 252, 1000])
def test_rows_are_distinct_video_tokens_and_move(text, count):
    layout = TokenLayout((4, 7, 9), *text)
    first = 5 if text == (5, True) else 0
    seen = set()
    for earlier in range(40):
        rows = probe_rows(layout, count, earlier, torch.device("cpu")).tolist()
        assert len(set(rows)) == min(count, 252)
        assert first <= min(rows) <= max(rows) < first + 252
        seen |= {*rows}
    assert count > 7 or len(seen) > 5 * count


def test_each_layer_is_probed_first_and_then_in_turn():
    guard = QualityGuard(every=4)
    probed = [[guard.probes(layer, calls) for calls in range(9)] for layer in range(4)]
    assert all(row[0] for row in probed)
    later = [sum(column) for column in zip(*probed, strict=True)][1:]
    assert later == [1] * 8
    assert not QualityGuard(layers=(2,)).probes(1, 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_eror": 0.3}, "Did you mean 'max_error'"),
        ({"max_error": 0}, "max_error=0"),
        ({"max_error": True}, "max_error=True"),
        ({"max_error": float("nan")}, "max_error"),
        ({"max_error": float("inf")}, "finite"),
        ({"rows": 0}, "rows=0"),
        ({"every": 1.5}, "every=1.5"),
        ({"layers": 3}, "layers=3"),
        ({"layers": [-1]}, "layers"),
        ({"action": "haed"}, "Did you mean 'head'"),
        ({"release": 2}, "release=2"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_impossible_options(options, says):
    with pytest.raises(OptionError, match=says):
        settle_guard(options)


def test_choices():
    assert settle_guard(None) == settle_guard(True) == settle_guard("on") == QualityGuard()
    assert settle_guard(False) is settle_guard("off") is None
    assert settle_guard({"layers": [1, 2]}) == QualityGuard(layers=(1, 2))
    with pytest.raises(OptionError, match=r"guard=0\.1"):
        settle_guard(0.1)
