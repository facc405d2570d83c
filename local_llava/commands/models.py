"""`local-llava models`: what there is. `local-llava ls`: what is on this computer. `local-llava rm`: away with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from local_llava.commands import console, tables
from local_llava.errors import UsageError

if TYPE_CHECKING:
    from local_llava.model_list import ModelEntry
    from local_llava.store import Leftover
    from local_llava.store.origin import Pair

Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


def models(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show all that is known of this one.")] = None,
    as_json: Json = False,
) -> None:
    """List the models that local-llava knows by name: their sizes, what fits this computer, and what is on it."""
    from local_llava import memory, model_list, store

    entries = model_list.entries() if name is None else (model_list.get(name),)
    free = memory.available()
    kept = {entry.name: store.find(entry.name) for entry in entries}
    if as_json:
        described = [_describe(entry, kept[entry.name], free) for entry in entries]
        print(json.dumps(described if name is None else described[0], indent=2))
    elif name is None:
        _print_list(entries, kept, free)
    else:
        _print_one(entries[0], kept[entries[0].name], free)


def ls(as_json: Json = False) -> None:
    """List the models on this computer that local-llava keeps, with their sizes and where they come from."""
    from local_llava import store
    from local_llava.convert.write import human_size

    pairs, leftovers = store.pairs(), store.leftovers()
    if as_json:
        values = {
            "directory": str(store.models_dir()),
            "pairs": [_pair_values(pair) for pair in pairs],
            "leftovers": [_leftover_values(leftover) for leftover in leftovers],
        }
        print(json.dumps(values, indent=2))
        return
    for pair in pairs:
        types = f"{pair.origin.quant} + {pair.origin.mmproj_quant}"
        print(f"{pair.origin.name}  {types}  {human_size(pair.size)}  {pair.origin.kind} {tables.age(pair.created)}")
        revision = f" ({pair.origin.revision[:7]})" if pair.origin.revision else ""
        print(f"    from {pair.origin.repository or pair.origin.source}{revision}")
        print(f"    in {pair.directory}")
    for leftover in leftovers:
        print(f"{leftover.name}  {human_size(leftover.size)}  {leftover.state}")
        print(f"    in {leftover.directory}")
    total = sum(pair.size for pair in pairs) + sum(leftover.size for leftover in leftovers)
    print(f"{len(pairs)} model{'s' * (len(pairs) != 1)}, {human_size(total)} in {store.models_dir()}")


def rm(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME[:TYPE]", help="Names, with a type or of all types; or keys or paths as ls shows."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all that is kept.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove models that local-llava keeps. Never touches other files, nor the Hugging Face cache."""
    from local_llava import store
    from local_llava.convert.write import human_size

    if bool(names) == everything:
        raise UsageError("name what to remove, or give --all")
    pairs, leftovers = store.pairs(), store.leftovers()
    chosen: list[Pair | Leftover] = [*pairs, *leftovers] if everything else []
    for name in names or ():
        chosen += [item for item in _meant(name, pairs, leftovers) if item not in chosen]
    for item in chosen:
        print(f"{_label(item)}  {human_size(item.size)}  {item.directory}")
    if chosen and not yes and not console.confirmed(f"Remove {human_size(sum(item.size for item in chosen))}?", "rm"):
        console.note("Nothing was removed")
        raise typer.Exit(1)
    freed = sum(store.remove(item) for item in chosen)
    print(f"{human_size(freed)} freed")


def _print_list(entries: Sequence[ModelEntry], kept: dict[str, list[Pair]], free: int) -> None:
    from local_llava import model_sizes
    from local_llava.convert.write import human_size
    from local_llava.types import DEFAULT_QUANT

    rows = [("NAME", "SIZE", "MEMORY", "FITS", "LICENSE", "ON DISK")]
    for entry in entries:
        size = model_sizes.size(entry)
        there = sorted({pair.origin.quant for pair in kept[entry.name]}) + ["HF cache"] * bool(_cached(entry))
        fits = "yes" if size.memory <= free else "no"
        cells = (human_size(size.files), human_size(size.memory), fits, entry.license, ", ".join(there) or "-")
        rows.append((entry.name, *cells))
    tables.print_table(rows)
    console.note(
        f"SIZE and MEMORY are those of {DEFAULT_QUANT}; {human_size(free)} of memory are free now. "
        "`local-llava models NAME` shows other types."
    )


def _print_one(entry: ModelEntry, kept: list[Pair], free: int) -> None:
    from local_llava import model_sizes
    from local_llava.convert.write import human_size

    print(f"{entry.name}: {entry.title}")
    if entry.aliases:
        print(f"also called: {', '.join(entry.aliases)}")
    print(f"license: {entry.license}" + (f" ({entry.license_note})" if entry.license_note else ""))
    for repository in entry.repositories:
        needs = [part for part in (repository.vision_tower, repository.llm) if part]
        extra = f", needs {' and '.join(needs)}" if needs else ""
        types = f" of {', '.join(pair.quant for pair in repository.pairs)}" if repository.pairs else ""
        size = f", {human_size(repository.bytes)}" if repository.bytes else ""
        print(f"{repository.format}{types}: {repository.name}{size}{extra}")
    for cached in _cached(entry):
        print(f"in the Hugging Face cache: {cached}")
    for name, score in entry.scores.items():
        print(f"{name}: {score}")
    on_disk = {pair.origin.quant for pair in kept}
    rows = [("TYPE", "SIZE", "MEMORY", "FITS", "PUBLISHED", "ON DISK")]
    for quant in model_sizes.QUANTS:
        size_of = model_sizes.size(entry, quant)
        flags = (size_of.memory <= free, entry.published(quant) is not None, quant in on_disk)
        fits, published, there = ("yes" if flag else "no" for flag in flags)
        rows.append((quant, human_size(size_of.files), human_size(size_of.memory), fits, published, there))
    tables.print_table(rows)
    console.note(
        f"MEMORY is for a context of {model_sizes.size(entry).n_ctx} tokens, shorter ones take less; "
        f"{human_size(free)} are free now."
    )


def _cached(entry: ModelEntry) -> list[str]:
    """The repositories of a model that are in the Hugging Face cache as a whole."""
    from local_llava.store import hub_cache

    names = [repository.name for repository in entry.repositories]
    return [name for name in names if any(map(hub_cache.is_complete, hub_cache.snapshots(name)))]


def _describe(entry: ModelEntry, kept: list[Pair], free: int) -> dict[str, Any]:
    from dataclasses import asdict

    from local_llava import model_sizes

    sizes = {quant: model_sizes.size(entry, quant) for quant in model_sizes.QUANTS}
    return {
        "name": entry.name,
        "aliases": entry.aliases,
        "title": entry.title,
        "license": entry.license,
        "license_note": entry.license_note,
        "repositories": [asdict(repository) for repository in entry.repositories],
        "scores": entry.scores,
        "types": {quant: {**asdict(size), "fits": size.memory <= free} for quant, size in sizes.items()},
        "on_disk": [_pair_values(pair) for pair in kept],
        "in_hub_cache": _cached(entry),
    }


def _pair_values(pair: Pair) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "key": pair.key,
        **asdict(pair.origin),
        "model": str(pair.files.model),
        "mmproj": str(pair.files.mmproj),
        "bytes": pair.size,
        "created": pair.created.isoformat(),
        "version": pair.version,
    }


def _leftover_values(leftover: Leftover) -> dict[str, Any]:
    return {
        "key": leftover.key,
        "name": leftover.name,
        "state": leftover.state,
        "resumable": leftover.resumable,
        "directory": str(leftover.directory),
        "bytes": leftover.size,
    }


def _meant(name: str, pairs: list[Pair], leftovers: list[Leftover]) -> list[Pair | Leftover]:
    """What a name, a key or a path means.

    Raises:
        UsageError: Nothing that is kept.
    """
    from local_llava import model_list, store
    from local_llava.store import hub_cache

    base, quant = model_list.split_name(name)
    entry = model_list.find(base)
    keys = {pair.key for pair in store.find(base, quant)}
    items: list[Pair | Leftover] = [*pairs, *leftovers]
    found = [item for item in items if item.key in keys]
    for leftover in leftovers:
        same = leftover.name.lower() == base.lower() or (entry and model_list.find(leftover.name) is entry)
        if quant is None and (same or store.is_key(base, leftover.key)):
            found.append(leftover)
    path = Path(name).absolute()
    found = found or [item for item in items if item.directory.absolute() in (path, path.parent)]
    if found:
        return found
    repositories = [base] if "/" in base else [r.name for r in entry.repositories] if entry else []
    cached = [r for r in repositories if model_list.is_repository(r) and hub_cache.snapshots(r)]
    if cached:
        raise UsageError(
            f"{name} is not kept by local-llava; {cached[0]} is in the Hugging Face cache, "
            "which local-llava leaves alone: `hf cache rm` removes from there"
        )
    raise UsageError(f"{name} is not among the models that local-llava keeps in {store.models_dir()}: see `ls`")


def _label(item: Pair | Leftover) -> str:
    from local_llava.store.origin import Pair

    return f"{item.origin.name}:{item.origin.quant}" if isinstance(item, Pair) else f"{item.name} ({item.state})"
