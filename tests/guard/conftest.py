"""Attention calls of a tiny Wan pipeline whose tensors a test chooses."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_pipelines import TINY_PIPELINES
from torch import Tensor

from dit_accel import accelerate_pipeline, acceleration_report
from dit_accel.report import AccelerationReport
from dit_accel.tracking import Moment

GRID = (4, 7, 9)
TOKENS = 252
HEADS = 4
LAYERS = 3

QKV = tuple[Tensor, Tensor, Tensor]


def dense(qkv: QKV) -> Tensor:
    """Attend to everything."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)


def error_of(output: Tensor, expected: Tensor) -> Tensor:
    """Relative L2 error per head."""
    norm = torch.linalg.vector_norm
    return norm(output - expected, dim=(0, 1, 3)) / norm(expected, dim=(0, 1, 3))


def near(heads: int = HEADS) -> QKV:
    """A call that local patterns get right: all values are alike but for a little."""
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 1, TOKENS, heads, 32).unbind()
    return query, key, 1 + 0.01 * value


def needle(heads: tuple[int, ...] = (0,), among: int = HEADS) -> QKV:
    """The same, but in some heads one token, the last, carries all the mass and another value."""
    query, key, value = near(among)
    for head in heads:
        query[:, :, head, 0] = 10.0
        key[:, :, head, 0] = 0.0
        key[:, -1, head, 0] = 20.0
        value[:, -1, head] = -5.0
    return query, key, value


class Calls:
    """Runs chosen attention calls through an accelerated pipeline's own path."""

    def __init__(self, method: str = "gna", **options: Any) -> None:
        build, _ = TINY_PIPELINES["wan"]
        self.pipe = build()
        self.options = {"dense_steps": 0, "dense_layers": 0, "min_tokens": 0} | options
        accelerate_pipeline(self.pipe, method, **self.options)
        self.runtime = self.pipe._dit_accel.runtime

    def forward(
        self, calls: list[QKV], step: int | None = 0, branch: str = "cond", generation: int = 0
    ) -> list[Tensor]:
        """Attend in one forward, a layer after the other."""
        moment = Moment(step, None if step is None else 50, branch, generation)
        outputs: list[Tensor] = []
        with self.running(moment, outputs):
            for layer, qkv in enumerate(calls):
                outputs.append(self.runtime.attend(*qkv, None, None, torch.tensor(layer)))
        return outputs

    @contextmanager
    def running(self, moment: Moment, outputs: Sequence[Tensor] = ()) -> Any:
        """Be inside a transformer's forward, which puts out the sum of ``outputs``."""
        hidden = torch.zeros(1, 16, GRID[0], 2 * GRID[1], 2 * GRID[2])
        with self.runtime.tracker.hold(moment):
            self.runtime.enter(self.pipe.transformer, {"hidden_states": hidden}, LAYERS, None)
        # The reordering of whole forwards is the blocks' matter: each call is reordered by itself.
        object.__setattr__(self.runtime._running, "order", raster())
        yield
        self.runtime.leave((sum(outputs),) if outputs else None)

    @property
    def report(self) -> AccelerationReport:
        """Of the calls so far."""
        return acceleration_report(self.pipe)


def raster() -> Any:
    """The order in which tests give tokens."""
    from dit_accel.grid import RASTER

    return RASTER


@pytest.fixture(autouse=True)
def _quiet():
    """A trip warns; tests that care look for it themselves."""
    from dit_accel.errors import QualityWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QualityWarning)
        yield
