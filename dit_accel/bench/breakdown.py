"""Where the time of a forward goes: self-attention, matrix products, the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dit_accel.bench.measuring import Row

ATTENTION = "dit_accel.attention"
"""Range around a layer's attention while it is accelerated, choosing included."""
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_scaled_mm", "convolution")


def breakdown(run: Callable[[], Any], device: str) -> Row:
    """Profile one ``run`` and return milliseconds of the device (of the CPU without one).

    "attention" is self-attention: torch's operator where queries and keys are equally many, and
    what `attention_range` wraps. "matmul" are matrix products outside of it. Both include the
    operators that they call, and "rest" is everything else, cross-attention too.
    """
    gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=activities, record_shapes=True) as profiler:
        run()
        if gpu:
            torch.cuda.synchronize()
    return split(list(profiler.events() or ()), gpu)


def split(events: Sequence[Any], gpu: bool) -> Row:
    """Do `breakdown`'s sums over the events of a profile."""
    on_cpu = [event for event in events if str(event.device_type).endswith("CPU")]
    attribute = "device_time_total" if gpu else "cpu_time_total"  # microseconds
    found = {"attention": 0.0, "matmul": 0.0}
    for event in on_cpu:
        kind = _kind(event)
        if kind is not None and not any(map(_kind, _parents(event))):
            found[kind] += getattr(event, attribute)
    if gpu:
        on_gpu = [event for event in events if not str(event.device_type).endswith("CPU")]
        kernels = [event.time_range for event in on_gpu if not event.is_user_annotation]
        ranges = [event.time_range for event in on_gpu if event.name == ATTENTION]
        if ranges:
            # Triton kernels outside torch's operators are known to be inside by their time alone.
            inside = [k for k in kernels if any(r.start <= k.start < r.end for r in ranges)]
            found["attention"] += sum(kernel.elapsed_us() for kernel in inside)
            found["attention"] -= sum(getattr(e, attribute) for e in on_cpu if e.name == ATTENTION)
        total = sum(kernel.elapsed_us() for kernel in kernels)
    else:
        total = sum(event.cpu_time_total for event in on_cpu if event.cpu_parent is None)
    found |= {"total": total, "rest": total - found["attention"] - found["matmul"]}
    return {name: round(value / 1e3, 3) for name, value in found.items()}


@contextmanager
def attention_range(pipe: Any) -> Iterator[None]:
    """Let a profile tell the attention of an accelerated pipeline apart."""
    acceleration = pipe.__dict__.get("_dit_accel")
    if acceleration is None:
        yield
        return
    runtime = acceleration.runtime
    attend = runtime.attend

    def ranged(*arguments: Any) -> Any:
        with record_function(ATTENTION):
            return attend(*arguments)

    runtime.attend = ranged
    try:
        yield
    finally:
        del runtime.attend  # back to the method of its class


def amdahl_bound(attention_share: float, density: float) -> float:
    """Speed-up of a whole forward if its attention took time in proportion to the density.

    Args:
        attention_share: share of self-attention in the dense forward.
        density: share of (query, key) pairs that is computed.
    """
    return 1 / (1 - attention_share + attention_share * density)


def _kind(event: Any) -> str | None:
    name: str = event.name
    if name == ATTENTION:
        return "attention"
    if "scaled_dot_product" in name:
        shapes = event.input_shapes or []
        return "attention" if len(shapes) > 1 and shapes[0] == shapes[1] else None
    return "matmul" if name.removeprefix("aten::") in _PRODUCTS else None


def _parents(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event
