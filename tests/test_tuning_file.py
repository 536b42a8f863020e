"""What a card was tuned to is used for that card and these versions alone, and it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel import tuning_file
from dit_accel.call import TokenLayout
from dit_accel.grid import RASTER
from dit_accel.kernels import block_sparse
from dit_accel.kernels.tuning import HopperConfig, KernelConfig, Tuning, kernel_config
from dit_accel.methods.gna import GNA
from dit_accel.operators import TritonOperator, make_operators
from dit_accel.tuning_file import Tunings, load_tuning, save_tuning, tuning_path

CUDA = torch.device("cuda")
TUNED = Tuning(
    "measured just now",
    {(128, 2): KernelConfig(64, 64, 8, 3), (64, 4): KernelConfig(32, 16, 4, 1)},
    {(128, "short"): HopperConfig(3, persistent=True), (128, "long"): HopperConfig(eager=2)},
)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Pretend to have a card; returns a function that changes it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def put(name: str, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    put("NVIDIA H200")
    return put


def test_what_was_saved_is_used(card, tmp_path):
    path = save_tuning(CUDA, TUNED)
    assert path == tmp_path / "dit-accel" / "tuning-nvidia-h200.json"
    found = load_tuning(CUDA)
    assert (found.block_sparse, found.hopper) == (TUNED.block_sparse, TUNED.hopper)
    assert found.source.startswith("measured on this card")
    assert str(path) in found.source


def test_without_a_file_the_table_serves_and_says_so(card):
    assert load_tuning(CUDA) == Tuning(
        "built-in table: this card was not tuned; run `dit-accel bench tune` to do so"
    )
    card("NVIDIA Unheard-of", (13, 0))
    assert "estimated for (13, 0)" in load_tuning(CUDA).source
    assert isinstance(kernel_config((13, 0), 128, 2), KernelConfig)
    assert load_tuning(torch.device("cpu")).source == "built-in table"


def test_the_file_of_another_card_is_not_touched(card):
    save_tuning(CUDA, TUNED)
    card("NVIDIA H100")
    assert "was not tuned" in load_tuning(CUDA).source
    path = tuning_path("NVIDIA H100")
    tuning_path("NVIDIA H200").rename(path)
    found = load_tuning(CUDA)
    assert found.block_sparse == {}
    assert "ignored, made with gpu NVIDIA H200 (here: NVIDIA H100)" in found.source


@pytest.mark.parametrize("name", ["dit_accel", "triton"])
def test_the_file_of_another_version_is_ignored_with_the_reason(card, name):
    path = save_tuning(CUDA, TUNED)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {name: "0.0.1"}))
    found = load_tuning(CUDA)
    assert found.hopper == {}
    assert f"{path} is ignored, made with {name} 0.0.1" in found.source
    assert "run `dit-accel bench tune` again" in found.source


@pytest.mark.parametrize(
    "change",
    [
        {"block_m": 100}, {"num_warps": 64}, {"num_stages": "2"}, {"use_tma": 1}, {"more": 1},
        {"block_n": 4096}, {"block_m": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_file_never_reaches_a_kernel(card, change):
    path = save_tuning(CUDA, TUNED)
    content = json.loads(path.read_text())
    content["block_sparse"]["128.2"] |= change
    path.write_text(json.dumps(content))
    found = load_tuning(CUDA)
    assert found.block_sparse == {}
    assert "can't be read" in found.source
    path.write_text("{")
    assert "can't be read" in load_tuning(CUDA).source


def test_without_platformdirs_there_is_no_folder(card, monkeypatch):
    monkeypatch.setattr(tuning_file.importlib.util, "find_spec", lambda name: None)
    assert "platformdirs is not installed" in load_tuning(CUDA).source
    assert save_tuning(CUDA, TUNED) is None


def test_the_kind_of_call_decides():
    assert TUNED.kernel_config(100, 2) == KernelConfig(64, 64, 8, 3)  # padded to 128
    assert TUNED.kernel_config(128, 4) is None
    assert TUNED.hopper_config(128, 10, with_text=False) == HopperConfig(3, persistent=True)
    assert TUNED.hopper_config(128, 64, with_text=False) == HopperConfig(eager=2)
    assert TUNED.hopper_config(64, 10, with_text=False) is None
    persistent = Tuning(hopper={(128, "long"): HopperConfig(persistent=True)})
    assert not persistent.hopper_config(128, 10, with_text=True).persistent


def test_operators_hand_it_to_the_kernel_and_read_it_once(monkeypatch):
    reads = []

    def load(device: torch.device) -> Tuning:
        reads.append(device)
        return Tuning(block_sparse={(16, 4): KernelConfig(32, 16, 4, 1)})

    seen = []

    def kernel(query: Any, *rest: Any, config: Any, **more: Any) -> Any:
        seen.append(config)
        return torch.zeros_like(query)

    monkeypatch.setattr(tuning_file, "load_tuning", load)
    monkeypatch.setattr(block_sparse, "block_sparse_attention", kernel)
    plan = GNA(0.5, block_size=16).plan_layout(TokenLayout((3, 5, 7)), RASTER)
    operator = TritonOperator()
    for head_size in (16, 16, 32):
        query = torch.randn(1, 105, 2, head_size)
        operator.run(query, query, query, plan, None, False)
    assert seen == [KernelConfig(32, 16, 4, 1)] * 2 + [None]
    assert len(reads) == 1


def test_state_is_shared_by_the_operators_of_one_acceleration_alone():
    one, two = make_operators(), make_operators()
    assert one["triton"].tunings is one["hopper"].tunings
    assert one["triton"].tunings is not two["triton"].tunings
    assert Tunings().read == {}
