"""How the running forward's tokens are spread over the ranks, and one attention call over them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.errors import GridMismatchError
from dit_accel.parallel.exchange import gather_heads, scatter_heads
from dit_accel.parallel.groups import SequenceGroup
from dit_accel.parallel.shares import Shares

Streams = tuple[Tensor, Tensor | None]
"""Image (or video) tokens ``[B, N, H, D]`` and text tokens, if they share the sequence."""
QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Split:
    """Where the tokens of one forward are.

    Attributes:
        group: the ranks.
        shares: of the image stream.
        text_length: text tokens of the whole sequence; 0 where text has its own attention.
        text_first: whether a rank's text comes before its image tokens in attention.
        tail: image tokens of the stream that are no part of the grid, and come first.
    """

    group: SequenceGroup
    shares: Shares
    text_length: int = 0
    text_first: bool = False
    tail: int = 0

    @property
    def image_rows(self) -> int:
        """Image tokens that a rank holds, padding included."""
        return self.shares.length // self.group.ulysses.size

    @property
    def text_rows(self) -> int:
        """Text tokens that a rank holds, padding included."""
        return math.ceil(self.text_length / self.group.ranks)

    @property
    def text_padding(self) -> int:
        """Text tokens to add so that all ranks hold as many."""
        return self.text_rows * self.group.ranks - self.text_length

    @property
    def own_image_rows(self) -> int:
        """Image tokens that this rank holds, without padding."""
        before = self.group.ulysses.rank * self.image_rows
        count = self.shares.count(self.group.ring.rank) + self.tail
        return min(max(count - before, 0), self.image_rows)

    @property
    def part_text_rows(self) -> int:
        """Text tokens that this ring part holds, without padding."""
        each = self.text_rows * self.group.ulysses.size
        return min(max(self.text_length - self.group.ring.rank * each, 0), each)

    def first_head(self, query: Tensor) -> int:
        """Return which head of the model this rank's first one is, of ``[B, N, h, D]``."""
        return self.group.ulysses.rank * query.shape[2]

    def heads(self, query: Tensor) -> tuple[int, int]:
        """Return this rank's first head, and how many ranks share the heads."""
        return self.first_head(query), self.group.ulysses.size

    def attend(
        self, qkv: QKV, whole: Callable[[QKV], Tensor], ring: Callable[..., Streams]
    ) -> Tensor:
        """Return the attention of this rank's tokens, ``[B, L, H, D]``.

        Args:
            qkv: this rank's share of query, key and value.
            whole: attends to a sequence without padding, of this rank's heads.
            ring: ``ring(split, query, key, value)`` of `Streams`: likewise for one part of it.
        """
        self.group.check_heads(qkv[0].shape[2])
        rows = qkv[0].shape[1]
        if rows not in (self.image_rows, self.image_rows + self.text_rows):
            raise GridMismatchError(
                f"a layer attends over {rows} tokens of each rank, but {self.image_rows} image and "
                f"{self.text_rows} text tokens were dealt out."
            )
        with_text = rows > self.image_rows
        received = scatter_heads(qkv, self.group.ulysses)
        streams = [self._streams(tokens, with_text) for tokens in received]
        if self.group.ring.size > 1:
            image, text = ring(self, *streams)
        else:
            q, k, v = (self._joined(stream) for stream in streams)
            image, text = self._parted(whole((q, k, v)), with_text)
        return gather_heads(self._dealt(image, text), self.group.ulysses)

    def _streams(self, tokens: Tensor, with_text: bool) -> Streams:
        """Part ``[P, B, L, h, D]`` into the streams ``[B, P * L, h, D]``."""
        if not with_text:
            return tokens.movedim(0, 1).flatten(1, 2), None
        sizes = [self.image_rows, self.text_rows]
        found = tokens.split(sizes[::-1] if self.text_first else sizes, dim=2)
        image, text = (part.movedim(0, 1).flatten(1, 2) for part in
                       (found[::-1] if self.text_first else found))  # fmt: skip
        return image, text

    def _dealt(self, image: Tensor, text: Tensor | None) -> Tensor:
        """Undo `_streams`."""
        ranks = self.group.ulysses.size
        parts = [part.unflatten(1, (ranks, -1)).movedim(1, 0) for part in (image, text)
                 if part is not None]  # fmt: skip
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts[::-1] if self.text_first else parts, dim=2)

    def _joined(self, stream: Streams) -> Tensor:
        """Put both streams together as attention without ranks sees them, without padding."""
        image, text = stream
        image = image[:, : self.shares.count(0) + self.tail]
        if text is None:
            return image
        text = text[:, : self.text_length]
        return torch.cat([text, image] if self.text_first else [image, text], 1)

    def _parted(self, tokens: Tensor, with_text: bool) -> Streams:
        """Undo `_joined`; what stands in the padding is of no account."""
        image, text = tokens, None
        if with_text:
            length = self.text_length
            text = tokens[:, :length] if self.text_first else tokens[:, -length:]
            image = tokens[:, length:] if self.text_first else tokens[:, :-length]
            text = padded(text, self.text_rows * self.group.ranks)
        return padded(image, self.shares.length), text


def padded(tokens: Tensor, length: int) -> Tensor:
    """Return ``[B, N, H, D]`` with zeros behind, ``length`` tokens in all."""
    missing = length - tokens.shape[1]
    if missing == 0:
        return tokens
    return torch.cat([tokens, tokens.new_zeros(len(tokens), missing, *tokens.shape[2:])], 1)
