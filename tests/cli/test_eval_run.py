"""`dit-accel eval`: one command from a model to a report, gone on with, compared and checked."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from dit_accel.cli.eval_run import _options_by_method
from dit_accel.errors import OptionError

SMALL = ("--frames", "9", "--height", "64", "--width", "64", "--steps", "2", "--device", "cpu")
SOON = ("--block-size", "16", "--set", "min_tokens=0", "--set", "dense_steps=1")
EVAL = ("eval", "--suite", "smoke", *SMALL, *SOON)


class Page(HTMLParser):
    """Collects the clips that a page shows, and whether its tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.clips: list[str] = []
        self.open: list[str] = []
        self.points = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("video", "img"):
            self.clips.append(str(dict(attributes)["src"]))
        self.points += tag == "circle"
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_run_is_reported_gone_on_with_compared_and_checked(dit_accel, tmp_path):
    methods = ("--methods", "dense,gna,radial+first_block_cache", "--density", "0.8")
    arguments = (*EVAL, *methods, "--prompts", "2", "--output", "runs/first")
    ran = dit_accel(*arguments)
    assert ran.code == 0, ran.err
    assert "gna@0.8" in ran.out
    assert "wrote runs/first/report.html" in ran.out
    folder = tmp_path / "runs/first"
    results = json.loads((folder / "results.json").read_text())
    assert list(results["methods"]) == ["dense", "gna@0.8", "radial+first_block_cache@0.8"]
    dense, gna, _ = results["summary"]
    assert gna["samples"] == 2
    assert gna["computed_density"] < 1
    assert gna["speed"]["step_s"] > 0
    assert "following" in dense
    assert results["methods"]["gna@0.8"]["operators"]

    page = Page()
    page.feed((folder / "report.html").read_text())
    assert not page.open
    assert len(page.clips) == 6
    assert all(
        (folder / clip.replace("%40", "@").replace("%2B", "+")).is_file() for clip in page.clips
    )
    assert page.points > 2

    journal = (folder / "journal.jsonl").read_text().count('"sample"')
    again = dit_accel(*arguments, "--json")
    assert again.code == 0
    assert (folder / "journal.jsonl").read_text().count('"sample"') == journal
    printed = json.loads(again.out)
    assert printed["summary"] == results["summary"]
    assert "rows" not in printed

    assert dit_accel("eval", "compare", folder, folder / "results.json").code == 0
    assert dit_accel("eval", "check", folder, "--against", folder).code == 0
    worse = json.loads(json.dumps(results))
    for row in worse["rows"]:
        if "fidelity" in row:
            row["fidelity"]["psnr_db"] -= 1
    (tmp_path / "worse.json").write_text(json.dumps(worse))
    checked = dit_accel("eval", "check", "worse.json", "--against", folder)
    assert checked.code == 1
    assert "problem: gna@0.8: PSNR, dB dropped by 1, more than 0.5" in checked.err
    allowed = dit_accel("eval", "check", "worse.json", "--against", folder, "--max-psnr-drop", "2")
    assert allowed.code == 0
    del worse["rows"][0]
    (tmp_path / "worse.json").write_text(json.dumps(worse))
    compared = dit_accel("eval", "compare", folder, "worse.json", "--json")
    assert compared.code == 1
    assert json.loads(compared.out)["problems"] == ["dense: the second run lacks prompt 0 (seed 4)"]


def test_models_of_no_world_take_open_prompts(dit_accel, tmp_path, video_model):
    soon = ("--set", "block_size=16", "--set", "min_tokens=0")
    ran = dit_accel(
        *("eval", "--model", video_model, "--methods", "gna", "--set", "gna.density=0.9", *soon),
        *("--prompts", "1", "--steps", "1", "--device", "cpu", "-o", "run", "--repeats", "2"),
    )
    assert ran.code == 0, ran.err
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["settings"]["batch"] == 1
    assert results["rows"][0]["prompt"].startswith("a cat")
    assert "following" not in results["summary"][0]
    assert results["rows"][1]["speed"]["repeats"] == 2
    assert results["methods"]["gna"]["options"]["density"] == 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--suite", "smok"], "Did you mean 'smoke'", id="suite"),
        pytest.param(["--methods", "radail"], "Did you mean 'radial'", id="method"),
        pytest.param(["--methods", ","], "--methods is empty", id="none"),
        pytest.param(["--methods", "gna,gna"], "named twice", id="twice"),
        pytest.param(["--set", "windw=1"], "Did you mean 'window'", id="option"),
        pytest.param(["--set", "density"], "write name=value", id="assignment"),
        pytest.param(["--density", "2"], "density=2", id="density"),
        pytest.param(["--density", "much"], "write numbers", id="number"),
        pytest.param(["--prompts", "0"], "prompts=0 must be at least 1", id="prompts"),
        pytest.param(["--batch", "0"], "batch=0 must be at least 1", id="batch"),
        pytest.param(["--repeats", "0"], "repeats=0 must be at least 1", id="repeats"),
        pytest.param(["--block-size", "0"], "block_size=0 must be at least 1", id="block"),
        pytest.param(["--height", "100"], "take 96", id="height"),
        pytest.param(["--output", "taken/run"], "is no folder", id="output"),
        pytest.param(["--device", "cuda:99"], "no device", id="device"),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_refused_before_loading(dit_accel, tmp_path, arguments, message):
    (tmp_path / "taken").write_text("a file")
    ran = dit_accel(*EVAL, *arguments)
    assert ran.code == 2
    assert message in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_options_go_to_the_methods_that_have_them():
    given = ["dense_steps=2", "window=1.0,0.5,0.5", "radial.decay=0.3"]
    options = _options_by_method(["gna", "radial+first_block_cache", "first_block_cache"], given)
    assert options["gna"] == {"dense_steps": 2, "window": (1.0, 0.5, 0.5)}
    assert options["radial+first_block_cache"] == {"dense_steps": 2, "radial": {"decay": 0.3}}
    assert options["first_block_cache"] == {}
    with pytest.raises(OptionError, match="no method here has that option"):
        _options_by_method(["gna"], ["decay=0.3"])
