"""Compile the kernel for Hopper without a GPU; print the shared memory of each configuration."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dit_accel.kernels import block_sparse_hopper as kernel
from dit_accel.kernels import block_sparse_hopper_quantised as rounding
from dit_accel.kernels.tuning import HopperConfig


class NoDriver:
    """Says that there is a Hopper GPU, and can nothing else."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compiled(head_size: int, config: HopperConfig) -> Any:
    """Compile one configuration."""
    x = torch.empty(1, 300, 2, head_size, dtype=torch.bfloat16)
    index = torch.zeros(1, 1, 3, 3, dtype=torch.int32)
    return kernel._hopper_forward.warmup(
        kernel._descriptor(x, 64), kernel._descriptor(x, 128), kernel._descriptor(x, 128),
        x, torch.empty(4), index[..., 0], index, index[..., 0], index, index,
        torch.zeros(1, 128, 4, dtype=torch.int32), 0.1, 2, 300, 7, 0, 293, 8, 0, 0, 3, 3,
        D=head_size, STAGES=config.stages, TURNS=config.turns, EAGER=config.eager,
        PERSISTENT=config.persistent, WITH_LSE=True, num_warps=4, maxnreg=168, grid=(8,),
    )  # fmt: skip


def quantised(head_size: int, low: torch.dtype, eager: int) -> Any:
    """Compile the 8-bit kernel."""
    query = torch.empty(1, 2, 512, head_size, dtype=low)
    value = torch.empty(1, 2, head_size, 512, dtype=torch.float8_e4m3fn)
    x = torch.empty(1, 307, 2, head_size, dtype=torch.bfloat16)
    index = torch.zeros(1, 1, 3, 3, dtype=torch.int32)
    numbers = torch.empty(4)
    return rounding._hopper_forward.warmup(
        rounding.descriptor(query, 64), rounding.descriptor(query, 128),
        rounding.descriptor(value, head_size, 128), numbers, numbers, numbers, numbers,
        x, numbers, index[..., 0], index, index[..., 0], index, index,
        torch.zeros(1, 128, 4, dtype=torch.int32), 2, 300, 7, 384, 512, 8, 0, 0, 3, 3, 0, 300,
        D=head_size, STAGES=4, EAGER=eager, WITH_LSE=True, num_warps=4, maxnreg=168, grid=(8,),
    )  # fmt: skip


if __name__ == "__main__":
    driver.set_active(NoDriver())
    for head_size, config in (
        (128, HopperConfig(persistent=True)),
        (64, HopperConfig(stages=6, turns=False, eager=2)),
    ):
        print(compiled(head_size, config).metadata.shared)
    print(quantised(128, torch.float8_e4m3fn, 0).metadata.shared)
    print(quantised(64, torch.int8, 1).metadata.shared)
