"""What is kept of pictures on disk: their embeddings, and the KV cache of the prompts that begin with them.

Knows what an entry depends on, and so what it is called; the files are `image_cache`'s. Knows no threads: everything is
called from the engine's.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from local_llava.image_cache import ImageCache
from local_llava.request import Shown, Unit, n_tokens
from local_llava.types import ImageCacheMode

log = logging.getLogger("local_llava")

_MAX_COUNTED = 1024
"""Prefixes whose questions are counted."""


class PictureStore:
    """Pictures as one pair of models, loaded in one way, sees them."""

    def __init__(
        self,
        cache: ImageCache | None,
        mode: ImageCacheMode,
        *,
        tower: Mapping[str, Any],
        llm: Mapping[str, Any],
        name: str,
        exact: bool,
        after: int,
    ) -> None:
        """
        Args:
            cache: The files; None to keep nothing.
            mode: What is kept.
            tower: All that embeddings depend on besides the picture.
            llm: All that the KV cache depends on besides those and the prompt.
            name: Of the model, for people.
            exact: Whether embeddings are kept as float32, and not as float16.
            after: Questions about a picture until its KV cache is kept.
        """
        self._cache = cache if mode != "off" else None
        self._keeps_kv = mode == "kv"
        self._tower, self._llm = _text(tower), _text({**llm, "tower": tower})
        self._name, self._after = name, after
        self._dtype = np.dtype("<f4" if exact else "<f2")
        self._counts: OrderedDict[str, int] = OrderedDict()

    def embeddings(self, digest: bytes, n_tokens: int, n_embd: int) -> NDArray[np.float32] | None:
        """Those of a picture, if they are kept: float32 [n_tokens, n_embd]."""
        if self._cache is None:
            return None
        payload = self._cache.get("embeddings", self._embeddings_key(digest))
        if payload is None or len(payload) != n_tokens * n_embd * self._dtype.itemsize:
            return None
        return np.frombuffer(payload, self._dtype).reshape(n_tokens, n_embd).astype(np.float32)

    def keep_embeddings(self, digest: bytes, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Keep those of a picture. Returns them as they would be read, so that both give the same answer."""
        if self._cache is None:
            return values
        with np.errstate(over="ignore"):
            kept = values.astype(self._dtype)
        if not np.isfinite(kept).all():  # beyond float16's range
            return values
        about: dict[str, str | int] = {"model": self._name, "tokens": len(values)}
        self._cache.put("embeddings", self._embeddings_key(digest), kept.tobytes(), about)
        return kept.astype(np.float32)

    def prefix(self, units: Sequence[Unit], n_held: int) -> tuple[int, NDArray[np.uint8]] | None:
        """The longest kept beginning of a prompt that ends with a picture.

        Args:
            units: The prompt.
            n_held: Pieces of it that are in the KV cache already; only longer beginnings are looked for.

        Returns:
            Its pieces and its state, for `LLM.restore`.
        """
        if self._cache is None or not self._keeps_kv:
            return None
        for n in reversed(range(n_held + 1, len(units))):
            if isinstance(units[n - 1], Shown):
                payload = self._cache.get("kv", self._prefix_key(units[:n]))
                if payload is not None:
                    return n, np.frombuffer(payload, np.uint8)
        return None

    def keep_prefix(self, units: Sequence[Unit], save: Callable[[int], NDArray[np.uint8] | None]) -> None:
        """Keep the KV cache of a prompt up to its last picture, if enough questions were asked about it.

        Args:
            units: The prompt, which is evaluated.
            save: Called with the number of pieces; gives their state.
        """
        n = max((i + 1 for i, unit in enumerate(units[:-1]) if isinstance(unit, Shown)), default=0)
        if self._cache is None or not self._keeps_kv or not n:
            return
        key = self._prefix_key(units[:n])
        count = self._counts[key] = self._counts.pop(key, 0) + 1
        if len(self._counts) > _MAX_COUNTED:
            self._counts.popitem(last=False)
        if count < self._after or self._cache.has("kv", key):
            return
        state = save(n)
        if state is not None:
            self._cache.put("kv", key, state, {"model": self._name, "tokens": n_tokens(units[:n])})

    def close(self) -> None:
        """Wait for what is being written."""
        if self._cache is not None:
            self._cache.close()

    def _embeddings_key(self, digest: bytes) -> str:
        return _digest(self._tower, self._dtype.str, digest.hex())

    def _prefix_key(self, units: Sequence[Unit]) -> str:
        """A picture's place has its digest, which no token id looks like."""
        pieces = [unit.digest.hex() if isinstance(unit, Shown) else unit for unit in units]
        return _digest(self._llm, self._dtype.str, json.dumps(pieces))


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _digest(*parts: str) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()
