"""The Hugging Face Hub: what a repository holds at a commit, and the bytes of its files. The one importer of
huggingface_hub.

Knows the Hub's API, its errors, and the layout of its cache, which other programs share
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache). Proxies, certificates, HF_HOME, HF_HUB_CACHE,
HF_ENDPOINT, HF_TOKEN, the stored token, HF_HUB_OFFLINE and HF_HUB_DOWNLOAD_TIMEOUT are the library's. Does not know
what the files are for, or how one gets to the disk in spite of cuts (`download`).
"""

from __future__ import annotations

import contextlib
import hashlib
import http
import logging
import os
import re
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote

from local_llava.errors import DownloadError, LocalLlavaError, UsageError
from local_llava.store.process_lock import locked

RETRIES = 5
"""How often in a row a request is made again that failed for a reason which may pass."""

RETRY_SECONDS = 1.0
"""Wait before the first of them; it doubles each time."""

MAX_WAIT_SECONDS = 330.0
"""Longest wait that the Hub may ask for (its rate limits are counted over five minutes)."""

MAX_FILE_BYTES = 1 << 43
"""8 TiB, more than any file has."""

T = TypeVar("T")

log = logging.getLogger("local_llava")


class PassingError(DownloadError):
    """A failure that may pass: no connection, an overloaded server."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait
        """Seconds after which the Hub says to come again."""


class OfflineError(DownloadError):
    """Offline mode is on, and what is wanted is not in the Hub's cache."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at a commit."""

    name: str
    """Path in the repository, with slashes."""
    size: int
    sha256: str | None
    """Of its content, where the Hub keeps it outside git (large files)."""
    blob: str | None
    """Git's object name, where it keeps it inside."""

    @property
    def etag(self) -> str:
        """What the Hub's cache calls the content."""
        return self.sha256 or self.blob or ""

    def digest(self) -> tuple[Any, str | None]:
        """What computes the digest of the content, and the hex digits that are to come out; None if not known."""
        if self.sha256:
            return hashlib.sha256(), self.sha256
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False), self.blob


@dataclass(frozen=True)
class Listing:
    """A repository at a commit."""

    repository: str
    """owner/name."""
    revision: str
    """As it was asked for: a branch, a tag, a commit."""
    commit: str
    files: Mapping[str, RemoteFile]
    """By name."""

    @property
    def url(self) -> str:
        return f"{_library().constants.ENDPOINT}/{self.repository}"

    @property
    def cache(self) -> Path:
        """The repository's directory in the Hub's cache."""
        return _cache(self.repository)

    @property
    def directory(self) -> Path:
        """Where its files lie in the cache under their names."""
        return self.cache / "snapshots" / self.commit

    def blob(self, file: RemoteFile) -> Path:
        """Where a file's content lies in the cache."""
        return self.cache / "blobs" / file.etag

    def cached(self, file: RemoteFile) -> Path | None:
        """The file in the cache, if it is there and has the right size."""
        pointer = self.directory / file.name
        with contextlib.suppress(OSError):
            for path in (pointer, self.blob(file)):
                if path.is_file() and path.stat().st_size == file.size:
                    return pointer if path == pointer else self.link(file)
        return None

    def link(self, file: RemoteFile) -> Path:
        """Give a content in the cache its name: a link, or the file itself where there are no links."""
        pointer, blob = self.directory / file.name, self.blob(file)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)
        try:
            if getattr(_library().constants, "HF_HUB_DISABLE_SYMLINKS", False):
                raise OSError
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError:
            blob.replace(pointer)
        return pointer

    def remember_revision(self) -> None:
        """Note in the cache which commit the revision meant, for offline mode."""
        reference = self.cache / "refs" / self.revision
        if self.revision != self.commit and ".." not in self.revision.split("/"):
            with contextlib.suppress(OSError):  # the cache may be for reading only
                reference.parent.mkdir(parents=True, exist_ok=True)
                reference.write_text(self.commit)

    @contextlib.contextmanager
    def lock(self, file: RemoteFile) -> Iterator[None]:
        """The lock under which a content comes into the cache, the library's own."""
        path = self.cache.parent / ".locks" / self.cache.name / f"{file.etag}.lock"
        with locked(path, lambda: log.warning("Waiting for another program, which is downloading %s", file.name)):
            yield

    @contextlib.contextmanager
    def stream(
        self, file: RemoteFile, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, Iterator[bytes]]]:
        """The bytes of a file from `start` to before `stop`.

        Gives where they really start (0 if the server does not serve parts), and the bytes as they arrive.

        Raises:
            PassingError: The connection or the server failed.
            DownloadError: The Hub refuses.
        """
        library = _library()
        where = f"{self.repository}/{file.name}"
        headers = {**_headers(), "Accept-Encoding": "identity"}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        url = f"{self.url}/resolve/{self.commit}/{quote(file.name)}"
        timeout = library.constants.HF_HUB_DOWNLOAD_TIMEOUT
        with (
            _explained(where),
            library.utils.get_session().stream("GET", url, headers=headers, timeout=timeout) as response,
        ):
            if response.status_code not in (200, 206):
                raise _refusal(where, response, "authorization" in headers)
            begins = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            if response.status_code == 206 and not begins:
                raise DownloadError(f"{where}: the server sent another part of the file than it was asked for")
            yield start if response.status_code == 206 else 0, response.iter_bytes()


def list_repository(repository: str, revision: str | None = None) -> Listing:
    """What a repository holds now; in offline mode what the cache holds of it.

    Args:
        repository: owner/name.
        revision: A branch, tag or commit; None for the main branch.

    Raises:
        DownloadError: It is not there, not allowed, or cannot be asked.
    """
    library, revision = _library(), revision or "main"
    if library.constants.HF_HUB_OFFLINE:
        return _cached_listing(repository, revision)
    from local_llava import __version__

    api = library.HfApi(library_name="local-llava", library_version=__version__)

    def ask() -> Any:
        with _explained(repository, revision):
            return api.model_info(
                repository, revision=revision, files_metadata=True, timeout=library.constants.HF_HUB_ETAG_TIMEOUT
            )

    try:
        info = retried(ask)
        commit = info.sha
        files = [_remote_file(sibling) for sibling in info.siblings or ()]
        if not isinstance(commit, str) or not re.fullmatch("[0-9a-f]{40}", commit):
            raise ValueError
    except LocalLlavaError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        endpoint = library.constants.ENDPOINT
        raise DownloadError(f"{repository}: what {endpoint} says of it is not as the Hub's API has it") from e
    return Listing(repository, revision, commit, {file.name: file for file in files})


def retried(call: Callable[[], T], stop: threading.Event | None = None) -> T:
    """What a call gives, made again with growing waits while it fails for a reason that may pass."""
    for failures in range(RETRIES + 1):
        try:
            return call()
        except PassingError as e:
            wait_before_retry(e, failures, stop)
    raise AssertionError("unreachable")


def wait_before_retry(error: PassingError, failures: int, stop: threading.Event | None = None) -> None:
    """Wait, or raise the error if there were too many, the wait is too long, or the stop is set.

    Args:
        error: The failure.
        failures: How many there were in a row before.
        stop: Ends the wait.
    """
    seconds = RETRY_SECONDS * 2**failures if error.wait is None else error.wait
    if failures >= RETRIES or seconds > MAX_WAIT_SECONDS or (stop or threading.Event()).wait(seconds):
        raise error


def _library() -> Any:
    """huggingface_hub, which sends no telemetry from now on: it would ask the Hub which programs to tell of."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import huggingface_hub.constants
    import huggingface_hub.utils

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    return huggingface_hub


def _headers() -> dict[str, str]:
    from local_llava import __version__

    return dict(_library().utils.build_hf_headers(library_name="local-llava", library_version=__version__))


def _cache(repository: str) -> Path:
    return Path(_library().constants.HF_HUB_CACHE).expanduser() / f"models--{repository.replace('/', '--')}"


def _remote_file(sibling: Any) -> RemoteFile:
    name, size, lfs = sibling.rfilename, sibling.size, sibling.lfs
    sha256, blob = (lfs["sha256"], None) if lfs else (None, sibling.blob_id)
    parts = PurePosixPath(name).parts
    sane = (
        name.isprintable()
        and len(name) <= 1000
        and "\\" not in name
        and parts
        and not {"..", "/"} & {*parts}
        and str(PurePosixPath(name)) == name
    )
    if not sane or type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
        raise ValueError
    if not re.fullmatch("[0-9a-f]{64}" if lfs else "[0-9a-f]{40}", sha256 or blob or ""):
        raise ValueError
    return RemoteFile(name, size, sha256, blob)


def _cached_listing(repository: str, revision: str) -> Listing:
    cache = _cache(repository)
    commit = revision
    with contextlib.suppress(OSError, ValueError):
        commit = (cache / "refs" / revision).read_text(encoding="utf-8").strip()
    directory = cache / "snapshots" / commit
    if not re.fullmatch("[0-9a-f]{40}", commit) or not directory.is_dir():
        raise OfflineError(
            f"{repository}: offline mode is on (HF_HUB_OFFLINE), and revision {revision!a:.80} is not in the Hub's "
            f"cache ({cache.parent})"
        )
    files = {}
    for path in directory.rglob("*"):
        if path.is_file():
            # A link's target in blobs/ is called by the digest. That file may be a link itself, with another digest.
            etag = path.readlink().name if path.is_symlink() else ""
            sha256, blob = (etag if re.fullmatch(f"[0-9a-f]{{{n}}}", etag) else None for n in (64, 40))
            name = path.relative_to(directory).as_posix()
            files[name] = RemoteFile(name, path.stat().st_size, sha256, blob)
    return Listing(repository, revision, commit, files)


def _failures() -> tuple[type[Exception], ...]:
    """What the library's HTTP client raises; it is httpx under a name that changes with the library's version."""
    from huggingface_hub.errors import HfHubHTTPError

    base = HfHubHTTPError.__bases__[0]
    client = sys.modules[base.__module__.partition(".")[0]]
    return base, client.InvalidURL, client.StreamError


@contextlib.contextmanager
def _explained(where: str, revision: str = "") -> Iterator[None]:
    """Makes one line of what the library and its HTTP client raise."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as e:
        raise OfflineError(f"{where}: is not in the Hub's cache, and offline mode is on (HF_HUB_OFFLINE)") from e
    except HfHubHTTPError as e:
        raise _refusal(where, e.response, "authorization" in e.response.request.headers, revision) from e
    except _failures() as e:
        raise _broken(where, e) from e


def _refusal(where: str, response: Any, logged_in: bool, revision: str = "") -> DownloadError:
    """What a status code means."""
    code, reason = response.status_code, response.headers.get("X-Error-Code")
    repository = "/".join(where.split("/")[:2])
    endpoint = _library().constants.ENDPOINT
    login = "run `hf auth login`, or set HF_TOKEN"
    if reason == "GatedRepo":
        return DownloadError(f"{where}: is gated: ask for access at {endpoint}/{repository}, then {login}")
    if code == 401 and logged_in:
        return DownloadError(f"{where}: the Hub does not accept the token that you are logged in with: {login}")
    if code == 401:
        return DownloadError(f"{where}: there is no such repository at {endpoint}, or it is private: {login}")
    if code == 403:
        return DownloadError(
            f"{where}: access is forbidden (403); the token must allow reading this repository: {login}"
        )
    if code == 404 and reason == "RevisionNotFound":
        return DownloadError(f"{where}: has no revision {revision!a:.80}")
    if code == 404 and where != repository:
        return DownloadError(f"{where}: there is no such file at {endpoint} (404)")
    if code == 404:
        return DownloadError(f"{where}: there is no such repository at {endpoint}, or this login may not see it (404)")
    phrase = http.HTTPStatus(code).phrase if code in set(http.HTTPStatus) else "no known status"
    if code == 429:
        wait = _wait(response.headers)
        again = f"come again in {wait:.0f} s" if wait is not None else "come again later"
        return PassingError(f"{where}: too many requests for the Hub's liking (429); {again}", wait)
    message = f"{where}: the server answered {code} ({phrase})"
    return (
        PassingError(message, _wait(response.headers)) if code in (408, 425) or code >= 500 else DownloadError(message)
    )


def _wait(headers: Mapping[str, str]) -> float | None:
    """Seconds after which to come again: `Retry-After: 30`, or `RateLimit: "api";r=0;t=30` of the Hub."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*", headers.get("Retry-After", "")) or re.search(
        r";\s*r=0\s*;\s*t=(\d{1,6})", headers.get("RateLimit", "")
    )
    return float(match[1]) if match else None


def _broken(where: str, error: BaseException) -> DownloadError:
    """What went wrong on the way, in words: the client's own may repeat addresses that are keys to something."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and len(chain) < 10:
        chain.append(link)
        link = link.__cause__ or link.__context__
    kinds = {kind.__name__ for kind in type(error).__mro__}
    endpoint = _library().constants.ENDPOINT
    for cause in chain:
        if isinstance(cause, socket.gaierror):
            return PassingError(f"{where}: no connection: the name of the server cannot be found ({endpoint})")
        if isinstance(cause, ssl.SSLCertVerificationError):
            return DownloadError(f"{where}: the server's certificate is not trusted: {cause.verify_message}")
    if "TimeoutException" in kinds:
        return PassingError(f"{where}: no answer within the time (HF_HUB_DOWNLOAD_TIMEOUT sets another)")
    if "ConnectError" in kinds:
        return PassingError(f"{where}: no connection to {endpoint}")
    if "ProxyError" in kinds:
        return DownloadError(f"{where}: the proxy refuses")
    if kinds & {"UnsupportedProtocol", "InvalidURL"}:
        raise UsageError(f"HF_ENDPOINT must be an http or https address, not {endpoint!a:.200}") from error
    if kinds & {"TransportError", "StreamError"}:
        return PassingError(f"{where}: the connection broke off")
    return DownloadError(f"{where}: cannot be had: {type(error).__name__}")
