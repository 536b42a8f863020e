"""``dit-accel bench pipeline``: whole generations, densely and by each method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from dit_accel.acceleration import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.bench.measuring import SEED, Row, free_memory
from dit_accel.bench.methods import accelerate_at, block_options
from dit_accel.eval.fidelity import psnr
from dit_accel.generation import Generation, GenerationRequest, generate
from dit_accel.models import generation_defaults, load_pipeline
from dit_accel.registry import list_methods
from dit_accel.world.worlds import fixed_prompts

DENSE = "dense"


@dataclass
class PipelineBench:
    """Times generations at a model's recommended size. The model of the last task is kept.

    Dense and sparse runs follow an untimed one of a single step, sparse from that step on; caches
    change no kernel, and need none.

    Attributes:
        device: where to run.
        dtype: of the weights, by name; None for the model's choice.
        steps: denoising steps; None as the model recommends.
        repeats: timed generations, of which the median counts.
        prompt: what to generate; None takes the first fixed prompt of the model's world.
    """

    device: str
    dtype: str | None = None
    steps: int | None = None
    repeats: int = 3
    prompt: str | None = None
    _pipes: dict[str, Any] = field(default_factory=dict, repr=False)
    _dense: dict[str, Generation] = field(default_factory=dict, repr=False)

    def measure(self, task: Mapping[str, Any]) -> Row:
        """Return times, density and PSNR to dense of a task made by `pipeline_tasks`."""
        model, method = task["model"], task["method"]
        pipe = self._pipe(model)
        request = self._request(model)
        if method == DENSE:
            _one_step(pipe, request)
            self._dense[model], row = self._timed(pipe, request)
            return row
        try:
            names = method.split("+")
            settings: Row = block_options(names[0], task["block_size"])
            reached: Row = {}
            if set(names) & set(list_methods("attention")):
                settings["density"] = task["density"]
                every = {**settings, "dense_steps": 0, "dense_layers": 0}
                reached = accelerate_at(pipe, names, lambda: _one_step(pipe, request), **every)
                settings["density"] = reached.get("reaches", settings["density"])
            accelerate_pipeline(pipe, names, **settings)
            generated, row = self._timed(pipe, request)
            report = acceleration_report(pipe)
        finally:
            restore_pipeline(pipe)
        if model not in self._dense:
            self._dense[model] = generate(pipe, request)
        fidelity = psnr(generated.frames, self._dense[model].frames)
        return reached | row | {
            "mean_density": report.block_density,
            "sparse_density": report.sparse_density,
            "operators": sorted({call.operator for call in report.calls}),
            "psnr_db": None if fidelity == float("inf") else round(fidelity, 3),
            "acceleration": report.settings,
        }  # fmt: skip

    def _timed(self, pipe: Any, request: GenerationRequest) -> tuple[Generation, Row]:
        """Generate ``repeats`` times; return the last generation and the median times."""
        runs = [generate(pipe, request) for _ in range(self.repeats)]
        times = {
            "total_s": round(median(run.total_s for run in runs), 4),
            "denoise_s": round(median(run.denoise_s for run in runs), 4),
        }
        return runs[-1], times

    def _pipe(self, model: str) -> Any:
        import torch

        if model not in self._pipes:
            self._pipes.clear()
            self._dense.clear()
            free_memory()
            dtype = None if self.dtype is None else getattr(torch, self.dtype)
            self._pipes[model] = load_pipeline(model, device=self.device, dtype=dtype)
        return self._pipes[model]

    def _request(self, model: str) -> GenerationRequest:
        defaults = generation_defaults(model)
        prompt = self.prompt
        if prompt is None and defaults.world is not None:
            prompt = fixed_prompts(defaults.world)[0]["prompt"]
        return GenerationRequest(
            prompt=prompt or "a cat walks on the grass",
            steps=self.steps or defaults.steps,
            frames=defaults.frames,
            height=defaults.height,
            width=defaults.width,
            guidance=defaults.guidance,
            seed=SEED,
        )


def _one_step(pipe: Any, request: GenerationRequest) -> None:
    """Warm up."""
    generate(pipe, replace(request, steps=1))


def pipeline_tasks(
    *,
    models: Sequence[str],
    methods: Sequence[str],
    densities: Sequence[float | None],
    block_size: int | None = None,
) -> Iterator[Row]:
    """Yield the tasks, the dense one of a model first.

    Args:
        models: what `locate_model` takes.
        methods: names of methods; joined by "+" they go together, the attention method first.
        densities: shares of pairs to ask for; None for a method's published options.
        block_size: tokens per block for small models; None for the methods' own.
    """
    for model in models:
        yield {"model": model, "method": DENSE, "density": None, "block_size": None}
        for method in methods:
            for density in densities if method != DENSE else ():
                yield {
                    "model": model,
                    "method": method,
                    "density": density,
                    "block_size": block_size,
                }


def with_speedups(rows: Sequence[Row]) -> list[Row]:
    """Return rows with how many times faster than dense the pipeline call and its loop were."""
    dense = {row["model"]: row for row in rows if row["method"] == DENSE and "total_s" in row}
    found = []
    for row in rows:
        row = dict(row)
        if "total_s" in row and row["model"] in dense:
            row["vs_dense"] = dense[row["model"]]["total_s"] / row["total_s"]
            row["loop_vs_dense"] = dense[row["model"]]["denoise_s"] / row["denoise_s"]
        found.append(row)
    return found
