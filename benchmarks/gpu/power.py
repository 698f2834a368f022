"""Energy that a GPU has drawn, as its driver counts it."""

from __future__ import annotations

import ctypes

import torch

_LIBRARY = "libnvidia-ml.so.1"


class EnergyMeter:
    """The driver's counter of one GPU, which it renews some ten times a second: for spans of seconds, not for kernels.

    Without a GPU, without NVIDIA's management library or on a GPU that does not count, every reading is 0.

    Args:
        device: Index of the GPU among those this process sees.

    Source: `nvmlDeviceGetTotalEnergyConsumption` of NVIDIA's management library (NVML).
    """

    def __init__(self, device: int = 0) -> None:
        self._library: ctypes.CDLL | None = None
        self._handle = ctypes.c_void_p()
        if not torch.cuda.is_available():
            return
        try:
            library = ctypes.CDLL(_LIBRARY)
        except OSError:
            return
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        failed = library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(self._handle))
        self._library = None if failed else library

    def joules(self) -> float:
        """Joules since the driver was loaded; the difference of two readings is what counts."""
        if self._library is None:
            return 0.0
        millijoules = ctypes.c_ulonglong()
        failed = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(millijoules))
        return 0.0 if failed else millijoules.value / 1e3
