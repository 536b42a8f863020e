"""Over several CPU processes: the output is that of one process, and bad input ends all of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from rank_cases import four_ranks, two_ranks
from ranks import run_ranks

pytestmark = pytest.mark.slow
ROUNDING = 1e-5
"""Latents are up to 5."""


@pytest.fixture(scope="module")
def both() -> list[dict[str, Any]]:
    """What each of two ranks found."""
    found = run_ranks(two_ranks)
    assert not any(isinstance(one, str) for one in found), found
    return found


def check_same(found: Any) -> None:
    assert isinstance(found, dict), found
    assert found
    for name, (difference, restored, densities) in found.items():
        assert difference < ROUNDING, name
        assert restored, name
        assert len(set(map(lambda density: round(density, 9), densities))) <= 1, (name, densities)


@pytest.mark.parametrize("split", ["ulysses", "ring"])
def test_every_method_gives_the_same_video_of_odd_length(both, split):
    found = dict(both[0][f"methods {split}"])
    assert found.pop("matters") > 1e3 * ROUNDING
    check_same(found)


@pytest.mark.parametrize("split", ["ulysses", "ring"])
def test_text_in_the_sequence_is_followed(both, split):
    check_same(both[0][f"families {split}"])


def test_guidance_passes_run_on_ranks_of_their_own(both):
    check_same(both[0]["guided"])


def test_parallelism_and_acceleration_go_in_any_order(both):
    found = dict(both[0]["in any order"])
    assert found.pop("stock is refused").startswith("ContextParallelError")
    assert all(difference < ROUNDING for difference in found.values()), found


def test_bad_input_is_refused_on_every_rank_alike(both):
    expected = {
        "too many": ("ContextParallelError", "2 were started"),
        "three passes": ("OptionError", "cfg=3"),
        "other pipeline": ("ContextParallelError", "rank 1 has pipeline 'FluxPipeline'"),
        "other noise": ("ContextParallelError", "rank 1 has inputs"),
        "guidance beside cfg": ("ContextParallelError", "ulysses=2 or ring=2"),
        "budget over ranks": ("OptionError", "give every rank the file, calibration="),
        "twice": ("OptionError", "unparallelize_pipeline"),
        "reference on a ring": ("ContextParallelError", "ulysses="),
        "no plan": ("ContextParallelError", "WanVACETransformer3DModel"),
    }
    for rank in both:
        assert rank["bad input"].keys() == expected.keys()
        for name, (kind, says) in expected.items():
            message = rank["bad input"][name]
            assert message.startswith(kind), (name, message)
            assert says in message, (name, message)


@pytest.mark.parametrize("split", ["ulysses", "ring"])
def test_guidances_perturb_the_same(both, split):
    check_same(both[0][f"perturbed {split}"])


def test_splits_go_together():
    found = run_ranks(four_ranks, 4)
    assert not any(isinstance(one, str) for one in found), found
    check_same(found[0])
