"""Budgets, the search and the choice, on curves that are known."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from dit_accel.choosing.budget import Budget, low_quantile
from dit_accel.choosing.choice import Point, choose, frontier, load, save
from dit_accel.choosing.search import Search
from dit_accel.choosing.settings import Line, Setting
from dit_accel.errors import OptionError

STRENGTHS = tuple(range(9))


def line(method: str, knob: str) -> Line:
    values = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15) if knob == "density" else STRENGTHS
    return Line(method, knob, values)


LINES = [
    line("pisa", "density"),
    line("gna", "density"),
    line("easycache", "threshold"),
    line("first_block_cache", "threshold"),
]
GAIN = {"pisa": 0.05, "gna": 0.08, "easycache": 0.09, "first_block_cache": 0.12}
LOSS = {"pisa": 2.0, "gna": 5.0, "easycache": 3.0, "first_block_cache": 6.0}


def world(setting: Setting, _to_beat: float = 0.0) -> Point:
    """Speeds multiply and errors add; each step of a knob gains and loses by method."""
    speedup, noise = 1.0, 0.0
    for name in setting.methods:
        of = next(one for one in LINES if one.method == name)
        own = setting.options.get(name, {})
        value = setting.options["density"] if of.knob == "density" else own[of.knob]
        step = of.values.index(value) + 1
        speedup *= 1 + GAIN[name] * step
        noise += 10 ** (-(50 - LOSS[name] * step) / 10)
    middle = -10 * math.log10(noise)
    psnr = tuple(middle + spread for spread in (-2, -1, 0, 1, 2, 0, 1, -1))
    return Point(setting, 10 / speedup, speedup, psnr, (noise**0.5,) * 8)


def every_point() -> list[Point]:
    from dit_accel.choosing.settings import together

    singles = [one.at(i) for one in LINES for i in range(len(one.values))]
    attention = [s for s in singles if "density" in s.options]
    caches = [s for s in singles if "density" not in s.options]
    return [world(s) for s in [*singles, *(together(a, c) for a in attention for c in caches)]]


def search(budget: Budget, predict=lambda setting: None) -> Search:
    found = Search(budget, LINES, world, predict)
    found.run()
    return found


@pytest.mark.parametrize("decibels", [20, 25, 30, 35, 40])
def test_few_trials_find_nearly_the_best_for_a_quality(decibels):
    budget = Budget(min_psnr=decibels)
    found = search(budget)
    assert len(found.points) <= 30
    best = max(p.speedup for p in every_point() if p.margin_db(budget) >= 0)
    choice = choose(found.points, budget, {}, [])
    assert choice.chosen.margin_db(budget) >= 0
    assert choice.chosen.speedup >= 0.9 * best


@pytest.mark.parametrize("target", [1.2, 1.5, 2.0])
def test_few_trials_find_nearly_the_nearest_for_a_speed(target):
    budget = Budget(target_speedup=target)
    found = search(budget)
    best = max(p.low_psnr for p in every_point() if p.speedup >= target)
    choice = choose(found.points, budget, {}, [])
    assert choice.chosen.speedup >= target
    assert choice.chosen.low_psnr >= best - 3
    assert "method='auto' took" in choice.why


def test_a_cache_that_comes_nearer_again_is_taken_at_its_strongest():
    def measure(setting: Setting, _to_beat: float) -> Point:
        point = world(setting)
        if setting.options.get("first_block_cache", {}).get("threshold") == STRENGTHS[-1]:
            return replace(point, psnr_db=tuple(33.0 + i / 10 for i in range(8)))
        return point

    budget = Budget(min_psnr=30)
    names = ("easycache", "first_block_cache")
    caches = [one for one in LINES if one.method in names]
    found = Search(budget, caches, measure, lambda setting: None)
    chosen = choose(found.run(), budget, {}, []).chosen
    assert str(chosen.setting) == "first_block_cache threshold=8"
    tried = [str(point.setting) for point in found.points]
    assert len(tried) == len(set(tried)) <= 6


@pytest.mark.parametrize("decibels", [20, 30, 40])
def test_giving_up_early_finds_the_same_with_fewer_prompts(decibels):
    budget = Budget(min_psnr=decibels)
    ran: list[int] = []

    def racing(setting: Setting, to_beat: float) -> Point:
        point = world(setting)
        given = [], point.speedup, 8, to_beat
        count = next((n for n in range(1, 8) if budget.hopeless(point.psnr_db[:n], *given)), 8)
        ran.append(count)
        return replace(point, psnr_db=point.psnr_db[:count], error=point.error[:count])

    found = Search(budget, LINES, racing, lambda setting: None)
    chosen = choose(found.run(), budget, {}, []).chosen
    whole = choose(search(budget).points, budget, {}, []).chosen
    assert len(chosen.psnr_db) == 8
    assert chosen.speedup >= 0.97 * whole.speedup
    assert sum(ran) < 0.65 * 8 * len(ran)


def test_pairs_are_found_where_one_member_was_given_up_early():
    budget = Budget(target_speedup=2.0)

    def racing(setting: Setting, _to_beat: float) -> Point:
        point = world(setting)
        few = 1 if budget.hopeless(point.psnr_db[:1], [], point.speedup, 8) else 8
        return replace(point, psnr_db=point.psnr_db[:few], error=point.error[:few])

    found = Search(budget, LINES, racing, lambda setting: None)
    assert any(len(point.setting.methods) == 2 for point in found.run())


def test_what_is_slower_than_the_best_is_of_no_more_interest():
    beaten: list[tuple[float, float]] = []

    def measure(setting: Setting, to_beat: float) -> Point:
        point = world(setting)
        beaten.append((to_beat, point.speedup))
        return point

    budget = Budget(min_psnr=30)
    points = Search(budget, LINES, measure, lambda setting: None).run()
    best = 0.0
    for (to_beat, speedup), point in zip(beaten, points, strict=True):
        assert to_beat == best
        if point.margin_db(budget) >= 0:
            best = max(best, speedup)
    # A speed that is asked for need not be beaten: the nearest to dense that has it is chosen.
    beaten.clear()
    Search(Budget(target_speedup=1.5), LINES, measure, lambda setting: None).run()
    assert {to_beat for to_beat, _ in beaten} == {0.0}


def test_methods_that_would_not_pay_are_not_tried():
    told = {"pisa": 0.9, "gna": 1.2}
    found = search(Budget(min_psnr=30), lambda setting: told.get(setting.methods[0]))
    assert not any("pisa" in p.setting.methods for p in found.points)
    assert any("gna" in p.setting.methods for p in found.points)
    assert ["predicted 0.90x" in why for why in found.idle.values()] == [True]


def test_what_cannot_run_is_passed_over():
    def measure(setting: Setting, _to_beat: float) -> Point | None:
        return None if "pisa" in setting.methods else world(setting)

    found = Search(Budget(min_psnr=30), LINES, measure, lambda setting: None)
    assert choose(found.run(), Budget(min_psnr=30), {}, []).chosen is not None


def test_nothing_worthwhile_stays_dense_and_says_so():
    slow = replace(world(LINES[0].at(0)), speedup=1.02)
    choice = choose([slow], Budget(min_psnr=30), {}, [])
    assert choice.chosen is None
    assert "stays dense" in choice.why
    assert "nearest to dense" not in choice.why  # nothing is faster
    assert choice.lines()[0] == choice.why
    points = [world(LINES[0].at(i)) for i in range(3)]
    choice = choose(points, Budget(min_psnr=70), {}, [])
    assert choice.chosen is None
    assert f"The nearest to dense that is faster: {points[0]}" in choice.why


def test_what_was_given_up_for_another_budget_is_not_chosen():
    fast, slow = world(LINES[2].at(6)), world(LINES[2].at(3))
    part = replace(fast, psnr_db=fast.psnr_db[:1], error=fast.error[:1])
    assert choose([fast, slow], Budget(min_psnr=20), {}, []).chosen is fast
    assert choose([part, slow], Budget(min_psnr=20), {}, []).chosen is slow
    assert choose([part, slow], Budget(target_speedup=1.3), {}, []).chosen is slow
    assert choose([part], Budget(min_psnr=20), {}, [], prompts=8).chosen is None


def test_a_choice_says_if_there_was_no_time_for_more():
    points = [world(LINES[0].at(i)) for i in range(9)]
    over = {"ended": "the 60 s are over"}
    told = r"\. More may be found with more time: the 60 s are over\.$"
    for decibels in (30, 70):
        assert re.search(told, choose(points, Budget(min_psnr=decibels), {}, [], **over).why)
    with pytest.raises(OptionError, match=told):
        choose(points, Budget(target_speedup=9), {}, [], **over)


def test_budgets_out_of_reach_say_what_is_in_reach():
    points = [world(LINES[0].at(i)) for i in range(9)]
    with pytest.raises(OptionError, match=r"at least 3x is out of reach.*fastest tried is pisa"):
        choose(points, Budget(target_speedup=3), {}, [])
    both = Budget(min_psnr=45, target_speedup=1.3)
    with pytest.raises(OptionError, match=r"At that speed the.*At that quality the"):
        choose(points, both, {}, [])


@pytest.mark.parametrize(
    "wrong",
    [{"min_psnr": 0}, {"min_psnr": "30"}, {"max_error": -1}, {"target_speedup": 1},
     {"target_speedup": math.inf}, {"min_psnr": True}],
    ids=str,
)  # fmt: skip
def test_impossible_budgets(wrong):
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Budget(**wrong)


def test_a_setting_is_hopeless_once_too_many_prompts_missed():
    budget = Budget(min_psnr=30)
    good, bad = [35.0] * 13, [29.9]
    assert not budget.hopeless(good + bad, [], 1.5, 16)
    assert budget.hopeless(good + 2 * bad, [], 1.5, 16)
    assert budget.hopeless(bad, [], 1.5, 4)  # none of four may miss
    assert not budget.hopeless(bad, [], 1.5, 10)
    # What it says holds: with all the others perfect, it isn't within the budget.
    assert budget.margin_db([*good, *2 * bad, 100.0], [0.1] * 16) < 0
    assert Budget(max_error=0.1).hopeless([], [0.2, 0.2], 1.5, 16)
    assert not Budget(max_error=0.1).hopeless([], [0.09, 0.05], 1.5, 16)


def test_a_setting_is_hopeless_if_it_is_surely_too_slow():
    assert Budget(min_psnr=30).hopeless([50.0], [], 0.9, 16)
    assert not Budget(min_psnr=30).hopeless([50.0], [], 1.0, 16)  # one prompt may mislead
    assert Budget(target_speedup=2).hopeless([50.0], [], 1.7, 16)
    assert not Budget(target_speedup=2).hopeless([10.0], [9.0], 1.9, 16)
    assert Budget(min_psnr=30).hopeless([50.0], [], 1.7, 16, to_beat=2.0)
    assert not Budget(min_psnr=30).hopeless([50.0], [], 1.9, 16, to_beat=2.0)


def test_fewer_prompts_leave_a_larger_margin():
    few, many = [28.0, 32.0, 29.0, 31.0], [28.0, 32.0, 29.0, 31.0] * 8
    assert low_quantile(few) < low_quantile(many) < 30
    assert low_quantile([30.0] * 5) == 30
    assert low_quantile([30.0]) == 27
    # Nine in ten of a normal sample lie over it, with some confidence.
    normal = [30 + 2 * x for x in (-1.5, -1, -0.7, -0.4, -0.1, 0.1, 0.4, 0.7, 1, 1.5)]
    assert 25.5 < low_quantile(normal) < 27.5


def test_errors_are_budgets_too():
    point = world(LINES[0].at(0))
    assert point.margin_db(Budget(max_error=10 * point.mean_error)) == pytest.approx(20)
    assert point.margin_db(Budget(max_error=point.mean_error / 2)) < 0
    assert point.margin_db(Budget(target_speedup=2)) == math.inf


def test_the_frontier_has_no_point_that_another_beats():
    points = every_point()
    best = frontier(points)
    for point in best:
        better = [p for p in points if p.speedup > point.speedup and p.low_psnr >= point.low_psnr]
        assert not better
    assert [p.speedup for p in best] == sorted(p.speedup for p in best)


def test_points_survive_their_file(tmp_path):
    points = [world(one.at(3)) for one in LINES]
    save(tmp_path / "a.json", {"gpu": "x"}, {"steps": 3}, points)
    where, seen, found = load(tmp_path / "a.json")
    assert (where, seen, found) == ({"gpu": "x"}, {"steps": 3}, points)


@pytest.mark.parametrize("content", ["", "{}", '{"kind": "other"}', "[1]"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(OptionError, match=r"can't be read as a choice.*make it anew"):
        load(path)


def test_a_choice_is_json_and_marks_what_was_taken():
    found = search(Budget(min_psnr=30))
    choice = choose(found.points, Budget(min_psnr=30), {"x": "no"}, ["table"])
    content = json.loads(json.dumps(choice.to_dict()))
    assert content["chosen"] == str(choice.chosen.setting)
    assert len(content["points"]) == len(found.points)
    assert sum("(chosen)" in text for text in choice.lines()) == 1
