"""Triton or plain torch: the choice of the kernels that have both."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal

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
