"""FLUX.1: dual-stream and single-stream blocks over [text | image], text first.

Kontext appends the tokens of a reference image. They move in front of the image, next to the text,
and are treated like text: every query sees them and they see everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dit_accel.call import TokenLayout
from dit_accel.errors import GridMismatchError
from dit_accel.grid import Grid
from dit_accel.pipelines.base import (
    ForwardInputs,
    PipelineFamily,
    TokenShuffle,
    Undo,
    encoded_image,
    hook_output,
    padded,
)


@dataclass(frozen=True)
class Flux(PipelineFamily):
    """FLUX.1 dev, schnell, Kontext, Fill and the pipelines that share their transformer."""

    name: ClassVar[str] = "flux"
    transformer_classes: ClassVar[tuple[str, ...]] = ("FluxTransformer2DModel",)
    pipelines: ClassVar[str] = "FluxPipeline (dev, schnell), FluxKontextPipeline, FluxFillPipeline"
    block_output: ClassVar[tuple[str, ...]] = ("text", "video")
    text_first: ClassVar[bool] = True
    text_pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)

    grids: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """Grid by position-id tensor: read from the device once per generation, not per step."""

    def variants(self, pipe: Any) -> tuple[str, ...]:
        """Return "flux-12b", for the released size alone, and "flux"."""
        config = pipe.transformer.config
        released = (config.num_layers, config.num_single_layers) == (19, 38)
        return (f"{self.name}-12b", self.name) if released else (self.name,)

    def attention_layers(self, transformer: Any) -> list[Any]:
        """Return the dual-stream blocks' attention, then the single-stream blocks'."""
        return [block.attn for block in self.blocks(transformer)]

    def blocks(self, transformer: Any) -> list[nn.Module]:
        """Return the dual-stream blocks, then the single-stream blocks."""
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def encode(self, pipe: Any, frames: Tensor) -> Tensor:
        """Pack 2 x 2 latents into a token; see `PipelineFamily.encode`."""
        latents = encoded_image(pipe.vae, frames)
        cells = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, H, 2, W, 2]
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def modulated(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the block's adaptive norm."""
        return block.norm1(kwargs["hidden_states"], emb=kwargs["temb"])[0]

    def volume(self, transformer: Any, kwargs: dict[str, Any]) -> Tensor:
        """Unpack the target image's tokens; a reference image is left out."""
        grid = self.read_inputs(transformer, kwargs).layouts[0].grid
        return kwargs["hidden_states"][:, : math.prod(grid)].unflatten(1, grid)

    def read_inputs(self, transformer: Any, kwargs: dict[str, Any]) -> ForwardInputs:
        """Take the grid from ``img_ids`` ``[S, 3]`` = (segment, row, column)."""
        ids = kwargs["img_ids"]
        if ids not in self.grids:
            self.grids[ids] = _target_grid(ids[0] if ids.ndim == 3 else ids)
        grid = self.grids[ids]
        reference = ids.shape[-2] - math.prod(grid)
        text = kwargs["encoder_hidden_states"].shape[1]
        return ForwardInputs(
            layouts=(TokenLayout(grid, text + reference, text_first=True),),
            kwargs=kwargs,
            tail_first=reference,
        )

    def pad_text(self, kwargs: dict[str, Any], extra: int) -> dict[str, Any]:
        """Pad the text's position ids, too; see `PipelineFamily.pad_text`."""
        ids = padded(kwargs["txt_ids"], kwargs["txt_ids"].ndim - 2, extra)
        return {**super().pad_text(kwargs, extra), "txt_ids": ids}

    def install_shuffle(self, transformer: Any, shuffle: TokenShuffle) -> list[Undo]:
        """Reorder the packed latents, their position ids and ControlNet residuals; restore last."""

        def inputs(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if shuffle.gather is None:
                return None
            changed = dict(kwargs)
            changed["hidden_states"] = shuffle.into(kwargs["hidden_states"], 1)
            changed["img_ids"] = shuffle.into(kwargs["img_ids"], kwargs["img_ids"].ndim - 2)
            for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
                if kwargs.get(name) is not None:
                    changed[name] = [shuffle.into(tokens, 1) for tokens in kwargs[name]]
            return args, changed

        return [
            transformer.register_forward_pre_hook(inputs, with_kwargs=True).remove,
            hook_output(transformer.proj_out, lambda tokens: shuffle.back(tokens, 1)),
        ]


def _target_grid(ids: Tensor) -> Grid:
    """Return (1, H, W) of segment 0, checking that its tokens come first and in raster order."""
    positions = ids.detach().cpu().long()
    target = positions[positions[:, 0] == 0]
    height, width = (int(target[:, axis].max()) + 1 for axis in (1, 2))
    rows = torch.arange(height * width)
    raster = torch.stack([torch.zeros_like(rows), rows // width, rows % width], 1)
    if not torch.equal(positions[: len(raster)], raster):
        raise GridMismatchError(
            f"img_ids {tuple(ids.shape)} do not begin with a {height}x{width} raster image; "
            "accelerate_pipeline supports FLUX pipelines that pack the target image first."
        )
    return 1, height, width
