"""What users say about ranks, and how wrong wishes are refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dit_accel.errors import ContextParallelError, OptionError
from dit_accel.parallel import launch
from dit_accel.parallel.groups import Axis, SequenceGroup
from dit_accel.parallel.launch import Degrees, join_ranks


def test_splits_are_read_from_text():
    assert Degrees.parse("ulysses=2, ring=4") == Degrees(ulysses=2, ring=4)
    assert Degrees.parse("cfg=2,ulysses=4").ranks == 8


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ulyses=2", "'ulysses'"),
        ("ring", "number of ranks"),
        ("ring=2,ring=2", "at most once"),
        ("ring=-2", "number of ranks"),
        ("ring=0", "at least 1"),
        ("cfg=4", "1 or 2"),
        ("", "cfg, ring, ulysses"),
    ],
)
def test_other_text_is_refused(text, says):
    with pytest.raises(OptionError, match=says):
        Degrees.parse(text)


def test_worlds_that_fit_no_split_are_told_what_does():
    with pytest.raises(ContextParallelError, match="ulysses=6 or ring=6 or cfg=2,ulysses=3"):
        Degrees(ulysses=4).check_world(6)
    with pytest.raises(ContextParallelError, match="no split"):
        Degrees(ulysses=4).check_world(1)


def test_heads_that_do_not_divide_are_refused_with_what_does():
    SequenceGroup(Axis(4), Axis(2)).check_heads(24)
    with pytest.raises(ContextParallelError, match=r"\[2, 4, 5, 8, 10, 20, 40\]"):
        SequenceGroup(Axis(3), Axis()).check_heads(40)


def test_one_process_is_told_how_to_start_several():
    with pytest.raises(ContextParallelError, match="torchrun --nproc-per-node"):
        join_ranks("cpu")


def test_gpus_without_nccl_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "pick_device", lambda device: "cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(ContextParallelError, match="built without NCCL"):
        join_ranks()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "pick_device", lambda device: "cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dist, "get_node_local_rank", lambda fallback: 2)
    with pytest.raises(ContextParallelError, match="--nproc-per-node 2"):
        join_ranks()
