"""Which methods go together, and whose an option is."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tiny_pipelines import TINY_PIPELINES, run_tiny
from torch import nn

from dit_accel import GNA, accelerate_pipeline, acceleration_report, registry, restore_pipeline
from dit_accel.caching.base import Cache
from dit_accel.composition import compose
from dit_accel.errors import OptionError
from dit_accel.session import Seam, Session


class Counting(Session):
    """Counts what the seam tells it, and lets every block run."""

    def __init__(self, seam: Seam) -> None:
        self.seam = seam
        self.events: list[Any] = []

    def attach(self, transformer: nn.Module) -> None:
        for block in transformer.blocks:
            self.seam.intercept(block, self.run)

    def run(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        self.events.append("block")
        return inner(*args, **kwargs)

    def begin(self) -> None:
        self.events.append("begin")

    def enter(self, forward: Any) -> None:
        self.events.append((forward.moment.step, forward.moment.branch))


@dataclass(frozen=True)
class EveryBlock(Cache):
    """A cache that keeps nothing."""

    name: ClassVar[str] = "every_block"
    rate: float = 0.5
    decay: float = 0.1

    def session(self, pipe: Any, seam: Seam) -> Session:
        return Counting(seam)


@pytest.fixture(autouse=True)
def third_party(monkeypatch):
    point = SimpleNamespace(load=lambda: EveryBlock)
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [point] if group == "dit_accel.caching" else []
    )
    registry._methods.cache_clear()
    yield
    registry._methods.cache_clear()


def test_methods_are_listed_by_kind():
    assert "every_block" in registry.list_methods()
    assert "every_block" in registry.list_methods("cache")
    assert "every_block" not in registry.list_methods("attention")
    with pytest.raises(OptionError, match="Did you mean 'cache'"):
        registry.list_methods("caches")


def test_options_go_to_the_method_that_has_them():
    found = compose(["every_block", "gna"], {"rate": 0.2, "block_size": 16})
    assert list(found) == ["attention", "cache"]
    assert found["cache"] == EveryBlock(rate=0.2)
    assert found["attention"] == GNA(block_size=16)
    assert compose("every_block,gna", {"rate": 0.2, "block_size": 16}) == found


def test_a_method_s_own_dict_settles_whose_an_option_is():
    with pytest.raises(OptionError, match=r"'radial' and 'every_block'.*radial=\{'decay': 0.4\}"):
        compose(["radial", "every_block"], {"decay": 0.4})
    found = compose(["radial", "every_block"], {"every_block": {"decay": 0.4}})
    assert (found["attention"].decay, found["cache"].decay) == (1.0, 0.4)


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        (["radial", "gna"], {}, "one attention method at most"),
        (["every_block", EveryBlock()], {}, "one cache at most"),
        (["radial", "every_block"], {"rat": 1}, "Did you mean 'rate'"),
        (["radial", "every_block"], {"every_block": {"rat": 1}}, "Did you mean 'rate'"),
        (["radial", EveryBlock()], {"rate": 1}, "put them into the object"),
        (["radial", 3], {}, "give"),
        ([], {}, "give"),
        (["every_block"], {"dense_steps": 3}, "goes with attention methods"),
        (["every_block"], {"density": 0.5}, "goes with attention methods"),
        (["every_block"], {"backend": "torch"}, "goes with attention methods"),
    ],
    ids=str,
)
def test_impossible_compositions_leave_the_pipeline_alone(method, options, says):
    pipe = TINY_PIPELINES["wan"][0]()
    with pytest.raises(OptionError, match=says):
        accelerate_pipeline(pipe, method, **options)
    assert not hasattr(pipe, "_dit_accel")


def test_a_cache_alone_does_not_touch_attention():
    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    dense = run_tiny(pipe, arguments)
    accelerate_pipeline(pipe, "every_block")
    assert not any(vars(block.attn1.processor) for block in pipe.transformer.blocks)
    assert torch.equal(run_tiny(pipe, arguments), dense)
    report = acceleration_report(pipe)
    assert (report.method, report.density) == ("every_block", None)
    assert report.options == {"every_block": {"rate": 0.5, "decay": 0.1}}
    assert set(report.forward_s) == {0, 1, 2}


def test_what_a_session_is_told():
    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    accelerate_pipeline(pipe, ["dense", "every_block"])
    events = pipe._dit_accel.runtime.sessions[0].events
    for _ in range(2):  # every generation begins anew
        events.clear()
        run_tiny(pipe, arguments, num_inference_steps=2)
        forwards = [(step, branch) for step in (0, 1) for branch in ("cond", "uncond")]
        expected = [item for forward in forwards for item in (forward, *["block"] * 3)]
        assert events == ["begin", *expected]
    restore_pipeline(pipe)
    events.clear()
    run_tiny(pipe, arguments)
    assert not events


@pytest.mark.parametrize("compile_first", [True, False])
def test_blocks_compiled_before_or_after_are_still_intercepted(compile_first):
    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    dense = run_tiny(pipe, arguments)
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    if not compile_first:
        accelerate_pipeline(pipe, "every_block")
    for block in pipe.transformer.blocks:
        block.compile(fullgraph=True, backend=count)
    if compile_first:
        accelerate_pipeline(pipe, "every_block")
    out = run_tiny(pipe, arguments, num_inference_steps=3)
    torch.testing.assert_close(out, dense)
    assert len(graphs) == 1
    assert pipe._dit_accel.runtime.sessions[0].events.count("block") == 3 * 2 * 3
    restore_pipeline(pipe)
    assert all(block._compiled_call_impl is not None for block in pipe.transformer.blocks)
    torch._dynamo.reset()


def test_a_transformer_compiled_as_a_whole_is_refused():
    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    accelerate_pipeline(pipe, "every_block")
    pipe.transformer.compile(backend="eager")
    with pytest.raises(OptionError, match="compile its blocks instead"):
        run_tiny(pipe, arguments)
