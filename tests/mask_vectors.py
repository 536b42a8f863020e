"""Masks under tests/vectors, as parameters of tests; and blocks of a dense mask."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "vectors"


def mask_vectors(kind: str, prefix: str) -> list[Any]:
    """Return (parameters, mask) of each vector whose name starts with ``prefix``."""
    packed = np.load(FOLDER / f"{kind}_masks.npz")
    cases = []
    for entry in json.loads((FOLDER / f"{kind}_masks.json").read_text()):
        name = entry["name"]
        if name.startswith(prefix):
            shape = tuple(packed[f"{name}__shape"])
            bits = np.unpackbits(packed[name])[: math.prod(shape)]
            mask = torch.from_numpy(bits.reshape(shape).astype(bool))
            cases.append(pytest.param(entry, mask, id=name))
    return cases


def digest(mask: Tensor) -> str:
    """Return the SHA-256 that the vectors' tables give for a mask."""
    return hashlib.sha256(np.packbits(mask.numpy().reshape(-1)).tobytes()).hexdigest()


def any_and_all(mask: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Bool ``[N, N]`` -> whether any, and whether all, pairs of each pair of blocks are set."""
    rest = -len(mask) % block_size
    blocks = (len(mask) + rest) // block_size
    shape = (blocks, block_size, blocks, block_size)
    pad = (0, rest, 0, rest)
    some = torch.nn.functional.pad(mask, pad, value=False).view(shape)
    every = torch.nn.functional.pad(mask, pad, value=True).view(shape)
    return some.any(3).any(1), every.all(3).all(1)
