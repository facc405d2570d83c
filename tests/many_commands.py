"""Runs many commands, each in a process of its own, for little more than the start of one.

A first process imports what `local-llava convert` needs; the others are its forks, which begin where it stands.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

_FORKS = """
import json, os, sys, tempfile
from local_llava import cli
from local_llava.convert import prepare

outcomes = {}
for name, arguments in json.load(sys.stdin).items():
    with tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if not child:
            os.dup2(stderr.fileno(), 2)
            os.dup2(2, 1)
            sys.argv = ["local-llava", *arguments]
            try:
                cli.main()
            except SystemExit as e:
                sys.stdout.flush()
                os._exit(e.code or 0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            os._exit(99)
        status = os.waitpid(child, 0)[1]
        stderr.seek(0)
        outcomes[name] = [os.waitstatus_to_exitcode(status), stderr.read().decode()]
json.dump(outcomes, sys.stdout)
"""


def run(commands: Mapping[str, Sequence[object]], **environment: str) -> dict[str, tuple[int, str]]:
    """Run `local-llava` with each of the arguments.

    Args:
        commands: Name of a command -> its arguments.
        **environment: Variables for all of them.

    Returns:
        Name -> exit status, negative for a signal, and what it wrote to stderr and stdout.
    """
    done = subprocess.run(
        [sys.executable, "-c", _FORKS],
        input=json.dumps({name: [str(a) for a in arguments] for name, arguments in commands.items()}),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "1000", **environment},
        check=True,
    )
    return {name: (code, text) for name, (code, text) in json.loads(done.stdout).items()}


def error_line(outcome: tuple[int, str]) -> str:
    """The one line that a command which failed has to say, after its notes."""
    code, text = outcome
    assert code == 1, text
    lines = [line for line in text.splitlines() if line.startswith("local-llava: ")]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]
