"""Wan 2.1, Wan 2.2 (two transformers; 5B with a timestep per token) and VACE.

Self-attention (``attn1``) sees video tokens only; text and image conditions have their own
cross-attention (``attn2``), which stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_accel.call import TokenLayout
from dit_accel.pipelines.base import (
    ForwardInputs,
    PipelineFamily,
    TokenShuffle,
    Undo,
    encoded_video,
    hook_output,
    hook_tables,
)


@dataclass(frozen=True)
class Wan(PipelineFamily):
    """Wan text-to-video, image-to-video, video-to-video and VACE pipelines."""

    name: ClassVar[str] = "wan"
    transformer_classes: ClassVar[tuple[str, ...]] = (
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
    )
    pipelines: ClassVar[str] = "WanPipeline, WanImageToVideoPipeline, WanVACEPipeline (2.1, 2.2)"
    components: ClassVar[tuple[str, ...]] = ("transformer", "transformer_2")
    block_output: ClassVar[tuple[str, ...]] = ("video",)
    text_pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline",)
    repeated_blocks: ClassVar[tuple[str, ...]] = ("WanTransformerBlock", "WanVACETransformerBlock")

    def variants(self, pipe: Any) -> tuple[str, ...]:
        """Return names such as "wan2.1-14b-i2v", "wan2.1-14b" and "wan"; 2.2 has its own."""
        if getattr(pipe, "config", {}).get("expand_timesteps"):
            return "wan2.2-5b", "wan2.2"
        task = "i2v" if "ImageToVideo" in type(pipe).__name__ else "t2v"
        if getattr(pipe, "transformer_2", None) is not None:
            return f"wan2.2-a14b-{task}", "wan2.2-a14b", "wan2.2"
        config = pipe.transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        size = {1536: "1.3b", 5120: "14b"}.get(width)
        if size is None:
            return ("wan",)
        names = (f"wan2.1-{size}-{task}", f"wan2.1-{size}", "wan")
        # Image-to-video has weights of its own for 480p, known by their name alone.
        small = task == "i2v" and "480p" in str(getattr(pipe, "name_or_path", "")).lower()
        return (f"{names[0]}-480p", *names) if small else names

    def attention_layers(self, transformer: Any) -> list[Any]:
        """Return every block's ``attn1``, VACE's control blocks last."""
        blocks = [*transformer.blocks, *getattr(transformer, "vace_blocks", [])]
        return [block.attn1 for block in blocks]

    def blocks(self, transformer: Any) -> list[nn.Module]:
        """Return the main blocks; VACE's control blocks are no part of the residual stack."""
        return list(transformer.blocks)

    def encode(self, pipe: Any, frames: Tensor) -> Tensor:
        """Normalise the VAE's latents channel by channel; see `PipelineFamily.encode`."""
        latents = encoded_video(pipe.vae, frames)
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        return (latents - mean) / std

    def modulated(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Shift and scale the normed tokens by the block's table and the time projection."""
        tokens, projection = args[0], args[2]
        table = block.scale_shift_table
        table = table.unsqueeze(0) if projection.ndim == 4 else table  # a timestep per token
        shift, scale, *_ = (table + projection.float()).unbind(-2)
        if projection.ndim == 3:
            shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
        return (block.norm1(tokens.float()) * (1 + scale) + shift).type_as(tokens)

    def time_embeddings(self, transformer: Any, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Run the time embedder on every timestep; neither prompt nor size enters."""
        embedder = transformer.condition_embedder
        features = embedder.timesteps_proj(timesteps)
        weight = next(embedder.time_embedder.parameters())
        embedding = embedder.time_embedder(features.to(weight.dtype))
        return embedding, embedder.time_proj(embedder.act_fn(embedding))

    def cacheable_attention(self, transformer: Any) -> list[tuple[nn.Module, str]]:
        """Return each block's self-attention and its cross-attention to the text."""
        return [
            pair
            for block in transformer.blocks
            for pair in ((block.attn1, "self"), (block.attn2, "cross"))
        ]

    def read_inputs(self, transformer: Any, kwargs: dict[str, Any]) -> ForwardInputs:
        """Take the grid from the latent's shape ``[B, C, T, H, W]``."""
        grid = _grid(kwargs["hidden_states"], transformer)
        control = kwargs.get("control_hidden_states")
        ragged_control = control is not None and _grid(control, transformer) != grid
        return ForwardInputs(
            layouts=(TokenLayout(grid),),
            kwargs=kwargs,
            keep_order="control video of another size" if ragged_control else None,
        )

    def install_shuffle(self, transformer: Any, shuffle: TokenShuffle) -> list[Undo]:
        """Reorder after the patch embedding and in rotary tables; restore after ``proj_out``."""

        def patches(latent: Tensor) -> Tensor:
            return shuffle.into(latent.flatten(2), 2)  # the model flattens it, too

        def timesteps(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # Wan 2.2 5B has one timestep per token.
            times = kwargs.get("timestep")
            if times is None or times.ndim != 2 or shuffle.gather is None:
                return None
            return args, {**kwargs, "timestep": shuffle.into(times, 1)}

        undo = [
            transformer.register_forward_pre_hook(timesteps, with_kwargs=True).remove,
            hook_output(transformer.patch_embedding, patches),
            hook_tables(transformer.rope, shuffle, 1),
            hook_output(transformer.proj_out, lambda tokens: shuffle.back(tokens, 1)),
        ]
        if hasattr(transformer, "vace_patch_embedding"):
            undo.append(hook_output(transformer.vace_patch_embedding, patches))
        return undo


def _grid(latent: Tensor, transformer: Any) -> tuple[int, int, int]:
    sizes = zip(latent.shape[2:], transformer.config.patch_size, strict=True)
    return tuple(n // p for n, p in sizes)
