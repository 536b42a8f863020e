"""The small trained pipelines that ship with the package, and how any pipeline is loaded.

Every folder beside this file that has a ``model_index.json`` is a bundled model: a stock diffusers
pipeline, so that ``DiffusionPipeline.from_pretrained(model_folder("tiny-wan"))`` loads it too.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from dit_accel.errors import OptionError, did_you_mean

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

DEFAULTS_FILE = "dit_accel.json"
"""File beside ``model_index.json`` with a model's `GenerationDefaults`; diffusers ignores it."""


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Settings that suit a model; None leaves the choice to its pipeline."""

    steps: int | None = None
    guidance: float | None = None
    frames: int | None = None
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    fps: int = 16  # frames per second of the written video


def list_models() -> list[str]:
    """Return the names of the bundled models, sorted."""
    return sorted(index.parent.name for index in Path(__file__).parent.glob("*/model_index.json"))


def model_folder(name: str) -> Path:
    """Return the folder of the bundled model called ``name``.

    Raises:
        OptionError: if there is none; the message names the nearest.
    """
    if name not in list_models():
        raise OptionError(
            f"no bundled model is called {name!r}.{did_you_mean(name, list_models())}"
        )
    return Path(__file__).parent / name


def locate_model(model: str) -> str:
    """Return what ``from_pretrained`` takes for ``model``: a folder, or the hub id as it is.

    Args:
        model: name of a bundled model, path of a folder, or hub id such as ``org/name``.

    Raises:
        OptionError: if it is none of these.
    """
    if model in list_models():
        return str(model_folder(model))
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise OptionError(
                f"folder {model!r} holds no diffusers pipeline: it has no model_index.json."
            )
        return str(folder)
    if folder.is_absolute() or model.startswith((".", "~")):
        raise OptionError(f"model folder {model!r} does not exist.")
    if model.count("/") != 1:
        raise OptionError(
            f"model {model!r} is no bundled model, no folder and no hub id (org/name)."
            f"{did_you_mean(model, list_models())}"
        )
    return model


def generation_defaults(model: str) -> GenerationDefaults:
    """Return the settings that a bundled model or a local folder recommends.

    Raises:
        OptionError: if its `DEFAULTS_FILE` has an unknown entry.
    """
    path = Path(locate_model(model)) / DEFAULTS_FILE
    if not path.is_file():
        return GenerationDefaults()
    entries = json.loads(path.read_text(encoding="utf-8"))
    valid = [f.name for f in fields(GenerationDefaults)]
    for name in entries:
        if name not in valid:
            raise OptionError(f"{path}: unknown entry {name!r}.{did_you_mean(name, valid)}")
    return GenerationDefaults(**entries)


def pipeline_class(model: str) -> type[DiffusionPipeline]:
    """Return the pipeline class of a model, without loading its weights.

    Raises:
        OptionError: if there is no such model, or this diffusers doesn't know its class.
    """
    import diffusers

    with _deliverable(model):
        index = diffusers.DiffusionPipeline.load_config(locate_model(model))
    name = index["_class_name"]
    found: type[DiffusionPipeline] | None = getattr(diffusers, name, None)
    if found is None:
        raise OptionError(
            f"model {model!r} is a {name}, which diffusers {diffusers.__version__} does not have: "
            "upgrade diffusers."
        )
    return found


def load_pipeline(
    model: str, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """Load a bundled model, a local folder or a model of the hub onto ``device``.

    Args:
        model: see `locate_model`.
        device: where to put it.
        dtype: of the weights; None means float32 on a CPU, which is slow or incomplete in half
            precision, and bfloat16 elsewhere.

    Raises:
        OptionError: if there is no such model, or the hub or folder can't deliver it.
    """
    import torch
    from diffusers import DiffusionPipeline

    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    with _deliverable(model), warnings.catch_warnings():
        # diffusers 0.36 knows no other name for it; newer ones warn of that name.
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        pipe = DiffusionPipeline.from_pretrained(locate_model(model), torch_dtype=dtype)
    return pipe.to(device)


@contextmanager
def _deliverable(model: str) -> Iterator[None]:
    """Turn diffusers' many ways of not getting at a model into one error."""
    try:
        yield
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise OptionError(
            f"model {model!r} could not be loaded: {reason} Check its name and the connection, or "
            f"use a bundled model: {', '.join(list_models())}."
        ) from error
