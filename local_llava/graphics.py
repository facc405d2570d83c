"""GPUs that the operating system sees, and how to install llama-cpp-python so that it uses them.

Knows where systems list such hardware, and llama.cpp's options for building. What llama.cpp itself can use already is
`devices`'s.
"""

from __future__ import annotations

import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

_SYS, _PROC = Path("/sys"), Path("/proc")

VENDORS = {"10de": "NVIDIA", "1002": "AMD", "8086": "Intel"}
"""By their numbers on the PCI bus. Others, such as those of virtual machines, have nothing to compute with."""


@dataclass(frozen=True)
class Graphics:
    """A GPU."""

    vendor: str
    """"NVIDIA", "AMD", "Intel" or "Apple"."""
    name: str


@dataclass(frozen=True)
class Recipe:
    """A way to build llama-cpp-python for a GPU."""

    backend: str
    """ggml's name of it: see `devices.Device.backend`."""
    title: str
    flag: str
    tool: str
    """A program without which it cannot be built."""
    needs: str
    """Where that comes from."""

    @property
    def ready(self) -> bool:
        """Whether the tool is there."""
        return shutil.which(self.tool) is not None

    @property
    def command(self) -> str:
        """For the shell that the system's users have."""
        pip = f"pip install --force-reinstall --no-cache-dir {pinned()}"
        if sys.platform == "win32":
            return f'$env:CMAKE_ARGS="{self.flag}"; {pip}'
        return f'CMAKE_ARGS="{self.flag}" {pip}'


_CUDA = Recipe("CUDA", "CUDA", "-DGGML_CUDA=on", "nvcc", "NVIDIA's CUDA toolkit")
_VULKAN = Recipe(
    "Vulkan",
    "Vulkan",
    "-DGGML_VULKAN=on",
    "glslc",
    "the Vulkan SDK, or libvulkan-dev, glslc and spirv-headers of a Linux distribution with Vulkan 1.4",
)
_HIP = Recipe("ROCm", "ROCm (HIP)", "-DGGML_HIP=on", "hipcc", "AMD's ROCm; it supports fewer GPUs than Vulkan")
_METAL = Recipe("MTL", "Metal", "-DGGML_METAL=on", "xcrun", "Apple's command line tools: xcode-select --install")

RECIPES: dict[str, tuple[Recipe, ...]] = {
    "NVIDIA": (_CUDA, _VULKAN),
    "AMD": (_VULKAN, _HIP),
    "Intel": (_VULKAN,),
    "Apple": (_METAL,),
}
"""By vendor, what to try first before the others."""


def pinned() -> str:
    """The requirement of llama-cpp-python, with its version, as this package states it."""
    try:
        stated = requires("local-llava") or []
    except PackageNotFoundError:
        stated = []
    return next((text.replace(" ", "") for text in stated if text.startswith("llama-cpp-python")), "llama-cpp-python")


def visible() -> list[Graphics]:
    """The GPUs of this computer, whether llama.cpp can use them or not."""
    if sys.platform == "darwin":
        return [Graphics("Apple", "Apple GPU")] if platform.machine() == "arm64" else []
    return list(_windows() if sys.platform == "win32" else _linux())


def _linux() -> Iterator[Graphics]:
    nvidia = [_field(path, "Model") for path in sorted(_PROC.glob("driver/nvidia/gpus/*/information"))]
    for device in sorted(_SYS.glob("bus/pci/devices/*")):
        # 0x03 is the class of displays, of which 0x0302 drive none and only compute.
        vendor = VENDORS.get(_read(device / "vendor").removeprefix("0x"))
        if vendor and _read(device / "class").startswith("0x03"):
            model = nvidia.pop(0) if vendor == "NVIDIA" and nvidia else ""
            yield Graphics(vendor, model or f"{vendor} GPU {_read(device / 'device').removeprefix('0x')}")
    # Containers may have the driver without the bus.
    yield from (Graphics("NVIDIA", model or "NVIDIA GPU") for model in nvidia)


def _windows() -> Iterator[Graphics]:
    if sys.platform != "win32":  # which tells type checkers that winreg is there
        return
    import winreg

    # The class of displays: https://learn.microsoft.com/windows-hardware/drivers/install/system-defined-device-setup-classes-available-to-vendors
    key = r"SYSTEM\CurrentControlSet\Control\Class\{4d36e968-e325-11ce-bfc1-08002be10318}"
    for number in range(32):
        try:
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, rf"{key}\{number:04d}") as entry:
                device, name = (winreg.QueryValueEx(entry, value)[0] for value in ("MatchingDeviceId", "DriverDesc"))
        except OSError:
            continue
        found = re.search(r"ven_([0-9a-f]{4})", str(device).lower())
        if found and found[1] in VENDORS:
            yield Graphics(VENDORS[found[1]], str(name))


def _field(path: Path, name: str) -> str:
    found = re.search(rf"^{name}:\s*(.+)$", _read(path), re.MULTILINE)
    return found[1].strip() if found else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
