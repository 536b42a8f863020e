"""FreeSwim's second stage as its release runs it on Wan: rows of a batch, in plain torch.

The batch holds each sample twice: the first half of the rows are windows, the second half see
everything. Only ``dispatch_attention_fn`` and the transformer's ``forward`` are replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.highres.reference import inward_window

DISPATCH = "diffusers.models.transformers.transformer_wan.dispatch_attention_fn"


class LiteralDualPath:
    """Runs a Wan transformer with windows in all steps and a full path in one of so many."""

    def __init__(
        self,
        transformer: Any,
        grid: tuple[int, int, int],
        window: tuple[int, int],
        gain: float,
        every: int,
        branches: tuple[str, ...],
    ) -> None:
        self.transformer, self.every, self.branches = transformer, every, branches
        self.mask, self.gain = inward_window(grid, window), gain
        self.text_of_layer: dict[tuple[str, int], Tensor] = {}
        self.step_of: dict[str, int] = {}
        self.dual = self.reuse = False
        self.branch, self.layer = "", 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace attention and the transformer's forward meanwhile."""
        stock, model = self.transformer.forward, self.transformer

        def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
            self.branch = model.branch_of_the_call
            step = self.step_of[self.branch] = self.step_of.get(self.branch, -1) + 1
            chosen, self.layer = self.branch in self.branches, 0
            self.dual = chosen and step % self.every == 0
            self.reuse = chosen and not self.dual
            if not self.dual:
                return stock(hidden_states=hidden_states, **kwargs)
            for name in ("timestep", "encoder_hidden_states"):
                kwargs[name] = torch.cat([kwargs[name]] * 2)
            both = stock(hidden_states=torch.cat([hidden_states] * 2), **kwargs)
            return (both[0].chunk(2)[0],)

        @contextmanager
        def cache_context(name: str, **_: Any) -> Iterator[None]:
            model.branch_of_the_call = name
            yield

        with patch(DISPATCH, self.attend):
            model.forward, model.cache_context = forward, cache_context
            try:
                yield
            finally:
                del model.forward, model.cache_context

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        """Self-attention if queries and keys are as many; else cross-attention."""
        if query.shape[1] == key.shape[1]:
            return self.self_attention(query, key, value)
        layer, self.layer = self.layer, self.layer + 1
        if self.reuse:
            return self.text_of_layer[self.branch, layer]
        if not self.dual:
            return softmax_attention(query, key, value)
        full = softmax_attention(*(x.chunk(2)[1] for x in (query, key, value)))
        self.text_of_layer[self.branch, layer] = full
        return torch.cat([full, full])

    def self_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Windows for the first half of the rows, or for all in a call without a full path."""
        scale = self.gain * query.shape[-1] ** -0.5
        if not self.dual:
            return softmax_attention(query, key, value, mask=self.mask, scale=scale)
        windows, everything = zip(*(x.chunk(2) for x in (query, key, value)), strict=True)
        return torch.cat(
            [
                softmax_attention(*windows, mask=self.mask, scale=scale),
                softmax_attention(*everything, scale=scale),
            ]
        )


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend on ``[B, N, H, D]``."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
