"""What FreeSwim's steps cost, and whether a whole generation stays within a memory limit.

Run by ``freeswim.py step`` and ``freeswim.py memory``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.bench.architectures import TOY, Architecture, load_architecture
from dit_accel.bench.measuring import Row, free_memory
from dit_accel.bench.methods import block_options
from dit_accel.highres.stages import kept_bytes

DENSE = "dense"
ALL_LAYERS = ", all layers"
SIZES = {
    "1088p81": {"height": 1088, "width": 1920, "frames": 81},
    "2176p17": {"height": 2176, "width": 3840, "frames": 17},
}
STEP: dict[str, Row] = {
    "full pass dense": {},
    "full pass radial": {"method": "radial"},
    "full pass pisa": {"method": "pisa"},
    "full pass pooled": {"pool_keys": 2},
    "native window": {"window": "native"},
    "windows in fp8": {"precision": "fp8"},
    "windows in fp8, pooled": {"precision": "fp8", "pool_keys": 2},
}


@dataclass
class StepBench:
    """Times the forwards that steps are made of. The model of the last task is kept."""

    device: str
    dtype: str
    repeats: int

    def __post_init__(self) -> None:
        """Start without a model."""
        self._kept: tuple[Any, Any] | None = None

    @torch.no_grad()
    def measure(self, task: Mapping[str, Any]) -> Row:
        """Return seconds of a task's forwards, all layers of the model counted."""
        model = step_model(task["size"])
        pipe, inputs = self._pipeline(model, task)
        _, layers = model.with_layers(task["layers"])
        scale = model.layers / layers
        row: Row = {"tokens": model.tokens(task["size"]), "layers_measured": layers}
        try:
            if task["case"] == DENSE:
                times = self._times(pipe, inputs, [("cond", 0)] * (self.repeats + 1))
                dense = statistics.median(times[1:] or times) * scale
                return row | {"dense_s": dense, "dense_step_s": 2 * dense} | self._peak()
            return row | self._freeswim(pipe, model, inputs, task, scale)
        finally:
            restore_pipeline(pipe)

    def _freeswim(
        self, pipe: Any, model: Architecture, inputs: Row, task: Mapping[str, Any], scale: float
    ) -> Row:
        toy, pixels = task["size"] == TOY, model.sizes[task["size"]]
        options = dict(STEP[task["case"].removesuffix(ALL_LAYERS)])
        beside, precision = (options.pop(name, None) for name in ("method", "precision"))
        options |= {"native_size": (64, 80) if toy else (480, 832)}
        options |= {"offload": task["offload"], "refresh_every": 2}
        if beside is None:
            accelerate_pipeline(pipe, "freeswim", precision=precision, **options)
        else:
            all_sparse = {"dense_steps": 0, "dense_layers": 0, "min_tokens": 0}
            all_sparse |= block_options(beside, 32 if toy else None)
            all_sparse |= {"precision": precision, "freeswim": options}
            accelerate_pipeline(pipe, ["freeswim", beside], guard=False, **all_sparse)
        session = pipe._dit_accel.runtime.sessions[0]
        given = {"num_frames": pixels["frames"], "prompt": ["one"]}
        kept = kept_bytes(session, (pixels["height"], pixels["width"]), given)
        rounds = 1 if task["layers"] is None else self.repeats + 1
        calls = [(branch, step) for step in range(2 * rounds) for branch in ("cond", "uncond")]
        with session.second_stage():
            times = self._times(pipe, inputs, calls)
        drop = 1 if rounds > 1 else 0  # the first round compiles kernels and makes plans
        guide, reuse, window_s = (
            statistics.median(part[drop:]) * scale
            for part in (times[::4], times[2::4], times[1::2])
        )
        report = acceleration_report(pipe)
        densities = {
            branch: statistics.mean(c.block_density for c in report.calls if c.branch == branch)
            for branch in sorted({call.branch for call in report.calls})
        }
        means = {
            f"step_every_{n}_s": (guide + (n - 1) * reuse) / n + window_s for n in (1, 2, 3, 5, 10)
        }
        return {
            "guide_s": guide,
            "reuse_s": reuse,
            "window_s": window_s,
            **means,
            "block_density": densities,
            "operators": sorted({call.operator for call in report.calls}),
            "kept_gib_all_layers": round(kept * scale / 2**30, 3),
            **self._peak(),
        }

    def _times(self, pipe: Any, inputs: Row, calls: Sequence[tuple[str, int]]) -> list[float]:
        """Run forwards of a branch and step each; return their seconds."""
        transformer, found = pipe.transformer, []
        free_memory()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for branch, step in calls:
            with _named(transformer, branch, step):
                began = now(self.device)
                output = transformer(**inputs)[0]
                found.append(now(self.device) - began)
            if not bool(output.isfinite().all()):
                raise ValueError("the output is not finite")
            del output
        return found

    def _peak(self) -> Row:
        if self.device != "cuda":
            return {}
        return {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3)}

    def _pipeline(self, model: Architecture, task: Mapping[str, Any]) -> tuple[Any, Row]:
        key = task["size"] == TOY, task["layers"]
        dtype = getattr(torch, self.dtype)
        if self._kept is None or self._kept[0] != key:
            self._kept = None
            free_memory()
            torch.manual_seed(0)
            pipe = model.build(self.device, dtype, task["layers"])
            pipe.scheduler.set_timesteps(50)
            self._kept = key, pipe
        return self._kept[1], model.inputs(task["size"], self.device, dtype)


@contextmanager
def _named(transformer: Any, branch: str, step: int) -> Iterator[None]:
    """Tell an accelerated transformer which call this is; a plain one is not told the step."""
    if "cache_context" in vars(transformer):
        with transformer.cache_context(branch, step_index=step):
            yield
    else:
        yield


def step_model(size: str) -> Architecture:
    """Return the measured model with the sizes of this benchmark, or its toy."""
    model = load_architecture("wan2.1-1.3b")
    return model.at(size) if size == TOY else replace(model, sizes=SIZES)


def step_tasks(args: argparse.Namespace) -> Iterator[Row]:
    """Yield the tasks of "step", the dense ones of a size first."""
    for size in [TOY] if args.toy else args.sizes:
        layers = 2 if args.toy else args.layers
        yield {"size": size, "case": DENSE, "layers": layers, "offload": False}
        for case in STEP:
            yield {"size": size, "case": case, "layers": layers, "offload": False}
        if not args.toy:
            yield {"size": size, "case": "full pass dense", "layers": layers, "offload": True}
    for size in [] if args.toy else args.whole:
        for offload in (True, False):
            case = f"full pass dense{ALL_LAYERS}"
            yield {"size": size, "case": case, "layers": None, "offload": offload}


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Return step rows with their speed-ups over the dense step of the same size."""
    dense = {row["size"]: row["dense_step_s"] for row in rows if "dense_step_s" in row}
    found = []
    for row in rows:
        ratios = {
            name.replace("_s", "_speedup").replace("step_", ""): round(
                dense[row["size"]] / value, 3
            )
            for name, value in row.items()
            if name.startswith("step_every_") and row["size"] in dense
        }
        found.append({**row, **ratios})
    return found


@dataclass
class MemoryBench:
    """Runs a whole generation in two stages, model offload on, on so much of the GPU's memory.

    Real sizes and random weights, without the text encoder, which runs alone before.
    """

    device: str
    dtype: str

    @torch.no_grad()
    def measure(self, task: Mapping[str, Any]) -> Row:
        """Return peak memory and seconds of a task's generation."""
        model, pixels = step_model(task["size"]), SIZES[task["size"]]
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(task["limit_gib"] * 2**30 / total)
        dtype = getattr(torch, self.dtype)
        pipe = self._pipeline(model, dtype)
        accelerate_pipeline(pipe, "freeswim", native_size=(480, 832), offload=True)
        # On the device, as a text encoder gives them: accelerate's hook moves inputs only when it
        # moves the model, so that the second forward would find them on the CPU.
        size = 2, 1, model.text_tokens, model.config["text_dim"]
        embeds = torch.randn(size, device=self.device, dtype=dtype)
        torch.cuda.reset_peak_memory_stats()
        began = now(self.device)
        frames = pipe(
            prompt_embeds=embeds[0],
            negative_prompt_embeds=embeds[1],
            height=pixels["height"],
            width=pixels["width"],
            num_frames=pixels["frames"],
            num_inference_steps=task["steps"],
            output_type="pt",
        ).frames
        return {
            "seconds": now(self.device) - began,
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
            "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
            "frames": list(frames.shape),
            "notes": list(acceleration_report(pipe).notes),
        }

    def _pipeline(self, model: Architecture, dtype: torch.dtype) -> Any:
        import diffusers

        torch.manual_seed(0)
        transformer = model.build("cpu", dtype).transformer
        pipe = diffusers.WanPipeline(
            tokenizer=None,
            text_encoder=None,
            transformer=transformer,
            vae=diffusers.AutoencoderKLWan().to(dtype).eval(),
            scheduler=diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )
        pipe.enable_model_cpu_offload(device=self.device)
        return pipe


def now(device: str) -> float:
    """Return seconds, once the device has caught up."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
