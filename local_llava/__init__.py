"""Ask LLaVA questions about your own pictures, on your own computer.

    from local_llava import Llava

    with Llava.load() as llava:  # the built-in model; or the path of a GGUF, a pair's directory, or a checkpoint
        print(llava.ask("What is in the picture?", images="picture.png").text)

Converting is `local_llava.convert.convert`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from local_llava.engine import Llava
    from local_llava.errors import (
        BusyError,
        CheckpointError,
        DownloadError,
        EngineError,
        ImageError,
        LocalLlavaError,
        ModelFileError,
        NotEnoughMemoryError,
        OutputError,
        PromptError,
        UsageError,
    )
    from local_llava.types import Chunk, Message, ModelFiles, Options, Reply, Timings, TokenLogprob

__version__: str

_HOMES = {
    "Llava": "engine",
    "BusyError": "errors",
    "CheckpointError": "errors",
    "DownloadError": "errors",
    "EngineError": "errors",
    "ImageError": "errors",
    "LocalLlavaError": "errors",
    "ModelFileError": "errors",
    "NotEnoughMemoryError": "errors",
    "OutputError": "errors",
    "PromptError": "errors",
    "UsageError": "errors",
    "Chunk": "types",
    "Message": "types",
    "ModelFiles": "types",
    "Options": "types",
    "Reply": "types",
    "Timings": "types",
    "TokenLogprob": "types",
}

__all__ = [
    "BusyError",
    "CheckpointError",
    "Chunk",
    "DownloadError",
    "EngineError",
    "ImageError",
    "Llava",
    "LocalLlavaError",
    "Message",
    "ModelFileError",
    "ModelFiles",
    "NotEnoughMemoryError",
    "Options",
    "OutputError",
    "PromptError",
    "Reply",
    "Timings",
    "TokenLogprob",
    "UsageError",
]


def __getattr__(name: str) -> Any:
    # Lazily, so that `local-llava --help` need not load llama.cpp.
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("local-llava")
    if name in _HOMES:
        return getattr(importlib.import_module(f"local_llava.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
