"""The models on this computer as requests name them, and what is known of them without loading them.

Knows the default model, the store, the Hugging Face cache and the headers of GGUF files. A name in a request is never a
path, and nothing is downloaded or converted here. Does not know what is in memory. It reads files, so event loops call
it in threads, of which there may be several.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from local_llava import hub, model_list, store
from local_llava.corrections import corrected
from local_llava.errors import LocalLlavaError, ModelFileError, UsageError
from local_llava.gguf_file import GGUFFile
from local_llava.hub import Checkpoint
from local_llava.llm_file import quant_of
from local_llava.server.backend import ModelInfo, UnknownModelError
from local_llava.server.engine_messages import Source
from local_llava.store import hub_cache
from local_llava.store.digest import file_digest
from local_llava.store.origin import Pair
from local_llava.types import DEFAULT_QUANT, ModelFiles

log = logging.getLogger("local_llava")

_BUILTIN = "tiny-llava"
_LATEST = ":latest"
"""What clients of Ollama put behind a name without a type."""

_MAX_NAME = 200
"""Characters of a name in a request; those of repositories have fewer."""

_FRESH_S = 5.0
"""How long a name means what it meant, as long as the files are there."""
_MAX_FRESH = 256
"""Names of which that is remembered."""


@dataclass(frozen=True)
class Model:
    """A model on this computer."""

    source: Source
    info: ModelInfo
    """As if it were not loaded."""


class Catalog:
    """All models on this computer."""

    def __init__(self, model: str | None, mmproj: Path | None) -> None:
        """
        Args:
            model: The default one, as `hub.resolve` takes it.
            mmproj: Of the default one, if not beside it.
        """
        self._named, self._mmproj = model, mmproj
        self._default: Source | None = None
        self._default_names: frozenset[str] = frozenset()
        self._made: dict[Checkpoint, ModelFiles] = {}
        self._infos: dict[ModelFiles, tuple[tuple[int, ...], ModelInfo]] = {}
        self._fresh: dict[str, tuple[float, Model]] = {}

    def models(self) -> list[Model]:
        """All that are ready to be loaded, the default one first. What cannot be used is passed over."""
        found: dict[Source, Model] = {}
        with _passing_over("the default model"):
            default = self.find(None)
            found[default.source] = default
        for name, files in _listed():
            with _passing_over(name):
                if files not in found:
                    found[files] = Model(files, self._info(files, name))
        self._infos = {files: known for files, known in list(self._infos.items()) if files in found}
        return list(found.values())

    def find(self, name: str | None) -> Model:
        """What a request means; None or "" is the default model, and has to be asked for first.

        Raises:
            UnknownModelError: Nothing of that name is on this computer.
            LocalLlavaError: It is there, but cannot be used.
        """
        name = (name or "").strip()
        if name.lower().endswith(_LATEST):
            name = name[: -len(_LATEST)]
        if len(name) > _MAX_NAME:
            raise UnknownModelError(f"{name[:40]!a}...: no model has a name of {len(name)} characters")
        until, known = self._fresh.get(name, (0.0, None))
        if known is not None and time.monotonic() < until and _exists(known.source):
            return known
        is_default = not name or name.lower() in self._default_names
        model = self._default_model() if is_default else self._other(name)
        if len(self._fresh) >= _MAX_FRESH:
            self._fresh.clear()
        # What the default one means was settled at the beginning.
        settled = is_default and isinstance(model.source, ModelFiles)
        self._fresh[name] = (math.inf if settled else time.monotonic() + _FRESH_S, model)
        return model

    def note_made(self, source: Source, files: ModelFiles) -> None:
        """A pair was made of a checkpoint."""
        if isinstance(source, Checkpoint):
            self._made[source] = files
            self._fresh.clear()

    def _default_model(self) -> Model:
        if self._default is None:
            self._default = hub.locate(self._named, self._mmproj)
        source = self._ready(self._default)
        name = self._default_name(source)
        self._default_names = frozenset(
            {name.lower(), model_list.split_name(name)[0].lower(), (self._named or "").lower()}
        )
        info = _checkpoint_info(source, name) if isinstance(source, Checkpoint) else self._info(source, name)
        return Model(source, info)

    def _default_name(self, source: Source) -> str:
        if self._named is None:
            return f"{_BUILTIN}:{DEFAULT_QUANT}"
        if isinstance(source, Checkpoint):
            return f"{hub.name_of(source)}:{source.quant}"
        return _shown(source, source.model.stem)

    def _other(self, name: str) -> Model:
        try:
            source = self._ready(hub.locate_name(name))
        except (ModelFileError, UsageError) as e:
            raise UnknownModelError(str(e)) from e
        if isinstance(source, Checkpoint):
            return Model(source, _checkpoint_info(source, f"{hub.name_of(source)}:{source.quant}"))
        return Model(source, self._info(source, _shown(source, name)))

    def _ready(self, source: Source) -> Source:
        """The pair that was made of a checkpoint, if one was."""
        if isinstance(source, ModelFiles):
            return source
        known = self._made.get(source)
        if known is None or not _exists(known):
            known = hub.made(source)
            if known is None:
                return source
            self._made[source] = known
        return known

    def _info(self, files: ModelFiles, name: str) -> ModelInfo:
        """Of a pair, from the headers; read again when a file has changed."""
        try:
            stats = [path.stat() for path in (files.model, files.mmproj)]
        except OSError as e:
            raise ModelFileError(f"{e.filename}: cannot be read: {e.strerror}") from e
        state = tuple(n for stat in stats for n in (stat.st_size, stat.st_mtime_ns))
        known = self._infos.get(files)
        if known is None or known[0] != state:
            known = state, _read_info(files, sum(s.st_size for s in stats), max(s.st_mtime for s in stats))
            self._infos[files] = known
        return replace(known[1], name=name)


@contextlib.contextmanager
def _passing_over(name: str) -> Iterator[None]:
    try:
        yield
    except LocalLlavaError as e:
        log.info("%s: passed over: %s", name, e)


def _listed() -> list[tuple[str, ModelFiles]]:
    """Pairs in the store and in the Hugging Face cache, each with a name that means it."""
    listed = [(_name(pair), pair.files) for pair in store.pairs()]
    for entry in model_list.entries():
        for repository in entry.repositories:
            if repository.pairs and hub_cache.snapshots(repository.name):
                for quant in dict.fromkeys(pair.quant for pair in repository.pairs):
                    files = _located(f"{entry.name}:{quant}")
                    if isinstance(files, ModelFiles):
                        listed.append((f"{entry.name}:{quant}", files))
    return listed


def _shown(files: ModelFiles, otherwise: str) -> str:
    """The name of a pair; one that is not in the store has the name that it was found by."""
    return next((_name(pair) for pair in store.pairs() if pair.files == files), otherwise)


def _name(pair: Pair) -> str:
    """A name that means just this pair."""
    name = f"{pair.origin.name}:{pair.origin.quant}"
    # Of several of the same name and type one has it; and a model of the list before somebody's own.
    return name if _located(name) == pair.files else pair.key


def _located(name: str) -> Source | None:
    try:
        return hub.locate_name(name)
    except LocalLlavaError:
        return None


def _exists(source: Source) -> bool:
    paths = (source.model, source.mmproj) if isinstance(source, ModelFiles) else (source.directory,)
    return all(path.exists() for path in paths)


def _read_info(files: ModelFiles, size: int, modified: float) -> ModelInfo:
    gguf = corrected(GGUFFile.open(files.model)).gguf
    digest = hashlib.sha256("".join(map(file_digest, (files.model, files.mmproj))).encode())
    template = gguf.metadata.get("tokenizer.chat_template")
    return ModelInfo(
        name="",
        size=size,
        modified=modified,
        digest=digest.hexdigest(),
        quant=quant_of(gguf),
        family=str(gguf.metadata.get("general.architecture", "llava")),
        parameters=sum(math.prod(tensor.shape) for tensor in gguf.tensors.values()),
        template=template if isinstance(template, str) else "",
    )


def _checkpoint_info(checkpoint: Checkpoint, name: str) -> ModelInfo:
    """Of a pair that is yet to be made, from what it will be made of."""
    try:
        stats = [path.stat() for path in checkpoint.directory.iterdir() if path.is_file()]
    except OSError as e:
        raise ModelFileError(f"{e.filename}: cannot be read: {e.strerror}") from e
    return ModelInfo(
        name=name,
        size=sum(stat.st_size for stat in stats),
        modified=max((stat.st_mtime for stat in stats), default=0.0),
        digest=store.source_digest(checkpoint.directory),
        quant=checkpoint.quant,
    )
