"""Budgets on the command line: settings are tried, what was measured is kept, and serves others."""

from __future__ import annotations

import json

import pytest

SMALL = ("--steps", "4", "--frames", "5", "--height", "112", "--width", "144")


def test_what_was_measured_once_serves_generations(dit_accel, video_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ball\na blue ball\n")
    common = ("--model", video_model, *SMALL, "--json")
    ran = dit_accel("calibrate", "--method", "auto", "--max-error", "3", "--prompts", "prompts.txt",
                    "-o", "choice.json", *common)  # fmt: skip
    assert ran.code == 0, ran.err
    made = json.loads(ran.out)
    assert made["budget"] == {"min_psnr": None, "max_error": 3.0, "target_speedup": None}
    assert len(made["points"]) >= 5
    assert set(made["frontier"]) <= {point_name(point) for point in made["points"]}
    ran = dit_accel("generate", "a green ball", "--max-error", "3", "--calibration", "choice.json",
                    "-o", "green.mp4", *common)  # fmt: skip
    assert ran.code == 0, ran.err
    choice = json.loads(ran.out)["acceleration"]["choice"]
    assert choice["chosen"] == made["chosen"]
    ran = dit_accel("generate", "a green ball", "--max-error", "3", "--calibration", "choice.json",
                    "-o", "larger.mp4", "--model", video_model, *SMALL[:-1], "160")  # fmt: skip
    assert ran.code == 2
    assert "made for a token grid of" in ran.err


def point_name(point: dict) -> str:
    from dit_accel.choosing.settings import Setting

    return str(Setting(tuple(point["setting"]["methods"]), point["setting"]["options"]))


def test_a_generation_tries_settings_first_for_as_long_as_it_may(dit_accel, video_model):
    methods = ("--method", "first_block_cache,easycache")
    ran = dit_accel("generate", "a ball", "--max-error", "3", "--probe-s", "600", *methods,
                    "--model", video_model, *SMALL, "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    choice = json.loads(ran.out)["acceleration"]["choice"]
    assert choice["budget"]["max_error"] == 3
    assert len(choice["points"]) >= 2
    assert all(len(point["error"]) <= 4 for point in choice["points"])  # four seeds


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "x", "--probe-s", "60"], "give one, such as --min-psnr 30"),
        (["generate", "x", "--min-psnr", "30", "--probe-s", "-1"], "probe_s=-1.0 must be"),
        (["generate", "x", "--min-psnr", "-3"], "min_psnr=-3.0 must be"),
        (["calibrate", "-o", "c.json", "--method", "auto", "--fit"], "takes neither --fit"),
        (["calibrate", "-o", "c.json", "--method", "easycache", "--min-psnr", "30"],
         "--min-psnr goes with --method auto"),
        (["calibrate", "-o", "c.json", "--method", "easycache", "--probe-s", "9"],
         "--probe-s goes with --method auto"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_refused_before_loading(dit_accel, no_loading, arguments, says):
    ran = dit_accel(*arguments)
    assert ran.code == 2
    assert says in ran.err
