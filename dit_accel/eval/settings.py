"""Which model generates what is measured, and at which settings."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dit_accel.errors import OptionError
from dit_accel.generation import GenerationRequest
from dit_accel.journal import as_read_back
from dit_accel.models import generation_defaults, locate_model


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A model and how it generates; None leaves a setting to the model.

    Attributes:
        model: a bundled model, a folder, or a hub id.
        steps, guidance, frames, height, width: as in `GenerationRequest`.
        batch: prompts generated at once.
        device: a torch device.
        dtype: of the weights; see `load_pipeline`.
    """

    model: str
    steps: int | None = None
    guidance: float | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    batch: int = 4
    device: str = "cpu"
    dtype: torch.dtype | None = None

    def check_counts(self, *names: str) -> None:
        """Raise `OptionError` if one of these attributes is below 1."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name}={value} must be at least 1.")

    def request(self, prompt: str, seed: int) -> GenerationRequest:
        """Return what to generate for a prompt."""
        defaults = generation_defaults(self.model)
        settings = {}
        for name in ("steps", "guidance", "frames", "height", "width"):
            given = getattr(self, name)
            settings[name] = getattr(defaults, name) if given is None else given
        return GenerationRequest(prompt=prompt, seed=seed, **settings)

    def described(self) -> dict[str, Any]:
        """Return all that every generation depends on, ready for JSON; ``batch`` is left out."""
        request = asdict(self.request("any", 0))
        for name in ("prompt", "negative_prompt", "seed"):
            del request[name]
        settings: dict[str, Any] = as_read_back(
            {
                "model": self.model,
                "weights_sha256": weights_digest(self.model),
                **request,
                "device": torch.device(self.device).type,
                "dtype": "auto" if self.dtype is None else str(self.dtype),
            }
        )
        return settings


def weights_digest(model: str) -> str:
    """Return what tells a local model's weights from others under the same name."""
    digest = hashlib.sha256()
    for file in sorted(Path(locate_model(model)).glob("*/*.safetensors")):
        with file.open("rb") as content:
            while piece := content.read(2**24):
                digest.update(piece)
    return digest.hexdigest()
