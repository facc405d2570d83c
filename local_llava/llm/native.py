"""llama.cpp's model and context, made and set up; and what it says when it fails."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as c

from local_llava import ggml
from local_llava.errors import EngineError
from local_llava.llm.observing import Observation
from local_llava.llm_file import LLMConfig
from local_llava.types import KVType

KV_TYPES: dict[KVType, int] = {"F32": 0, "F16": 1, "Q8_0": 8}

_first_error = ""
"""What llama.cpp logged first in the call under way: it names the reason, and the lines after it only the caller."""


_ERROR, _DEBUG = 4, 1
"""`enum ggml_log_level`."""

_stopped = False
"""Whether the call under way was told to leave off, which llama.cpp logs as an error."""


def _on_log(level: int, text: bytes, user_data: object) -> None:
    global _first_error
    if level == _ERROR and _stopped:
        level = _DEBUG
    if level == _ERROR and not _first_error:
        _first_error = " ".join(text.decode("utf-8", "replace").split())[:500]
    ggml.on_log(level, text, None)


def first_error() -> str:
    """The reason that llama.cpp gave for a failure, for people."""
    return _first_error or "no reason given"


def forget_error() -> None:
    """A new call begins."""
    global _first_error, _stopped
    _first_error, _stopped = "", False


def note_stop() -> None:
    """The call under way is told to leave off."""
    global _stopped
    _stopped = True


# llama.cpp keeps the pointer: it must live as long as the process.
log_callback = c.llama_log_callback(_on_log)


def start() -> None:
    """Start llama.cpp, and let it log to the logger `local_llava`."""
    c.llama_log_set(log_callback, ctypes.c_void_p(0))
    c.llama_backend_init()


@dataclass(frozen=True)
class Settings:
    """Of a context; see `LLM.load`."""

    n_cells: int
    n_seq_max: int
    n_batch: int
    n_outputs: int
    kv_type: int
    n_threads: int
    flash_attention: bool | None
    on_cpu: bool
    """Whether it is all there."""


def load_model(config: LLMConfig, n_gpu_layers: int) -> int:
    """The model's handle. Raises EngineError."""
    forget_error()
    params = c.llama_model_default_params()
    params.n_gpu_layers = n_gpu_layers
    # Else llama.cpp starts every GPU's driver all the same, and sends large batches there.
    no_devices = (ctypes.c_void_p * 1)(None)
    if n_gpu_layers == 0:
        params.devices = ctypes.addressof(no_devices)
    overrides = _kv_overrides(config)
    params.kv_overrides = overrides
    # ggml's AMX kernels crash when the compiler drops their tile configuration, as GCC 12 does (llama.cpp #20824,
    # #26954), and this is the only way to load without them.
    params.use_extra_bufts = "AMX_INT8" not in ggml.cpu_features()
    # llama.cpp takes the path in the file system's own encoding.
    model = c.llama_model_load_from_file(os.fsencode(config.path), params)
    if not model:
        raise EngineError(f"{config.path}: llama.cpp cannot load it: {first_error()}")
    return int(model)


def _kv_overrides(config: LLMConfig) -> Any:
    """Metadata in place of what the file says; the list ends with an empty key."""
    fitting = {key: value for key, value in config.overrides.items() if _fits(key, value)}
    if not fitting:
        return None
    array = (c.llama_model_kv_override * (len(fitting) + 1))()
    for entry, (key, value) in zip(array, fitting.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, str):
            entry.tag = c.LLAMA_KV_OVERRIDE_TYPE_STR
            entry.value.val_str = value.encode(errors="surrogateescape")
        elif isinstance(value, bool):
            entry.tag = c.LLAMA_KV_OVERRIDE_TYPE_BOOL
            entry.value.val_bool = value
        elif isinstance(value, int):
            entry.tag = c.LLAMA_KV_OVERRIDE_TYPE_INT
            entry.value.val_i64 = value
        else:
            entry.tag = c.LLAMA_KV_OVERRIDE_TYPE_FLOAT
            entry.value.val_f64 = value
    return array


def _fits(key: str, value: Any) -> bool:
    """Whether an override can hold an entry. The others are not llama.cpp's: the chat template, and keys of our own."""
    short = not isinstance(value, str) or len(value.encode(errors="surrogateescape")) < 128
    return len(key.encode()) < 128 and short and isinstance(value, (str, bool, int, float))


def new_context(config: LLMConfig, model: int, settings: Settings, observation: Observation | None = None) -> int:
    """The context's handle. Raises EngineError."""
    params = c.llama_context_default_params()
    params.n_ctx = settings.n_cells
    params.n_batch = params.n_ubatch = settings.n_batch
    params.n_seq_max = settings.n_seq_max + 1  # the last one for rows that fill up a batch
    # Sequences share one pool of cells, so that a prefix is copied by noting who else has it.
    params.kv_unified = True
    # Without it, llama.cpp makes room for the logits of all rows of a batch; it wants one for each sequence.
    params.n_outputs_max = max(settings.n_outputs, params.n_seq_max)
    params.n_threads = params.n_threads_batch = settings.n_threads
    params.type_k = params.type_v = settings.kv_type
    if settings.flash_attention is not None:
        # Flash attention rounds on the way: with an F32 KV cache logits are off by up to 1e-2, against 1e-5 without.
        on, off = c.LLAMA_FLASH_ATTN_TYPE_ENABLED, c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = on if settings.flash_attention else off
    params.no_perf = True
    if observation is not None:
        params.cb_eval = observation.callback
    forget_error()
    context = c.llama_init_from_model(model, params)
    if not context:
        raise EngineError(f"{config.path}: no context of {settings.n_cells} tokens: {first_error()}")
    return int(context)
