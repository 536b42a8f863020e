"""What a method is told about one attention call: where methods and model families meet."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.grid import Grid


@dataclass(frozen=True)
class TokenLayout:
    """What the rows of one attention call's query, key and value are.

    Attributes:
        grid: video (or image) tokens as (T, H, W).
        text_length: text tokens in the same sequence; 0 where text has its own cross-attention.
        text_first: whether the text rows come before the video rows.
    """

    grid: Grid
    text_length: int = 0
    text_first: bool = False

    @property
    def video_length(self) -> int:
        """Number of video tokens."""
        return math.prod(self.grid)

    @property
    def num_tokens(self) -> int:
        """Number of video and text tokens."""
        return self.video_length + self.text_length


@dataclass(frozen=True)
class AttentionCall:
    """One self-attention call of a denoising transformer.

    Attributes:
        layout: the tokens.
        layer: index among the model's attention layers, from 0.
        num_layers: how many such layers the model has.
        step: index of the denoising step, from 0; None outside a pipeline's loop.
        num_steps: number of denoising steps of this generation; None if unknown.
        branch: "cond", "uncond", "cond_uncond" (both in one batch) or a pipeline's own name.
        first_head: which of the layer's heads the first one of the call's is; not 0 where several
            GPUs share the heads.
        head_ranks: how many GPUs share the layer's heads; each has as many.
    """

    layout: TokenLayout
    layer: int = 0
    num_layers: int = 1
    step: int | None = None
    num_steps: int | None = None
    branch: str = "cond"
    first_head: int = 0
    head_ranks: int = 1


def text_last(tokens: Tensor, layout: TokenLayout) -> Tensor:
    """Move text rows of ``[B, N, H, D]`` behind the video rows, where they are not yet."""
    if not (layout.text_first and layout.text_length):
        return tokens
    return torch.cat([tokens[:, layout.text_length :], tokens[:, : layout.text_length]], 1)


def text_back(tokens: Tensor, layout: TokenLayout, dim: int) -> Tensor:
    """Undo `text_last` along ``dim``."""
    if not (layout.text_first and layout.text_length):
        return tokens
    return torch.cat(tokens.split([layout.video_length, layout.text_length], dim)[::-1], dim)
