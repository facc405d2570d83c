"""Reads the header of a safetensors file. No weights.

Format: https://huggingface.co/docs/safetensors#format.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from local_llava.convert.config import MAX_JSON_BYTES
from local_llava.convert.source import StoredTensor, check_name
from local_llava.errors import CheckpointError


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, from its header; the safetensors library checks that header first.

    Raises:
        CheckpointError: The file cannot be read, or is damaged or truncated.
    """
    if not path.is_file():  # reading a pipe would wait for ever
        raise CheckpointError(f"{path}: is not a regular file")
    try:
        # Checks the header's size, that it is JSON, and that the tensors fill the rest of the file without overlap.
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_JSON_BYTES:
                raise CheckpointError(f"{path}: a header of {length} bytes; at most {MAX_JSON_BYTES} are accepted")
            header = json.loads(file.read(length))
    except SafetensorError as e:
        reason = ascii(str(e))[1:-1]  # it quotes names from the file
        raise CheckpointError(f"{path}: not a whole safetensors file: {reason:.200}") from e
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not a whole safetensors file: its header is no JSON") from e
    header.pop("__metadata__", None)
    for name in header:
        check_name(path, name)
    return {
        name: StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path, 8 + length + start, stop - start)
        for name, entry in header.items()
        for start, stop in [entry["data_offsets"]]
    }
