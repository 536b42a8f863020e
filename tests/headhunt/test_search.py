"""The search on toys whose best heads are known."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from dit_accel.errors import OptionError
from dit_accel.headhunt.search import Heads, HeadScorer, SearchPlan, search_heads

HEADS = [(layer, head) for layer in range(6) for head in range(4)]
GOOD = {(1, 2): 0.5, (4, 0): 0.4, (2, 3): 0.3}
PROMPTS = 16


class Toy(HeadScorer):
    """Heads are worth what `GOOD` says, others harm a little; prompts differ and add noise.

    With a pair, its heads are worth nothing alone and much together.
    """

    def __init__(self, noise: float = 0.05, pair: Heads = (), at_once: int = 1) -> None:
        self.noise, self.pair, self.at_once = noise, pair, at_once
        self.asked: list[tuple[Heads, int]] = []

    def score(self, sets: Sequence[Heads], prompts: range) -> list[list[float]]:
        assert len(sets) <= self.at_once
        self.asked += [(heads, prompt) for heads in sets for prompt in prompts]
        return [[self._score(heads, prompt) for prompt in prompts] for heads in sets]

    def _score(self, heads: Heads, prompt: int) -> float:
        worth = sum(GOOD.get(head, -0.01) for head in heads)
        if self.pair and set(self.pair) <= set(heads):
            worth += 2.0
        rng = random.Random(repr((sorted(heads), prompt)))
        return prompt / 10 + worth + self.noise * rng.gauss(0, 1)


@pytest.mark.parametrize("halving", [None, 2, 4])
@pytest.mark.parametrize(("rounds", "per_round"), [(3, 1), (1, 3), (2, 2)])
def test_the_best_heads_are_found(rounds, per_round, halving):
    toy = Toy()
    plan = SearchPlan(rounds=rounds, per_round=per_round, halving=halving)
    found = search_heads(toy, HEADS, PROMPTS, plan)
    assert set(GOOD) <= {head for one in found.rounds for head in one.chosen}
    assert set(GOOD) <= set(found.heads)
    assert found.generations == len(toy.asked) == plan.generations(len(HEADS), PROMPTS)
    assert len(set(toy.asked)) == len(toy.asked)  # nothing is generated twice
    assert found.best.score - found.plain == pytest.approx(sum(GOOD.values()), abs=0.1)


def test_halving_costs_less_and_agrees():
    full, halved = (SearchPlan(rounds=3, per_round=1, halving=n) for n in (None, 4))
    one, other = (search_heads(Toy(), HEADS, PROMPTS, plan) for plan in (full, halved))
    assert one.heads == other.heads == tuple(GOOD)
    assert other.generations < 0.6 * one.generations
    tried = {trial.head: trial.prompts for trial in other.rounds[0].trials}
    assert tried.keys() == set(HEADS)
    assert sorted(set(tried.values())) == [4, 8, 16]


def test_rungs_halve_heads_and_double_prompts():
    assert SearchPlan(per_round=1, halving=4).rungs(24, 32) == [(24, 4), (12, 8), (6, 16), (3, 32)]
    assert SearchPlan(per_round=5, halving=3).rungs(24, 32) == [(24, 3), (12, 6), (6, 12)]
    assert SearchPlan(per_round=1, halving=5).rungs(15, 12) == [(15, 5), (8, 10), (4, 12)]
    assert SearchPlan(per_round=1).rungs(24, 32) == [(24, 32)]
    assert SearchPlan(per_round=1, halving=40).rungs(24, 32) == [(24, 32)]


def test_heads_are_tried_on_top_of_those_chosen():
    pair = ((1, 2), (5, 1))
    found = search_heads(Toy(0, pair), HEADS, 2, SearchPlan(rounds=2, per_round=1))
    assert found.heads == pair
    assert found.rounds[1].trials[0].gain == pytest.approx(0.5 - 0.01 + 2)


def test_heads_that_only_harm_are_not_kept():
    found = search_heads(Toy(0), HEADS, 2, SearchPlan(rounds=5, per_round=1))
    assert [one.chosen[0] for one in found.rounds[3:]] == [(0, 0), (0, 1)]  # of equals the first
    assert found.heads == tuple(GOOD)


def test_the_watcher_sees_every_score_and_the_best_so_far():
    states = []
    plan = SearchPlan(rounds=2, per_round=1, halving=4)
    found = search_heads(Toy(at_once=3), HEADS, PROMPTS, plan, states.append)
    assert [state.done for state in states] == sorted(state.done for state in states)
    assert states[-1].done == states[-1].total == found.generations
    for state in states:
        scores = [trial.score for trial in state.trials]
        assert scores == sorted(scores, reverse=True)
        assert state.plain == found.plain
    assert states[-1].chosen == tuple(head for one in found.rounds for head in one.chosen)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"per_round": 0}, "per_round=0"),
        ({"halving": 0}, "halving=0"),
        ({"rounds": 5, "per_round": 5}, "more than the 24"),
    ],
)
def test_impossible_plans_are_refused(options, says):
    with pytest.raises(OptionError, match=says):
        search_heads(Toy(), HEADS, PROMPTS, SearchPlan(**options))


def test_a_search_without_prompts_is_refused():
    with pytest.raises(OptionError, match="no prompt"):
        search_heads(Toy(), HEADS, 0, SearchPlan())
