"""The embeddings of pictures: computed once, kept in memory and, if wanted, on disk.

Knows the tower, in whose thread it runs, and what a picture is called. Knows no language model.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from local_llava.picture_store import PictureStore
from local_llava.request import Picture
from local_llava.vision import VisionTower

KNOWN_BYTES = 128 << 20
"""Most bytes of embeddings that are kept in memory: 14 pictures of the 8B model, or two of LLaVA-NeXT's largest."""

Embeddings = Mapping[bytes, NDArray[np.float32]]
"""By the picture's digest: float32 [n_tokens, n_embd]."""


class Encoder:
    """The tower, and what it computed lately."""

    def __init__(self, tower: VisionTower, store: PictureStore) -> None:
        self._tower, self._store = tower, store
        self._known: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def knows(self, pictures: Iterable[Picture]) -> bool:
        """Whether the embeddings of all these pictures are in memory."""
        return all(picture.given is not None or picture.digest in self._known for picture in pictures)

    def is_own(self, picture: Picture, values: NDArray[np.float32]) -> bool:
        """Whether these are the tower's own embeddings of a picture, which are in memory."""
        known = self._known.get(picture.digest)
        return known is not None and np.array_equal(known, values)

    def begin(self, pictures: Iterable[Picture]) -> Encoding:
        """Get the embeddings of pictures: those that are known at once, the others by and by."""
        found: dict[bytes, NDArray[np.float32]] = {}
        new: dict[bytes, Picture] = {}
        for picture in pictures:
            known = self._known.get(picture.digest) if picture.given is None else picture.given
            if known is None and picture.digest not in new:
                known = self._store.embeddings(picture.digest, picture.arrangement.n_tokens, self._tower.n_embd)
            if known is None:
                new[picture.digest] = picture
            else:
                found[picture.digest] = known
        self.remember(found)
        return Encoding(self, found, list(new.values()))

    def remember(self, embeddings: Embeddings) -> None:
        """Keep embeddings in memory, in the place of those that were not used for longest."""
        for digest, values in embeddings.items():
            self._known[digest] = values
            self._known.move_to_end(digest)
        excess = sum(known.nbytes for known in self._known.values()) - KNOWN_BYTES
        while excess > 0:
            excess -= self._known.popitem(last=False)[1].nbytes


class Given:
    """Embeddings that a caller has for pictures, to be taken in the place of the tower's. For any thread."""

    def __init__(self) -> None:
        self._seen: OrderedDict[bytes, tuple[bytes, NDArray[np.float32]]] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, picture: Picture, values: NDArray[np.float32]) -> None:
        """Keep those of a picture, in the place of the oldest ones.

        Args:
            picture: As the tower would see it.
            values: float32 [n_tokens, n_embd], which nobody changes any more.
        """
        # Another digest: what was computed with the tower's, be it on disk, is not taken for it, nor this for that.
        seen = hashlib.blake2b(picture.digest + values.tobytes(), digest_size=len(picture.digest)).digest()
        with self._lock:
            self._seen.pop(picture.digest, None)
            self._seen[picture.digest] = seen, values
            excess = sum(kept.nbytes for _, kept in self._seen.values()) - KNOWN_BYTES
            while excess > 0:
                excess -= self._seen.popitem(last=False)[1][1].nbytes

    def forget(self, picture: Picture) -> None:
        """Take the tower's again."""
        with self._lock:
            self._seen.pop(picture.digest, None)

    def applied(self, picture: Picture) -> Picture:
        """The picture with what was given for it, if something was."""
        with self._lock:
            seen = self._seen.get(picture.digest)
        return picture if seen is None else replace(picture, digest=seen[0], given=seen[1])


class Encoding:
    """Pictures on their way through the tower, all in as few graphs as possible.

    Attributes:
        embeddings: Those that are there; all of them when `done`.
        n_new: Pictures that have to go through the tower.
    """

    def __init__(self, encoder: Encoder, found: dict[bytes, NDArray[np.float32]], new: Sequence[Picture]) -> None:
        """Use `Encoder.begin`."""
        self._encoder, self._new = encoder, new
        self.embeddings, self.n_new = found, len(new)
        self._graph = encoder._tower.begin(np.concatenate([picture.pixels for picture in new])) if new else None

    @property
    def done(self) -> bool:
        return self._graph is None

    def advance(self, seconds: float | None) -> None:
        """Compute on for about so long; None for to the end.

        Raises:
            EngineError: ggml failed.
        """
        if self._graph is None or not self._graph.advance(seconds):
            return
        features, computed = self._graph.result, {}
        tower, store = self._encoder._tower, self._encoder._store
        for picture in self._new:
            tiles, features = np.split(features, [len(picture.pixels)])
            values = picture.arrangement.apply(tiles, tower.newline)
            computed[picture.digest] = store.keep_embeddings(picture.digest, values)
        self._graph = None
        self.embeddings.update(computed)
        self._encoder.remember(computed)
