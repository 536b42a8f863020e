"""Searches on a tiny pipeline: journals, interruptions, and the file that comes out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from headhunt_model import Brightness
from PIL import Image
from tiny_pipelines import TINY_PIPELINES, run_tiny, tiny_sd3

from dit_accel import accelerate_pipeline, restore_pipeline
from dit_accel.errors import OptionError
from dit_accel.guidance.heads import HeadFile
from dit_accel.headhunt.heatmap import write_heat_map
from dit_accel.headhunt.hunting import HeadHunt, hunt_heads
from dit_accel.headhunt.search import SearchPlan


@pytest.fixture
def pipe():
    return tiny_sd3()


@pytest.fixture
def hunt(model):
    return HeadHunt(
        model=str(model), objective=Brightness(), prompts=("a red ball", "two blue stars", "snow"),
        steps=2, height=32, width=32, batch=2, plan=SearchPlan(rounds=2, per_round=1, halving=1),
    )  # fmt: skip


def test_an_interrupted_search_goes_on_to_the_same_result(hunt, pipe, tmp_path):
    hunt, whole = replace(hunt, candidates=((0, 1), (1, 0), (2, 0))), Brightness()
    expected = hunt_heads(pipe, hunt, objective=whole)
    assert expected.search.generations == whole.scored
    calls = 0
    while True:  # break off after each possible call
        journal = tmp_path / f"{calls}.jsonl"
        first, second = Brightness(breaks_after=calls), Brightness()
        try:
            hunt_heads(pipe, hunt, objective=first, journal=journal)
            break
        except KeyboardInterrupt:
            pass
        found = hunt_heads(pipe, hunt, objective=second, journal=journal)
        assert found.search == expected.search
        # Only the set of heads that was under way is scored again.
        assert whole.scored <= first.scored + second.scored <= whole.scored + 2
        calls += 1
    assert calls == 11


def test_a_journal_that_was_cut_off_anywhere_is_gone_on_with(hunt, pipe, tmp_path):
    hunt, journal = replace(hunt, candidates=((0, 1), (2, 0))), tmp_path / "journal.jsonl"
    expected = hunt_heads(pipe, hunt, objective=Brightness(), journal=journal)
    text = journal.read_bytes()
    header = text.index(b"\n") + 1
    for end in (0, 5, header - 5, header, header + 10, len(text) - 3):
        journal.write_bytes(text[:end])
        again = hunt_heads(pipe, hunt, objective=Brightness(), journal=journal)
        assert again.search == expected.search


def test_a_journal_serves_more_rounds_and_other_candidates(hunt, pipe, tmp_path):
    journal = tmp_path / "journal.jsonl"
    two = hunt_heads(pipe, hunt, objective=Brightness(), journal=journal)
    more = replace(hunt, plan=SearchPlan(rounds=3, per_round=1, halving=1))
    scored = Brightness()
    found = hunt_heads(pipe, more, objective=scored, journal=journal)
    assert len(found.search.rounds) == 3
    assert found.search.rounds[:2] == two.search.rounds
    assert scored.scored == found.search.generations - two.search.generations
    few = replace(hunt, candidates=((0, 1), (1, 0)), plan=SearchPlan(rounds=1, per_round=1))
    assert hunt_heads(pipe, few, objective=Brightness(), journal=journal).search.heads


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 3}, "another steps"),
        ({"scale": 2.0}, "another scale"),
        ({"strength": 0.75}, "another strength"),
        ({"guidance": 2.0}, "another guidance"),
        ({"scope": "image"}, "another scope"),
        ({"prompts": ("a red ball", "two blue stars")}, "another prompts"),
        ({"first_seed": 1}, "another first_seed"),
    ],
    ids=str,
)
def test_a_journal_of_another_search_is_refused(hunt, pipe, tmp_path, change, says):
    journal = tmp_path / "journal.jsonl"
    one = replace(hunt, candidates=((0, 0),), plan=SearchPlan(per_round=1))
    hunt_heads(pipe, one, objective=Brightness(), journal=journal)
    before = journal.read_bytes()
    with pytest.raises(OptionError, match=says):
        hunt_heads(pipe, replace(one, **change), objective=Brightness(), journal=journal)
    assert journal.read_bytes() == before


def test_other_files_are_no_journals(hunt, pipe, tmp_path):
    journal = tmp_path / "journal.jsonl"
    for text in ('{"rows": []}\n', "no JSON"):
        journal.write_text(text)
        with pytest.raises(OptionError, match="no journal of `headhunt`"):
            hunt_heads(pipe, hunt, objective=Brightness(), journal=journal)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"candidates": ((3, 0),)}, "head 3:0 is out of range: this model has 3 layers of 2 heads"),
        ({"candidates": ((0, 2),)}, "head 0:2 is out of range"),
        ({"layers": (3,)}, "layer 3 is out of range"),
        ({"plan": SearchPlan(rounds=7, per_round=1)}, "more than the 6"),
        ({"layers": (0,), "plan": SearchPlan(per_round=3)}, "more than the 2"),
    ],
    ids=str,
)
def test_heads_that_are_not_there_are_refused(hunt, pipe, change, says):
    objective = Brightness()
    with pytest.raises(OptionError, match=says):
        hunt_heads(pipe, replace(hunt, **change), objective=objective)
    assert not objective.scored


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"strength": 1.5}, r"in \[0, 1\]"),
        ({"scale": float("nan")}, "finite"),
        ({"perturbation": "identiy"}, "Did you mean 'identity'"),
        ({"scope": "text"}, "unknown scope"),
        ({"candidates": ((0, 0), (0, 0))}, "twice"),
        ({"prompts": ()}, "no prompt"),
        ({"seeds": 0}, "seeds=0"),
        ({"batch": 0}, "batch=0"),
        ({"count": 0}, "count=0"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_at_once(hunt, change, says):
    with pytest.raises(OptionError, match=says):
        replace(hunt, **change)


def test_the_result_is_what_softpag_loads(hunt, pipe, tmp_path):
    plain = run_tiny(pipe, TINY_PIPELINES["sd3"][1])
    found = hunt_heads(pipe, replace(hunt, strength=0.75, scale=2.0), objective=Brightness())
    assert torch.equal(run_tiny(pipe, TINY_PIPELINES["sd3"][1]), plain)  # it was restored
    path = tmp_path / "heads.json"
    found.head_file().write(path)
    accelerate_pipeline(pipe, "softpag", heads=str(path))
    by_file = run_tiny(pipe, TINY_PIPELINES["sd3"][1])
    accelerate_pipeline(pipe, "softpag", heads=found.search.heads, strength=0.75, scale=2.0)
    assert torch.equal(run_tiny(pipe, TINY_PIPELINES["sd3"][1]), by_file)
    restore_pipeline(pipe)

    file = HeadFile.read(path)
    assert file.heads == found.search.heads
    about = json.loads(path.read_text())["found"]
    assert about["objective"] == "brightness"
    assert about["environment"]["packages"]["torch"] == torch.__version__
    assert about["score"] == found.search.best.score
    assert len(about["rounds"][0]["trials"]) == 6
    with pytest.raises(OptionError, match="found for transformer='SD3Transformer2DModel'"):
        accelerate_pipeline(TINY_PIPELINES["flux"][0](), "softpag", heads=str(path))


def test_heads_with_the_best_score_win(hunt, pipe):
    """The tiny model's heads tried one by one, by hand."""
    one = replace(hunt, plan=SearchPlan(per_round=1))
    found = hunt_heads(pipe, one, objective=Brightness())
    by_hand = {}
    for head in [(layer, head) for layer in range(3) for head in range(2)]:
        accelerate_pipeline(pipe, "softpag", heads=[head], strength=0.5)
        pictures = [
            pipe(
                prompt, num_inference_steps=2, height=32, width=32, guidance_scale=1.0,
                generator=torch.Generator().manual_seed(seed), output_type="pt",
            ).images
            for seed, prompt in enumerate(hunt.prompts)
        ]  # fmt: skip
        by_hand[head] = float(torch.stack(pictures).mean())
    restore_pipeline(pipe)
    assert found.search.heads == (max(by_hand, key=by_hand.__getitem__),)
    for trial in found.search.rounds[0].trials:
        assert trial.score == pytest.approx(by_hand[trial.head], abs=1e-4)


def test_queries_are_shown_to_the_mean_query(hunt, pipe):
    mean = replace(
        hunt, perturbation="query_mean", candidates=((1, 0),), plan=SearchPlan(per_round=1)
    )
    found = hunt_heads(pipe, mean, objective=Brightness())
    assert found.search.rounds[0].trials[0].gain != 0


def test_a_score_that_is_not_finite_is_refused(hunt, pipe):
    objective = Brightness()
    objective.score = lambda frames, entries: [float("nan")] * len(frames)
    with pytest.raises(OptionError, match="not finite"):
        hunt_heads(pipe, hunt, objective=objective)


def test_the_heat_map_shows_layers_by_heads(hunt, pipe, tmp_path):
    few = replace(hunt, candidates=((0, 0), (1, 1)), plan=SearchPlan(per_round=1))
    found = hunt_heads(pipe, few, objective=Brightness())
    write_heat_map(found, tmp_path / "heads.png")
    picture = Image.open(tmp_path / "heads.png").convert("RGB")
    corners = [(56 + 44 * head + 5, 78 + 44 * layer + 5) for layer in (0, 1) for head in (0, 1)]
    colours = set(map(picture.getpixel, corners))
    assert len(colours) == 3  # two that were tried, and gray
    assert (225, 225, 222) in colours
