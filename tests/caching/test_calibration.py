"""Profiles and calibrations, made on tiny pipelines and read back."""

from __future__ import annotations

import json
import re
from functools import wraps

import pytest
import torch
from cache_subjects import Subject

from dit_accel import accelerate_pipeline, acceleration_report
from dit_accel.caching.brought import CALIBRATION_FILE, brought_options
from dit_accel.caching.profile import Profile
from dit_accel.calibration import calibrate_cache, calls_for
from dit_accel.cli import main
from dit_accel.errors import OptionError
from dit_accel.fitting import fit_model
from dit_accel.foreground import foreground_by_colour, foreground_by_motion, otsu
from dit_accel.generation import GenerationRequest
from dit_accel.profiler import column_means, foreground_share, profile_model, sampled_rows

SIZE = {"height": 112, "width": 144, "frames": 5, "steps": 9}
IMAGE = {"height": 240, "width": 272, "steps": 9}


def requests(name: str = "wan", count: int = 1) -> list[GenerationRequest]:
    size = IMAGE if name in ("flux", "sd3") else SIZE
    return [GenerationRequest(prompt=f"a ball {seed}", seed=seed, **size) for seed in range(count)]


def test_column_means_are_those_of_the_attention_matrix():
    query, key = torch.randn(30, 2, 8), torch.randn(40, 2, 8)
    whole = torch.einsum("qhd,khd->hqk", query, key).mul(8**-0.5).softmax(-1).mean((0, 1))
    torch.testing.assert_close(column_means(query, key, torch.arange(30), chunk=7), whole)
    assert column_means(query, key, torch.tensor([3, 4])).sum() == pytest.approx(1, abs=1e-5)


def test_sampled_rows_are_spread_over_the_frames():
    rows = sampled_rows((3, 4, 5), per_frame=6)
    assert [int(((rows // 20) == frame).sum()) for frame in range(3)] == [6, 6, 6]
    assert len(rows.unique()) == 18
    assert torch.equal(rows, sampled_rows((3, 4, 5), per_frame=6))
    assert len(sampled_rows((2, 2, 2), per_frame=100)) == 8


def test_foregrounds_of_a_square_on_a_plain_ground():
    velocity = torch.randn(4, 8, 8, 6) * 0.01
    square = torch.zeros(4, 8, 8, dtype=torch.bool)
    square[:, 2:5, 3:6] = True
    velocity[square] += 1.0
    assert torch.equal(foreground_by_colour(velocity), square)
    moving = torch.randn(4, 8, 8, 6) * 0.01
    moving[:, 2:5, 3:6] += torch.linspace(-1, 1, 4).view(4, 1, 1, 1)
    assert torch.equal(foreground_by_motion(moving), square)
    assert foreground_share(square, square) == 1
    assert foreground_share(~square, square) == 0
    assert otsu(torch.tensor([0.0, 0.1, 5.0, 5.1])) == pytest.approx(2.5, abs=2.6)


@pytest.mark.parametrize("name", ["wan", "wan22", "hunyuan", "flux", "sd3"])
def test_every_family_can_be_profiled_and_then_cached(name, tmp_path):
    subject = Subject(name)
    pipe = subject.pipe
    if name == "hunyuan":
        template = subject.arguments["prompt_template"]
        call = type(pipe).__call__
        templated = wraps(call)(
            lambda self, **given: call(self, **{"prompt_template": template, **given})
        )
        pipe.__class__ = type("Templated", (type(pipe),), {"__call__": templated})
    output = tmp_path / "profile.json"
    found = profile_model(pipe, requests(name), model=name, output=output, per_frame=16)
    assert len(found.foreground) == found.num_blocks
    assert all(0 <= share <= 1 for share in found.foreground)
    assert len(found.by_step) == 9
    assert Profile.load(output).foreground == pytest.approx(found.foreground)
    assert not hasattr(pipe, "_dit_accel")
    accelerate_pipeline(pipe, "profiling_cache", profile=str(output))
    listed = found.background_blocks(0.6)
    subject.run()
    ran = [step.ran for step in acceleration_report(pipe).steps]
    assert {i for row in ran for i, did in enumerate(row) if not did} == set(listed)
    assert len(found.grid) == 3


def test_profiling_goes_on_where_it_stopped(tmp_path):
    pipe, output = Subject("wan").pipe, tmp_path / "profile.json"
    whole = profile_model(pipe, requests(count=2), model="m", per_frame=16)
    profile_model(pipe, requests(count=1), model="m", output=output, per_frame=16)
    seen = []
    resumed = profile_model(
        pipe, requests(count=2), model="m", output=output, per_frame=16,
        progress=lambda *told: seen.append(told),
    )  # fmt: skip
    assert resumed.foreground == pytest.approx(whole.foreground)
    assert [row["seed"] for row in json.loads(output.read_text())["prompts"]] == [0, 1]
    assert seen[-1] == ("prompts", 2, 2)
    with pytest.raises(OptionError, match="other settings"):
        profile_model(pipe, requests(), model="m", output=output, per_frame=17)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"mask": "color"}, "Did you mean 'colour'"), ({"requests": []}, "at least one")],
    ids=str,
)
def test_profiling_refuses(arguments, says):
    wanted = arguments.pop("requests", requests())
    with pytest.raises(OptionError, match=says):
        profile_model(Subject("wan").pipe, wanted, model="m", **arguments)


@pytest.mark.parametrize("goal", [{"target_speedup": 1.2}, {"max_error": 0.01}], ids=str)
def test_a_strength_is_chosen_for_a_goal(goal):
    pipe = Subject("wan").pipe
    found = calibrate_cache(pipe, "easycache", calls_for(pipe, requests(count=2)), **goal)
    strengths = [point.strength for point in found.curve]
    assert strengths == sorted(strengths)
    assert found.options == {"threshold": found.chosen.strength}
    if "target_speedup" in goal:
        assert found.chosen.speedup >= 1.2
        assert all(p.speedup < 1.2 for p in found.curve if p.strength < found.chosen.strength)
    else:
        assert found.chosen.error <= 0.01
    assert not hasattr(pipe, "_dit_accel")


def test_whole_numbers_are_tried_one_by_one():
    pipe = Subject("wan").pipe
    found = calibrate_cache(pipe, "taylorseer", calls_for(pipe, requests()), target_speedup=1.6)
    assert [point.strength for point in found.curve] == [2, 3]
    assert found.chosen == found.curve[1]


@pytest.mark.parametrize(
    ("method", "goal", "says"),
    [
        ("easycache", {}, "one goal"),
        ("easycache", {"target_speedup": 2, "max_error": 1}, "one goal"),
        ("gna", {"target_speedup": 2}, "no cache among"),
        ("easycache", {"target_speedup": 50}, "does not get there"),
    ],
    ids=str,
)
def test_calibration_refuses(method, goal, says):
    pipe = Subject("wan").pipe
    with pytest.raises(OptionError, match=says):
        calibrate_cache(pipe, method, calls_for(pipe, requests()), **goal)
    assert not hasattr(pipe, "_dit_accel")


def test_two_transformers_get_ratios_but_no_common_polynomial():
    assert set(fit_model(Subject("wan22").pipe, requests())) == {"magcache"}


@pytest.mark.parametrize("name", ["wan", "sd3"])
def test_fitted_numbers_work(name):
    subject = Subject(name)
    options = fit_model(subject.pipe, requests(name))
    assert len(options["teacache"]["coefficients"]) == 5
    for ratios in options["magcache"].values():
        assert len(ratios) == 9
        assert ratios[0] == 1
    for method in ("teacache", "magcache"):
        accelerate_pipeline(subject.pipe, method, threshold=0.5, **options[method])
        subject.run()
        assert acceleration_report(subject.pipe).blocks_skipped > 0


def test_commands_and_a_model_that_brings_its_numbers(tmp_path, capsys):
    folder = tmp_path / "model"
    Subject("wan").pipe.save_pretrained(folder)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\n\na blue ball\n")
    common = ["--model", str(folder), "--prompts", str(prompts), "--steps", "9", "--frames", "5"]
    common += ["--height", "112", "--width", "144", "--json"]

    def run(*arguments: str) -> dict:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *common])
        captured = capsys.readouterr()
        assert not ended.value.code, captured.err
        return json.loads(captured.out)

    profile = run("profile", "--rows", "16", "-o", str(tmp_path / "profile.json"))
    assert profile["num_blocks"] == 3
    file = folder / CALIBRATION_FILE
    made = run("calibrate", "--fit", "--method", "magcache", "--max-error", "1", "-o", str(file))
    assert set(made["options"]) == {"teacache", "magcache"}
    assert made["calibration"]["chosen"] in made["calibration"]["curve"]

    from dit_accel.models import load_pipeline

    pipe = load_pipeline(str(folder))
    assert (
        brought_options(pipe, "magcache")["threshold"] == made["options"]["magcache"]["threshold"]
    )
    accelerate_pipeline(pipe, "magcache")
    accelerate_pipeline(pipe, "teacache")
    other = {**made, "made_for": {**made["made_for"], "num_layers": 40}}
    file.write_text(json.dumps(other))
    with pytest.raises(OptionError, match=r"for a model of .*'num_layers': 40.*make its own"):
        accelerate_pipeline(pipe, "teacache")
    file.write_text("{}")
    with pytest.raises(OptionError, match=re.escape("is no calibration")):
        accelerate_pipeline(pipe, "teacache")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["profile", "-o", "p.txt"], "must end in .json"),
        (["profile", "-o", "p.json", "--prompts", "none.txt"], "can't be read"),
        (["calibrate", "-o", "c.json"], "nothing to do"),
        (["calibrate", "-o", "c.json", "--method", "esycache"], "Did you mean 'easycache'"),
    ],
    ids=str,
)
def test_commands_refuse(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def counted(pipe) -> list[int]:
    """Count generations by their first steps."""
    generations: list[int] = []
    tracked = pipe.scheduler.set_timesteps
    pipe.scheduler.set_timesteps = lambda *a, **k: (generations.append(1), tracked(*a, **k))[1]
    return generations


PROBE = {"prompt": "a ball", "height": 112, "width": 144, "num_frames": 5, "num_inference_steps": 9}


@pytest.mark.parametrize("method", ["easycache", ["gna", "easycache"]], ids=str)
def test_a_goal_in_place_of_a_strength(method, calibrations):
    subject = Subject("wan")
    sparse = {"dense_steps": 2, "min_tokens": 0} if "gna" in method else {}
    accelerate_pipeline(subject.pipe, method, target_speedup=1.2, probe=PROBE, **sparse)
    subject.run()
    report = acceleration_report(subject.pipe)
    found = report.calibration
    assert found.chosen.speedup >= 1.2
    assert report.methods[-1].threshold == found.chosen.strength
    assert "(chosen)" in str(report)
    assert report.to_dict()["calibration"]["method"] == "easycache"
    (kept,) = calibrations.glob("*.json")
    assert len(json.loads(kept.read_text())["points"]) == len(found.curve)


def test_what_was_measured_is_not_measured_again(calibrations):
    pipe = Subject("wan").pipe
    generations = counted(pipe)
    accelerate_pipeline(pipe, "easycache", target_speedup=1.2, probe=PROBE)
    once = len(generations)
    first = acceleration_report(pipe).calibration
    accelerate_pipeline(pipe, "easycache", target_speedup=1.2, probe=PROBE)
    assert len(generations) == once
    assert acceleration_report(pipe).calibration == first
    accelerate_pipeline(pipe, "easycache", target_speedup=1.2, probe=PROBE | {"prompt": "a cube"})
    assert len(generations) > once
    twice = len(generations)
    with torch.no_grad():
        pipe.transformer.blocks[0].attn1.to_q.weight.mul_(1.01)  # as a fused adapter would
    accelerate_pipeline(pipe, "easycache", target_speedup=1.2, probe=PROBE)
    assert len(generations) > twice
    for path in calibrations.glob("*.json"):
        path.write_text("{")
    damaged = len(generations)
    accelerate_pipeline(pipe, "easycache", target_speedup=1.2, probe=PROBE)
    assert len(generations) > damaged


def test_whole_numbers_stay_whole():
    pipe = Subject("wan").pipe
    for _ in range(2):
        accelerate_pipeline(pipe, "taylorseer", target_speedup=1.6, probe=PROBE)
        assert acceleration_report(pipe).methods[0].interval == 3


@pytest.mark.parametrize(
    ("method", "given", "says"),
    [
        ("easycache", {"target_speedup": 2, "max_error": 1}, "one goal"),
        ("easycache", {"target_speedup": 0.5}, "must be over 1"),
        ("easycache", {"max_error": float("nan")}, "must be over 0"),
        ("easycache", {"probe": PROBE}, "one goal"),
        ("easycache", {"target_speedup": 2, "threshold": 0.1}, "leave one out"),
        ("easycache", {"target_speedup": 2, "probe": None}, "say what to try strengths on"),
        ("easycache", {"target_speedup": 2, "probe": ["a ball"]}, "keyword arguments"),
        ("easycache", {"target_speedup": 2, "probe": []}, "at least one prompt"),
        ("easycache", {"target_speedup": 50}, "does not get there"),
        ("gna", {"target_speedup": 2}, "out of reach here|no setting could be tried"),
        ("pab", {"target_speedup": 2}, "give max_error"),
        ("teacache", {"target_speedup": 2}, "no TeaCache coefficients"),
        ("easycache", {"target_speedup": 2, "treshold": 1}, "no option 'treshold'"),
        (
            "easycache",
            {"target_speedup": 2, "probe": PROBE | {"generator": torch.Generator()}},
            "give seeds",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "given",
)
def test_refused_goals_leave_the_acceleration_before(method, given, says):
    pipe = Subject("wan").pipe
    accelerate_pipeline(pipe, "first_block_cache")
    with pytest.raises(OptionError, match=says):
        accelerate_pipeline(pipe, method, **{"probe": PROBE} | given)
    assert acceleration_report(pipe).method == "first_block_cache"


def test_bundled_models_know_what_to_probe_with():
    from dit_accel.calibration import bundled_calls
    from dit_accel.models import load_pipeline

    (call,) = bundled_calls(load_pipeline("tiny-sd3"))
    assert len(call["prompt"]) == len(call["generator"]) == 2
    assert call["num_inference_steps"] == 20


def test_the_progress_bar_stays_as_it_was():
    pipe = Subject("wan").pipe
    pipe.set_progress_bar_config(desc="mine")
    accelerate_pipeline(pipe, "easycache", target_speedup=1.2, probe=PROBE)
    assert pipe._progress_bar_config == {"desc": "mine"}
