"""The bench of searched heads, on a toy in place of a model."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dit_accel.headhunt.hunting import Found, HeadHunt
from dit_accel.headhunt.search import Round, Search, Trial

PATH = Path(__file__).parents[2] / "benchmarks" / "headhunt.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("headhunt_bench", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def found(heads, generations=100):
    trials = [
        Trial((layer, head), 0.5, layer / 10 - head / 100, 8) for layer in (0, 1) for head in (0, 1)
    ]
    rounds = tuple(Round((head,), 0.5 + i / 10, tuple(trials)) for i, head in enumerate(heads))
    hunt = HeadHunt(model="tiny-sd3", objective="following")
    model = {"transformer": "SD3Transformer2DModel", "layers": 2, "heads": 2}
    return Found(hunt, Search(0.4, rounds, generations), model, ("a red ball",), {}, 1.0)


class Toy:
    """Marks whose shares are known: layer 1 at the middle scale is best of the layers."""

    args = argparse.Namespace(held_out=4)

    def __init__(self, bench):
        self.bench, self.asked = bench, []

    def measure(self, conditions):
        self.asked += conditions
        return [self._row(condition) for condition in conditions]

    def _row(self, condition):
        options = dict(condition.options)
        best = {"pag": {"layers": (1,), "scale": 1.5}, "softpag": {"strength": 0.25}}
        wanted = best.get(condition.method, {"never": 0})
        good = all(options.get(name) == value for name, value in wanted.items())
        extra = 1 if condition.method == "softpag" else 0
        texture = [True] * (2 + good + extra) + [False] * (2 - good - extra)
        marks = {i: {"texture": texture, "style": [i % 2 == 0 or good]} for i in range(4)}
        return self.bench.summary(marks)


def test_the_best_conditions_are_chosen_and_measured_on_other_prompts(bench):
    toy = Toy(bench)
    chosen = bench.tune(toy, "dark", found([(1, 0)]), 1.0)
    assert dict(chosen["layer"].options) == {"layers": (1,), "scale": 1.5}
    assert dict(chosen["heads"].options)["strength"] == 0.25
    assert not any(condition.held_out for condition in toy.asked)
    result = bench.held_out(toy, "dark", 1.0, chosen)
    assert all(condition.held_out for condition in toy.asked[-3:])
    assert result["conditions"]["none"]["score"] == pytest.approx((0.5 + 0.5) / 2)
    assert result["conditions"]["layer"]["score"] == pytest.approx((1 + 0.75) / 2)
    assert result["conditions"]["heads"]["score"] == pytest.approx((1 + 1) / 2)
    assert set(result["gains"]) == {"layer over none", "heads over none", "heads over layer"}
    gain = result["gains"]["heads over layer"]["score"]
    assert gain["mean"] == pytest.approx(0.125)
    assert gain["interval"] == pytest.approx([0.125, 0.125])
    assert (gain["better"], gain["worse"]) == (4, 0)
    json.dumps(result, allow_nan=False)


def test_intervals_are_paired(bench):
    def row(values):
        zero = [0.0] * len(values)
        return {"following": list(values), "style": zero, "rest": zero}

    values = np.random.default_rng(0).random(64)
    paired = bench.compared("general", row(values + 0.01), row(values))["score"]
    assert paired["interval"] == pytest.approx([0.01, 0.01])
    shuffled = bench.compared("general", row(values[::-1] + 0.01), row(values))["score"]
    assert shuffled["interval"][0] < 0 < shuffled["interval"][1]
    assert shuffled["mean"] == pytest.approx(0.01)


def test_agreement_counts_heads_and_cost(bench):
    one, other = found([(0, 0), (1, 1)]), found([(0, 0), (1, 0)], generations=50)
    told = bench.agreement(one, other, 12, 6)
    assert told["in_common"] == 1
    assert told["same_first_head"]
    assert told["cost"] == 0.25
    assert told["rank_correlation_round_1"] == pytest.approx(1)


def test_shipped_heads_tell_their_effect(bench, tmp_path):
    effect = [{"guidance": 1.0, "prompts": 64, "gains": {}, "conditions": {}}]
    bench.ship(tmp_path, "dark", found([(1, 0)]), {"strength": 0.25, "scale": 3.0}, effect)
    content = json.loads((tmp_path / "dark.json").read_text())
    assert (content["heads"], content["strength"], content["scale"]) == ([[1, 0]], 0.25, 3.0)
    assert content["found"]["held_out"] == [{"guidance": 1.0, "prompts": 64, "gains": {}}]
    assert (tmp_path / "dark.png").is_file()
