"""Real transformers with random weights, from bundled configurations, and inputs for a forward.

Each JSON beside this file is the configuration that the named repository publishes, the sizes it
is measured at, and a toy of the same kind to try a benchmark out without a GPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import OptionError, did_you_mean

TOY = "toy"
"""The size at which a model is replaced by its toy."""
_DEPTHS = ("num_layers", "num_single_layers")
_SPATIAL, _TEMPORAL = 8, 4
"""Pixels per latent, and frames per latent frame: the same for the VAEs of all these models."""
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A transformer and the pipeline that it belongs to.

    Attributes:
        name: as on the command line.
        source: repository that publishes the configuration.
        pipeline: diffusers class.
        transformer: diffusers class.
        config: arguments of the transformer.
        text_tokens: text tokens of a forward.
        sizes: pixels and frames by name.
        toy: replaces configuration, text tokens and size at the size `TOY`.
    """

    name: str
    source: str
    pipeline: str
    transformer: str
    config: Mapping[str, Any]
    text_tokens: int
    sizes: Mapping[str, Mapping[str, int]]
    toy: Mapping[str, Any]

    def at(self, size: str) -> Architecture:
        """Return what is measured at ``size``: this, or its toy.

        Raises:
            OptionError: if there is no such size.
        """
        valid = [*self.sizes, TOY]
        if size not in valid:
            raise OptionError(f"{self.name} has no size {size!r}.{did_you_mean(size, valid)}")
        if size != TOY:
            return self
        config = {**self.config, **self.toy["config"]}
        sizes = {TOY: self.toy["size"]}
        return Architecture(
            self.name, self.source, self.pipeline, self.transformer, config,
            self.toy["text_tokens"], sizes, self.toy,
        )  # fmt: skip

    @property
    def layers(self) -> int:
        """Blocks of all kinds."""
        return sum(self.config.get(name, 0) for name in _DEPTHS)

    def with_layers(self, layers: int | None) -> tuple[dict[str, Any], int]:
        """Return the configuration with about so many blocks, kinds in proportion; and how many.

        Raises:
            OptionError: if there are not so many.
        """
        config = dict(self.config)
        if layers is None:
            return config, self.layers
        if not 1 <= layers <= self.layers:
            raise OptionError(f"{self.name} has {self.layers} layers: {layers=} must be 1 to that.")
        for name in _DEPTHS:
            if name in config:
                config[name] = max(1, round(config[name] * layers / self.layers))
        return config, sum(config.get(name, 0) for name in _DEPTHS)

    def build(self, device: str, dtype: torch.dtype, layers: int | None = None) -> Any:
        """Return a pipeline that holds a transformer with random weights, and nothing else."""
        import diffusers

        config, _ = self.with_layers(layers)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                transformer = getattr(diffusers, self.transformer)(**config).eval()
        finally:
            torch.set_default_dtype(before)
        transformer.requires_grad_(False)
        cls = getattr(diffusers, self.pipeline)
        others = {name: None for name in _required(cls) if name not in ("scheduler", "transformer")}
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        return cls(**others, scheduler=scheduler, transformer=transformer)

    def inputs(self, size: str, device: str, dtype: torch.dtype) -> Inputs:
        """Return the arguments of one forward at ``size``, batch 1, random but seeded."""
        generator = torch.Generator(device).manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        pixels = self.sizes[size]
        latent = [pixels["height"] // _SPATIAL, pixels["width"] // _SPATIAL]
        if "frames" in pixels:
            latent.insert(0, (pixels["frames"] - 1) // _TEMPORAL + 1)
        made = _INPUTS[self.transformer](self, latent, noise)
        time = torch.tensor([500.0], device=device, dtype=dtype)
        return {"timestep": time, "return_dict": False, **made}

    def tokens(self, size: str) -> int:
        """Video or image tokens at ``size``."""
        pixels = self.sizes[size]
        frames = (pixels.get("frames", 1) - 1) // _TEMPORAL + 1
        return frames * math.prod(pixels[axis] // (2 * _SPATIAL) for axis in ("height", "width"))


def _wan(model: Architecture, latent: list[int], noise: Callable[..., Tensor]) -> Inputs:
    config = model.config
    return {
        "hidden_states": noise(1, config["in_channels"], *latent),
        "encoder_hidden_states": noise(1, model.text_tokens, config["text_dim"]),
    }


def _hunyuan(model: Architecture, latent: list[int], noise: Callable[..., Tensor]) -> Inputs:
    config, hidden = model.config, noise(1, model.config["in_channels"], *latent)
    mask = torch.ones(1, model.text_tokens, device=hidden.device, dtype=hidden.dtype)
    return {
        "hidden_states": hidden,
        "encoder_hidden_states": noise(1, model.text_tokens, config["text_embed_dim"]),
        "encoder_attention_mask": mask,
        "pooled_projections": noise(1, config["pooled_projection_dim"]),
        "guidance": hidden.new_tensor([6000.0]),
    }


def _flux(model: Architecture, latent: list[int], noise: Callable[..., Tensor]) -> Inputs:
    config = model.config
    rows, columns = (side // 2 for side in latent)  # 2 x 2 latents make a token
    hidden = noise(1, rows * columns, config["in_channels"])
    ids = hidden.new_zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows, device=hidden.device)[:, None]
    ids[..., 2] += torch.arange(columns, device=hidden.device)
    return {
        "hidden_states": hidden,
        "encoder_hidden_states": noise(1, model.text_tokens, config["joint_attention_dim"]),
        "pooled_projections": noise(1, config["pooled_projection_dim"]),
        "guidance": torch.full((1,), 3.5, device=hidden.device),
        "timestep": torch.full((1,), 0.5, device=hidden.device, dtype=hidden.dtype),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": hidden.new_zeros(model.text_tokens, 3),
    }


def _sd3(model: Architecture, latent: list[int], noise: Callable[..., Tensor]) -> Inputs:
    config = model.config
    return {
        "hidden_states": noise(1, config["in_channels"], *latent),
        "encoder_hidden_states": noise(1, model.text_tokens, config["joint_attention_dim"]),
        "pooled_projections": noise(1, config["pooled_projection_dim"]),
    }


_INPUTS: Mapping[str, Callable[..., Inputs]] = MappingProxyType(
    {
        "WanTransformer3DModel": _wan,
        "HunyuanVideoTransformer3DModel": _hunyuan,
        "FluxTransformer2DModel": _flux,
        "SD3Transformer2DModel": _sd3,
    }
)


def list_architectures() -> list[str]:
    """Return the names of the bundled architectures, sorted."""
    return sorted(path.name.removesuffix(".json") for path in Path(__file__).parent.glob("*.json"))


def load_architecture(name: str) -> Architecture:
    """Return the bundled architecture called ``name``.

    Raises:
        OptionError: if there is none; the message names the nearest.
    """
    if name not in list_architectures():
        raise OptionError(
            f"no bundled architecture is called {name!r}.{did_you_mean(name, list_architectures())}"
        )
    path = Path(__file__).parent / f"{name}.json"
    return Architecture(name=name, **json.loads(path.read_text(encoding="utf-8")))


def _required(cls: type[Any]) -> list[str]:
    """Return the components that a pipeline class demands."""
    import inspect

    return [
        name
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if name != "self" and parameter.default is inspect.Parameter.empty
    ]
