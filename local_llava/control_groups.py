"""Control groups of Linux, which bound what a process may use: a container's, a service's, a user's.

Knows where they lie, in both versions: https://docs.kernel.org/admin-guide/cgroup-v2.html. What they bound is read by
`devices` (CPU time) and `memory`.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def directories(controller: str) -> list[Path]:
    """Where the groups that hold this process tell of a controller, such as "memory": its own, and those around it.

    A limit of any of them holds. Not all need be there: in a container the root is its own group, while the path that
    the process is told may be the host's.
    """
    found = [_ROOT, _ROOT / controller]  # version 2, and 1
    try:
        lines = _OWN.read_text().splitlines()
    except (OSError, ValueError):  # another system, or a path that is no text
        lines = []
    for line in lines:
        _, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        group = PurePosixPath(path.strip("/"))
        if ".." in group.parts or controller not in (controllers or controller).split(","):
            continue
        root = _ROOT / controller if controllers else _ROOT
        found += [root / part for part in (group, *group.parents)]
    return found
