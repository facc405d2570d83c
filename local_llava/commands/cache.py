"""`local-llava cache`: what is kept of pictures on this computer, and away with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from local_llava.commands import console, tables

if TYPE_CHECKING:
    from pathlib import Path

    from local_llava.image_cache import Entry

app = typer.Typer(
    help="Show or remove what is kept of pictures on disk.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("dir")
def directory() -> None:
    """Print where it is kept."""
    from local_llava import image_cache

    where = image_cache.default_dir()
    _check(where)
    print(where)
    console.note("What is kept there reveals the pictures that were asked about; `local-llava cache clear` removes it.")


@app.command()
def ls(as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False) -> None:
    """List what is kept, last used first."""
    from local_llava import image_cache
    from local_llava.convert.write import human_size
    from local_llava.types import Options

    where, cap = image_cache.default_dir(), Options().image_cache_bytes
    _check(where)
    found, unfinished = image_cache.entries(where), image_cache.leftovers(where)
    total = sum(entry.size for entry in found)
    if as_json:
        values = {
            "directory": str(where),
            "default_max_bytes": cap,
            "bytes": total,
            "unfinished_bytes": unfinished,
            "entries": [_entry_values(entry) for entry in found],
        }
        print(json.dumps(values, indent=2))
        return
    if found:
        rows: list[tuple[str, ...]] = [("KEY", "KIND", "SIZE", "TOKENS", "MODEL", "LAST USED")]
        for entry in found:
            told = [_printable(entry.about.get(name, "-")) for name in ("tokens", "model")]
            rows.append((entry.key[:12], entry.kind, human_size(entry.size), *told, tables.age(entry.last_used)))
        tables.print_table(rows)
    counted = f"{len(found)} {'entry' if len(found) == 1 else 'entries'}, {human_size(total)}"
    rest = f", and {human_size(unfinished)} unfinished" if unfinished else ""
    print(f"{counted} of at most {human_size(cap)} by default{rest} in {where}")


@app.command()
def clear(yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Remove all that is kept. Never touches other files."""
    from local_llava import image_cache
    from local_llava.convert.write import human_size

    where = image_cache.default_dir()
    found = image_cache.entries(where)
    size = sum(entry.size for entry in found) + image_cache.leftovers(where)
    question = f"Remove {len(found)} {'entry' if len(found) == 1 else 'entries'}, {human_size(size)}?"
    if (found or size) and not yes and not console.confirmed(question, "cache clear"):
        console.note("Nothing was removed")
        raise typer.Exit(1)
    print(f"{human_size(image_cache.clear(where)[1])} freed")


def _check(where: Path) -> None:
    from local_llava import image_cache

    reason = image_cache.refusal(where)
    if reason:
        console.note(f"Not in use: {reason}")


def _entry_values(entry: Entry) -> dict[str, object]:
    return {
        "kind": entry.kind,
        "key": entry.key,
        "bytes": entry.size,
        "last_used": entry.last_used.isoformat(),
        "about": entry.about,
    }


def _printable(value: str | int) -> str:
    """In one line, whatever the name of a model's file contains."""
    return "".join(c if c.isprintable() else "?" for c in str(value))
