"""HunyuanVideo: dual-stream and single-stream blocks over [video | text], text last.

The model pads its text and masks the padding. Here padding is dropped before the transformer runs
(identical output), so that attention needs no mask at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dit_accel.call import TokenLayout
from dit_accel.pipelines.base import (
    ForwardInputs,
    PipelineFamily,
    TokenShuffle,
    Undo,
    block_plan,
    encoded_video,
    hook_output,
    hook_tables,
    padded,
    rotary_plan,
)


@dataclass(frozen=True)
class HunyuanVideo(PipelineFamily):
    """HunyuanVideo text-to-video and both kinds of image-to-video."""

    name: ClassVar[str] = "hunyuan_video"
    transformer_classes: ClassVar[tuple[str, ...]] = ("HunyuanVideoTransformer3DModel",)
    pipelines: ClassVar[str] = "HunyuanVideoPipeline, HunyuanVideoImageToVideoPipeline"
    text_pipelines: ClassVar[tuple[str, ...]] = ("HunyuanVideoPipeline",)

    text_lengths: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """Valid text lengths by mask tensor: read from the device once per prompt, not per step."""

    def variants(self, pipe: Any) -> tuple[str, ...]:
        """Return "hunyuan_video-13b", for the released size alone, and "hunyuan_video"."""
        config = pipe.transformer.config
        released = (config.num_layers, config.num_single_layers) == (20, 40)
        return (f"{self.name}-13b", self.name) if released else (self.name,)

    def attention_layers(self, transformer: Any) -> list[Any]:
        """Return the dual-stream blocks' attention, then the single-stream blocks'."""
        return [block.attn for block in self.blocks(transformer)]

    def blocks(self, transformer: Any) -> list[nn.Module]:
        """Return the dual-stream blocks, then the single-stream blocks."""
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def encode(self, pipe: Any, frames: Tensor) -> Tensor:
        """Scale the VAE's latents; see `PipelineFamily.encode`."""
        return encoded_video(pipe.vae, frames) * pipe.vae.config.scaling_factor

    def modulated(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the block's adaptive norm; the first frame may have its own modulation."""
        tokens, time = args[0], args[2]
        if "TokenReplace" in type(block).__name__:
            return block.norm1(tokens, time, *args[5:7])[0]
        return block.norm1(tokens, emb=time)[0]

    def read_inputs(self, transformer: Any, kwargs: dict[str, Any]) -> ForwardInputs:
        """Take the grid from the latent ``[B, C, T, H, W]`` and drop text that is all padding."""
        config = transformer.config
        frames, height, width = kwargs["hidden_states"].shape[2:]
        grid = (
            frames // config.patch_size_t,
            height // config.patch_size,
            width // config.patch_size,
        )
        text, mask = kwargs["encoder_hidden_states"], kwargs["encoder_attention_mask"]
        lengths = self._valid_lengths(mask)
        replaced = getattr(config, "image_condition_type", None) == "token_replace"
        if lengths is None:
            return ForwardInputs(
                (TokenLayout(grid, text.shape[1]),), kwargs, "text mask with holes", False
            )
        longest = max(lengths)
        kwargs = {
            **kwargs,
            "encoder_hidden_states": text[:, :longest],
            "encoder_attention_mask": mask[:, :longest],
        }
        distinct = (longest,) if len(set(lengths)) == 1 else lengths
        return ForwardInputs(
            tuple(TokenLayout(grid, length) for length in distinct),
            kwargs,
            keep_order="the first frame has its own modulation" if replaced else None,
        )

    def pad_text(self, kwargs: dict[str, Any], extra: int) -> dict[str, Any]:
        """Mask what is added; see `PipelineFamily.pad_text`."""
        mask = padded(kwargs["encoder_attention_mask"], 1, extra)
        return {**super().pad_text(kwargs, extra), "encoder_attention_mask": mask}

    def split_plan(self) -> dict[str, Any]:
        """Split both streams in front of the first block; see `PipelineFamily.split_plan`."""
        return {**rotary_plan(0), **block_plan("transformer_blocks.0")}

    def install_shuffle(self, transformer: Any, shuffle: TokenShuffle) -> list[Undo]:
        """Reorder after ``x_embedder`` and in the rotary tables; restore after ``proj_out``."""

        return [
            hook_output(transformer.x_embedder, lambda tokens: shuffle.into(tokens, 1)),
            hook_tables(transformer.rope, shuffle, 0),
            hook_output(transformer.proj_out, lambda tokens: shuffle.back(tokens, 1)),
        ]

    def _valid_lengths(self, mask: Tensor) -> tuple[int, ...] | None:
        """Return each sample's number of text tokens, or None if the padding is no suffix."""
        if mask not in self.text_lengths:
            valid = mask.bool()
            counts = valid.sum(1)
            suffix = valid == (torch.arange(mask.shape[1], device=mask.device) < counts[:, None])
            self.text_lengths[mask] = tuple(counts.tolist()) if bool(suffix.all()) else None
        return self.text_lengths[mask]
