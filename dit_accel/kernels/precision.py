"""Which precisions there are beside the tensors' own, and who can run them."""

from __future__ import annotations

import importlib.util

import torch

from dit_accel.errors import OperatorUnavailableError, OptionError, did_you_mean
from dit_accel.kernels.backend import why_no_gluon, why_no_hopper_kernel

PRECISIONS = ("fp8", "int8_fp8", "int8")
"""See `quantised_reference.py`. "int8" runs on Ampere and newer; the others from Ada on."""


def check_precision(precision: str | None) -> None:
    """Raise `OptionError` unless ``precision`` is None or a name that is known."""
    if precision is not None and precision not in PRECISIONS:
        raise OptionError(f"unknown precision {precision!r}.{did_you_mean(precision, PRECISIONS)}")


def why_no_precision(
    precision: str, device: torch.device, dtype: torch.dtype, head_size: int, block_size: int
) -> str | None:
    """Say why the 8-bit kernel cannot run such a call, or return None if it can.

    Raises:
        OptionError: if there is no such precision.
    """
    check_precision(precision)
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it rounds float16 or bfloat16 tensors, not {dtype}"
    if not 1 <= head_size <= 256:
        return f"it takes head sizes up to 256, not {head_size}"
    if block_size < 32:
        return f"it takes blocks of at least 32 tokens, not {block_size}"
    if reason := _why_not_on(precision, device):
        return reason
    import triton

    if triton.knobs.runtime.interpret and dtype == torch.bfloat16 and precision == "int8":
        return "Triton's interpreter multiplies the bit patterns of bfloat16, not the numbers"
    return None


def why_no_hopper_precision(
    precision: str, device: torch.device, dtype: torch.dtype, head_size: int, block_size: int
) -> str | None:
    """Say why `block_sparse_hopper_quantised` cannot run such a call, or return None if it can."""
    check_precision(precision)
    if precision == "int8":
        return "its values are in 8 bits too: it has 'fp8' and 'int8_fp8', not 'int8'"
    return why_no_gluon() or why_no_hopper_kernel(device, dtype, head_size, block_size)


def check_device(precision: str | None, device: torch.device) -> None:
    """Raise `OperatorUnavailableError` if nothing on ``device`` can run with this precision."""
    if precision is not None and (reason := _why_not_on(precision, device)):
        raise OperatorUnavailableError(
            f"{precision=} can't run here: {reason}. Leave precision out to attend in the tensors' "
            "own dtype."
        )


def _why_not_on(precision: str, device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    import triton

    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs an NVIDIA GPU, and the tensors are on {device}"
    needed = (8, 0) if precision == "int8" else (8, 9)
    capability = torch.cuda.get_device_capability(device)
    if capability < needed:
        return f"it needs compute capability {needed} or newer, and {device} has {capability}"
    return None
