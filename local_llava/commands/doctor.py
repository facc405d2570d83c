"""`local-llava doctor`: what this computer has, what of it is used, and whether it computes right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from local_llava.commands import console
from local_llava.commands.options import MmprojOption

if TYPE_CHECKING:
    from local_llava.types import ModelFiles


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Whose plan to show, as of `ask`. Default: all that are kept, or the built-in one."
        ),
    ] = None,
    mmproj: MmprojOption = None,
    self_test: Annotated[
        bool,
        typer.Option("--self-test", help="Let the built-in model answer, on CPU and GPU: less than a minute."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show processors, memory, how models would be loaded, and what to install for a GPU. Code 1 if a test fails."""
    from local_llava.diagnosis import diagnose, lines
    from local_llava.types import Options

    diagnosis = diagnose(_pairs(model, mmproj), Options())
    values = diagnosis.as_json()
    if not as_json:
        for line in lines(diagnosis):
            print(line)
    if self_test:
        values["self_test"] = _self_test(print_them=not as_json)
    if as_json:
        print(json.dumps(values, indent=2))
    if self_test and not all(check["passed"] for check in values["self_test"]):
        raise typer.Exit(1)


def _pairs(model: str | None, mmproj: Path | None) -> list[tuple[str, ModelFiles]]:
    """Models to plan for, with what to call them."""
    from local_llava import hub, store

    kept = [] if model is not None else store.pairs()
    if kept:
        return [(f"{pair.origin.name} ({pair.origin.quant} + {pair.origin.mmproj_quant})", pair.files) for pair in kept]
    with console.ConvertProgress() as progress:
        files = hub.resolve(model, mmproj, on_convert=progress.start)
    return [(model or "the built-in model", files)]


def _self_test(print_them: bool) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from local_llava import selftest

    checks = []
    for check in selftest.run(lambda what: console.note(f"Testing {what}")):
        checks.append(asdict(check))
        if print_them:
            print(f"{'ok' if check.passed else 'FAILED'}: {check.name}: {check.measured}", flush=True)
    return checks
