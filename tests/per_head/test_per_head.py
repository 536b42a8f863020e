"""Methods with a density for each head: against single heads, on pipelines, and their files."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_pipelines import TINY_PIPELINES, run_tiny

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.errors import OptionError
from dit_accel.methods.psa import PSA
from dit_accel.operators import make_operators
from dit_accel.per_head.curves import measure_curves
from dit_accel.per_head.method import PerHead, at_level
from dit_accel.per_head.sharing import load_curves, per_head_method, save_curves
from dit_accel.plan import DensePlan
from dit_accel.registry import resolve_method

LAYOUT = TokenLayout((3, 9, 10), 7)
METHODS = {
    "radial": {"block_size": 16},
    "gna": {"block_size": 16},
    "gna + remainder": {"block_size": 16, "remainder": "pooled"},
    "sliding_window": {"block_size": 16},
    "psa": {"query_block": 16, "key_block": 16},
    "rectified": {"block_size": 16, "neighbours": False},
    "pisa": {"block_size": 16, "terms": 0},
}
PROBE = {"prompt": ["a", "b"], "generator": [3, 4], "num_inference_steps": 4}


def method_of(name: str, **more):
    return resolve_method(name.split(" ")[0], **METHODS[name], **more)


def attended(method, qkv, layer=0, layers=1):
    order = method.token_order(LAYOUT.grid)
    call = AttentionCall(LAYOUT, layer, layers)
    plan = method.plan(call, *qkv, order)
    if isinstance(plan, DensePlan):
        return None, 1.0
    return make_operators()["torch"].run(*qkv, plan, None, False)[0], plan.block_density


@pytest.mark.parametrize("name", METHODS)
def test_each_head_does_what_it_would_at_its_density_alone(name):
    torch.manual_seed(0)
    qkv = tuple(torch.randn(2, LAYOUT.num_tokens, 4, 16, dtype=torch.float64) for _ in range(3))
    base = method_of(name)
    row = (0.6, 1.0, 0.8, 0.6)
    out, density = attended(PerHead(base, 0.75, (row,)), qkv)
    costs = []
    for head, own in enumerate(row):
        one = tuple(x[:, :, head : head + 1] for x in qkv)
        # In the order of the whole, which single heads of GNA would not choose.
        alone = PerHead(base, 0.75, ((own,),))
        expected, cost = attended(alone, one)
        costs.append(cost)
        if expected is not None:
            torch.testing.assert_close(out[:, :, head : head + 1], expected)
    assert density == pytest.approx(sum(costs) / 4, abs=2e-2)


@pytest.mark.parametrize("name", METHODS)
def test_equal_heads_do_what_the_method_does(name):
    torch.manual_seed(0)
    qkv = tuple(torch.randn(1, LAYOUT.num_tokens, 2, 16, dtype=torch.float64) for _ in range(3))
    base = method_of(name)
    at_once = base.at_density(0.6, LAYOUT)
    order = base.token_order(LAYOUT.grid)
    plan = at_once.plan(AttentionCall(LAYOUT), *qkv, order)
    usual, _ = make_operators()["torch"].run(*qkv, plan, None, False)
    torch.testing.assert_close(attended(PerHead(base, 0.6, ((0.6, 0.6),)), qkv)[0], usual)


def test_dense_heads_are_dense():
    torch.manual_seed(0)
    qkv = tuple(torch.randn(1, LAYOUT.num_tokens, 2, 16, dtype=torch.float64) for _ in range(3))
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv))
    for name in METHODS:
        out, _ = attended(PerHead(method_of(name), 0.8, ((0.6, 1.0),)), qkv)
        torch.testing.assert_close(out[:, :, 1], dense.transpose(1, 2)[:, :, 1])


@pytest.mark.parametrize("family", ["wan", "hunyuan", "flux", "sd3"])
@pytest.mark.parametrize("name", ["gna", "pisa"])
def test_a_budget_is_shared_out_on_every_family(family, name):
    build, arguments = TINY_PIPELINES[family]
    pipe, before = build(), run_tiny(build(), arguments)
    options = {**METHODS[name], "density": 0.6, "min_tokens": 0, "dense_steps": 0}
    options |= {"dense_layers": 0, "guard": False}  # it repairs much of what random weights do
    probe = {**arguments, **PROBE}
    accelerate_pipeline(pipe, name, per_head=True, probe=probe, **options)
    run_tiny(pipe, arguments)
    report = acceleration_report(pipe)
    table = report.options[f"{name}, per head"]["densities"]
    assert [len(row) for row in table] == [2] * len(table)
    # Probed in four steps, run in three: the tokens differ, and blocks are few.
    assert report.block_density <= 0.63
    assert json.dumps(report.to_dict())
    assert f"{name}, per head" in str(report)
    restore_pipeline(pipe)
    assert torch.equal(run_tiny(pipe, arguments), before)


def test_shared_out_by_error_beats_one_density_in_the_errors_it_was_made_for():
    build, arguments = TINY_PIPELINES["wan"]
    pipe, method = build(), method_of("gna")
    curves = measure_curves(pipe, method, [{**arguments, **PROBE}])
    shared = per_head_method(method, curves, 0.5)
    patterns = [at_level(method, level, curves.layout) for level in curves.levels]
    affordable = [i for i, cost in enumerate(curves.cost[0]) if cost <= 0.5]
    uniform = min(sum(head[i] for layer in curves.error for head in layer) for i in affordable)
    found = sum(
        curves.error[layer][head][
            patterns.index(at_level(method, density, curves.layout, shared.order))
        ]
        for layer, row in enumerate(shared.densities)
        for head, density in enumerate(row)
    )
    assert found <= uniform
    dense = curves.levels.index(1.0)
    assert all(head[dense] == 0 for layer in curves.error for head in layer)
    assert not hasattr(pipe, "_dit_accel")


def test_dense_layers_take_nothing_from_the_budget():
    build, arguments = TINY_PIPELINES["wan"]
    pipe, method = build(), method_of("gna")
    curves = measure_curves(pipe, method, [{**arguments, **PROBE}])
    shared = per_head_method(method, curves, 0.5, frozenset({0}))
    assert set(shared.densities[0]) == {1.0}
    sparse = [density for row in shared.densities[1:] for density in row]
    assert 0.3 < sum(sparse) / len(sparse) <= 0.5 + 1e-6


def test_curves_are_measured_once_and_come_from_their_file(tmp_path, cache_home):
    build, arguments = TINY_PIPELINES["wan"]
    pipe, method = build(), method_of("gna")
    options = {"density": 0.6, "probe": {**arguments, **PROBE}}
    accelerate_pipeline(pipe, method, per_head=True, **options)
    (kept,) = (cache_home / "per-head").iterdir()
    first = acceleration_report(pipe).options
    content = json.loads(kept.read_text())
    content["curves"]["error"] = [[[0.0] * len(h) for h in r] for r in content["curves"]["error"]]
    kept.write_text(json.dumps(content))
    accelerate_pipeline(pipe, method, per_head=True, **options)
    assert acceleration_report(pipe).options != first  # the file's, not measured again
    curves = load_curves(kept, pipe, method)
    save_curves(tmp_path / "mine.json", pipe, method, curves)
    accelerate_pipeline(pipe, method, per_head=tmp_path / "mine.json", density=0.6)


@pytest.mark.parametrize(
    ("method", "given", "says"),
    [
        ("gna", {"per_head": True}, "give density="),
        ("dense", {"per_head": True, "density": 0.5}, "no density that per_head"),
        ("easycache", {"per_head": True}, "name one"),
        (PSA(refresh_every=2), {"per_head": True, "density": 0.5}, "refresh_every"),
        ("gna", {"per_head": "nowhere.json", "density": 0.5}, "can't be read"),
        ("gna", {"per_head": "a.json", "density": 0.5, "probe": {}}, "leave probe out"),
        ("gna", {"per_head": True, "density": 0.5}, "say what to try"),
        ("gna", {"per_head": True, "density": 0.5, "min_psnr": 30}, "leave one out"),
    ],
    ids=str,
)
def test_bad_input(method, given, says):
    pipe = TINY_PIPELINES["wan"][0]()
    with pytest.raises(OptionError, match=says):
        accelerate_pipeline(pipe, method, **given)
    assert not hasattr(pipe, "_dit_accel")


def test_files_of_other_models_and_methods_are_refused(tmp_path):
    build, arguments = TINY_PIPELINES["wan"]
    pipe, method = build(), method_of("gna")
    curves = measure_curves(pipe, method, [{**arguments, **PROBE}])
    path = tmp_path / "heads.json"
    save_curves(path, pipe, method, curves)
    with pytest.raises(OptionError, match="is for weights"):
        load_curves(path, build(seed=5), method)
    with pytest.raises(OptionError, match="is for method"):
        load_curves(path, pipe, method_of("pisa"))
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "dit_accel": "0.0"}))
    with pytest.raises(OptionError, match=r"is for dit_accel 0\.0"):
        load_curves(path, pipe, method)


def test_other_numbers_of_heads_are_refused():
    qkv = tuple(torch.randn(1, LAYOUT.num_tokens, 4, 16) for _ in range(3))
    method = PerHead(method_of("gna"), 0.75, ((0.5, 1.0),))
    with pytest.raises(OptionError, match="1 layers of 2 heads"):
        attended(method, qkv)
