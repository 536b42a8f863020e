"""Tile shapes and pipelining of the kernels: tables per GPU architecture, and what a card measured.

The tables serve every card, unknown ones included. `Tuning` is what ``dit-accel bench tune`` found
for one card; `dit_accel.tuning_file` keeps it, and operators hand its entries to the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

LONG_LIST = 64
"""Key tiles from which a list counts as long: the kernel for Hopper then wants other settings."""


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

    def cut_to(self, block_size: int) -> KernelConfig:
        """This configuration with tiles no larger than a block of the lists."""
        block_m, block_n = min(self.block_m, block_size), min(self.block_n, block_size)
        return replace(self, block_m=block_m, block_n=block_n)


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


def joint_config(
    capability: tuple[int, int], head_size: int, itemsize: int, query_block: int, pooled: bool
) -> KernelConfig:
    """Return the configuration of the kernel that attends at several levels.

    As `kernel_config`, but where shapes were compared: on an H100 at head size 128, PSA's levels in
    tiles of 32 keys take .88 of the time and PISA's tiles of 64 queries with three stages .96
    (`benchmarks/results/joint-sweep-h100.json`).

    Args:
        capability: CUDA compute capability, such as ``(9, 0)``.
        head_size: head size after padding to a power of two.
        itemsize: bytes per element of query, key and value.
        query_block: video tokens per query block.
        pooled: whether some blocks are attended to by their pooled keys.
    """
    usual = kernel_config(capability, head_size, itemsize)
    if capability[0] != 9 or head_size != 128 or itemsize == 4:
        return usual
    if pooled:
        return KernelConfig(128, 32, 4, 3, use_tma=True)
    return replace(usual, num_stages=3) if query_block <= 64 else usual


def quantised_config(capability: tuple[int, int], head_size: int, precision: str) -> KernelConfig:
    """Return the configuration of the 8-bit kernel: compiled without spills, not yet measured.

    Args:
        capability: CUDA compute capability, such as ``(9, 0)``.
        head_size: head size after padding to a power of two.
        precision: see `quantised_reference.py`.
    """
    hopper = capability[0] >= 9 and capability[0] < 12
    if head_size > 128:
        return KernelConfig(64, 32, 4, 2, use_tma=hopper)
    if hopper and precision != "int8":
        return KernelConfig(64, 128, 4, 3, use_tma=True)
    return KernelConfig(128, 64, 8 if head_size > 64 else 4, 3, use_tma=hopper)


@dataclass(frozen=True)
class HopperConfig:
    """How the Gluon kernel for Hopper runs; the result does not depend on it beyond rounding.

    Attributes:
        stages: buffers for a key and a value tile: 2 or 3, or (head size 64) up to 6.
        turns: whether the two groups of warps take turns at issuing products.
        eager: what is done under the exponentials, and not after the wait that follows them: 0
            leaves it to the compiler, 1 adds up the weights, 2 packs them too, two steps to a pass
            of the loop.
        persistent: whether one program per multiprocessor takes many query tiles.
    """

    stages: int = 3
    turns: bool = True
    eager: int = 0
    persistent: bool = False


def hopper_config(head_size: int, longest: int, with_text: bool) -> HopperConfig:
    """Return the configuration measured best on an H100.

    Args:
        head_size: 64 or 128.
        longest: key tiles on the longest list.
        with_text: whether there are text queries, which see everything.
    """
    # A persistent program loads its next queries early, which pays when it visits few keys; it
    # can't balance the few programs of text queries, which take many times as long.
    persistent = longest < LONG_LIST and not with_text
    if head_size == 64:
        # Exponentials take as long as products, and the groups keep apart by themselves.
        return HopperConfig(stages=6, turns=False, persistent=persistent)
    return HopperConfig(eager=1, persistent=persistent)


@dataclass(frozen=True)
class Tuning:
    """Measured settings of one card; where it has none, the tables above serve.

    Attributes:
        source: where the settings come from, in words for reports.
        block_sparse: of the Triton kernel, by padded head size and bytes per element.
        hopper: of the kernel for Hopper, by head size and "short" or "long" lists.
    """

    source: str = "built-in table"
    block_sparse: Mapping[tuple[int, int], KernelConfig] = field(default_factory=dict)
    hopper: Mapping[tuple[int, str], HopperConfig] = field(default_factory=dict)

    def kernel_config(self, head_size: int, itemsize: int) -> KernelConfig | None:
        """Return what was measured for this kind of call, or None; see `kernel_config`."""
        return self.block_sparse.get((padded_head_size(head_size), itemsize))

    def hopper_config(self, head_size: int, longest: int, with_text: bool) -> HopperConfig | None:
        """Return what was measured for this kind of call, or None; see `hopper_config`."""
        kind = "short" if longest < LONG_LIST and not with_text else "long"
        found = self.hopper.get((head_size, kind))
        # Never persistent with text, for the reason given above.
        return replace(found, persistent=False) if found and with_text else found


def padded_head_size(head_size: int) -> int:
    """Return the power of two that the Triton kernel rounds a head size up to, 16 at least."""
    return max(16, 1 << (head_size - 1).bit_length())
