"""Suites are data: bundled ones for both kinds of models, and users' files."""

from __future__ import annotations

import json

import pytest

from dit_accel.errors import OptionError
from dit_accel.eval.suites import list_suites, load_suite
from dit_accel.world.worlds import WORLDS, fixed_prompts


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("name", "count"), [("smoke", 4), ("standard", 33), ("world", 64)])
def test_bundled_suites_of_a_world(world, name, count):
    entries = load_suite(name, world).entries
    assert len(entries) == count
    scenes = fixed_prompts(world)
    for place, entry in enumerate(entries):
        assert entry.index == place
        assert entry.prompt == scenes[entry.seed]["prompt"]
        assert entry.scene == scenes[entry.seed]
    assert len({entry.prompt for entry in entries}) == count


def test_suites_of_other_models():
    assert list_suites() == ["smoke", "standard", "vbench", "world"]
    assert len(load_suite("smoke").entries) == 4
    standard = load_suite("standard").entries
    assert len({entry.prompt for entry in standard}) == 33
    assert len(load_suite("standard", first=5).entries) == 5
    with pytest.raises(OptionError, match="drawn world only"):
        load_suite("world")


def test_files(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("a cat\n\na dog\n")
    suite = load_suite(str(text))
    assert suite.name == "mine"
    assert [(e.index, e.prompt, e.seed) for e in suite.entries] == [
        (0, "a cat", 0),
        (1, "a dog", 1),
    ]
    rows = tmp_path / "mine.json"
    rows.write_text(json.dumps(["a cat", {"prompt": "a dog", "seed": 9}]))
    assert [(e.prompt, e.seed) for e in load_suite(str(rows)).entries] == [
        ("a cat", 0),
        ("a dog", 9),
    ]


def test_vbench_takes_its_own_file(tmp_path):
    with pytest.raises(OptionError, match=r"get https://.*VBench_full_info\.json"):
        load_suite("vbench")
    file = tmp_path / "VBench_full_info.json"
    rows = [
        {"prompt_en": "a cat", "dimension": ["subject_consistency"]},
        {"prompt_en": "a wall", "dimension": ["temporal_flickering"]},
    ]
    file.write_text(json.dumps(rows))
    entries = load_suite(str(file)).entries
    assert [entry.prompt for entry in entries].count("a cat") == 5
    assert [entry.seed for entry in entries if entry.prompt == "a wall"] == list(range(25))
    assert entries[0].dimensions == ("subject_consistency",)
    assert {entry.index for entry in load_suite(str(file), first=1).entries} == {0}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("smokee", None, "Did you mean 'smoke'", id="name"),
        pytest.param("a.json", "{", "can't be read", id="broken"),
        pytest.param("a.json", '[{"text": "a cat"}]', "can't be read", id="keys"),
        pytest.param("a.txt", "\n", "has no prompts", id="empty"),
    ],
)
def test_what_is_no_suite_is_refused(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(OptionError, match=message):
        load_suite(name)
