"""What published GGUF files get wrong, and what they should say.

Knows files of older converters and of other people's: `general.architecture` and keys under other names, numbers of
other types, what mmproj files of llama.cpp's legacy script leave out. The vocabulary and the chat template are
`vocab_corrections`'. Reads headers only, writes nothing (`convert.repair` does), and changes only what the file itself
proves; what remains wrong is for `llm_file` and `mmproj` to refuse, which see corrected files only.

Seen in public reports: Llama-3 files without `tokenizer.ggml.pre` (llama.cpp #7627) or with that of Smaug (#7724), and
with EOS 128001 and no end of turn (#6745); mmproj files without a projector_type (2023), with 23 blocks of 24 and fc1
called ffn_down (#25817).
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from local_llava.errors import ModelFileError
from local_llava.gguf_draft import Correction, Draft
from local_llava.gguf_file import TYPES, GGUFFile
from local_llava.llm_file import ARCHITECTURES, NUMBERS
from local_llava.llm_vocab import OPTIONAL_TYPES
from local_llava.mmproj import check_mmproj
from local_llava.vocab_corrections import correct_vocab

__all__ = ["Corrected", "Correction", "architecture", "corrected", "open_model"]

log = logging.getLogger("local_llava")

_LLAMAS = ("llava", "llava_llama", "llava_mistral", "mistral", "vicuna")
"""What files call llama.cpp's architecture `llama`: names of models that are nothing else."""

_CLIP_TYPES = {
    **dict.fromkeys(("image_size", "patch_size", "embedding_length", "feed_forward_length"), "u32"),
    **dict.fromkeys(("projection_dim", "block_count", "attention.head_count"), "u32"),
    "attention.layer_norm_epsilon": "f32",
    **dict.fromkeys(("image_mean", "image_std"), "arr[f32]"),
    "feature_layer": "arr[i32]",
}
"""Key after "clip.vision." -> type."""

_CLIP_FLAGS = ("has_text_encoder", "has_vision_encoder", "has_llava_projector", "use_gelu", "use_silu")

_VOCAB_TYPES = {"tokenizer.ggml.token_type": "arr[i32]", "tokenizer.ggml.scores": "arr[f32]"}

_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q6_K": 18, "BF16": 32}
"""llama.cpp's `llama_ftype`, where the type of the matrices tells it."""


@dataclass(frozen=True)
class Corrected:
    """A file as it should be."""

    gguf: GGUFFile
    """Everything in it is right, or will be refused. Its `overrides` are what llama.cpp must be told."""
    corrections: tuple[Correction, ...]
    notes: tuple[str, ...]
    """What looks wrong, but cannot be proved, and is left as it is."""


def corrected(gguf: GGUFFile, chat_template: str | None = None) -> Corrected:
    """Put the header of a language model or mmproj right, in memory.

    A file that is right, and one that is neither of both, comes back as it is.

    Args:
        gguf: As it was read. Nothing in it need have been checked.
        chat_template: Jinja source that somebody chose for a language model, which is not judged.

    Raises:
        PromptError: With `chat_template` no question can be put.
    """
    draft = Draft(gguf)
    _correct_architecture(draft)
    name = draft.get("general.architecture", "str")
    if name == "clip":
        _correct_mmproj(draft)
    elif name in ARCHITECTURES:
        _correct_llm(draft, name, chat_template)
    return Corrected(draft.gguf, tuple(draft.corrections), tuple(draft.notes))


def open_model(path: Path) -> GGUFFile:
    """Open a model to load it: corrected, with a line in the log for each correction.

    Raises:
        ModelFileError: As of `GGUFFile.open`; or something is wrong that llama.cpp reads for itself.
    """
    result = corrected(GGUFFile.open(path))
    for correction in result.corrections:
        if correction.on_disk and architecture(result.gguf) != "clip":
            raise ModelFileError(f"{path}: {correction}; `local-llava repair` makes a file that can be loaded")
        log.info("%s: %s", result.gguf.path.name, correction)
    return result.gguf


def architecture(gguf: GGUFFile) -> str | None:
    """The architecture of a file, corrected; None where it names none. "clip" is an mmproj."""
    draft = Draft(gguf)
    _correct_architecture(draft)
    name: str | None = draft.get("general.architecture", "str")
    return name


def _correct_architecture(draft: Draft) -> None:
    key = "general.architecture"
    stated = draft.get(key, "str")
    found = None
    if "token_embd.weight" in draft.tensors:
        if stated not in ARCHITECTURES:
            found = _evident_llm(draft, stated)
    elif "v.patch_embd.weight" in draft.tensors and stated != "clip":
        found = "clip" if _clip_prefix(draft, stated) is not None else None
    if found is not None:
        draft.set(key, "str", found, f"its keys and tensors are those of {found}")
    name = draft.get(key, "str")
    prefix = _clip_prefix(draft, stated) if name == "clip" else _llm_prefix(draft, stated, name)
    if prefix is not None and prefix != f"{name}.":
        _correct_prefix(draft, prefix, f"{name}.")


def _evident_llm(draft: Draft, stated: str | None) -> str | None:
    """The architecture of a language model that names none or an unknown one."""
    named = [name for name in ARCHITECTURES if _has_sizes(draft, f"{name}.")]
    if len(named) == 1:
        return named[0]
    return "llama" if stated in _LLAMAS and _has_sizes(draft, f"{stated}.") else None


def _llm_prefix(draft: Draft, stated: str | None, name: str | None) -> str | None:
    """What the keys of a llama begin with; None where that is not known."""
    if name != "llama" or _has_sizes(draft, "llama."):
        return None
    return next((f"{p}." for p in (stated, *_LLAMAS) if p != name and _has_sizes(draft, f"{p}.")), None)


def _has_sizes(draft: Draft, prefix: str) -> bool:
    return all(f"{prefix}{name}" in draft.metadata for name in ("block_count", "embedding_length"))


def _clip_prefix(draft: Draft, stated: str | None) -> str | None:
    """What the keys of an mmproj begin with; None where it has none that are known."""
    prefixes = ("clip.", "", *(f"{name}." for name in (stated, "llama", *_LLAMAS) if name))
    return next((p for p in prefixes if _has_sizes(draft, f"{p}vision.")), None)


def _correct_prefix(draft: Draft, prefix: str, right: str) -> None:
    tails = ("vision.", "projector_type", *_CLIP_FLAGS) if right == "clip." else ("",)
    keys = {}
    for key in draft.metadata:
        tail = key.removeprefix(prefix)
        if key.startswith(prefix) and tail.startswith(tails) and f"{right}{tail}" not in draft.metadata:
            keys[key] = f"{right}{tail}"
    why = f"{len(keys)} keys of {right[:-1]} have another name"
    # An override of a key that is missing counts for most keys only, not for those that may hold an array.
    draft.rename(keys, Correction(f"{prefix}*", f"{prefix}*", f"{right}*", why, on_disk=True))


def _correct_llm(draft: Draft, name: str, chat_template: str | None) -> None:
    kinds = {f"{name}.{key}": kind for key, (kind, *_) in NUMBERS.items()} | {f"{name}.vocab_size": "u32"}
    for key, kind in (kinds | OPTIONAL_TYPES | _VOCAB_TYPES | {"general.file_type": "u32"}).items():
        # Scores may also be whole numbers.
        if not (kind == "arr[f32]" and draft.types.get(key) == "arr[i32]"):
            draft.retype(key, kind)
    _correct_file_type(draft)
    correct_vocab(draft, chat_template)


def _correct_mmproj(draft: Draft) -> None:
    kinds = {f"clip.vision.{key}": kind for key, kind in _CLIP_TYPES.items()}
    for key, kind in (kinds | {f"clip.{flag}": "bool" for flag in _CLIP_FLAGS} | {"general.file_type": "u32"}).items():
        draft.retype(key, kind)
    _correct_file_type(draft)
    try:
        config = check_mmproj(draft.gguf)
    except ModelFileError:
        return  # whoever loads the file will tell
    if "clip.projector_type" not in draft.metadata and "clip.vision.projector_type" not in draft.metadata:
        draft.set("clip.projector_type", "str", "mlp", "files of 2023 do not name it; there was one kind")
    key = "clip.vision.feature_layer"
    if key not in draft.metadata:
        n_blocks = draft.metadata["clip.vision.block_count"]
        draft.set(key, "arr[i32]", list(config.feature_layers), f"so many of the {n_blocks} blocks run in a LLaVA")
    if config.ffn_swapped and config.n_ff != config.n_embd:
        _swap_ffn(draft)


def _swap_ffn(draft: Draft) -> None:
    """Where both layers have the same shape, llama.cpp takes the first for one called ffn_down; elsewhere not."""
    other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    names = {}
    for name in draft.tensors:
        parts = name.split(".")
        if name.startswith("v.blk.") and len(parts) == 5 and parts[3] in other:
            names[name] = ".".join((*parts[:3], other[parts[3]], parts[4]))
    why = f"the first layer has that name; the shapes show that {len(names)} tensors have each other's"
    draft.rename_tensors(names, Correction("v.blk.*.ffn_down", "v.blk.*.ffn_down", "v.blk.*.ffn_up", why))


def _correct_file_type(draft: Draft) -> None:
    """Only where all matrices have one type, and that type one number."""
    key = "general.file_type"
    if key in draft.metadata:
        return
    others = ("token_embd", "output", "v.position_embd")
    kinds = Counter(
        TYPES[t.type].name for t in draft.tensors.values() if len(t.shape) == 2 and not t.name.startswith(others)
    )
    if len(kinds) == 1 and (kind := next(iter(kinds))) in _FILE_TYPES:
        draft.set(key, "u32", _FILE_TYPES[kind], f"all matrices are {kind}")
