"""Which kernels can run: Triton or plain torch, and the one for Hopper."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dit_accel.errors import OperatorUnavailableError, OptionError

Backend = Literal["auto", "torch", "triton"]


def use_triton(backend: Backend, tensor: Tensor, why_unavailable: Callable[[], str | None]) -> bool:
    """Whether the Triton version serves this call.

    Args:
        backend: "auto" takes Triton for CUDA tensors that its kernel can take, else torch.
        tensor: whose device decides.
        why_unavailable: asked only if Triton may be used, because it imports it: what stands in
            the way, or None.

    Raises:
        OptionError: for an unknown ``backend``.
        OperatorUnavailableError: if "triton" is asked for and cannot run.
    """
    if backend not in ("auto", "torch", "triton"):
        raise OptionError(f"{backend=} must be 'auto', 'torch' or 'triton'.")
    if backend == "torch" or (backend == "auto" and not tensor.is_cuda):
        return False
    if importlib.util.find_spec("triton") is None:
        reason: str | None = "triton is not installed"
    else:
        reason = why_unavailable()
    if reason is not None and backend == "triton":
        raise OperatorUnavailableError(f"the Triton kernel cannot run this call: {reason}.")
    return reason is None


def why_no_gluon() -> str | None:
    """Say why Gluon, in which the kernel for Hopper is written, can't be used, or return None."""
    for package in ("triton", "pytorch-triton"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if tuple(int(part) for part in version.split(".")[:2]) >= (3, 6):
            return None
        return f"it needs triton 3.6 or newer (its language Gluon), not {version}"
    return "the package triton is not installed"


def why_no_hopper_kernel(
    device: torch.device, dtype: torch.dtype, head_size: int, block_size: int
) -> str | None:
    """Say why `block_sparse_hopper`, given Gluon, can't run such a call, or return None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {dtype} is not float16 or bfloat16"
    if head_size not in (64, 128):
        return f"head size {head_size} is not 64 or 128"
    if block_size != 128:
        return f"block size {block_size} is not 128"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs an NVIDIA GPU, and the tensors are on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return f"it needs a Hopper GPU (compute capability 9.0), and {device} has {capability}"
    return None
