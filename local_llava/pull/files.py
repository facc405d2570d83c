"""What a conversion needs of a repository on the Hub: which of its files, and which other repositories.

Knows how checkpoints are laid out there, by the names of their files. What is in them is `convert`'s.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from local_llava.convert import weights
from local_llava.convert.config import MAX_JSON_BYTES, read_json
from local_llava.convert.write import human_size
from local_llava.errors import CheckpointError, DownloadError
from local_llava.model_list import ModelEntry, is_repository
from local_llava.pull import download
from local_llava.pull.hub_api import Listing, RemoteFile, list_repository

log = logging.getLogger("local_llava")

SMALL_FILES = frozenset(
    (
        "README.md",
        "adapter_config.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "xtuner_config.py",
        *(name for form in weights.FORMATS for name in form.indexes),
    )
)
"""What a conversion reads besides weights."""

EXTRA_WEIGHTS = frozenset(("mm_projector.bin", "non_lora_trainables.bin"))
"""What the official code saves besides an adapter."""

PART_DIRECTORIES = frozenset(("llm", "llm_adapter", "projector", "visual_encoder", "visual_encoder_adapter"))
"""Where XTuner puts the parts of a model."""


@dataclass(frozen=True)
class Content:
    """What a conversion needs of a repository."""

    listing: Listing
    weights: tuple[RemoteFile, ...]

    @classmethod
    def of(cls, listing: Listing, *, only_small: bool = False) -> Content:
        """Chooses the files, and downloads the small ones into the Hub's cache."""
        places = ("", *sorted(PART_DIRECTORIES))
        files = [file for file in listing.files.values() if directory_of(file) in places]
        for file in files:
            if PurePosixPath(file.name).name not in SMALL_FILES:
                continue
            if file.size > MAX_JSON_BYTES:
                raise DownloadError(f"{listing.repository}/{file.name}: is too large ({human_size(file.size)})")
            download.to_cache(listing, file)
        listing.remember_revision()
        if only_small:
            return cls(listing, ())
        chosen = [file for place in places for file in _weight_files(listing, files, place)]
        if not chosen:
            raise CheckpointError(f"{listing.repository}: holds no weights (*.safetensors, *.bin) and no GGUF files")
        return cls(listing, tuple(chosen))

    def missing(self) -> list[RemoteFile]:
        """Weights that are not in the cache."""
        return [file for file in self.weights if self.listing.cached(file) is None]


def find_beside(content: Content, entry: ModelEntry | None, names: set[str]) -> list[Content]:
    """What the checkpoint does not carry: by the model list, else by its own word for its tower.

    Args:
        content: The checkpoint.
        entry: Its model, if it is on the list.
        names: Of its tensors, as far as they are known.
    """
    listing = content.listing
    known = entry.repository(listing.repository) if entry else None
    if known:
        return [Content.of(list_repository(name)) for name in (known.vision_tower, known.llm) if name]
    config = listing.directory / "config.json"
    values = read_json(config) if config.is_file() and config.stat().st_size else {}
    tower = values.get("mm_vision_tower")
    if not isinstance(tower, str) or not is_repository(tower):
        return []
    for form in weights.FORMATS:
        for index in (listing.directory / name for name in form.indexes):
            names |= set(read_json(index).get("weight_map") or ()) if index.is_file() else set()
    if not any("vision_tower" in name for name in names) and not values.get("unfreeze_mm_vision_tower"):
        return [Content.of(list_repository(tower))]
    try:  # the tower is inside, and only its configuration may be needed
        Content.of(list_repository(tower), only_small=True)
    except DownloadError as e:
        log.info("%s", e)
    return []


def total_size(files: Sequence[RemoteFile]) -> int:
    return sum(file.size for file in files)


def directory_of(file: RemoteFile) -> str:
    """The directory of a file in its repository."""
    parent = str(PurePosixPath(file.name).parent)
    return "" if parent == "." else parent


def _weight_files(listing: Listing, files: list[RemoteFile], place: str) -> list[RemoteFile]:
    """The weight files of one directory that a conversion reads, of one format."""
    here = {PurePosixPath(file.name).name: file for file in files if directory_of(file) == place}
    where = f"{listing.repository}/{place}".rstrip("/")
    with tempfile.TemporaryDirectory() as temporary:
        # What is read of a directory is decided by what is there: empty files do, and the index.
        directory = Path(temporary)
        for name, file in here.items():
            small = name in SMALL_FILES
            (directory / name).write_bytes(download.to_cache(listing, file).read_bytes() if small else b"")
        try:
            for form in weights.FORMATS:
                found = {path.name for path in weights.weight_files(directory, form)}
                if found:
                    if any(name.startswith("adapter_model.") for name in found):
                        found |= EXTRA_WEIGHTS & here.keys()
                    return [here[name] for name in sorted(found)]
        except CheckpointError as e:
            raise CheckpointError(str(e).replace(temporary, where)) from e
    return []
