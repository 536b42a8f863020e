"""Stable Diffusion 3 and 3.5: joint blocks over [image | text], text last.

Stock diffusers calls torch's attention directly in this family, so its processors are replaced,
while accelerated, by ones that go through diffusers' attention dispatcher; the maths is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_accel.call import TokenLayout
from dit_accel.errors import UnknownPipelineError
from dit_accel.pipelines.base import (
    ForwardInputs,
    PipelineFamily,
    TokenShuffle,
    Undo,
    block_plan,
    encoded_image,
    hook_output,
)


@dataclass(frozen=True)
class StableDiffusion3(PipelineFamily):
    """SD3 and SD3.5, with their dual attention layers (``attn2`` sees the image alone)."""

    name: ClassVar[str] = "sd3"
    transformer_classes: ClassVar[tuple[str, ...]] = ("SD3Transformer2DModel",)
    pipelines: ClassVar[str] = "StableDiffusion3Pipeline (3, 3.5) and its img2img and inpaint forms"
    repeated_blocks: ClassVar[tuple[str, ...]] = ("JointTransformerBlock",)
    block_output: ClassVar[tuple[str, ...]] = ("text", "video")
    text_pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)

    def attention_layers(self, transformer: Any) -> list[Any]:
        """Return each block's joint attention, followed by its image-only one where it has one."""
        layers = []
        for block in transformer.transformer_blocks:
            layers.append(block.attn)
            if getattr(block, "attn2", None) is not None:
                layers.append(block.attn2)
        return layers

    def blocks(self, transformer: Any) -> list[nn.Module]:
        """Return the joint blocks; the last one returns no text."""
        return list(transformer.transformer_blocks)

    def encode(self, pipe: Any, frames: Tensor) -> Tensor:
        """Shift and scale the VAE's latents; see `PipelineFamily.encode`."""
        return encoded_image(pipe.vae, frames)

    def modulated(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the block's adaptive norm."""
        return block.norm1(kwargs["hidden_states"], emb=kwargs["temb"])[0]

    def read_inputs(self, transformer: Any, kwargs: dict[str, Any]) -> ForwardInputs:
        """Take the grid from the latent's shape ``[B, C, H, W]``."""
        height, width = kwargs["hidden_states"].shape[-2:]
        patch = transformer.config.patch_size
        text = kwargs["encoder_hidden_states"].shape[1]
        return ForwardInputs((TokenLayout((1, height // patch, width // patch), text),), kwargs)

    def split_plan(self) -> dict[str, Any]:
        """Split both streams in front of the first block; see `PipelineFamily.split_plan`."""
        return block_plan("transformer_blocks.0")

    def install_shuffle(self, transformer: Any, shuffle: TokenShuffle) -> list[Undo]:
        """Reorder after ``pos_embed`` (and ControlNet residuals); restore after ``proj_out``."""

        def residuals(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            states = kwargs.get("block_controlnet_hidden_states")
            if states is None or shuffle.gather is None:
                return None
            reordered = [shuffle.into(tokens, 1) for tokens in states]
            return args, {**kwargs, "block_controlnet_hidden_states": reordered}

        return [
            hook_output(transformer.pos_embed, lambda tokens: shuffle.into(tokens, 1)),
            transformer.register_forward_pre_hook(residuals, with_kwargs=True).remove,
            hook_output(transformer.proj_out, lambda tokens: shuffle.back(tokens, 1)),
        ]

    def install_processors(self, transformer: Any) -> list[Undo]:
        """Give every layer its own `DispatchedJointAttention`."""
        undo: list[Undo] = []
        for layer in self.attention_layers(transformer):
            stock = layer.processor
            if type(stock).__name__ not in _REPLACED:
                raise UnknownPipelineError(
                    f"attention processor {type(stock).__name__} of {type(transformer).__name__} "
                    f"is not supported; supported: {', '.join(_REPLACED)}. Unload IP-Adapters and "
                    "other custom processors before accelerating."
                )
            layer.processor = DispatchedJointAttention()
            undo.append(partial(setattr, layer, "processor", stock))
        return undo


_REPLACED = ("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0")


class DispatchedJointAttention:
    """Joint attention of SD3 through diffusers' dispatcher, fused projections included."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run one layer; tokens ``[B, N, C]`` in and out, as in the stock processor."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        heads = (attn.heads, -1)
        qkv = [x.unflatten(-1, heads) for x in _project(attn, hidden_states, "to_{}")]
        qkv[0] = qkv[0] if attn.norm_q is None else attn.norm_q(qkv[0])
        qkv[1] = qkv[1] if attn.norm_k is None else attn.norm_k(qkv[1])
        if encoder_hidden_states is not None:
            text = [
                x.unflatten(-1, heads) for x in _project(attn, encoder_hidden_states, "add_{}_proj")
            ]
            text[0] = text[0] if attn.norm_added_q is None else attn.norm_added_q(text[0])
            text[1] = text[1] if attn.norm_added_k is None else attn.norm_added_k(text[1])
            qkv = [torch.cat(pair, dim=1) for pair in zip(qkv, text, strict=True)]

        out = dispatch_attention_fn(
            *qkv,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2, 3).to(qkv[0].dtype)
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](out))
        image, text_out = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        if not attn.context_pre_only:
            text_out = attn.to_add_out(text_out)
        return attn.to_out[1](attn.to_out[0](image)), text_out


def _project(attn: Any, tokens: Tensor, pattern: str) -> list[Tensor]:
    """Return query, key and value projections, fused into one matrix or not."""
    fused = getattr(attn, "to_qkv" if pattern == "to_{}" else "to_added_qkv", None)
    if fused is not None and getattr(attn, "fused_projections", False):
        return list(fused(tokens).chunk(3, dim=-1))
    return [getattr(attn, pattern.format(letter))(tokens) for letter in "qkv"]
