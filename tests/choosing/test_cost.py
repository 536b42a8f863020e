"""Times from a table, from a measurement and from the cache folder; what is predicted from them."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch

from dit_accel.call import TokenLayout
from dit_accel.choosing import times
from dit_accel.choosing.cost import CostModel, Workload
from dit_accel.choosing.rehearsal import rehearse
from dit_accel.choosing.times import AttentionTimes, Place, predicted_seconds, shipped_rates
from dit_accel.compat import dense_attention
from dit_accel.functional import sparse_attention
from dit_accel.guard.options import QualityGuard
from dit_accel.methods.gna import GNA
from dit_accel.methods.pisa import PISA
from dit_accel.methods.psa import PSA

ROW = {"fixed_s": 0.0, "per_token_s": 0.0, "per_block_pair_s": 0.0, "per_pair_s": 1e-12}
PLACE = Place(TokenLayout((21, 45, 80)), 40, 128, dtype=torch.bfloat16)


class Card(Place):
    """A call on a card that is not here."""

    card = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setattr(times, "cache_folder", lambda: tmp_path)


def on_h100(**changes):
    given = {"layout": PLACE.layout, "heads": 40, "head_size": 128, "dtype": torch.bfloat16}
    return Card(**{**given, **changes})


@pytest.mark.parametrize(
    ("method", "measured_ms"),
    [
        (None, 201.9),  # step-h100.json: attention of Wan 14B at 720p and 81 frames, per layer
        (GNA().at_density(0.15, PLACE.layout), 27.1),
        (PSA(density=0.15, key_block=128), 64.9),
        (PISA(density=0.15), 54.7),
    ],
    ids=["dense", "gna", "psa", "pisa"],
)
def test_the_table_agrees_with_other_measurements_on_that_card(method, measured_ms):
    # The forwards' profiles took no part in the table, and have five times its heads.
    seconds = AttentionTimes(measuring=False).seconds(method, on_h100())
    dense_s = 0.2019
    # A quarter of the call's own time, which is a few per cent of a forward.
    assert abs(seconds - measured_ms / 1e3) < max(0.25 * measured_ms / 1e3, 0.03 * dense_s)


def test_forwards_of_wan_are_predicted_within_ten_percent():
    # step-h100.json, 4 of 40 layers: stock 1251 ms, gna 558, pisa 661, psa 699 at density .15.
    model = CostModel(Workload(on_h100(), 4), 1.251, AttentionTimes(measuring=False))
    for method, measured in (
        (GNA().at_density(0.15, PLACE.layout), 0.558),
        (PISA(density=0.15), 0.661),
        (PSA(density=0.15), 0.699),
    ):
        assert model.forward_s(method) == pytest.approx(measured, rel=0.1)


def test_the_table_says_nothing_of_what_it_does_not_have():
    known = AttentionTimes(measuring=False)
    assert known.seconds(None, PLACE) is None  # this machine
    assert known.seconds(None, on_h100(dtype=torch.float32)) is None
    assert known.seconds(None, on_h100(head_size=96)) is None
    assert known.seconds(None, on_h100(layout=TokenLayout((1, 32, 32)))) is None
    assert known.seconds(PSA(), on_h100()) is None  # a threshold: tokens decide the density
    assert known.seconds(PISA(density=0.2, block_size=32), on_h100()) is None


def test_cards_are_known_by_the_beginning_of_their_names():
    table = {"NVIDIA H100": {"gpu": "a", "head_sizes": {"128": 2.0}, "methods": {"dense": ROW}}}
    known = AttentionTimes(measuring=False, table=table)
    place = on_h100()
    once = predicted_seconds(ROW, place, 1.0, 128)
    assert known.seconds(None, place) == pytest.approx(2 * once)
    assert once == pytest.approx(1e-12 * 75_600**2 * 128 * 40)
    assert set(shipped_rates()) >= {"NVIDIA H100 80GB HBM3", "NVIDIA H200"}


def test_measured_times_are_kept_and_read_back(monkeypatch):
    place = Place(TokenLayout((2, 8, 8)), 2, 16)
    asked = []

    def measure(method, at, guard, clock):
        asked.append(method)
        return 0.25 if method is None else 0.125

    monkeypatch.setattr(times, "measure_seconds", measure)
    method = GNA(0.5, block_size=16)
    first = AttentionTimes()
    assert [first.seconds(m, place) for m in (None, method, None)] == [0.25, 0.125, 0.25]
    second = AttentionTimes(measuring=False)
    assert second.seconds(method, place) == 0.125
    assert asked == [None, method]
    assert second.seconds(method, replace(place, heads=4)) is None


def test_files_of_other_versions_and_damaged_ones_are_not_read():
    place = Place(TokenLayout((2, 8, 8)), 2, 16)
    first = AttentionTimes()
    first.seconds(None, place)
    path = times.times_path(place.card)
    content = json.loads(path.read_text())
    for wrong in ({**content, "made_with": {}}, [], {"made_with": content["made_with"]}):
        path.write_text(json.dumps(wrong))
        assert AttentionTimes(measuring=False).seconds(None, place) is None
    path.write_text("{")
    assert AttentionTimes(measuring=False).seconds(None, place) is None


@pytest.mark.parametrize(
    "method", [None, GNA(0.5, block_size=16), PISA(density=0.3, block_size=16)], ids=str
)
def test_a_call_is_measured_with_random_tokens(method):
    place = Place(TokenLayout((2, 8, 8), 5), 3, 16, batch=2)
    assert times.measure_seconds(method, place) > 0


def recorded(method, guard=None):
    """Run each kind of call of a rehearsal once; return its share and what it gave."""
    layout = TokenLayout((2, 8, 8), 5, text_first=True)
    generator = torch.Generator().manual_seed(0)
    shape = 1, layout.num_tokens, 2, 16
    qkv = tuple(torch.randn(shape, generator=generator) for _ in range(3))
    return [(share, call()) for share, call in rehearse(method, qkv, layout, guard)], qkv


@pytest.mark.parametrize(
    "method",
    [
        None,
        GNA(0.5, block_size=16),
        PISA(density=0.3, block_size=16),
        PSA(density=0.3, query_block=16, key_block=16),
    ],
    ids=str,
)
def test_a_rehearsed_call_is_the_call_that_would_run(method):
    ((share, output),), qkv = recorded(method)
    assert share == 1
    if method is None:
        assert torch.equal(output, dense_attention(*qkv, mask=None, scale=None, backend=None))
        return
    # `sparse_attention` takes the video in raster order, and the text behind it.
    grid, text = (2, 8, 8), torch.arange(5)
    raster = torch.argsort(method.token_order(grid).permutation(grid))
    rows = torch.cat([raster + 5, text])
    wanted = sparse_attention(*(x[:, rows] for x in qkv), method, grid=grid, text_length=5)
    torch.testing.assert_close(output[:, rows], wanted)


def test_a_guard_is_rehearsed_by_its_share_and_never_trips():
    guard = QualityGuard(max_error=1e-6, every=8, layers=(3,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = recorded(GNA(0.5, block_size=16), guard)
    assert [share for share, _ in found] == [7 / 8, 1 / 8]
    assert torch.equal(found[0][1], found[1][1])
    assert [share for share, _ in recorded(None, guard)[0]] == [1]


def test_times_are_kept_by_what_a_guard_costs(monkeypatch):
    place, method = Place(TokenLayout((2, 8, 8)), 2, 16), GNA(0.5, block_size=16)
    asked = []

    def measure(method, at, guard, clock):
        asked.append(guard)
        return 1.0

    monkeypatch.setattr(times, "measure_seconds", measure)
    seldom = QualityGuard(every=16)
    for guard in (None, QualityGuard(), QualityGuard(max_error=0.1), seldom):
        AttentionTimes(guard=guard).seconds(method, place)
    assert asked == [None, QualityGuard(), seldom]  # the budget changes no cost


def test_only_attention_and_blocks_that_run_take_time():
    known = AttentionTimes(measuring=False)
    place = Place(TokenLayout((1, 64, 64)), 2, 16)
    method = GNA(0.5)
    known._known = {times.attention_key(None, place): 0.2, times.attention_key(method, place): 0.05}
    known._read.add(place.card)
    model = CostModel(Workload(place, layers=3, steps=10, forwards=2), 1.0, known)
    assert model.forward_s(None) == 1.0
    assert model.forward_s(method) == pytest.approx(1.0 - 3 * 0.15)
    assert model.forward_s(method, layers=1, run=0.5) == pytest.approx(0.85 / 2)
    assert model.generation_s(method, dense_steps=0.25) == pytest.approx(2 * (3 + 7 * 0.55))
    assert model.generation_s(method, dense_steps=(2, 1)) == pytest.approx(2 * (3 + 7 * 0.55))
    assert model.speedup(method) == pytest.approx(1 / 0.55)
    assert model.speedup(None, run=0.5) == 2
    assert model.speedup(GNA(0.25)) is None
