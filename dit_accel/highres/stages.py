"""The two stages of a FreeSwim generation, around a stock pipeline's own call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.errors import OptionError, UnknownPipelineError
from dit_accel.highres.reference import renoised
from dit_accel.highres.schedule import check_scheduler, starting_at
from dit_accel.highres.store import free_bytes
from dit_accel.pipelines.base import PipelineFamily
from dit_accel.sizes import check_size, pixels_per_token, trained_size, usual_size

if TYPE_CHECKING:
    from dit_accel.highres.engine import FreeSwimSession
    from dit_accel.highres.freeswim import FreeSwim

ASPECT = 1.25
"""By how much the target's aspect ratio may differ from the trained one's."""


@dataclass(frozen=True)
class Sizes:
    """What a model was trained for.

    Attributes:
        trained: (height, width) in pixels.
        token: pixels along one side of a token.
    """

    trained: tuple[int, int]
    token: int

    @property
    def trained_grid(self) -> tuple[int, int]:
        """The trained size in tokens."""
        return self.trained[0] // self.token, self.trained[1] // self.token


def sizes_of(method: FreeSwim, pipe: Any, family: PipelineFamily) -> Sizes:
    """Return the trained size, having checked that a pipeline can be used at all.

    Raises:
        UnknownPipelineError: if it makes its output of more than text.
        OptionError: if no trained size is known, or the model can't make it, or its scheduler
            can't start from a stated noise level.
    """
    if not {cls.__name__ for cls in type(pipe).__mro__} & set(family.text_pipelines):
        raise UnknownPipelineError(
            f"freeswim needs a pipeline that makes its output of text alone, and "
            f"{type(pipe).__name__} is none: use {' or '.join(family.text_pipelines) or 'another'}."
        )
    check_scheduler(pipe.scheduler, method.flow_shift)
    trained, token = method.native_size or trained_size(pipe), pixels_per_token(pipe)
    if trained is None or token is None:
        raise OptionError(
            "the size that this model was trained for is not known: give native_size=(height, "
            "width) in pixels."
        )
    check_size(pipe, **{"native height": trained[0], "native width": trained[1]})
    return Sizes(trained, token)


@torch.no_grad()
def generate_in_stages(
    session: FreeSwimSession,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a pipeline's call in two stages; in one, as it is, if it asks for the trained size.

    Raises:
        OptionError: if the target can't be made, or what has to be kept doesn't fit. Before
            anything is generated.
    """
    pipe, method = session.pipe, session.method
    given = dict(inspect.signature(call).bind(*args, **kwargs).arguments)
    target = _target(pipe, given)
    if target == session.sizes.trained:
        return call(*args, **kwargs)
    _check_target(pipe, target, session.sizes)
    _check_memory(session, target, given)
    height, width = session.sizes.trained
    base = {**given, "height": height, "width": width, "output_type": "pt", "return_dict": True}
    latents = _enlarged(session, _frames(call(**base)), target)
    latents = renoised(latents, _noise_like(latents, given.get("generator")), method.sigma)
    given |= {"height": target[0], "width": target[1], "latents": latents}
    with _scheduler_from(pipe, method), _tiling(pipe, method), session.second_stage():
        return call(**given)


def kept_bytes(session: FreeSwimSession, target: tuple[int, int], given: Mapping[str, Any]) -> int:
    """Return what FreeSwim keeps between the steps of a call, text tokens aside."""
    method, pipe, transformer = session.method, session.pipe, session.pipe.transformer
    if method.override == "none" or method.refresh_every == 1:
        return 0
    parameters = inspect.signature(type(pipe).__call__).parameters

    def setting(name: str) -> float:
        value = given.get(name, parameters[name].default if name in parameters else None)
        return 1 if value is None else float(value)

    frames = (setting("num_frames") - 1) // getattr(pipe, "vae_scale_factor_temporal", 1) + 1
    tokens = int(frames) * math.prod(side // session.sizes.token for side in target)
    prompts = given.get("prompt")
    batch = len(prompts) if isinstance(prompts, list | tuple) else 1
    if given.get("prompt_embeds") is not None:
        batch = len(given["prompt_embeds"])
    batch *= int(setting("num_videos_per_prompt") * setting("num_images_per_prompt"))
    guidance = "true_cfg_scale" if "true_cfg_scale" in parameters else "guidance_scale"
    in_one_batch = not hasattr(transformer, "cache_context")
    if (method.branches == "both" or in_one_batch) and setting(guidance) > 1:
        batch *= 2
    config, layers = transformer.config, len(session.seam.family.blocks(transformer))
    token = config.num_attention_heads * config.attention_head_dim * transformer.dtype.itemsize
    if method.override == "joint":
        token += config.num_attention_heads * 4  # the LSE
    return int(layers * batch * tokens * token)


def _check_memory(
    session: FreeSwimSession, target: tuple[int, int], given: Mapping[str, Any]
) -> None:
    """Say what will be kept between steps, and refuse what doesn't fit."""
    method, pipe = session.method, session.pipe
    wanted = kept_bytes(session, target, given)
    if not wanted:
        return
    device = torch.device("cpu") if method.offload else torch.device(pipe._execution_device)
    place = "CPU memory" if device.type == "cpu" else "device memory"
    session.seam.recorder.note(
        f"freeswim keeps {_readable(wanted)} in {place} between steps at {target[0]} x {target[1]}"
    )
    limits: list[tuple[int | None, str]] = [(free_bytes(device), "that are free")]
    if method.budget_gib is not None:
        limits.append((int(method.budget_gib * 2**30), "of budget_gib"))
    for limit, name in limits:
        if limit is not None and wanted > limit:
            offload = "" if method.offload else "set offload=True, or "
            raise OptionError(
                f"freeswim would keep {_readable(wanted)} in {place} between steps, more than the "
                f"{_readable(limit)} {name}: {offload}set refresh_every=1, which keeps nothing, or "
                "generate less at once."
            )


def _readable(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"


def _target(pipe: Any, given: Mapping[str, Any]) -> tuple[int, int]:
    """Return the height and width that a call asks for."""
    height, width = usual_size(pipe) or (None, None)
    height, width = given.get("height") or height, given.get("width") or width
    if height is None or width is None:
        raise OptionError("give height and width: this pipeline has no usual size.")
    return height, width


def _check_target(pipe: Any, target: tuple[int, int], sizes: Sizes) -> None:
    check_size(pipe, height=target[0], width=target[1])
    (height, width), trained = target, sizes.trained
    stretch = (width / height) / (trained[1] / trained[0])
    if not 1 / ASPECT <= stretch <= ASPECT:
        pixels, token = math.prod(trained), sizes.token
        near = [
            round(math.sqrt(pixels * shape) / token) * token
            for shape in (height / width, width / height)
        ]
        raise OptionError(
            f"height={height}, width={width} has another shape than the trained size "
            f"{trained[0]} x {trained[1]}: give a native size of that shape, such as "
            f"native_size=({near[0]}, {near[1]})."
        )
    if height < trained[0] or width < trained[1]:
        raise OptionError(
            f"height={height}, width={width} is smaller than the trained size {trained[0]} x "
            f"{trained[1]} on one side: freeswim enlarges. Ask for more, or give another "
            "native_size."
        )


def _frames(output: Any) -> Tensor:
    """Return what the first stage made, ``[B, T, 3, H, W]`` in [0, 1]."""
    if hasattr(output, "frames"):
        frames: Tensor = output.frames
        return frames
    images: Tensor = output.images
    return images.unsqueeze(1)


def _enlarged(session: FreeSwimSession, frames: Tensor, target: tuple[int, int]) -> Tensor:
    """Return the latents of frames enlarged to the target, one sample after the other."""
    pipe, method = session.pipe, session.method
    device, latents = pipe._execution_device, []
    with _tiling(pipe, method):
        for sample in frames:
            large = F.interpolate(sample.float(), target, mode="bilinear", align_corners=False)
            pixels = large[None].to(device, pipe.vae.dtype)
            latents.append(session.seam.family.encode(pipe, pixels))
    pipe.maybe_free_model_hooks()
    return torch.cat(latents)


def _noise_like(latents: Tensor, generator: Any) -> Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(
        latents.shape, generator=generator, device=latents.device, dtype=latents.dtype
    )


@contextmanager
def _scheduler_from(pipe: Any, method: FreeSwim) -> Iterator[None]:
    """Give a pipeline a scheduler of the second stage meanwhile."""
    before = pipe.scheduler
    # Past the pipeline's own bookkeeping, which would write it into the configuration.
    vars(pipe)["scheduler"] = starting_at(before, method.sigma, method.flow_shift)
    try:
        yield
    finally:
        vars(pipe)["scheduler"] = before


@contextmanager
def _tiling(pipe: Any, method: FreeSwim) -> Iterator[None]:
    """Let the VAE work in tiles meanwhile, if asked for."""
    vae = pipe.vae
    if not method.tiled_vae or not hasattr(vae, "enable_tiling"):
        yield
        return
    before = vae.use_tiling
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.use_tiling = before
