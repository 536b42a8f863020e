"""``dit-accel bench step``: one forward of a real architecture, densely and by each method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from dit_accel.acceleration import acceleration_report, restore_pipeline
from dit_accel.bench.architectures import TOY, load_architecture
from dit_accel.bench.breakdown import amdahl_bound, attention_range, breakdown
from dit_accel.bench.measuring import Row, free_memory, median_ms
from dit_accel.bench.methods import accelerate_at, block_options

STOCK = "stock"
"""The pipeline as diffusers makes it."""
_TOY_BLOCK = 32


@dataclass
class StepBench:
    """Times forwards. The model of the last task is kept for the next.

    Weights are random, batch is 1, and every step and layer is sparse: what a forward costs past
    the dense ones of a schedule.

    Attributes:
        device: "cuda" or "cpu"; times on a CPU mean nothing.
        dtype: of weights and inputs, by name.
        repeats: timed forwards.
    """

    device: str
    dtype: str
    repeats: int = 3
    _model: dict[Any, Any] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def measure(self, task: Mapping[str, Any]) -> Row:
        """Return time, peak memory, breakdown and density of a task made by `step_tasks`."""
        model = load_architecture(task["model"]).at(task["size"])
        dtype = getattr(torch, self.dtype)
        pipe = self._pipeline(task, dtype)
        inputs = model.inputs(task["size"], self.device, dtype)
        _, layers = model.with_layers(task["layers"])
        row: Row = {"tokens": model.tokens(task["size"]), "layers_of_model": model.layers}
        row["layers_measured"] = layers
        if task["compiled"]:
            torch._dynamo.reset()  # each method would count as one more recompilation
        try:
            if task["attention"] != STOCK:
                row |= _accelerate(pipe, inputs, task)
                if row["attended_density"] == 1.0 and task["attention"] != "dense":
                    return row | {"refused": f"every call is dense: {row['why_dense']}"}
            return row | self._times(pipe, inputs, model.layers / layers)
        finally:
            restore_pipeline(pipe)

    def _times(self, pipe: Any, inputs: Mapping[str, Any], scale: float) -> Row:
        def forward() -> Any:
            return pipe.transformer(**inputs)[0]

        if not forward().isfinite().all():
            return {"failed": "the output is not finite"}
        gpu = torch.device(self.device).type == "cuda"
        free_memory()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        time_ms = median_ms(forward, self.repeats, 1, self.device)
        peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
        with attention_range(pipe):
            parts = breakdown(forward, self.device)
        return {
            "measured_ms": round(time_ms, 3),
            "forward_s": round(time_ms * scale / 1e3, 5),  # of all layers
            "peak_gib": peak and round(peak, 3),
            "breakdown_ms": parts,
        }

    def _pipeline(self, task: Mapping[str, Any], dtype: torch.dtype) -> Any:
        """Return the task's pipeline; compiling can't be undone, so it is part of the key."""
        toy = task["size"] == TOY
        key = task["model"], toy, task["layers"], task["compiled"]
        if key not in self._model:
            self._model.clear()
            free_memory()
            torch.manual_seed(0)
            model = load_architecture(task["model"]).at(task["size"])
            pipe = model.build(self.device, dtype, task["layers"])
            if task["compiled"]:
                pipe.transformer.compile_repeated_blocks(fullgraph=True)
            self._model[key] = pipe
        return self._model[key]


def _accelerate(pipe: Any, inputs: Mapping[str, Any], task: Mapping[str, Any]) -> Row:
    """Put a method on, at the density asked or the least that it reaches, and run it once."""
    row = accelerate_at(
        pipe,
        task["attention"],
        lambda: pipe.transformer(**inputs),
        density=task["density"],
        precision=task["precision"],
        dense_steps=0,
        dense_layers=0,
        min_tokens=0,
        **block_options(task["attention"], _TOY_BLOCK if task["size"] == TOY else None),
    )
    report = acceleration_report(pipe)
    row |= {
        "attended_density": report.density,
        "block_density": report.block_density,
        "operators": sorted({call.operator for call in report.calls}),
        "rejected_operators": report.rejected,
        "why_dense": sorted({call.reason for call in report.calls if call.reason}),
        "options": report.options[task["attention"]],
        "tuning": report.settings["tuning"],
    }
    return row


def step_tasks(
    *,
    models: Sequence[str],
    sizes: Sequence[str] | None,
    methods: Sequence[str],
    densities: Sequence[float | None],
    modes: Sequence[bool],
    layers: int | None,
    precisions: Sequence[str | None] = (None,),
) -> Iterator[Row]:
    """Yield the tasks, the dense ones of a size first.

    Args:
        models: bundled architectures.
        sizes: names of sizes; None takes all of each model.
        methods: names of methods.
        densities: shares of pairs to ask for; None for a method's published options.
        modes: False for eager, True for compiled blocks.
        layers: measure only so many layers; None for all.
        precisions: what sparse attention multiplies in; None for the tensors' own dtype.
    """
    for name in models:
        for size in sizes or load_architecture(name).sizes:
            for compiled in modes:
                task = {"model": name, "size": size, "layers": layers, "compiled": compiled}
                plain = {"density": None, "precision": None}
                yield {**task, "attention": STOCK, **plain}
                for method in methods:
                    if method == "dense":
                        yield {**task, "attention": method, **plain}
                        continue
                    for density, precision in product(densities, precisions):
                        asked = {"density": density, "precision": precision}
                        yield {**task, "attention": method, **asked}


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Return rows with their speed-ups over stock attention, eager and compiled, and the bound.

    The bound is Amdahl's, from the share of self-attention in the stock forward of the same mode.
    """
    stock = {(*_place(row), row["compiled"]): row for row in rows if row["attention"] == STOCK}
    found = []
    for row in rows:
        row = dict(row)
        if "measured_ms" in row:
            for name, compiled in (("vs_eager", False), ("vs_compiled", True)):
                other = stock.get((*_place(row), compiled), {})
                if "measured_ms" in other:
                    row[name] = other["measured_ms"] / row["measured_ms"]
            parts = stock.get((*_place(row), row["compiled"]), {}).get("breakdown_ms")
            if parts and row["attention"] != STOCK:
                share = parts["attention"] / parts["total"]
                row["amdahl"] = amdahl_bound(share, row["block_density"])
        found.append(row)
    return found


def _place(row: Row) -> tuple[Any, ...]:
    return row["model"], row["size"], row["layers"]
