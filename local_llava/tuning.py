"""What `local-llava tune` measured to be fastest: kept for a machine and a pair, and used when that pair is loaded.

Knows the file and when it holds. How it is measured is `measuring`'s.

One file for each machine and pair, whose name is a digest of both, so that another processor, GPU, build of llama.cpp
or model finds nothing. It only changes what has no part in the answers beyond rounding, and nothing that the user
named.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import platformdirs

from local_llava import devices, ggml
from local_llava.errors import OutputError, UsageError
from local_llava.types import ModelFiles, Options

log = logging.getLogger("local_llava")

FIELDS = ("n_threads", "n_batch", "flash_attention", "kv_type")
"""The options that are measured."""

_FORMAT = 1
_HEAD = 1 << 20
"""Bytes of a file's beginning that stand for it, with its size: they hold the header, or most of it."""


def directory() -> Path:
    """Where files are kept: in $LOCAL_LLAVA_HOME, or the platform's directory for a user's settings."""
    home = os.environ.get("LOCAL_LLAVA_HOME")
    return (Path(home) if home else platformdirs.user_config_path("local-llava", appauthor=False)) / "tuning"


def apply(options: Options, explicit: Mapping[str, Any], files: ModelFiles) -> Options:
    """Options with what was measured for this machine and pair in the place of defaults.

    Args:
        options: As asked for.
        explicit: Those of them that the user named, whatever the value: they stay.
        files: The pair.

    Returns:
        The options themselves where nothing was measured, or the file is damaged, which the log tells.
    """
    if not directory().is_dir():
        return options
    stored = read(files)
    fitting = {name: value for name, value in stored.items() if name not in explicit}
    if options.kv_type == "F32":
        fitting.pop("flash_attention", None)  # it rounds: who asks for F32 wants none of that
    flash_attention = fitting.get("flash_attention", options.flash_attention)
    if fitting.get("kv_type", options.kv_type) == "Q8_0" and flash_attention is False:
        # llama.cpp cannot have both, and at least one was not named by the user.
        fitting.pop("kv_type", None)
        fitting.pop("flash_attention", None)
    if not fitting:
        return options
    log.debug("measured by local-llava tune: %s", ", ".join(f"{name}={value}" for name, value in fitting.items()))
    try:
        return options.updated(fitting)
    except UsageError as e:
        log.warning("%s is ignored: %s", path(files), e)
        return options


def read(files: ModelFiles) -> dict[str, Any]:
    """Options that were measured to be fastest for this machine and pair, by name; empty where there are none."""
    where = path(files)
    try:
        document = json.loads(where.read_bytes())
        options = document["options"]
        if document["format"] != _FORMAT or not options.keys() <= set(FIELDS):
            raise ValueError("of another version")
        Options(**options)
    except FileNotFoundError:
        return {}
    # What a damaged file can hold: no JSON, or too deep; no mapping; values out of their ranges.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError) as e:
        log.warning("%s is ignored, since it is damaged: %s", where, e)
        return {}
    return dict(options)


def save(files: ModelFiles, options: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    """Keep options for this machine and pair, in the place of what was kept before.

    Args:
        files: The pair.
        options: Of `FIELDS`.
        about: For people who look at the file: what was measured.

    Raises:
        OutputError: The file cannot be written.
    """
    where = path(files)
    document = {
        "format": _FORMAT,
        "options": dict(options),
        "model": str(files.model),
        "machine": machine(),
        "measured": dict(about),
    }
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=where.parent, prefix=where.name, suffix=".part")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=2)
        Path(name).replace(where)
    except OSError as e:
        raise OutputError(f"cannot write {where}: {e.strerror}; LOCAL_LLAVA_HOME names another place") from e
    return where


def forget(files: ModelFiles) -> bool:
    """Remove what is kept for this machine and pair. Returns whether there was something."""
    try:
        path(files).unlink()
    except FileNotFoundError:
        return False
    except OSError as e:
        raise OutputError(f"cannot remove {path(files)}: {e.strerror}") from e
    return True


def path(files: ModelFiles) -> Path:
    """The file for this machine and pair, there or not."""
    digest = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode())
    for part in (files.model, files.mmproj):
        with part.open("rb") as file:
            digest.update(f"\n{part.stat().st_size}\n".encode())
            digest.update(file.read(_HEAD))
    return directory() / f"{digest.hexdigest()[:32]}.json"


def machine() -> dict[str, Any]:
    """What the speed depends on besides the pair."""
    return {
        "devices": [f"{device.backend}: {device.description}" for device in devices.devices()],
        "cores": devices.physical_cores(),
        "cpus": ggml.available_cpus(),
        "features": ggml.cpu_features(),
        "llama-cpp-python": version("llama-cpp-python"),
    }
