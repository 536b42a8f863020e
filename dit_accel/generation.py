"""Generating with an accelerated pipeline, and densely beside it, timed alike."""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.acceleration import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.composition import members
from dit_accel.errors import OptionError, UnknownWordsWarning
from dit_accel.eval.fidelity import psnr
from dit_accel.models import world_of
from dit_accel.registry import method_class
from dit_accel.report import AccelerationReport
from dit_accel.sizes import check_size
from dit_accel.world.worlds import unknown_words

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the steps done and the steps in all; 0 if nobody knows."""


BUDGETS = frozenset({"min_psnr", "max_error", "target_speedup", "probe_s", "calibration"})
"""Options of `accelerate_pipeline` with which it tries settings, or takes what was tried."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What to generate; None leaves a setting to the pipeline.

    Raises:
        OptionError: if the prompt is empty, or a number is not positive (``guidance`` and
            ``seed``: is negative).
    """

    prompt: str
    negative_prompt: str | None = None
    steps: int | None = None
    frames: int | None = None
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    guidance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the prompt and the numbers."""
        if not self.prompt.strip():
            raise OptionError("the prompt is empty: say what to generate.")
        for name in ("steps", "frames", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name}={value} must be at least 1.")
        for name in ("guidance", "seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise OptionError(f"{name}={value} must not be negative.")


@dataclass(frozen=True)
class Generation:
    """One generated video or image.

    Attributes:
        frames: float32 ``[T, 3, H, W]`` in [0, 1], on the CPU; an image has T = 1.
        total_s: seconds for the whole pipeline call, text encoding and decoding included.
        denoise_s: seconds from the first transformer call to the end of the last step.
    """

    frames: Tensor
    total_s: float
    denoise_s: float


@dataclass(frozen=True)
class Batch:
    """Videos or images generated at once, on the CPU.

    Attributes:
        frames: ``[B, T, 3, H, W]`` in [0, 1], in the pipeline's dtype; images have T = 1.
        latents: of the last step, ``[B, ...]`` as the pipeline lays them out.
        steps: denoising steps.
        total_s: seconds for the whole pipeline call, for all of them together.
        denoise_s: seconds from the first transformer call to the end of the last step, likewise.
    """

    frames: Tensor
    latents: Tensor
    steps: int
    total_s: float
    denoise_s: float


@dataclass(frozen=True)
class Result:
    """A request generated with acceleration, and densely too if it was to be compared."""

    accelerated: Generation
    report: AccelerationReport
    dense: Generation | None = None

    @property
    def psnr_db(self) -> float | None:
        """PSNR between the two, before any video encoding; inf if they are equal."""
        return psnr(self.accelerated.frames, self.dense.frames) if self.dense else None

    @property
    def timing(self) -> str:
        """What the times are times of."""
        if self.dense:
            return "one run each, after an untimed run of one step"
        return "one run, which includes compiling kernels and first allocations"

    @property
    def speedup(self) -> float | None:
        """How many times faster the whole pipeline call was."""
        return self.dense.total_s / self.accelerated.total_s if self.dense else None

    @property
    def denoise_speedup(self) -> float | None:
        """How many times faster the denoising loop was."""
        return self.dense.denoise_s / self.accelerated.denoise_s if self.dense else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the frames as JSON-ready values; an infinite PSNR is None."""
        runs = {"accelerated": self.accelerated, "dense": self.dense}
        times = {
            name: {"total_s": run.total_s, "denoise_s": run.denoise_s}
            for name, run in runs.items()
            if run is not None
        }
        psnr_db = self.psnr_db
        return {
            "density": self.report.density,
            **times,
            "timing": self.timing,
            "speedup": self.speedup,
            "denoise_speedup": self.denoise_speedup,
            "psnr_db": None if psnr_db == math.inf else psnr_db,
            "identical": psnr_db == math.inf,
            "acceleration": self.report.to_dict(),
        }


def makes_video(pipeline: type[Any]) -> bool:
    """Whether pipelines of this class generate videos rather than images."""
    return "num_frames" in inspect.signature(pipeline.__call__).parameters


def pipeline_arguments(pipe: Any, request: GenerationRequest) -> dict[str, Any]:
    """Return the arguments with which ``pipe`` serves the request.

    Raises:
        OptionError: if the pipeline has no such setting, or can't make that size.
    """
    check_size(pipe, height=request.height, width=request.width)
    _check_frames(pipe, request)
    settings = {
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.steps,
        "num_frames": request.frames,
        "height": request.height,
        "width": request.width,
        "guidance_scale": request.guidance,
    }
    arguments = {name: value for name, value in settings.items() if value is not None}
    parameters = inspect.signature(type(pipe).__call__).parameters
    for name in arguments:
        if name not in parameters:
            raise OptionError(f"{type(pipe).__name__} has no {name}: leave it out.")
    return {"prompt": request.prompt, **arguments}


def generate(
    pipe: Any,
    request: GenerationRequest,
    *,
    stage: str = "denoising",
    progress: Progress | None = None,
) -> Generation:
    """Run a pipeline on one request. The seed gives the same noise on every device.

    Warns:
        UnknownWordsWarning: if the prompt has words that a bundled model never saw in training.
    """
    _warn_of_unknown_words(pipe, request)
    return _generate(pipe, request, stage, progress)


def generate_batch(
    pipe: Any,
    requests: Sequence[GenerationRequest],
    *,
    stage: str = "steps of the batch",
    progress: Progress | None = None,
) -> Batch:
    """Generate requests that differ in prompt and seed alone, each from its own seed's noise."""
    output, stopwatch = _run_batch(pipe, requests, stage, progress, "pt")
    frames = output.frames if hasattr(output, "frames") else output.images[:, None]
    return Batch(
        frames.cpu(),
        stopwatch.latents.cpu(),
        stopwatch.steps,
        stopwatch.total_s,
        stopwatch.denoise_s,
    )


def warm_up_batch(
    pipe: Any,
    requests: Sequence[GenerationRequest],
    *,
    stage: str,
    progress: Progress | None = None,
) -> None:
    """Run one step of what `generate_batch` would, and decode it where the first time is slower."""
    requests = [replace(request, steps=1) for request in requests]
    _run_batch(pipe, requests, stage, progress, _warm_up_output(pipe))


def _run_batch(
    pipe: Any,
    requests: Sequence[GenerationRequest],
    stage: str,
    progress: Progress | None,
    output_type: str,
) -> tuple[Any, Stopwatch]:
    arguments = pipeline_arguments(pipe, requests[0])
    arguments["prompt"] = [request.prompt for request in requests]
    noise = [torch.Generator().manual_seed(request.seed) for request in requests]
    return timed_call(pipe, arguments, noise, stage, progress, output_type)


def _generate(
    pipe: Any, request: GenerationRequest, stage: str, progress: Progress | None
) -> Generation:
    output, stopwatch = _run(pipe, request, stage, progress)
    frames = output.frames[0] if hasattr(output, "frames") else output.images[:1]
    return Generation(frames.float().cpu(), stopwatch.total_s, stopwatch.denoise_s)


def generate_accelerated(
    pipe: Any,
    request: GenerationRequest,
    method: str,
    options: Mapping[str, Any],
    *,
    compare: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Generate a request with a method, and leave the pipeline accelerated.

    With ``compare`` it is generated densely first, and both runs are timed alike: one run each,
    after an untimed one of a single step, so that neither pays for compiling kernels or for first
    allocations. Without it there is just the one run, which pays for these.

    Args:
        pipe: a pipeline of a known family.
        request: what to generate.
        method: name of the method, or several with commas.
        options: keyword arguments for `accelerate_pipeline`.
        compare: whether to generate densely too.
        progress: told of every step.

    Raises:
        DitAccelError: if the pipeline can't be accelerated so; before any long run.

    Warns:
        UnknownWordsWarning: as `generate` does.
    """
    _warn_of_unknown_words(pipe, request)
    if BUDGETS & options.keys():
        options = {**options, "progress": progress}
    dense = None
    if compare:
        # Sparse from the first step on, or the warm-up would miss what it is there to compile. It
        # comes first, so that options this pipeline can't take are refused without a long wait.
        accelerate_pipeline(pipe, method, **at_once(method, options))
        _warm_up(pipe, request, f"warming up ({method})", progress)
        _make_dense(pipe)
        _warm_up(pipe, request, "warming up (dense)", progress)
        dense = _generate(pipe, request, "denoising (dense)", progress)
    accelerate_pipeline(pipe, method, **options)
    accelerated = _generate(pipe, request, f"denoising ({method})", progress)
    return Result(accelerated, acceleration_report(pipe), dense)


def _make_dense(pipe: Any) -> None:
    """Take the method off; over ranks, which stock attention may not know, put "dense" on."""
    if getattr(pipe, "_dit_accel_parallel", None) is None:
        restore_pipeline(pipe)
    else:
        accelerate_pipeline(pipe, "dense")


def at_once(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with which attention is sparse from the first step on."""
    if BUDGETS & options.keys():
        return dict(options)  # chosen by trying, which has compiled what is needed
    names = members(method)
    sparse = any(n == "auto" or method_class(str(n)).kind == "attention" for n in names)
    return {**options, **({"dense_steps": 0, "dense_layers": 0} if sparse else {})}


def _run(
    pipe: Any,
    request: GenerationRequest,
    stage: str,
    progress: Progress | None,
    output_type: str = "pt",
) -> tuple[Any, Stopwatch]:
    noise = torch.Generator().manual_seed(request.seed)
    return timed_call(pipe, pipeline_arguments(pipe, request), noise, stage, progress, output_type)


def timed_call(
    pipe: Any,
    arguments: Mapping[str, Any],
    noise: torch.Generator | list[torch.Generator],
    stage: str = "",
    progress: Progress | None = None,
    output_type: str = "pt",
) -> tuple[Any, Stopwatch]:
    """Return the output of ``pipe(**arguments)``, and what its run took and ended with."""
    pipe.set_progress_bar_config(disable=True)
    with Stopwatch(pipe, stage, progress) as stopwatch:
        output = pipe(
            **arguments,
            generator=noise,
            output_type=output_type,
            callback_on_step_end=stopwatch.step_end,
        )
    return output, stopwatch


def _warm_up(pipe: Any, request: GenerationRequest, stage: str, progress: Progress | None) -> None:
    _run(pipe, replace(request, steps=1), stage, progress, _warm_up_output(pipe))


def _warm_up_output(pipe: Any) -> str:
    """Decoding is warmed up only where its first run is slower: on a GPU."""
    return "latent" if pipe.device.type == "cpu" else "pt"


class Stopwatch:
    """Times one pipeline call, and its denoising loop from the first transformer call on."""

    def __init__(self, pipe: Any, stage: str, progress: Progress | None) -> None:
        self.stage, self.progress = stage, progress
        self.total_s = self.denoise_s = 0.0
        self.steps = 0
        self.latents: Any = None
        self._pipe = pipe
        self._first_call: float | None = None

    def __enter__(self) -> Stopwatch:
        transformers = (
            getattr(self._pipe, name, None) for name in ("transformer", "transformer_2")
        )
        self._hooks = [
            module.register_forward_pre_hook(self._begin)
            for module in transformers
            if isinstance(module, nn.Module)
        ]
        self._started = _now()
        return self

    def __exit__(self, *_: object) -> None:
        self.total_s = _now() - self._started
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *_: object) -> None:
        if self._first_call is None:
            self._first_call = _now()

    def step_end(
        self, pipe: Any, step: int, _timestep: Any, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Note the time and the latents; a pipeline's ``callback_on_step_end``."""
        if self._first_call is not None:
            self.denoise_s = _now() - self._first_call
        self.steps, self.latents = step + 1, kwargs.get("latents")
        if self.progress is not None:
            self.progress(self.stage, step + 1, pipe.num_timesteps)
        return kwargs


def _now() -> float:
    """Seconds, once the GPU has caught up."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _warn_of_unknown_words(pipe: Any, request: GenerationRequest) -> None:
    world = world_of(pipe)
    if world is None:
        return
    unknown = unknown_words(world, f"{request.prompt} {request.negative_prompt or ''}")
    if unknown:
        warnings.warn(
            f"this model knows nothing of {', '.join(map(repr, unknown))}: its captions never had "
            "these words (see its README.md).",
            UnknownWordsWarning,
            stacklevel=3,
        )


def _check_frames(pipe: Any, request: GenerationRequest) -> None:
    """Refuse numbers of frames that a pipeline would fail on, or silently round."""
    period = getattr(pipe, "vae_scale_factor_temporal", None)
    if request.frames is not None and period and (request.frames - 1) % period:
        near = round((request.frames - 1) / period) * period + 1
        raise OptionError(
            f"frames={request.frames} is not 1 more than a multiple of {period}, as "
            f"{type(pipe).__name__} needs: take {near}."
        )
