"""The ggml functions that local-llava calls, through the libraries that llama-cpp-python installs.

Knows where those libraries lie and the C types of the functions used. Knows no model and no file. Nothing is loaded
before the first call. Rows of numbers are `ggml_rows`'s.

Two things decide how loading is done:

- llama-cpp-python installs the libraries twice, in `llama_cpp/lib` and in `site-packages/lib`, and each copy has its
  own registry of devices. `llama_cpp` uses the first, so we do.
- Within `llama_cpp/lib` every library lies under several names (`libggml.so`, `libggml.so.0`, ...) that are separate
  files, and a loader that meets a second file maps a second copy. So we open the one file that `llama_cpp` opens,
  `libllama`, and let the system's loader find the ggml libraries behind it, by the names it will look for again.

Importing `llama_cpp` redirects ggml's log to its own callback; whoever imports it calls `route_log` afterwards.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

from local_llava.errors import EngineError

logger = logging.getLogger("local_llava")

F32, F16, Q8_0, BF16 = 0, 1, 8, 30
"""`enum ggml_type`: those that are named in code; `ggml_rows` has the rest."""

CPU, GPU, IGPU, ACCEL = 0, 1, 2, 3
"""`enum ggml_backend_dev_type`."""

WEIGHTS = 1
"""`enum ggml_backend_buffer_usage`: tells the scheduler that a buffer stays where it is."""

SUCCESS = 0
"""`enum ggml_status`."""

PREC_F32 = 10
"""`enum ggml_prec`."""

MUL_MAT = 29
"""`enum ggml_op`: GGML_OP_MUL_MAT."""


class InitParams(ctypes.Structure):
    """`struct ggml_init_params`, the only one that is passed by value."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Tensor(ctypes.Structure):
    """`struct ggml_tensor`, to look at a graph that llama.cpp made: all else goes through functions."""

    _fields_ = (
        ("type", c_int),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),
        ("nb", c_size_t * 4),
        ("op", c_int),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", c_char * 64),
        ("extra", c_void_p),
        ("padding", c_char * 8),
    )


_TO_FLOAT = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", _TO_FLOAT),
        ("from_float_ref", c_void_p),
    )


class DeviceProps(ctypes.Structure):
    """`struct ggml_backend_dev_props`, with `struct ggml_backend_dev_caps` at its end."""

    _fields_ = (
        ("name", c_char_p),
        ("description", c_char_p),
        ("memory_free", c_size_t),
        ("memory_total", c_size_t),
        ("type", c_int),
        ("device_id", c_char_p),
        ("async", c_bool),
        ("host_buffer", c_bool),
        ("buffer_from_host_ptr", c_bool),
        ("events", c_bool),
        ("mmap_support", c_bool),
    )


_P = c_void_p
_SHAPE = POINTER(c_int64)
_LOG_CALLBACK = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_ABORT_CALLBACK = ctypes.CFUNCTYPE(None, c_char_p)
_SET_N_THREADS = ctypes.CFUNCTYPE(None, c_void_p, c_int)

# name without "ggml_": (result, arguments), as in ggml.h, ggml-alloc.h and ggml-backend.h of the pinned version.
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "log_set": (None, [_LOG_CALLBACK, _P]),
    "set_abort_callback": (_P, [_ABORT_CALLBACK]),
    # types and quantization
    "blck_size": (c_int64, [c_int]),
    "type_size": (c_size_t, [c_int]),
    "row_size": (c_size_t, [c_int, c_int64]),
    "quantize_chunk": (c_size_t, [c_int, _P, _P, c_int64, c_int64, c_int64, _P]),
    "validate_row_data": (c_bool, [c_int, _P, c_size_t]),
    "get_type_traits": (POINTER(_TypeTraits), [c_int]),
    # contexts, tensors, graphs
    "init": (_P, [InitParams]),
    "free": (None, [_P]),
    "op_name": (c_char_p, [c_int]),
    "tensor_overhead": (c_size_t, []),
    "graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "new_tensor": (_P, [_P, c_int, c_int, _SHAPE]),
    "set_input": (None, [_P]),
    "set_output": (None, [_P]),
    "new_graph_custom": (_P, [_P, c_size_t, c_bool]),
    "build_forward_expand": (None, [_P, _P]),
    # operations
    "add": (_P, [_P, _P, _P]),
    "mul": (_P, [_P, _P, _P]),
    "scale": (_P, [_P, _P, c_float]),
    "scale_bias": (_P, [_P, _P, c_float, c_float]),
    "norm": (_P, [_P, _P, c_float]),
    "silu": (_P, [_P, _P]),
    "sigmoid": (_P, [_P, _P]),
    "gelu_erf": (_P, [_P, _P]),
    "concat": (_P, [_P, _P, _P, c_int]),
    "cast": (_P, [_P, _P, c_int]),
    "cont": (_P, [_P, _P]),
    "reshape_3d": (_P, [_P, _P, c_int64, c_int64, c_int64]),
    "reshape_4d": (_P, [_P, _P, c_int64, c_int64, c_int64, c_int64]),
    "view_3d": (_P, [_P, _P, c_int64, c_int64, c_int64, c_size_t, c_size_t, c_size_t]),
    "permute": (_P, [_P, _P, c_int, c_int, c_int, c_int]),
    "mul_mat": (_P, [_P, _P, _P]),
    "prec_set_acc": (c_bool, [_P, c_int]),
    "soft_max_ext": (_P, [_P, _P, _P, c_float, c_float]),
    "flash_attn_ext": (_P, [_P, _P, _P, _P, _P, c_float, c_float, c_float]),
    # devices, buffers, scheduling
    "backend_reg_count": (c_size_t, []),
    "backend_load_all_from_path": (None, [c_char_p]),
    "backend_dev_by_type": (_P, [c_int]),
    "backend_dev_count": (c_size_t, []),
    "backend_dev_get": (_P, [c_size_t]),
    "backend_dev_description": (c_char_p, [_P]),
    "backend_dev_get_props": (None, [_P, POINTER(DeviceProps)]),
    "backend_reg_get": (_P, [c_size_t]),
    "backend_reg_name": (c_char_p, [_P]),
    "backend_dev_backend_reg": (_P, [_P]),
    "backend_dev_init": (_P, [_P, c_char_p]),
    "backend_reg_get_proc_address": (_P, [_P, c_char_p]),
    "backend_free": (None, [_P]),
    "backend_alloc_ctx_tensors": (_P, [_P, _P]),
    "backend_dev_buffer_from_host_ptr": (_P, [_P, _P, c_size_t, c_size_t]),
    "backend_tensor_alloc": (c_int, [_P, _P, _P]),
    "backend_buffer_free": (None, [_P]),
    "backend_buffer_set_usage": (None, [_P, c_int]),
    "backend_tensor_set": (None, [_P, _P, c_size_t, c_size_t]),
    "backend_tensor_get": (None, [_P, _P, c_size_t, c_size_t]),
    "backend_sched_new": (_P, [POINTER(_P), _P, c_int, c_size_t, c_bool, c_bool]),
    "backend_sched_free": (None, [_P]),
    "backend_sched_reset": (None, [_P]),
    "backend_sched_alloc_graph": (c_bool, [_P, _P]),
    "backend_sched_graph_compute": (c_int, [_P, _P]),
}


# In the CPU backend's library, which a build with GGML_BACKEND_DL loads on its own; None there.
_CPU_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "cpu_fp16_to_fp32": (None, [_P, _P, c_int64]),
}


class Functions:
    """The functions of `_SIGNATURES` and `_CPU_SIGNATURES` as attributes, without the prefix `ggml_`."""

    def __init__(self, libraries: list[ctypes.CDLL]) -> None:
        for name, (result, arguments) in (_SIGNATURES | _CPU_SIGNATURES).items():
            owner = next((lib for lib in libraries if hasattr(lib, f"ggml_{name}")), None)
            if owner is None and name in _CPU_SIGNATURES:
                setattr(self, name, None)
                continue
            if owner is None:
                raise EngineError(
                    f"llama-cpp-python's libraries lack ggml_{name}: install the version local-llava asks for"
                )
            function = getattr(owner, f"ggml_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # Reached only for names outside the table; it also tells type checkers what the attributes are.
        raise AttributeError(f"ggml_{name} is not in the table of local_llava.ggml")


def library_dir() -> Path:
    """The folder `llama_cpp` loads its libraries from, found without importing it.

    Raises:
        EngineError: llama-cpp-python is not installed.
    """
    if override := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(override)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise EngineError("llama-cpp-python is not installed: pip install llama-cpp-python")
    return Path(os.path.abspath(spec.submodule_search_locations[0])) / "lib"  # noqa: PTH100 - as llama_cpp spells it


@functools.cache
def functions() -> Functions:
    """Load the libraries at the first call, and route ggml's log to the logger `local_llava`.

    Raises:
        EngineError: The libraries are missing, cannot be loaded, or are of another version.
    """
    folder = library_dir()
    prefixes, suffixes = {"win32": (("", "lib"), (".dll",)), "darwin": (("lib",), (".so", ".dylib"))}.get(
        sys.platform, (("lib",), (".so",))
    )
    # GetProcAddress looks into one library only; dlsym also into those that it depends on.
    names = ("llama", "ggml", "ggml-base") if sys.platform == "win32" else ("llama",)
    libraries = []
    for name in names:
        paths = [folder / f"{prefix}{name}{suffix}" for prefix in prefixes for suffix in suffixes]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise EngineError(f"llama-cpp-python's library is missing: {paths[0]}")
        try:
            libraries.append(_open(path))
        except OSError as error:
            raise EngineError(f"llama-cpp-python's library cannot be loaded: {error}") from error
    table = Functions(libraries)
    table.log_set(_log_callback, None)
    table.set_abort_callback(_abort_callback)
    if not table.backend_reg_count():
        # Builds with GGML_BACKEND_DL link no backend, not even the CPU's.
        table.backend_load_all_from_path(os.fsencode(folder))
    return table


def _open(path: Path) -> ctypes.CDLL:
    if sys.platform == "win32":
        os.add_dll_directory(str(path.parent))
        for variable in ("CUDA_PATH", "HIP_PATH"):
            if (root := os.environ.get(variable)) and (folder := Path(root) / "bin").is_dir():
                os.add_dll_directory(str(folder))
    return ctypes.CDLL(str(path))


def route_log() -> None:
    """Send ggml's log to the logger `local_llava` again, after `llama_cpp` was imported."""
    functions().log_set(_log_callback, None)


# What fails comes back as a status and is raised; llama.cpp warns of much that is as it should be.
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.INFO, 4: logging.ERROR}


def on_log(level: int, text: bytes, _: object) -> None:
    """Log a line of ggml or llama.cpp."""
    # GGML_LOG_LEVEL_CONT (5) continues a line with dots of progress.
    if level in _LEVELS and (line := text.decode("utf-8", "replace").strip()):
        logger.log(_LEVELS[level], "%s", line)


def _on_abort(message: bytes) -> None:
    logger.critical("ggml aborts the process: %s", message.decode("utf-8", "replace").strip())


# ggml keeps these pointers: they must live as long as the process.
_log_callback = _LOG_CALLBACK(on_log)
_abort_callback = _ABORT_CALLBACK(_on_abort)


def set_n_threads(device: int, backend: int, n_threads: int) -> bool:
    """Set the threads of a backend. Returns whether it has such a setting, as the CPU's and BLAS's have.

    The function belongs to the backend's own library, so the registry is asked for it.
    """
    g = functions()
    address = g.backend_reg_get_proc_address(g.backend_dev_backend_reg(device), b"ggml_backend_set_n_threads")
    if address:
        _SET_N_THREADS(address)(backend, n_threads)
    return bool(address)


class _Feature(ctypes.Structure):
    """`struct ggml_backend_feature`."""

    _fields_ = (("name", c_char_p), ("value", c_char_p))


_GET_FEATURES = ctypes.CFUNCTYPE(POINTER(_Feature), c_void_p)


def cpu_features() -> dict[str, str]:
    """What the CPU's backend was built for and finds on this machine, such as {"AVX2": "1"}."""
    g = functions()
    registry = g.backend_dev_backend_reg(g.backend_dev_by_type(CPU))
    address = g.backend_reg_get_proc_address(registry, b"ggml_backend_get_features")
    features: dict[str, str] = {}
    if address:
        entries = _GET_FEATURES(address)(registry)
        while (entry := entries[len(features)]).name:
            features[entry.name.decode()] = entry.value.decode()
    return features


def available_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
