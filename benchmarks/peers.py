"""llama.cpp's own tools, built from the source that llama-cpp-python's pinned version carries.

Everything lies in a cache outside the repository: LOCAL_LLAVA_BENCHMARK_CACHE, or ~/.cache/local-llava-benchmarks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path


def llama_cpp() -> Path:
    """The vendored llama.cpp of the installed llama-cpp-python's source distribution."""
    package = f"llama_cpp_python-{version('llama-cpp-python')}"
    cache = Path(os.environ.get("LOCAL_LLAVA_BENCHMARK_CACHE") or Path.home() / ".cache" / "local-llava-benchmarks")
    directory = cache / package
    if not directory.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        requirement = package.replace("_", "-").replace("python-", "python==")
        _run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", requirement, cwd=cache)
        with tarfile.open(next(cache.glob(f"{package}.tar.gz"))) as archive:
            archive.extractall(cache / "unpacked", filter="data")
        (cache / "unpacked" / package).rename(directory)
    return directory / "vendor" / "llama.cpp"


def build(target: str) -> Path:
    """A tool of llama.cpp as a release build for this machine, such as llama-quantize."""
    source = llama_cpp()
    binary = source / "build" / "bin" / target
    if not binary.is_file():
        if shutil.which("cmake") is None:
            raise SystemExit("the peers are built with cmake (Debian: apt install cmake g++)")
        flags = ("-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DBUILD_SHARED_LIBS=OFF")
        # The server's web page would be fetched from the network, or built with npm.
        flags += ("-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF")
        # GCC 12 breaks ggml's AMX kernels (llama.cpp #20824), and we run without them, too.
        flags += ("-DCMAKE_CXX_FLAGS=-mno-amx-tile -mno-amx-int8 -mno-amx-bf16",) if _has_amx() else ()
        _run("cmake", "-S", source, "-B", source / "build", *flags)
        _run("cmake", "--build", source / "build", "--target", target, "-j", os.cpu_count() or 1)
    return binary


def converter() -> list[str]:
    """The command of llama.cpp's converter, run with this Python, which has torch and transformers."""
    libraries = llama_cpp() / "python"
    if not libraries.is_dir():
        _run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", libraries, "sentencepiece")
    return ["env", f"PYTHONPATH={libraries}", sys.executable, str(llama_cpp() / "convert_hf_to_gguf.py")]


def legacy_script(name: str) -> list[str]:
    """The command of one of llama.cpp's old LLaVA scripts, with a transformers of their time."""
    libraries = llama_cpp() / "python-legacy"
    if not libraries.is_dir():
        _run(sys.executable, "-m", "pip", "install", "-q", "--target", libraries, "transformers==4.46.3")
    paths = os.pathsep.join(map(str, (llama_cpp() / "gguf-py", libraries)))
    script = llama_cpp() / "tools" / "mtmd" / "legacy-models" / name
    return ["env", f"PYTHONPATH={paths}", sys.executable, str(script)]


def _has_amx() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "amx_tile" in cpuinfo.read_text()


def _run(*command: object, cwd: Path | None = None) -> None:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-2000:]}")
