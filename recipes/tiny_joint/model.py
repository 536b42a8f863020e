"""What a model of this recipe is: its parts, its sizes, and how its transformer is called."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from recipes.tiny_joint.autoencoders import Autoencoder, Size


@dataclass(frozen=True)
class Bucket:
    """Training scenes of one size."""

    name: str
    size: tuple[int, ...]  # (height, width), or (frames, height, width)
    scenes: int
    encode_batch: int
    batch: int
    shift: float  # of the noise schedule: larger pictures need more noise to hide the same detail
    share: float  # of the steps in the mixed phase
    text_length: int  # tokens that the pipeline pads a prompt to


class Model(ABC):
    """One model; `smoke` asks for tiny parts, to try the code."""

    world: ModuleType  # `dit_accel.world.clips` or `pictures`
    buckets: tuple[Bucket, ...]
    smoke_buckets: tuple[Bucket, ...]
    autoencoder_sizes: tuple[Size, ...]
    smoke_autoencoder_sizes: tuple[Size, ...]
    measured_sizes: tuple[Size, ...]  # at which the card states the autoencoder's PSNR
    guidance: tuple[float, float] | None  # range of the embedded guidance; None: not embedded
    lessons: tuple[tuple[Callable, str, str, float], ...]
    """How to teach, tokenizer and text encoder by the pipeline's names, and share of the time."""
    defaults: ClassVar[dict[str, Any]]  # dit_accel.json

    @abstractmethod
    def make_autoencoder(self, smoke: bool) -> Autoencoder:
        """A fresh autoencoder."""

    @abstractmethod
    def load_autoencoder(self, folder: Path) -> Autoencoder:
        """The trained autoencoder."""

    @abstractmethod
    def latent_shape(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one scene's latents."""

    @abstractmethod
    def make_text(self) -> dict[str, Any]:
        """Fresh tokenizers and text encoders by the pipeline's names for them."""

    def teach(self, text: dict[str, Any], seconds: float, log: Callable, device: str) -> None:
        """Teach the text encoders, for about `seconds` altogether."""
        for teach, tokenizer, encoder, share in self.lessons:
            right = teach(text[tokenizer], text[encoder], self.world, share * seconds, log, device)
            log(f"text: {encoder} has {100 * right:.1f} % right")

    @abstractmethod
    def make_transformer(self, smoke: bool) -> nn.Module:
        """A fresh transformer."""

    @abstractmethod
    def make_pipeline(self, text: dict[str, Any], vae, transformer) -> DiffusionPipeline:
        """The stock pipeline of these parts; `vae` and `transformer` may be None."""

    @abstractmethod
    def embed(
        self, pipe: DiffusionPipeline, captions: list[str], length: int
    ) -> tuple[Tensor, ...]:
        """What the stock pipeline makes of prompts: tensors with one row a prompt."""

    @abstractmethod
    def velocity(
        self, transformer, x: Tensor, sigma: Tensor, text: tuple[Tensor, ...], guidance: Tensor
    ) -> Tensor:
        """The transformer's answer for noisy latents `x` at noise levels `sigma` [B] in (0, 1]."""
