"""Which machine this is, for results: processor, GPU, driver, and the energy that the GPU takes."""

import contextlib
import ctypes
import platform
import re
from pathlib import Path

import torch


def processor() -> str:
    """The processor's name, as the system tells it."""
    with contextlib.suppress(OSError):
        if name := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()):
            return name[1].strip()
    return platform.processor() or platform.machine()


class Gpu:
    """The GPU that this process computes on, as its driver (NVML) tells of it; or none."""

    def __init__(self):
        self._library = self._handle = self._before = None
        if not torch.cuda.is_initialized():
            return
        with contextlib.suppress(OSError, AttributeError):
            self._library = ctypes.CDLL("libnvidia-ml.so.1")
            self._library.nvmlInit_v2()
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            name, handle = f"GPU-{uuid}".encode(), ctypes.c_void_p()
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
        before, self._before = self._before, self._millijoules()
        return None if None in (before, self._before) else (self._before - before) / 3.6e6

    def _millijoules(self) -> int | None:
        total = ctypes.c_ulonglong()
        ask = self._handle and self._library.nvmlDeviceGetTotalEnergyConsumption
        return total.value if ask and not ask(self._handle, ctypes.byref(total)) else None


def facts() -> dict[str, str | None]:
    """Names of the processor, of the GPU in use and of its driver's version, None without one."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_initialized() else None
    return {"processor": processor(), "gpu": gpu, "driver": Gpu().driver()}
