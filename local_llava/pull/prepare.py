"""A model of the Hugging Face Hub becomes a pair of GGUF files here: what a name means, and where the pair goes.

Knows what is taken: a published pair where there is one of the wanted types, else a checkpoint. How each of them gets
here is `gguf`'s and `checkpoint`'s; how a file is downloaded, `download`'s.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from local_llava import model_list
from local_llava.convert import mixes
from local_llava.errors import DownloadError, UsageError
from local_llava.model_list import ModelEntry, PublishedPair
from local_llava.pull.checkpoint import CheckpointPull
from local_llava.pull.gguf import GGUFPull
from local_llava.pull.hub_api import Listing, OfflineError, list_repository
from local_llava.pull.target import KeptPair, Target
from local_llava.types import DEFAULT_MMPROJ_QUANT, DEFAULT_QUANT

Kind = Literal["gguf", "checkpoint"]

_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def prepare_pull(
    name: str,
    *,
    quant: str | None = None,
    mmproj_quant: str | None = None,
    source: Kind | None = None,
    revision: str | None = None,
    out: Path | None = None,
    low_disk: bool = False,
    force: bool = False,
) -> GGUFPull | CheckpointPull | KeptPair:
    """Decide what a name means, and check all that can be checked before the first large download.

    Of a checkpoint, the small files are downloaded already (into the Hub's cache), and the headers of its weights.

    Args:
        name: A name of the model list, or owner/repository on the Hub; either may end with :QUANT.
        quant: Type of the language model; None for Q4_K_M, or what a repository of GGUF files has.
        mmproj_quant: Type of the mmproj; None for F16.
        source: Take published GGUF files, or convert a checkpoint; None for GGUF files where there are some.
        revision: Branch, tag or commit of the repository that is taken; None for the main branch.
        out: A directory for the pair; None for the store.
        low_disk: Remove each file of a checkpoint as soon as it is converted.
        force: Replace what is there.

    Raises:
        UsageError: The name means nothing, or what is wanted is not published.
        DownloadError: The Hub cannot be asked, or refuses.
        CheckpointError: The checkpoint cannot be converted.
        OutputError: There is not enough room, or something is in the way.
    """
    base, suffix = model_list.split_name(name)
    if quant and suffix and quant.upper() != suffix:
        raise UsageError(f"{name} and --quant {quant} name two types: name one")
    wanted = (quant or suffix or "").upper() or None
    mmproj_wanted = mmproj_quant.upper() if mmproj_quant else None
    entry = model_list.find(base)
    target = Target(out, entry.name if entry else base, force)
    repository = base if "/" in base else None
    if repository is None:
        entry = model_list.get(base)
        published = entry.published(wanted or DEFAULT_QUANT, mmproj_wanted)
        if published and source != "checkpoint":
            return _gguf(published[0].name, revision, published[1], target)
        if source == "gguf":
            raise UsageError(f"{entry.name}: {_not_published(entry, wanted, mmproj_wanted)}")
        repository = entry.checkpoint.name
    elif not model_list.is_repository(repository):
        raise UsageError(f"{name!a:.80} is neither a name of the model list nor owner/repository on the Hub")
    elif entry and (listed := entry.repository(repository)):
        repository = listed.name  # in its own case of letters
    types = (wanted or DEFAULT_QUANT, mmproj_wanted or DEFAULT_MMPROJ_QUANT)
    listing = _list(repository, revision, target, types)
    if isinstance(listing, KeptPair):
        return listing
    if source != "checkpoint" and any(file.lower().endswith(".gguf") for file in listing.files):
        return _gguf(listing, revision, _pair_of(listing, entry, wanted, mmproj_wanted), target)
    if source == "gguf":
        raise UsageError(f"{repository}: holds no GGUF files; without --from gguf it is converted")
    for kind, known in zip(types, (mixes.LLM_MIXES, mixes.MMPROJ_MIXES), strict=True):
        mixes.get_mix(kind, known)
    kept = target.kept(repository, listing.commit, *types)
    return kept or CheckpointPull.prepare(listing, *types, target, entry, low_disk)


def _gguf(listing: Listing | str, revision: str | None, pair: PublishedPair, target: Target) -> GGUFPull | KeptPair:
    types = (pair.quant, pair.mmproj_quant)
    found = _list(listing, revision, target, types) if isinstance(listing, str) else listing
    if isinstance(found, KeptPair):
        return found
    return target.kept(found.repository, found.commit, *types) or GGUFPull.prepare(found, pair, target)


def _list(repository: str, revision: str | None, target: Target, types: tuple[str, str]) -> Listing | KeptPair:
    """What the Hub has; in offline mode a pair that is here will do, from whatever commit of the main branch."""
    try:
        return list_repository(repository, revision)
    except OfflineError:
        kept = target.kept(repository, None, *types) if revision is None else None
        if kept is None:
            raise
        return kept


def _not_published(entry: ModelEntry, quant: str | None, mmproj_quant: str | None) -> str:
    pairs = [pair for repository in entry.repositories for pair in repository.pairs]
    there = ", ".join(f"{pair.quant} with {pair.mmproj_quant}" for pair in pairs) or "none"
    wanted = f"{quant or DEFAULT_QUANT} with an mmproj of {mmproj_quant or DEFAULT_MMPROJ_QUANT}"
    return f"no GGUF files of {wanted} are published ({there}); without --from gguf it is converted"


def _pair_of(listing: Listing, entry: ModelEntry | None, quant: str | None, mmproj_quant: str | None) -> PublishedPair:
    """The pair of a repository of GGUF files: as the model list says, else by the names of the files."""
    known = entry.repository(listing.repository) if entry else None
    pairs = known.pairs if known else ()
    fitting = [
        pair
        for pair in pairs
        if quant in (None, pair.quant) and mmproj_quant in (None, pair.mmproj_quant) and pair.model in listing.files
    ]
    if fitting:
        return fitting[0]
    files = [file for file in sorted(listing.files) if file.lower().endswith(".gguf")]
    projectors = [file for file in files if "mmproj" in Path(file).name.lower()]
    models = [file for file in files if file not in projectors]
    if not projectors:
        raise DownloadError(f"{listing.repository}: has no mmproj file (mmproj*.gguf), which is needed to see pictures")
    model, model_type = _choose(listing, models, quant, DEFAULT_QUANT, "language model", "--quant")
    mmproj, mmproj_type = _choose(listing, projectors, mmproj_quant, DEFAULT_MMPROJ_QUANT, "mmproj", "--mmproj-quant")
    return PublishedPair(model_type, mmproj_type, model, mmproj)


def _choose(
    listing: Listing, files: Sequence[str], quant: str | None, default: str, what: str, flag: str
) -> tuple[str, str]:
    """The file of a type, by its name, and the type."""
    types = {file: _type_in(file) for file in files}
    fitting = [file for file in files if types[file] == (quant or default)]
    if not fitting and quant is None and len(files) == 1:
        fitting = list(files)
    if len(fitting) != 1:
        there = ", ".join(sorted({kind for kind in types.values() if kind})) or ", ".join(files[:8]) or "none"
        count = "several files" if fitting else "no file"
        raise DownloadError(
            f"{listing.repository}: {count} of the {what} in {quant or default}; there are: {there} ({flag})"
        )
    if _PART.search(fitting[0]):
        raise DownloadError(f"{listing.repository}/{fitting[0]}: is split into parts, which are not supported")
    return fitting[0], types[fitting[0]] or "unknown"


def _type_in(file: str) -> str | None:
    """The type that a file's name tells: `model-Q4_K_M.gguf`, `mmproj-model-f16.gguf`."""
    name = _PART.sub(".gguf", Path(file).name).upper()
    match = re.search(r"(?:^|[-._])((?:I?Q\d_(?:K_(?:S|M|L|XL)|K|\d|S|M|XS|XXS|NL))|BF16|F16|F32)\.GGUF$", name)
    if match is None and re.search(r"(?:^|[-._])FP(?:16|32)\.GGUF$", name):
        return "F16" if "FP16" in name else "F32"
    return match[1] if match else None
