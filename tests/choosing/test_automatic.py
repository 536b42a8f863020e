"""`accelerate_pipeline` with a budget, with a calibration, and with nothing, on tiny pipelines."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_pipelines import TINY_PIPELINES, run_tiny

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.choosing import trials
from dit_accel.choosing.automatic import calibrate_auto
from dit_accel.choosing.budget import Budget
from dit_accel.choosing.forecast import Forecast
from dit_accel.choosing.settings import Setting, attention_lines, block_size_for, cache_lines
from dit_accel.choosing.times import AttentionTimes
from dit_accel.errors import OptionError
from dit_accel.guard.options import guard_option, settle_guard

PROMPTS = {"prompt": ["a", "b"], "generator": [0, 1], "num_inference_steps": 8}


def probe_of(name: str) -> dict:
    return {**TINY_PIPELINES[name][1], **PROMPTS}


@pytest.fixture
def counted(monkeypatch):
    """Let time be the number of blocks and attention pairs, which every machine agrees on."""
    generate = trials.Trials._generate

    def counting(self, call):
        made = generate(self, call)
        acceleration = self.pipe.__dict__.get("_dit_accel")
        share = 1.0
        if acceleration is not None:
            report = acceleration.report()
            share = 1 - (report.blocks_skipped or 0.0)
            share *= 0.5 + 0.5 * (report.block_density or 1.0)
        return trials.Generated(made.frames, made.latents, share)

    monkeypatch.setattr(trials.Trials, "_generate", counting)
    monkeypatch.setattr(trials.Prediction, "__call__", lambda self, setting: None)


@pytest.mark.parametrize(
    ("name", "budget"), [("wan", {"max_error": 0.3}), ("flux", {"min_psnr": 20, "max_error": 0.9})]
)
def test_a_budget_is_kept_and_undone(name, budget, counted):
    build, arguments = TINY_PIPELINES[name]
    pipe = build()
    before = run_tiny(pipe, arguments)
    methods = ["gna", "first_block_cache", "easycache"]
    accelerate_pipeline(pipe, methods, **budget, probe=probe_of(name), min_tokens=0)
    choice = acceleration_report(pipe).choice
    assert choice.chosen is not None
    assert choice.chosen.margin_db(Budget(**budget)) >= 0
    assert len(choice.chosen.error) == 2
    assert bool(choice.chosen.psnr_db) == ("min_psnr" in budget)
    run_tiny(pipe, arguments)
    report = acceleration_report(pipe)
    assert set(report.options) == set(choice.chosen.setting.methods)
    assert "method='auto' took" in str(report).replace("\n", " ")
    content = json.loads(json.dumps(report.to_dict()))
    assert content["choice"]["chosen"] == str(choice.chosen.setting)
    restore_pipeline(pipe)
    assert torch.equal(run_tiny(pipe, arguments), before)


def test_a_speed_is_reached_at_the_best_quality(counted):
    pipe = TINY_PIPELINES["flux"][0]()
    methods, probe = ["first_block_cache", "magcache"], probe_of("flux")
    accelerate_pipeline(pipe, methods, target_speedup=1.3, probe=probe)
    choice = acceleration_report(pipe).choice
    assert choice.chosen.speedup >= 1.3
    fast = [point for point in choice.points if point.speedup >= 1.3]
    assert choice.chosen.low_psnr == max(point.low_psnr for point in fast)
    assert any("magcache" in name for name in choice.refused)


@pytest.mark.parametrize("together", [True, False])
def test_a_cache_that_was_tried_on_a_batch_says_so(together, counted):
    pipe, call = TINY_PIPELINES["flux"][0](), probe_of("flux")
    each = {"prompt": call["prompt"], "generator": call["generator"]}
    apart = [
        call | {"prompt": prompt, "generator": seed}
        for prompt, seed in zip(*each.values(), strict=True)
    ]
    probe = call if together else apart
    accelerate_pipeline(pipe, ["taylorseer", "easycache"], target_speedup=1.3, probe=probe)
    choice = acceleration_report(pipe).choice
    assert choice.chosen is not None
    assert ("decides for a batch as a whole" in choice.why) == together


def test_the_fixed_prompts_of_a_bundled_model_are_tried_one_by_one():
    from dit_accel.choosing.automatic import PROMPTS, probe_for
    from dit_accel.generation import GenerationRequest
    from dit_accel.models import load_pipeline

    pipe = load_pipeline("tiny-sd3")
    request = GenerationRequest(prompt="a red circle", steps=4)
    calls = probe_for(pipe, request)
    assert len(calls) == PROMPTS
    assert all(len(call["prompt"]) == 1 for call in calls)


def test_a_second_budget_is_served_from_what_was_measured(counted, cache_home, monkeypatch):
    pipe = TINY_PIPELINES["wan"][0]()
    methods, given = (
        ["gna", "first_block_cache", "easycache"],
        {"probe": probe_of("wan"), "min_tokens": 0},
    )
    accelerate_pipeline(pipe, methods, max_error=0.3, **given)
    first = acceleration_report(pipe).choice
    assert len(list((cache_home / "choices").iterdir())) == 1

    def never(self, call):
        raise AssertionError("generated again")

    monkeypatch.setattr(trials.Trials, "_generate", never)
    accelerate_pipeline(pipe, methods, max_error=0.3, **given)
    assert acceleration_report(pipe).choice.chosen == first.chosen


def test_hopeless_settings_cost_few_prompts_and_are_measured_anew_for_another_budget(counted):
    pipe = TINY_PIPELINES["flux"][0]()
    calls = [
        {**TINY_PIPELINES["flux"][1], "prompt": text, "generator": seed, "num_inference_steps": 8}
        for seed, text in enumerate("abcd")
    ]
    strict, lax = Budget(max_error=1e-6), Budget(max_error=5.0)
    setting = Setting(("taylorseer",), {"taylorseer": {"interval": 4}})
    run = trials.Trials(pipe, calls, decode=False, hopeless=strict.hopeless)
    given_up = run.measure(setting)
    assert len(given_up.error) == 1
    assert given_up.margin_db(strict) < 0
    assert "(1 prompts)" in str(given_up)
    assert run.measure(setting) is given_up
    later = trials.Trials(pipe, calls, decode=False, hopeless=lax.hopeless)
    later.recall(run.points, run.look())
    whole = later.measure(setting)
    assert len(whole.error) == 4
    assert whole.error[0] == pytest.approx(given_up.error[0])
    assert not hasattr(pipe, "_dit_accel")


@pytest.mark.parametrize(("to_beat", "times_too_fast"), [(0.0, 1), (100.0, 4)])
def test_a_speed_is_confirmed_where_it_counts(to_beat, times_too_fast, counted, monkeypatch):
    generate, times = trials.Trials._generate, iter((1.0, 0.25))  # dense, and a lucky one

    def lucky(self, call):
        made = generate(self, call)
        return trials.Generated(made.frames, made.latents, made.seconds * next(times, 1.0))

    monkeypatch.setattr(trials.Trials, "_generate", lucky)
    pipe, budget = TINY_PIPELINES["flux"][0](), Budget(max_error=5.0)
    run = trials.Trials(pipe, [probe_of("flux")], decode=False, hopeless=budget.hopeless)
    point = run.measure(Setting(("taylorseer",), {"taylorseer": {"interval": 4}}), to_beat)
    assert point.speedup == pytest.approx(times_too_fast / point.blocks_run)
    assert not hasattr(pipe, "_dit_accel")


@pytest.fixture
def clock(counted, monkeypatch):
    """Let each generation take a second on the clock that limits look at, and confirm no speeds."""
    monkeypatch.setattr(trials, "_CONFIRM_S", 0.0)
    generate, now = trials.Trials._generate, [0.0]

    def ticking(self, call):
        now[0] += 1
        return generate(self, call)

    monkeypatch.setattr(trials.Trials, "_generate", ticking)
    monkeypatch.setattr(trials, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


CACHES = ["first_block_cache", "easycache", "seacache"]


def test_what_was_found_in_time_is_taken_and_a_repeated_call_goes_on(clock, cache_home):
    pipe = TINY_PIPELINES["wan"][0]()
    given = {"max_error": 0.9, "probe": probe_of("wan")}
    accelerate_pipeline(pipe, CACHES, **given, probe_s=3.5)  # dense, and three settings
    first = acceleration_report(pipe).choice
    assert clock[0] == 1 + len(first.points) == 4
    assert "the 3.5 s for trying settings are over" in first.why
    before = clock[0]
    accelerate_pipeline(pipe, CACHES, **given)
    whole = acceleration_report(pipe).choice
    assert "over" not in whole.why
    assert whole.points[:3] == first.points
    assert clock[0] == before + 1 + len(whole.points) - len(first.points)  # and dense once more
    assert whole.chosen.speedup >= first.chosen.speedup


def test_too_little_time_is_noticed_before_it_is_spent(clock, cache_home):
    pipe = TINY_PIPELINES["wan"][0]()
    calls = [{**TINY_PIPELINES["wan"][1], "prompt": text, "generator": 0} for text in "abcd"]
    with pytest.raises(OptionError, match=r"dense generations alone take some 4 s of the 3 s"):
        accelerate_pipeline(pipe, CACHES, max_error=0.9, probe=calls, probe_s=3)
    assert clock[0] == 1
    with pytest.raises(OptionError, match=r"nothing was tried yet\. Give more time, fewer prompts"):
        accelerate_pipeline(pipe, CACHES, max_error=0.9, probe=probe_of("wan"), probe_s=0.5)
    assert not hasattr(pipe, "_dit_accel")


def test_a_calibration_serves_its_model_its_size_and_its_steps(tmp_path, counted):
    build, arguments = TINY_PIPELINES["wan"]
    pipe, path = build(), tmp_path / "auto.json"
    budget = Budget(max_error=0.5)
    made = calibrate_auto(pipe, budget, probe_of("wan"), names=["first_block_cache"])
    made.save(path)
    assert not hasattr(pipe, "_dit_accel")
    accelerate_pipeline(pipe, max_error=0.5, calibration=path)
    assert acceleration_report(pipe).method == "first_block_cache"
    run_tiny(pipe, {**arguments, "num_inference_steps": 8})
    with pytest.raises(OptionError, match=r"8 steps.*has .* and 3: use those"):
        run_tiny(pipe, {**arguments, "num_inference_steps": 3})
    larger = {**arguments, "num_inference_steps": 9, "height": 128}
    with pytest.raises(OptionError, match="made for a token grid of"):
        run_tiny(pipe, larger)
    with pytest.raises(OptionError, match="made with weights"):
        accelerate_pipeline(build(seed=3), calibration=path)
    content = json.loads(path.read_text())
    for name, value in {"dit_accel": "0", "gpu": "another", "pipeline": "OtherPipeline"}.items():
        about = {**content["circumstances"], name: value}
        path.write_text(json.dumps({**content, "circumstances": about}))
        with pytest.raises(OptionError, match=f"made with {name.replace('_', ' ')} {value}"):
            accelerate_pipeline(pipe, calibration=path)
    path.write_text("{")
    with pytest.raises(OptionError, match="can't be read"):
        accelerate_pipeline(pipe, calibration=path)


@pytest.mark.parametrize("guard", [None, False, {"max_error": 0.3, "layers": (0, 1)}], ids=str)
def test_trials_have_the_guard_that_will_run(guard, counted, cache_home, tmp_path):
    build, arguments = TINY_PIPELINES["wan"]
    pipe, path = build(), tmp_path / "auto.json"
    given = {"max_error": 0.9, "guard": guard, "min_tokens": 0}
    accelerate_pipeline(pipe, "gna", **given, probe=probe_of("wan"))
    choice = acceleration_report(pipe).choice
    assert choice.points
    tried = {json.dumps(point.setting.options.get("guard")) for point in choice.points}
    assert tried == {json.dumps(guard_option(guard))}
    run_tiny(pipe, {**arguments, "num_inference_steps": 8})
    found = acceleration_report(pipe).guard
    assert (None if found is None else found.options) == settle_guard(guard)
    # What one guard measured is not taken for another's, neither from the cache folder ...
    general = {"guard": guard, "min_tokens": 0}
    restore_pipeline(pipe)
    made = calibrate_auto(
        pipe, Budget(max_error=0.9), probe_of("wan"), names=["gna"], general=general
    )
    assert len(list((cache_home / "choices").iterdir())) == 1
    # ... nor from a file.
    made.save(path)
    accelerate_pipeline(pipe, "gna", **given, calibration=path)
    with pytest.raises(OptionError, match="made with guard "):
        accelerate_pipeline(pipe, "gna", **{**given, "guard": {"rows": 8}}, calibration=path)


def test_options_beside_a_calibration_are_what_it_was_made_with(tmp_path, counted):
    pipe, path = TINY_PIPELINES["wan"][0](), tmp_path / "auto.json"
    general = {"min_tokens": 0, "dense_steps": (2, 1), "guard": False}
    budget, probe = Budget(max_error=0.9), probe_of("wan")
    calibrate_auto(pipe, budget, probe, names=["gna"], general=general).save(path)
    given = {"max_error": 0.9, "calibration": path, "guard": False}
    accelerate_pipeline(pipe, "gna", **given, dense_steps=(2, 1))
    assert acceleration_report(pipe).settings["dense_steps"] == [2, 1]
    with pytest.raises(OptionError, match=r"made with dense steps \[2, 1\] \(here: 3\)"):
        accelerate_pipeline(pipe, "gna", **given, dense_steps=3)


@pytest.mark.parametrize(
    ("method", "given", "says"),
    [
        ("auto", {"min_psnr": -3}, "min_psnr=-3"),
        ("auto", {"min_psnr": 30, "density": 0.5}, "leave one out"),
        (["auto", "easycache"], {"min_psnr": 30}, "give 'auto' alone"),
        ("auto", {"min_psnr": 30, "threshold": 0.1}, "belong to a method by name"),
        ("auto", {"min_psnr": 30, "probe": {}, "calibration": "a.json"}, "leave one out"),
        ("auto", {"min_psnr": 30, "probe_s": 9, "calibration": "a.json"}, "leave one out"),
        ("auto", {"min_psnr": 30, "probe": PROMPTS, "probe_s": 0}, "probe_s=0 must be"),
        ("auto", {"probe_s": 9}, "probe_s limits how long"),
        ("gna", {"density": 0.5, "per_head": True, "probe_s": 9}, "probe_s limits how long"),
        ("easycache", {"max_error": 0.1, "probe": PROMPTS, "probe_s": 9}, "probe_s limits how"),
        ("auto", {"min_psnr": 30}, "say what to try"),
        ("auto", {"calibration": "nowhere.json"}, "can't be read"),
        ("auto", {"min_psnr": 30, "probe": [3]}, "keyword arguments of pipe"),
        ("gna", {"min_psnr": 30, "stride": (1, 8, 8), "probe": PROMPTS}, "are chosen"),
        ("gna", {"min_psnr": 30, "wimdow": 3, "probe": PROMPTS}, "wimdow=: with a budget"),
        (["gna", "easycache"], {"min_psnr": 30, "easycache": {"threshold": 1}}, "both say how"),
        (["gna", "easycache"], {"min_psnr": 30, "easycache": {"frist_steps": 1}}, "'first_steps'"),
        ("pag", {"min_psnr": 30, "probe": PROMPTS}, "no strength that a budget"),
    ],
    ids=str,
)
def test_bad_input(method, given, says):
    pipe = TINY_PIPELINES["wan"][0]()
    with pytest.raises(OptionError, match=says):
        accelerate_pipeline(pipe, method, **given)
    assert not hasattr(pipe, "_dit_accel")


def test_what_cannot_be_met_says_what_can(counted):
    pipe = TINY_PIPELINES["flux"][0]()
    accelerate_pipeline(pipe, "dense")
    caches, probe = ["first_block_cache", "magcache"], probe_of("flux")
    with pytest.raises(OptionError, match=r"out of reach here. The fastest tried is first_block"):
        accelerate_pipeline(pipe, caches, target_speedup=9, probe=probe)
    assert acceleration_report(pipe).method == "dense"  # what was attached before is back


def test_short_sequences_stay_dense_and_no_attention_is_tried(counted):
    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    accelerate_pipeline(pipe, "gna", min_psnr=20, probe=probe_of("wan"))
    choice = acceleration_report(pipe).choice
    assert choice.points == ()
    assert "stays dense" in choice.why
    accelerate_pipeline(pipe)
    run_tiny(pipe, arguments)
    report = acceleration_report(pipe)
    assert report.density == 1
    assert {call.reason.split(", ")[-1] for call in report.calls} <= {"fewer than min_tokens"}


def fake_times(monkeypatch, dense: float, sparse: float):
    """Let attention take these shares of a forward in all."""

    def seconds(self, method, place):
        self.sources["a test's table"] = None
        return dense if method is None else sparse

    monkeypatch.setattr(AttentionTimes, "seconds", seconds)


@pytest.mark.parametrize(("sparse", "stays"), [(10.0, True), (0.0, False)])
def test_auto_stays_dense_where_it_would_not_pay(sparse, stays, monkeypatch):
    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    fake_times(monkeypatch, 5.0, sparse)  # a forward takes far less, so only the sign counts
    accelerate_pipeline(pipe, min_tokens=0, density=0.5)
    run_tiny(pipe, {**arguments, "num_inference_steps": 8})
    report = acceleration_report(pipe)
    reasons = {call.reason for call in report.calls}
    assert any("under 1.05x" in reason for reason in reasons) == stays
    assert (report.density == 1) == stays
    told = [note for note in report.notes if note.startswith("predicted at")]
    assert len(told) == 1
    assert "a test's table" in told[0]
    assert ("stays dense" in told[0]) == stays


def test_a_method_by_name_runs_as_asked_and_the_report_warns(monkeypatch):
    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    fake_times(monkeypatch, 5.0, 10.0)
    accelerate_pipeline(pipe, "gna", density=0.5, min_tokens=0, dense_steps=1, block_size=16)
    run_tiny(pipe, arguments)
    report = acceleration_report(pipe)
    assert report.density < 1
    assert any("not expected to be faster" in note for note in report.notes)


def test_a_method_by_name_is_never_measured_for_that():
    pipe = TINY_PIPELINES["wan"][0]()
    accelerate_pipeline(pipe, "gna", density=0.5)
    runtime = pipe._dit_accel.runtime
    (forecast,) = (s for s in runtime.sessions if isinstance(s, Forecast))
    assert not forecast.times.measuring
    assert not forecast.binding


def test_lines_are_within_reach_and_have_enough_blocks():
    from dit_accel.call import TokenLayout

    small, large = TokenLayout((9, 16, 16)), TokenLayout((21, 45, 80))
    assert (block_size_for(small), block_size_for(large)) == (32, 128)
    lines = attention_lines(small, {"dense_steps": 0.25})
    assert {line.method for line in lines} >= {"gna", "pisa", "psa", "rectified", "radial"}
    for line in lines:
        assert list(line.values) == sorted(line.values, reverse=True)
        assert line.at(0).options["density"] == line.values[0]
    for line in cache_lines():
        assert list(line.values) == sorted(line.values)
