"""Energy that a GPU has used, as its driver counts it."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

_LIBRARY = "libnvidia-ml.so.1"  # comes with the driver


class EnergyMeter:
    """Reads the counter of one device; there is none before Volta, for MIG slices and elsewhere."""

    def __init__(self, device: str | torch.device) -> None:
        self._library: Any = None
        self._handle = ctypes.c_void_p()
        where = torch.device(device)
        if where.type != "cuda":
            return
        # Not by its index: CUDA may see fewer devices than the driver, and in another order.
        uuid = getattr(torch.cuda.get_device_properties(where), "uuid", None)
        if uuid is None:
            return
        try:
            library = ctypes.CDLL(_LIBRARY)
            name = f"GPU-{str(uuid).removeprefix('GPU-')}".encode()
            failed = library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(
                name, ctypes.byref(self._handle)
            )
        except (OSError, AttributeError):
            return
        if not failed:
            self._library = library

    def joules(self) -> float | None:
        """Return joules since the driver was loaded, or None if the driver doesn't count them."""
        if self._library is None:
            return None
        millijoules = ctypes.c_ulonglong()
        if self._library.nvmlDeviceGetTotalEnergyConsumption(
            self._handle, ctypes.byref(millijoules)
        ):
            return None
        return millijoules.value / 1e3
