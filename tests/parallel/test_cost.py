"""The cost model: what can be counted by hand, and what must follow whatever the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dit_accel.errors import OptionError
from dit_accel.parallel.cost import Machine, Workload, cost_of, splits

MACHINE = Machine(inside_bytes_s=3e11, between_bytes_s=5e10, memory_bytes_s=3e12)
FREE = Machine(inside_bytes_s=1e30, between_bytes_s=1e30, memory_bytes_s=1e30, latency_s=0)
WORK = Workload(
    tokens=128 * 512, heads=40, head_size=128, blocks=40, density=0.25,
    attention_s=0.052, other_s=0.104, beside_s=0.0,
)  # fmt: skip


def test_one_gpu_costs_what_it_costs():
    cost = cost_of(WORK, MACHINE)
    assert cost.forward_s == pytest.approx(WORK.forward_s)
    assert cost.efficiency == pytest.approx(1)
    assert cost.pairs == 0.25 * WORK.tokens**2 * 40
    assert cost.ulysses_bytes == cost.ring_bytes == 0


@pytest.mark.parametrize(("ulysses", "ring"), [(8, 1), (1, 8), (4, 2)])
def test_without_exchange_the_speed_up_is_ideal(ulysses, ring):
    cost = cost_of(WORK, FREE, ulysses=ulysses, ring=ring)
    assert cost.efficiency == pytest.approx(1)
    assert cost.pairs == pytest.approx(cost_of(WORK, FREE).pairs / 8)


def test_bytes_are_those_that_are_sent():
    layer = WORK.tokens * 40 * 128 * 2
    assert cost_of(WORK, MACHINE, ulysses=8).ulysses_bytes == pytest.approx(4 * layer / 8 * 7 / 8)
    assert cost_of(WORK, MACHINE, ring=8).ring_bytes == pytest.approx(2 * layer / 8 * 7)
    both = cost_of(WORK, MACHINE, ulysses=4, ring=2)
    assert both.ulysses_bytes == pytest.approx(4 * layer / 8 * 3 / 4)
    assert both.ring_bytes == pytest.approx(2 * layer / 8)


def test_a_ring_hides_what_it_passes_on_behind_attention():
    slow = replace(MACHINE, inside_bytes_s=1e9)
    assert cost_of(WORK, MACHINE, ring=2).exchange_s < cost_of(WORK, slow, ring=2).exchange_s
    busy = replace(WORK, attention_s=10.0)
    assert cost_of(busy, slow, ring=2).exchange_s == pytest.approx(
        cost_of(busy, MACHINE, ring=2).exchange_s
    )


def test_blocks_that_do_not_divide_are_an_imbalance():
    assert cost_of(WORK, MACHINE, ring=8).imbalance == 0
    uneven = cost_of(replace(WORK, tokens=75600), MACHINE, ring=8)
    assert uneven.imbalance == pytest.approx(74 * 8 / 591 - 1)
    assert cost_of(WORK, MACHINE, ring=8, imbalance=0.05).imbalance == pytest.approx(0.05)


def test_between_nodes_is_slower():
    inside = cost_of(WORK, replace(MACHINE, node_ranks=64), ulysses=8, ring=8)
    across = cost_of(WORK, MACHINE, ulysses=8, ring=8)
    assert across.forward_s > inside.forward_s


def test_splits_are_those_that_heads_allow():
    assert splits(8, 40) == {"ring": (1, 8), "ulysses": (8, 1), "hybrid": (4, 2)}
    assert splits(64, 40) == {"ring": (1, 64), "hybrid": (8, 8)}
    assert splits(512, 40) == {"ring": (1, 512), "hybrid": (8, 64)}
    assert splits(2, 40) == {"ring": (1, 2), "ulysses": (2, 1)}


def test_impossible_splits_are_refused():
    with pytest.raises(OptionError, match="40 heads"):
        cost_of(WORK, MACHINE, ulysses=64)
    with pytest.raises(OptionError, match="too few"):
        cost_of(replace(WORK, tokens=1000), MACHINE, ring=64)
