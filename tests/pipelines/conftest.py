"""Pipelines and methods that every contract test runs over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tiny_pipelines import TINY_PIPELINES, run_tiny

from dit_accel.call import TokenLayout
from dit_accel.grid import TokenOrder
from dit_accel.methods.base import StaticMethod
from dit_accel.plan import PARTIAL, TokenPredicate


@dataclass(frozen=True)
class Subject:
    """A tiny pipeline, how to call it, and what it gives when nothing is attached."""

    pipe: Any
    arguments: dict[str, Any]
    dense: torch.Tensor

    def run(self, **overrides: Any) -> torch.Tensor:
        """Generate with the pipeline as it is now."""
        return run_tiny(self.pipe, self.arguments, **overrides)


@pytest.fixture(params=sorted(TINY_PIPELINES))
def subject(request: pytest.FixtureRequest) -> Subject:
    """Each tiny pipeline in turn."""
    return make_subject(request.param)


def make_subject(name: str) -> Subject:
    """Build one tiny pipeline and run it densely."""
    build, arguments = TINY_PIPELINES[name]
    pipe = build()
    return Subject(pipe, arguments, run_tiny(pipe, arguments))


@dataclass(frozen=True)
class Masked(StaticMethod):
    """Another method's definition as one token mask: raster order, every block evaluated."""

    name: ClassVar[str] = "masked_for_tests"

    method: StaticMethod | None = None

    def allowed(self, layout: TokenLayout, device: Any = "cpu") -> TokenPredicate:
        return self.method.allowed(layout, device)

    def tile_states(self, layout: TokenLayout, order: TokenOrder, device: Any = "cpu") -> Any:
        blocks = -(-layout.video_length // self.block_size)
        return torch.full((blocks, blocks), PARTIAL, dtype=torch.int8, device=device)


@pytest.fixture
def masked() -> Callable[[StaticMethod], Masked]:
    """Wrap a method as its plain token mask."""
    return lambda method: Masked(method=method, block_size=32)
