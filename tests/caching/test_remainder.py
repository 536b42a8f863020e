"""Remainders of sparse attention, kept across steps."""

from __future__ import annotations

import pytest
import torch
from cache_subjects import Subject
from torch.nn.functional import scaled_dot_product_attention

from dit_accel import GNA, accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.caching.remainder import complement
from dit_accel.call import TokenLayout
from dit_accel.errors import OptionError
from dit_accel.kernels.merge import merge
from dit_accel.operators import choose_operator, make_operators

# With random weights, sparse attention is so far from dense that the guard would step in.
SPARSE = {
    "window": (0.5, 0.4, 0.4),
    "block_size": 16,
    "dense_steps": 2,
    "min_tokens": 0,
    "guard": False,
}


def test_a_plan_and_its_complement_make_dense_attention():
    layout = TokenLayout((3, 7, 9))
    method = GNA(window=(2, 4, 4), block_size=16)
    order = method.token_order(layout.grid)
    plan = method.plan_layout(layout, order)
    outside = complement(plan)
    query, key, value = (torch.randn(2, 189, 2, 16, dtype=torch.float64) for _ in range(3))
    parts = []
    for part in (plan, outside):
        run = choose_operator("torch", make_operators(), part, query).operator.run
        parts += run(query, key, value, part, None, return_lse=True)
    dense = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    torch.testing.assert_close(merge(*parts), dense.transpose(1, 2), rtol=1e-5, atol=1e-6)
    assert plan.density + outside.density == pytest.approx(1)


def test_a_plan_that_keeps_everything_leaves_nothing():
    layout = TokenLayout((1, 4, 4))
    plan = GNA(window=4, block_size=16).plan_block_sparse(layout, GNA().token_order((1, 4, 4)))
    assert complement(plan) is None


def test_merging_with_an_empty_part_changes_nothing():
    out, lse = torch.randn(1, 5, 2, 4), torch.randn(1, 2, 5)
    empty, none = torch.full_like(out, float("nan")), torch.full_like(lse, -torch.inf)
    assert torch.equal(merge(out, lse, empty, none), out)
    assert torch.equal(merge(out, lse, torch.zeros_like(out), none), out)


def test_refreshing_always_is_dense_and_seldom_is_nearer_than_never(subject):
    dense = subject.run()

    def distance(method, **options) -> float:
        accelerate_pipeline(subject.pipe, method, **SPARSE, **options)
        return float((subject.run() - dense).norm() / dense.norm())

    never = distance("gna")
    always = distance(["gna", "remainder_cache"], refresh_every=1)
    assert acceleration_report(subject.pipe).cache_bytes == 0
    seldom = distance(["gna", "remainder_cache"], refresh_every=3)
    assert always < 1e-4
    assert always < seldom < never
    report = acceleration_report(subject.pipe)
    reused = {step.step for step in report.steps if step.attention_reused}
    if subject.name != "wan22":  # its second transformer begins in between
        assert reused == {3, 4, 6, 7, 9, 10}
    assert subject.session.bytes_held == 0
    assert any("keeps up to" in note for note in report.notes)
    again = subject.run()
    assert torch.equal(subject.run(), again)
    restore_pipeline(subject.pipe)
    assert torch.equal(subject.run(), dense)


def test_few_steps_take_the_sparse_method_alone():
    subject = Subject("wan")
    accelerate_pipeline(subject.pipe, "gna", **SPARSE)
    sparse = subject.run(num_inference_steps=4)
    accelerate_pipeline(subject.pipe, ["gna", "remainder_cache"], **SPARSE)
    assert torch.equal(subject.run(num_inference_steps=4), sparse)
    assert any("min_steps" in note for note in acceleration_report(subject.pipe).notes)


def test_memory_is_an_output_per_layer_and_branch_wherever_it_lies():
    subject = Subject("wan")
    outs = []
    for offload in (False, True):
        accelerate_pipeline(subject.pipe, ["gna", "remainder_cache"], **SPARSE, offload=offload)
        outs.append(subject.run())
        per_layer = 252 * 64 * 4 + 2 * 252 * 4  # output and LSE, float32, 2 heads
        assert acceleration_report(subject.pipe).cache_bytes == 3 * 2 * per_layer
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("remainder_cache", {}, "add one"),
        (["gna", "remainder_cache"], {"refresh_every": 0}, "refresh_every"),
        (["gna", "remainder_cache"], {"budget_gib": -1}, "budget_gib"),
    ],
    ids=str,
)
def test_refusals(method, options, says):
    with pytest.raises(OptionError, match=says):
        accelerate_pipeline(Subject("wan").pipe, method, **options)


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("gna", {"budget_gib": 1e-4}, "more than budget_gib"),
        ("pisa", {}, "needs a method that lists blocks"),
        ("gna", {"remainder": "pooled"}, "needs a method that lists blocks"),
    ],
    ids=str,
)
def test_refusals_before_memory_is_taken(method, options, says):
    subject = Subject("wan")
    own = {name: value for name, value in SPARSE.items() if name != "window" or method == "gna"}
    accelerate_pipeline(subject.pipe, [method, "remainder_cache"], **own, **options)
    with pytest.raises(OptionError, match=says):
        subject.run()
    assert subject.session.bytes_held == 0
