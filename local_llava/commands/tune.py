"""`local-llava tune`: finds the fastest way to run a model on this computer, and keeps it for later."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from local_llava.commands import console
from local_llava.commands.options import MmprojOption
from local_llava.errors import UsageError

if TYPE_CHECKING:
    from local_llava.measuring import Measurement, Result


def tune(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="As `--model` of ask. Default: the built-in model.", show_default=False),
    ] = None,
    mmproj: MmprojOption = None,
    seconds: Annotated[float, typer.Option(help="How long to measure, roughly. Large models need more.")] = 60,
    allow_q8_kv: Annotated[
        bool, typer.Option("--allow-q8-kv", help="Also keep a KV cache in Q8_0 if it is faster, though it rounds.")
    ] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Only forget what was kept for this model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all measurements as JSON.")] = False,
) -> None:
    """Measure threads, batch sizes, flash attention and types of the KV cache, and keep the best for this computer.

    Close other programs before: what they take is measured, too.
    """
    if not 1 <= seconds <= 86400:
        raise UsageError(f"--seconds must be 1 to 86400, not {seconds:g}")
    from local_llava import hub, tuning
    from local_llava.measuring import Tuner

    with console.ConvertProgress() as progress:
        files = hub.resolve(model, mmproj, on_convert=progress.start)
    if reset:
        print("forgotten" if tuning.forget(files) else "nothing was kept")
        return
    result = Tuner(files, seconds, allow_q8_kv, lambda measured: console.note(_line(measured))).run()
    changes = result.changes
    where = None
    if changes:
        where = tuning.save(files, changes, {**_values(result.best), "seconds_by_default": result.default.total_s})
    else:
        tuning.forget(files)
    if as_json:
        print(json.dumps(_as_json(result), indent=2))
        return
    for settings in result.skipped:
        console.note(f"Not measured, for lack of time: {_named(settings)}")
    if where:
        print(f"{_named(changes)}: {result.gain:.0%} less time; kept in {where}")
    else:
        print("the defaults are as fast as anything else that was measured; nothing is kept")


def _line(measured: Measurement) -> str:
    speeds = (1 / min(times) for times in (measured.prefill_s, measured.decode_s))
    prefill, decode = (f"{speed:.1f}" for speed in speeds)
    return (
        f"{_named(measured.settings)}: {measured.total_s:.2f} s a question about a new picture "
        f"(tower {min(measured.picture_s):.2f} s, prompt {prefill} and answer {decode} tokens/s)"
    )


def _named(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {'default' if value is None else value}" for name, value in settings.items())


def _values(measured: Measurement) -> dict[str, Any]:
    return {
        **measured.settings,
        "seconds": round(measured.total_s, 4),
        "picture_s": round(min(measured.picture_s), 4),
        "prefill_tokens_per_s": round(1 / min(measured.prefill_s), 2),
        "decode_tokens_per_s": round(1 / min(measured.decode_s), 2),
    }


def _as_json(result: Result) -> dict[str, Any]:
    return {
        "measured": [_values(measured) for measured in result.tried],
        "not_measured": result.skipped,
        "gain": round(result.gain, 4),
        "kept": result.changes,
    }
