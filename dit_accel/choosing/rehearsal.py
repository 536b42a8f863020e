"""One attention call as an accelerated pipeline runs it, without the pipeline, to be timed.

It goes through the same `Runtime`: planning, the choice of the operator, moving the text, the
record and the guard are part of what a call takes, and on short sequences most of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dit_accel.call import TokenLayout
from dit_accel.guard.engine import Guard, is_short
from dit_accel.guard.options import QualityGuard
from dit_accel.methods.base import AttentionMethod
from dit_accel.methods.dense import Dense
from dit_accel.running import RunningForward
from dit_accel.runtime import Runtime
from dit_accel.schedule import Schedule
from dit_accel.tracking import Moment

Rehearsal = list[tuple[float, Callable[[], Tensor]]]
"""Kinds of calls, each with its share of all."""

_NEVER = 1e9
"""Error that no head has: random tokens would trip the guard, and its repairs would be timed."""


def rehearse(
    method: AttentionMethod | None,
    qkv: tuple[Tensor, Tensor, Tensor],
    layout: TokenLayout,
    guard: QualityGuard | None = None,
) -> Rehearsal:
    """Return the calls to time; their mean by share is what a call takes.

    Args:
        method: at its density; None for dense.
        qkv: query, key and value ``[B, N, H, D]``, in the method's order.
        layout: of the tokens.
        guard: looks at a share of the calls; repairs are not foretold.
    """
    if method is None or guard is None:
        return [(1.0, _call(method, qkv, layout, None))]
    seldom = 4 if is_short(layout, qkv[0].device) and guard.every > 1 else 1
    share = 1 / (guard.every * seldom)
    probed = replace(guard, max_error=_NEVER, every=1, layers=None)
    return [
        (1 - share, _call(method, qkv, layout, replace(probed, every=guard.every, layers=()))),
        (share, _call(method, qkv, layout, probed)),
    ]


def _call(
    method: AttentionMethod | None,
    qkv: tuple[Tensor, Tensor, Tensor],
    layout: TokenLayout,
    guard: QualityGuard | None,
) -> Callable[[], Tensor]:
    family: Any = None  # which would read a transformer's inputs
    schedule = Schedule(min_tokens=0 if method else layout.video_length + 1)
    method = method or Dense()
    runtime = Runtime(None, family, method, schedule, "auto", None, None)
    runtime.guard = None if guard is None else Guard(guard)
    order, layer = method.token_order(layout.grid), torch.tensor(0)
    # Without a step no plan is kept from one call to the next.
    moment = Moment(None, None, "cond", 0)
    running = RunningForward((layout,), method, moment, 1, True, order, order, False, 0)

    def run() -> Tensor:
        runtime._running = running
        runtime.recorder.calls.clear()
        if runtime.guard is not None:
            runtime.guard.records.clear()
        return runtime.attend(*qkv, None, None, layer)

    return run
