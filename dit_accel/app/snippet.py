"""A generation written down as Python that anyone can run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dit_accel.generation import GenerationRequest, makes_video, pipeline_arguments
from dit_accel.models import list_models, locate_model


def snippet(
    pipe: Any,
    model: str,
    method: str,
    options: Mapping[str, Any],
    request: GenerationRequest,
    fps: int,
    why: str = "",
) -> str:
    """Return a script that loads ``pipe`` again, accelerates it and repeats the request.

    Args:
        pipe: the pipeline that served the request.
        model: what it was loaded from.
        method: name of the method, or several with commas.
        options: keyword arguments for `accelerate_pipeline`.
        request: what was generated, with every setting that was used.
        fps: frames per second of a video.
        why: where the options come from, as a remark.
    """
    name, dtype = type(pipe).__name__, str(pipe.dtype)
    bundled = model in list_models()
    folder = f"model_folder({model!r})" if bundled else repr(locate_model(model))
    loaded = f"{name}.from_pretrained({folder}, torch_dtype={dtype})"
    arguments = [f"{key}={value!r}" for key, value in pipeline_arguments(pipe, request).items()]
    arguments.append(f"generator=torch.Generator().manual_seed({request.seed})")
    file = method.replace(",", "-")
    chosen = "".join(f", {key}={value!r}" for key, value in options.items())
    if makes_video(type(pipe)):
        output, save = "frames[0]", f'export_to_video(output, "{file}.mp4", fps={fps})'
    else:
        output, save = "images[0]", f'output.save("{file}.png")'
    return "\n".join(
        [
            "import torch",
            f"from diffusers import {name}",
            *(["from diffusers.utils import export_to_video"] if makes_video(type(pipe)) else []),
            "",
            "from dit_accel import accelerate_pipeline, acceleration_report",
            *(["from dit_accel.models import model_folder"] if bundled else []),
            "",
            f"pipe = {loaded}.to({str(pipe.device)!r})",
            *([f"# {why}"] if why else []),
            f"accelerate_pipeline(pipe, {method!r}{chosen})  # without this line: dense",
            "output = pipe(",
            *(f"    {argument}," for argument in arguments),
            f").{output}",
            save,
            "print(acceleration_report(pipe))",
        ]
    )
