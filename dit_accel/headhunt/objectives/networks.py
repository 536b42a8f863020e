"""Networks that compare pictures with texts or pictures, from the hub or a folder: CLIP, PickScore.

They see at most `FRAMES` frames of a video, evenly spread, and a video's score is their mean.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel.errors import BackboneError, OptionError
from dit_accel.headhunt.objectives.base import Entry, Objective

FRAMES = 8
CLIP = "openai/clip-vit-large-patch14"
_TEXT_TOKENS = 77


class _ClipObjective(Objective):
    """A CLIP model, and what prepares its inputs."""

    hub_model: ClassVar[str] = CLIP
    hub_processor: ClassVar[str] = CLIP

    @property
    def sources(self) -> tuple[str, str]:
        """Where the model and its processor come from."""
        return (self.argument,) * 2 if self.argument else (self.hub_model, self.hub_processor)

    def load(self, device: str) -> None:
        """See `Objective.load`."""
        from transformers import CLIPModel, CLIPProcessor

        model, processor = self.sources
        self.device = device
        self.processor = self._from_pretrained(CLIPProcessor, processor)
        self.model = self._from_pretrained(CLIPModel, model).eval().to(device)

    def embed(self, frames: Tensor, texts: Sequence[str]) -> Any:
        """Return CLIP's outputs for ``[B, 3, H, W]`` in [0, 1] and as many texts."""
        inputs = self.processor(
            text=list(texts),
            images=[frame.permute(1, 2, 0).mul(255).round().byte().numpy() for frame in frames],
            padding=True,
            truncation=True,
            max_length=_TEXT_TOKENS,
            return_tensors="pt",
        )
        with torch.no_grad():
            return self.model(**inputs.to(self.device))

    def score(self, frames: Tensor, entries: Sequence[Entry]) -> list[float]:
        """See `Objective.score`."""
        chosen = frames[:, torch.linspace(0, frames.shape[1] - 1, FRAMES).round().long().unique()]
        texts = [entry["prompt"] for entry in entries for _ in range(chosen.shape[1])]
        outputs = self.embed(chosen.flatten(0, 1).clamp(0, 1), texts)
        scores: list[float] = self.judge(outputs).float().view(len(frames), -1).mean(1).tolist()
        return scores

    @abstractmethod
    def judge(self, outputs: Any) -> Tensor:
        """Return a score per picture, ``[B]``, from CLIP's outputs."""

    def _from_pretrained(self, cls: Any, source: str) -> Any:
        try:
            return cls.from_pretrained(source)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BackboneError(
                f"objective {self.name!r} needs {source}, which can't be loaded: {reason} Fetch it "
                f"with `hf download {source}`, or take an objective that needs no weights, such "
                "as 'following' on bundled models."
            ) from error


class ClipText(_ClipObjective):
    """Cosine of the angle between CLIP's views of a picture and its prompt.

    The argument is a folder with a CLIP model and its processor; without, ViT-L/14 of the hub.
    """

    name: ClassVar[str] = "clip_text"

    def judge(self, outputs: Any) -> Tensor:
        """See `_ClipObjective.judge`."""
        return torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds)


class PickScore(_ClipObjective):
    """PickScore v1 (2305.01569): what people prefer for a prompt.

    The argument is a folder with the model and its processor; without, those of the hub.
    """

    name: ClassVar[str] = "pickscore"
    hub_model: ClassVar[str] = "yuvalkirstain/PickScore_v1"
    hub_processor: ClassVar[str] = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def judge(self, outputs: Any) -> Tensor:
        """See `_ClipObjective.judge`."""
        cosine = torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds)
        return self.model.logit_scale.exp() * cosine


class ClipImage(_ClipObjective):
    """Cosine of the angle between CLIP's views of a picture and of a given one.

    The argument is the file of the given picture.
    """

    name: ClassVar[str] = "clip_image"

    def __init__(self, argument: str | None = None, world: str | None = None) -> None:
        super().__init__(argument, world)
        if argument is None or not Path(argument).is_file():
            raise OptionError(
                f"objective {self.name!r} needs a picture to compare with, and {argument!r} is no "
                f"file: write {self.name}:FILE."
            )
        self.picture = Path(argument)

    @property
    def sources(self) -> tuple[str, str]:
        """See `_ClipObjective.sources`."""
        return self.hub_model, self.hub_processor

    def identity(self) -> Any:
        """See `Objective.identity`; the picture counts, not its name."""
        return [self.name, hashlib.sha256(self.picture.read_bytes()).hexdigest()]

    def load(self, device: str) -> None:
        """See `Objective.load`."""
        from diffusers.utils import load_image
        from PIL import UnidentifiedImageError
        from torch import from_numpy

        try:
            picture = load_image(str(self.picture))
        except (OSError, ValueError, UnidentifiedImageError) as error:
            raise OptionError(f"{self.picture} is no picture that can be read.") from error
        super().load(device)
        import numpy as np

        pixels = from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
        self.reference = self.embed(pixels, [""]).image_embeds

    def judge(self, outputs: Any) -> Tensor:
        """See `_ClipObjective.judge`."""
        return torch.cosine_similarity(outputs.image_embeds, self.reference)
