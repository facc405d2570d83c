"""Proves the GPU path on a machine without a GPU: llama.cpp's Vulkan backend on Mesa's lavapipe, a driver that computes
on the CPU.

    python scripts/vulkan.py            # install, build (7 minutes on two cores, once), check
    python scripts/vulkan.py --build    # without the checks
    python scripts/vulkan.py --check    # only those: tests/gpu, and `local-llava doctor --self-test`
    python scripts/vulkan.py --check -k second    # some of them

It is not part of `make test`. What it makes lies in one folder outside the repository, `--dir`; deleting that undoes
all but the Debian packages, which are installed only where it runs as root. Checked on Debian 12; its headers of Vulkan
are too old for ggml, which needs 1.4, so those of Debian 13 are unpacked beside the venv. On a machine with a real GPU,
run `pytest tests/gpu/check_offload.py` with a build for that GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mesa-vulkan-drivers", "libvulkan-dev", "glslc", "spirv-headers")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "local-llava-vulkan"
    parser.add_argument("--dir", type=Path, default=default, help="where headers and venv go (default: %(default)s)")
    parser.add_argument("--build", action="store_true", help="only install and build")
    parser.add_argument("--check", action="store_true", help="only run the checks")
    arguments, for_pytest = parser.parse_known_args()
    folder: Path = arguments.dir.resolve()
    if not arguments.check:
        install_packages()
        build(folder, headers(folder))
    return 0 if arguments.build else check(folder, for_pytest)


def install_packages() -> None:
    missing = [name for name in PACKAGES if subprocess.run(["dpkg", "-s", name], capture_output=True).returncode]
    if not missing:
        return
    if os.geteuid() != 0:
        sys.exit(f"not installed: run as root: apt-get install --no-install-recommends {' '.join(missing)}")
    run(["apt-get", "update"])
    run(["apt-get", "install", "-y", "--no-install-recommends", *missing])


def headers(folder: Path) -> Path:
    """A folder with headers that are new enough: the system's, or those of Debian 13, unpacked but not installed."""
    for include in (Path("/usr/include"), folder / "headers/usr/include"):
        core = include / "vulkan/vulkan_core.h"
        found = re.search(r"\bVK_API_VERSION_1_4\b", core.read_text()) if core.exists() else None
        if found and (include / "vulkan/vulkan.hpp").exists():
            return include
    apt = folder / "apt"  # its own lists and cache: the system's stay as they are
    (apt / "lists/partial").mkdir(parents=True, exist_ok=True)
    (apt / "cache/archives/partial").mkdir(parents=True, exist_ok=True)
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {archive()} trixie main\n")
    options = {
        "Dir::Etc::SourceList": apt / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": apt / "lists",
        "Dir::Cache": apt / "cache",
        "APT::Sandbox::User": "root",
    }
    command = ["apt-get", *(f"-o{key}={value}" for key, value in options.items())]
    run([*command, "update"])
    run([*command, "download", "libvulkan-dev"], cwd=apt)
    (package,) = apt.glob("libvulkan-dev_*.deb")
    run(["dpkg-deb", "--extract", str(package), str(folder / "headers")])
    shutil.rmtree(apt)
    return folder / "headers/usr/include"


def archive() -> str:
    """Where this machine's apt finds Debian, as it is set up."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    found = [uri for uri in told if uri.rstrip("/").endswith("/debian")]
    if not found:
        sys.exit("apt knows no archive of Debian to take newer headers from: install those of Vulkan 1.4")
    return found[0]


def build(folder: Path, include: Path) -> None:
    """A venv with this checkout, editable, and the pinned llama-cpp-python with Vulkan."""
    pin = re.search(r'"(llama-cpp-python==[^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert pin, "pyproject.toml pins no llama-cpp-python"
    done = folder / "built"
    if done.exists() and done.read_text() == pin[1]:
        return
    venv.create(folder / "venv", with_pip=True)
    pip = [str(folder / "venv/bin/python"), "-m", "pip", "install", "--quiet"]
    # A wheel that pip built or found before would be one without Vulkan.
    flags = f"-DGGML_VULKAN=on -DVulkan_INCLUDE_DIR={include}"
    run([*pip, "--no-cache-dir", "--no-binary", "llama-cpp-python", pin[1]], env={"CMAKE_ARGS": flags})
    run([*pip, "--editable", str(ROOT), "pytest"])
    done.write_text(pin[1])


def check(folder: Path, for_pytest: list[str]) -> int:
    python = str(folder / "venv/bin/python")
    # Naming the device makes ggml take it though it is a CPU. Validation layers and other drivers stay out.
    env = {"GGML_VK_VISIBLE_DEVICES": "0", "VK_ICD_FILENAMES": lavapipe()}
    env |= {"LOCAL_LLAVA_HOME": str(folder / "home"), "LOCAL_LLAVA_CACHE": str(folder / "pictures")}
    # First as exact as it can be, which shows that nothing is wrong; then as it is used.
    offload = [python, "-m", "pytest", "-v", "-s", "--rootdir", str(ROOT), str(ROOT / "tests/gpu/check_offload.py")]
    codes = [
        subprocess.run(command, env={**os.environ, **env, **more}, cwd=ROOT).returncode
        for command, more in (
            ([*offload, *for_pytest], {"GGML_VK_DISABLE_F16": "1"}),
            ([*offload, *(for_pytest or ["-k", "tower or logits or kv_types"])], {}),
            ([python, "-m", "local_llava.cli", "doctor", "--self-test"], {}),
        )
    ]
    return max(codes)


def lavapipe() -> str:
    """The description of Mesa's driver for the CPU, as the loader wants it."""
    found = sorted(Path("/usr/share/vulkan/icd.d").glob("lvp_icd*.json"))
    if not found:
        sys.exit("Mesa's lavapipe is not installed: apt-get install mesa-vulkan-drivers")
    return str(found[0])


def run(command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    print("+", " ".join(command), flush=True)
    if code := subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}).returncode:
        sys.exit(f"failed with code {code}: {command[0]}")


if __name__ == "__main__":
    sys.exit(main())
