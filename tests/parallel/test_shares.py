"""How tokens are dealt out: nothing is lost, blocks stay together, and all have as much to do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.call import TokenLayout
from dit_accel.errors import ContextParallelError
from dit_accel.methods.gna import GNA
from dit_accel.methods.radial import Radial
from dit_accel.parallel.context import _work
from dit_accel.parallel.shares import deal, imbalance


@given(
    count=st.integers(1, 200),
    ring=st.integers(1, 4),
    ulysses=st.integers(1, 4),
    unit=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 99),
)
def test_every_token_is_dealt_once_and_comes_back(count, ring, ulysses, unit, seed):
    units = -(-count // unit)
    if units < ring:
        return
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    work = torch.rand(units, generator=generator)
    shares = deal(order, ring=ring, ulysses=ulysses, unit=unit, work=work)
    assert shares.length % ulysses == 0
    assert torch.cat(shares.places).sort().values.equal(torch.arange(count))
    tokens = torch.arange(count)
    if shares.gather is None:
        assert shares.length * ring == count
        return
    dealt = tokens[shares.gather]
    assert len(dealt) == shares.length * ring
    assert dealt[shares.scatter].equal(tokens)
    for part, places in enumerate(shares.places):
        own = dealt[part * shares.length :][: len(places)]
        assert own.equal(order[places])
        whole = places[: len(places) // unit * unit].view(-1, unit)
        assert (whole[:, 0] % unit == 0).all()
        assert (whole.diff(dim=1) == 1).all()


def test_what_needs_no_dealing_is_left_alone():
    assert deal(torch.arange(12), ulysses=4).gather is None
    assert deal(torch.arange(12), ulysses=5).gather is not None


def test_a_reference_comes_first():
    shares = deal(torch.tensor([2, 0, 1]), ulysses=2, tail=2)
    assert shares.gather.tolist() == [3, 4, 2, 0, 1, 1]
    assert shares.scatter.tolist() == [3, 4, 2, 0, 1]


@pytest.mark.parametrize("ring", [2, 4, 8])
@pytest.mark.parametrize("method", [GNA(), Radial()], ids=["gna", "radial"])
def test_parts_attend_to_as_many_pairs_within_ten_percent(method, ring):
    layout = TokenLayout((9, 30, 52))
    order = method.token_order(layout.grid)
    work = _work(method.plan_layout(layout, order), method.block_size)
    shares = deal(order.permutation(layout.grid), ring=ring, unit=method.block_size, work=work)
    loads = [float(work[shares.blocks(part, method.block_size)].sum()) for part in range(ring)]
    assert max(loads) / min(loads) < 1.1
    assert imbalance(work, shares, method.block_size) < 0.1


def test_too_few_blocks_are_refused_with_what_works():
    with pytest.raises(ContextParallelError, match="ring=3 or less"):
        deal(torch.arange(40), ring=4, unit=16)
