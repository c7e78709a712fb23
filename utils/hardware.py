"""Which machine this is, for results: processor, GPU, driver, and the energy that the GPU takes."""

import contextlib
import ctypes
import platform
from pathlib import Path

import torch


def processor() -> str:
    """The processor's name, as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


class Gpu:
    """The GPU that this process computes on, as its driver (NVML) tells of it; or none."""

    def __init__(self):
        self._library = self._handle = None
        if not torch.cuda.is_initialized():
            return
        with contextlib.suppress(OSError, AttributeError):
            self._library = ctypes.CDLL("libnvidia-ml.so.1")
            self._library.nvmlInit_v2()
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            handle = ctypes.c_void_p()
            name = f"GPU-{uuid}".encode()
            if self._library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) == 0:
                self._handle = handle
        self._before = self._millijoules()

    def driver(self) -> str | None:
        """The version of the driver."""
        text = ctypes.create_string_buffer(80)
        if not self._library or self._library.nvmlSystemGetDriverVersion(text, len(text)):
            return None
        return text.value.decode()

    def watt_hours(self) -> float | None:
        """What it has taken since the last call, all programs on it together; None if not known."""
        now = self._millijoules()
        if now is None:
            return None
        used, self._before = now - self._before, now
        return used / 3.6e6

    def _millijoules(self) -> int | None:
        value = ctypes.c_ulonglong()
        if self._handle and not self._library.nvmlDeviceGetTotalEnergyConsumption(
            self._handle, ctypes.byref(value)
        ):
            return value.value
        return None


def facts() -> dict[str, str | None]:
    """Names of the processor, of the GPU in use and of its driver's version, None without one."""
    used = torch.cuda.is_initialized()
    return {
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if used else None,
        "driver": Gpu().driver() if used else None,
    }
