"""Tile shapes and pipelining of the kernels, per GPU architecture."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelConfig:
    """How one kernel launch is cut up; the result does not depend on it beyond rounding.

    Attributes:
        block_m: query rows per program.
        block_n: keys per step.
        num_warps: warps per program.
        num_stages: depth of the load pipeline.
        use_tma: whether Hopper's copy engine loads keys and values (where strides allow it).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_tma: bool = False


def kernel_config(capability: tuple[int, int], head_size: int, itemsize: int) -> KernelConfig:
    """Return the configuration for a GPU; measured on Hopper (H200), estimated elsewhere.

    Args:
        capability: CUDA compute capability, such as ``(9, 0)``.
        head_size: head size after padding to a power of two.
        itemsize: bytes per element of query, key and value.
    """
    if itemsize == 4:
        # Full-precision products run on the ordinary units and need many registers.
        return KernelConfig(64, 32, 8, 2) if head_size <= 128 else KernelConfig(32, 16, 8, 2)
    if capability[0] >= 9 and capability[0] < 12:
        if head_size > 128:
            return KernelConfig(128, 64, 8, 2, use_tma=True)
        return KernelConfig(128, 64, 4, 2, use_tma=True)
    if head_size > 128:
        return KernelConfig(64, 32, 4, 2)
    return KernelConfig(128, 64 if head_size <= 64 else 32, 4, 3)
