"""Where FreeSwim keeps tensors between steps: on their device, or in CPU memory."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

PIECE_BYTES = 2**26
"""CPU memory is pinned in pieces of this size, because torch rounds each up to a power of two."""


@dataclass
class TensorStore:
    """Tensors by key; a new one takes the place, and the memory, of the one before.

    Args:
        offload: keep what comes from a GPU in pinned CPU memory. Copies run beside the
            computation, on a stream of their own; `get` asked for one key begins to fetch the key
            that was put after it.
    """

    offload: bool = False
    _kept: dict[Hashable, Tensor | _OnHost] = field(default_factory=dict)
    _ahead: dict[Hashable, tuple[Tensor, torch.cuda.Event]] = field(default_factory=dict)
    _stream: torch.cuda.Stream | None = None

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a tensor, which nobody may change afterwards."""
        self._ahead.pop(key, None)
        if not (self.offload and tensor.is_cuda):
            self._kept[key] = tensor
            return
        before = self._kept.get(key)
        if not isinstance(before, _OnHost) or not before.fits(tensor):
            self._kept[key] = before = _OnHost.like(tensor)
        stream = self._side_stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            before.fill(tensor)
        tensor.record_stream(stream)

    def get(self, key: Hashable) -> Tensor:
        """Return a kept tensor on the device that it came from.

        Raises:
            KeyError: if there is none.
        """
        kept = self._kept[key]
        if isinstance(kept, Tensor):
            return kept
        self._fetch(key)
        tensor, arrived = self._ahead.pop(key)
        current = torch.cuda.current_stream(tensor.device)
        current.wait_event(arrived)
        tensor.record_stream(current)
        keys = list(self._kept)
        following = keys.index(key) + 1
        if following < len(keys):
            self._fetch(keys[following])
        return tensor

    def clear(self) -> None:
        """Let go of everything."""
        if self._stream is not None:
            self._stream.synchronize()
        self._ahead.clear()
        self._kept.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors kept."""
        return sum(tensor.nbytes for tensor in self._kept.values())

    def _fetch(self, key: Hashable) -> None:
        """Begin to bring a tensor back to its device."""
        kept = self._kept[key]
        if key in self._ahead or isinstance(kept, Tensor):
            return
        stream = self._side_stream(kept.device)
        with torch.cuda.stream(stream):
            tensor = kept.copied()
        self._ahead[key] = tensor, stream.record_event()

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream


@dataclass
class _OnHost:
    """A tensor in pieces of pinned CPU memory."""

    device: torch.device
    shape: torch.Size
    pieces: list[Tensor]

    @classmethod
    def like(cls, tensor: Tensor) -> _OnHost:
        """Return room for a tensor."""
        step = PIECE_BYTES // tensor.element_size()
        pieces = [
            torch.empty(min(step, tensor.numel() - at), dtype=tensor.dtype, pin_memory=True)
            for at in range(0, tensor.numel(), step)
        ]
        return cls(tensor.device, tensor.shape, pieces)

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor can take the place of the one held."""
        mine = self.device, self.shape, self.pieces[0].dtype
        return mine == (tensor.device, tensor.shape, tensor.dtype)

    def fill(self, tensor: Tensor) -> None:
        """Copy a tensor in; the copy may still be under way afterwards."""
        flat = tensor.reshape(-1)
        for piece, part in zip(self.pieces, flat.split(self.pieces[0].numel()), strict=True):
            piece.copy_(part, non_blocking=True)

    def copied(self) -> Tensor:
        """Return a copy on the device, which may still be under way."""
        tensor = torch.empty(self.shape, dtype=self.pieces[0].dtype, device=self.device)
        parts = tensor.view(-1).split(self.pieces[0].numel())
        for piece, part in zip(self.pieces, parts, strict=True):
            part.copy_(piece, non_blocking=True)
        return tensor


def free_bytes(device: torch.device) -> int | None:
    """Return how much memory a device, or the CPU, has left; None if it can't be told."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kibibytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kibibytes[0]) * 1024 if kibibytes and device.type == "cpu" else None
