"""The computer's processors as ggml sees them: CPU cores and GPUs, with their memory.

Knows ggml's list of devices and where operating systems tell of cores. Knows no model; what to put where is
`placement`'s. GPUs that this build of llama.cpp has no backend for are `graphics`'s.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import psutil

from local_llava import control_groups, ggml

DeviceKind: TypeAlias = Literal["cpu", "gpu", "igpu", "accelerator"]

_KINDS: dict[int, DeviceKind] = {ggml.CPU: "cpu", ggml.GPU: "gpu", ggml.IGPU: "igpu", ggml.ACCEL: "accelerator"}

_SYS = Path("/sys")


@dataclass(frozen=True)
class Device:
    """A device of ggml's list."""

    handle: int
    """ggml's pointer, for this process."""
    name: str
    """Short, such as "CUDA0"."""
    description: str
    """What it is sold as."""
    kind: DeviceKind
    backend: str
    """Part of ggml that drives it: "CPU", "CUDA", "Metal", "Vulkan", "ROCm", ..."""
    free: int
    """Bytes of its memory that are free; 0 with `total` where it does not tell."""
    total: int
    id: str | None = None
    """Address on the PCI bus, where it is known: the same for two backends of one GPU."""

    @property
    def unified(self) -> bool:
        """Whether its memory is the computer's own: a GPU inside a processor, and drivers that compute on the CPU."""
        apple = self.backend in ("Metal", "MTL") and platform.machine() == "arm64"
        return self.kind in ("cpu", "igpu") or apple or "llvmpipe" in self.description


def devices() -> list[Device]:
    """All devices, in ggml's order, with what is free now.

    Raises:
        EngineError: llama-cpp-python's libraries cannot be loaded.
    """
    g = ggml.functions()
    return [_device(g.backend_dev_get(i)) for i in range(g.backend_dev_count())]


def gpus() -> list[Device]:
    """The GPUs that llama.cpp spreads layers over: `llama_prepare_model_devices` in its src/llama.cpp.

    Those inside a processor count only where there is no other. A GPU that two backends drive counts once.
    """
    found: list[Device] = []
    for device in devices():
        twice = device.id is not None and any(device.id == other.id for other in found)
        if device.kind == "gpu" and not twice:
            found.append(device)
    if found:
        return found
    inside = [device for device in devices() if device.kind == "igpu"]
    return [device for device in inside if device.backend == inside[0].backend]


def backends() -> list[str]:
    """The parts of ggml that this build of llama-cpp-python has, whether or not they find a device."""
    g = ggml.functions()
    return [_text(g.backend_reg_name(g.backend_reg_get(i))) for i in range(g.backend_reg_count())]


def _device(handle: int) -> Device:
    g = ggml.functions()
    props = ggml.DeviceProps()
    g.backend_dev_get_props(handle, ctypes.byref(props))
    registry = g.backend_reg_name(g.backend_dev_backend_reg(handle))
    return Device(
        handle=handle,
        name=_text(props.name),
        description=_text(props.description),
        kind=_KINDS.get(props.type, "accelerator"),
        backend=_text(registry),
        free=props.memory_free,
        total=props.memory_total,
        id=_text(props.device_id) or None,
    )


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace").strip()


def physical_cores() -> int:
    """Cores that a program may keep busy: the default for threads.

    Two threads on one core are slower than one where both only multiply; slow cores, where a processor has two kinds,
    hold up the fast ones, since ggml deals out equal shares. What the process may use bounds it: the affinity mask, and
    the control groups' quotas of CPU time, as containers and services have them.
    """
    return max(1, min(_cores(), ggml.available_cpus(), *_quota()))


def _cores() -> int:
    if sys.platform == "darwin":
        return _performance_cores() or psutil.cpu_count(logical=False) or 1
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    siblings = {text for cpu in usable if (text := _read(f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))}
    fast = _cpu_list(_read("devices/cpu_core/cpus"))  # of Intel's processors with two kinds of cores
    if fast & usable:
        siblings = {text for text in siblings if _cpu_list(text) & fast & usable}
    return len(siblings) or psutil.cpu_count(logical=False) or ggml.available_cpus()


def _performance_cores() -> int:
    """Of Apple's processors, the fast ones."""
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    try:
        failed = ctypes.CDLL(None).sysctlbyname(
            b"hw.perflevel0.physicalcpu", ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
        )
    except (OSError, AttributeError):
        return 0
    return 0 if failed else value.value


def _quota() -> list[int]:
    """Cores' worth of CPU time that the control groups give, in either version."""
    shares = []
    for group in control_groups.directories("cpu"):
        for quota, period in (("cpu.max", ""), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            words = f"{_line(group / quota)} {_line(group / period) if period else ''}".split()
            if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
                shares.append(math.ceil(int(words[0]) / int(words[1])))
    return shares


def _cpu_list(text: str) -> set[int]:
    """ "0-3,8" -> {0, 1, 2, 3, 8}."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _read(path: str) -> str:
    """A line that Linux tells under /sys, or nothing."""
    return _line(_SYS / path)


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
