"""The small trained pipelines that ship with the package, and how any pipeline is loaded.

Every folder beside this file that has a ``model_index.json`` is a bundled model: a stock diffusers
pipeline, so that ``DiffusionPipeline.from_pretrained(model_folder("tiny-wan"))`` loads it too.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError, OptionError, did_you_mean

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
    world: str | None = None  # the drawn world it was trained on, one of `dit_accel.world.worlds`


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
    return _read_defaults(Path(locate_model(model)))


def defaults_of(pipe: Any) -> GenerationDefaults:
    """Return the settings that the folder of a loaded pipeline recommends."""
    folder = pipe.config.get("_name_or_path")
    return _read_defaults(Path(folder)) if folder else GenerationDefaults()


def world_of(pipe: Any) -> str | None:
    """Return the drawn world that a loaded pipeline was trained on, if it is a model of one."""
    return defaults_of(pipe).world


def _read_defaults(folder: Path) -> GenerationDefaults:
    path = folder / DEFAULTS_FILE
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


def pipeline_outline(model: str) -> DiffusionPipeline | None:
    """Return a local model's pipeline without weights, from which sizes can be checked.

    It has the VAE and the transformer on the meta device, and nothing else. None for models of
    the hub, which are not fetched for this, and for parts that are no diffusers classes.

    Raises:
        OptionError: if there is no such model, or its folder lacks a configuration.
    """
    import diffusers
    import torch

    folder = locate_model(model)
    if not Path(folder).is_dir():
        return None
    cls = pipeline_class(model)
    taken = inspect.signature(cls.__init__).parameters
    with _deliverable(model):
        index = cls.load_config(folder)
        # A part is a pair of library and class; what else there is are plain settings.
        parts = {
            name: None if isinstance(index[name], list | tuple) else index[name]
            for name in index.keys() & taken.keys()
        }
        for name in ("vae", "transformer"):
            library, class_name = index.get(name, (None, None))
            if library != "diffusers":
                return None
            part_class = getattr(diffusers, class_name)
            config = part_class.load_config(folder, subfolder=name)
            with torch.device("meta"):
                parts[name] = part_class.from_config(config)
    return cls(**parts)


def load_pipeline(
    model: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    safetensors_only: bool = False,
) -> DiffusionPipeline:
    """Load a bundled model, a local folder or a model of the hub onto ``device``.

    Args:
        model: see `locate_model`.
        device: where to put it.
        dtype: of the weights; None means float32 on a CPU, which is slow or incomplete in half
            precision, and bfloat16 elsewhere.
        safetensors_only: refuse weights in pickles, which can run code when they are read.

    Raises:
        OptionError: if there is no such model, or the hub or folder can't deliver it; a missing
            or damaged weight file is named.
    """
    import torch
    from diffusers import DiffusionPipeline

    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    _check_weights(model, safetensors_only)
    only = {"use_safetensors": True} if safetensors_only else {}
    with _deliverable(model), warnings.catch_warnings():
        # diffusers 0.36 knows no other name for it; newer ones warn of that name.
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        pipe = DiffusionPipeline.from_pretrained(locate_model(model), torch_dtype=dtype, **only)
    return pipe.to(device)


def _check_weights(model: str, safetensors_only: bool) -> None:
    """Refuse local models with a missing or damaged weight file; only headers are read."""
    from safetensors import SafetensorError, safe_open

    folder = Path(locate_model(model))
    for config in sorted(folder.glob("*/config.json")):  # only parts with weights have one
        part = config.parent
        files = sorted(part.glob("*.safetensors"))
        pickled = any(part.glob("*.bin"))
        if not files and not pickled:
            raise OptionError(f"model {model!r} has no weights in {part}: {_remedy(model)}")
        if not files and safetensors_only:
            raise OptionError(
                f"model {model!r} has its weights in {part.name} as a pickle, which is not loaded "
                "here: save it again as safetensors."
            )
        for file in files:
            try:
                with safe_open(file, "pt"):
                    pass
            except (OSError, SafetensorError) as error:
                raise OptionError(
                    f"weight file {file} is damaged or incomplete ({error}): {_remedy(model)}"
                ) from error


@contextmanager
def _deliverable(model: str) -> Iterator[None]:
    """Turn the many ways of not getting at a model into one error."""
    try:
        yield
    except DitAccelError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OptionError(
            f"model {model!r} could not be loaded: {reason} ({_remedy(model)})"
        ) from error


def _remedy(model: str) -> str:
    if model in list_models():
        return "install dit-accel again."
    if Path(model).expanduser().is_dir():
        return "copy or download the folder again."
    return f"check its name and the connection, or use a bundled model: {', '.join(list_models())}."
