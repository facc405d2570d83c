"""A Hugging Face Hub on this computer, for tests: its API, its redirects to a CDN, and its faults on demand.

Serves directories as repositories. Answers are as huggingface.co gave them to huggingface_hub: listings of models with
digests, 401 for repositories that are not there, X-Error-Code, redirects of large files to another server. The CDN
refuses requests that carry a token, which no client may send there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".gguf", ".model")
"""Files that the Hub keeps outside git."""

TOKEN = "hf_valid"


@dataclass
class Fault:
    """What goes wrong with requests for a file, or for the listing (the name "listing")."""

    times: int = 1 << 30
    """With how many requests."""
    status: int = 0
    """Answer with this status."""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    """Break the connection after so many bytes of the body."""
    flip: int | None = None
    """Change the byte at this offset of the file."""
    delay: float = 0.0
    """Seconds before each kilobyte."""
    stall: float = 0.0
    """Seconds before the answer."""
    no_range: bool = False
    """Send the whole file, whatever is asked for."""
    body: bytes | None = None
    """Send this in place of the content."""
    skip: int = 0
    """Leave so many requests alone first."""


@dataclass
class Repository:
    """A directory, served."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    faults: dict[str, Fault] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(n.encode() + c for n, c in sorted(self.files.items()))).hexdigest()

    def sibling(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
        if name.endswith(LARGE):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
        return entry


class HubServer:
    """Two servers, the Hub and its CDN, each on a port of its own."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        """Method, path and headers, in lower case, of all requests so far."""
        self.on_body: Callable[[int], None] = lambda _: None
        """Called with the bytes of each piece that is sent."""
        self._lock = threading.Lock()
        self._hub = self._serve(_HubHandler)
        self._cdn = self._serve(_CDNHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._hub.server_address[1]}"

    @property
    def cdn_url(self) -> str:
        return f"http://127.0.0.1:{self._cdn.server_address[1]}"

    def add(self, name: str, directory: Path, **access: bool) -> Repository:
        files = {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
        self.repositories[name] = Repository(files, **access)
        return self.repositories[name]

    def downloads(self, suffix: str = "") -> list[str]:
        """Names of the files whose content was asked for, in order."""
        paths = [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]
        return [name for path in paths if (name := path.split("/resolve/")[1].split("/", 1)[1]).endswith(suffix)]

    def fault(self, repository: Repository, name: str) -> Fault | None:
        with self._lock:
            fault = repository.faults.get(name)
            if fault is None or fault.times == 0:
                return None
            if fault.skip:
                fault.skip -= 1
                return None
            fault.times -= 1
            return fault

    def __enter__(self) -> HubServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()

    def _serve(self, handler: type[_Handler]) -> ThreadingHTTPServer:
        bound = type(handler.__name__, (handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        # Whoever was killed says no good-bye.
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def _handle(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append((self.command, self.path, headers))
        try:
            self.answer()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def answer(self) -> None:
        raise NotImplementedError

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def failed(self, fault: Fault | None) -> bool:
        if fault is not None:
            time.sleep(fault.stall)
        if fault is None or not fault.status:
            return False
        self.reply(fault.status, b"no", **{name.replace("-", "_"): value for name, value in fault.headers.items()})
        return True

    def send_file(self, content: bytes, fault: Fault | None, **headers: str) -> None:
        fault = fault or Fault()
        if fault.flip is not None:
            changed = bytearray(content)
            changed[fault.flip] ^= 0xFF
            content = bytes(changed)
        if fault.body is not None:
            content = fault.body
        start, stop, status = 0, len(content), 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match and not fault.no_range:
            start, stop = int(match[1]), min(len(content), int(match[2] or len(content)) + 1)
            if start >= len(content):
                self.reply(416, Content_Range=f"bytes */{len(content)}")
                return
            status, headers["Content_Range"] = 206, f"bytes {start}-{stop - 1}/{len(content)}"
        self.send_response(status)
        for name, value in {**headers, "Content_Length": str(stop - start)}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "GET":
            return
        end = stop if fault.cut is None else min(stop, start + fault.cut)
        step = 1024 if fault.delay else 16384
        for at in range(start, end, step):
            time.sleep(fault.delay)
            piece = content[at : min(at + step, end)]
            self.wfile.write(piece)
            self.hub.on_body(len(piece))
        if end < stop:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


class _HubHandler(_Handler):
    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            name, revision, file = match[1], match[2] or "main", None
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = match[1], match[2], match[3]
        else:
            self.reply(404)
            return
        repository = self._allowed(name)
        if repository is None:
            return
        if revision not in ("main", repository.commit):
            self.reply(404, X_Error_Code="RevisionNotFound")
        elif file is None:
            self._list(name, repository)
        elif file not in repository.files:
            self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=repository.commit)
        else:
            self._resolve(name, repository, file)

    def _allowed(self, name: str) -> Repository | None:
        """The repository; None where an error was answered."""
        authorization = self.headers.get("Authorization")
        repository = self.hub.repositories.get(name)
        if authorization not in (None, f"Bearer {TOKEN}"):
            self.reply(401, X_Error_Message="Invalid credentials in Authorization header")
        elif repository is None or (repository.private and authorization is None):
            self.reply(404 if authorization else 401, X_Error_Code="RepoNotFound")
        elif repository.gated and "/resolve/" in self.path:
            self.reply(403 if authorization else 401, X_Error_Code="GatedRepo")
        else:
            return repository
        return None

    def _list(self, name: str, repository: Repository) -> None:
        fault = self.hub.fault(repository, "listing")
        if self.failed(fault):
            return
        siblings = [repository.sibling(file) for file in sorted(repository.files)]
        body = json.dumps({"_id": "1", "id": name, "sha": repository.commit, "siblings": siblings}).encode()
        self.reply(200, fault.body if fault and fault.body is not None else body, Content_Type="application/json")

    def _resolve(self, name: str, repository: Repository, file: str) -> None:
        sibling, commit = repository.sibling(file), repository.commit
        if "lfs" in sibling:
            self.reply(
                302,
                Location=f"{self.hub.cdn_url}/{name}/{commit}/{file}?signature=1",
                X_Repo_Commit=commit,
                X_Linked_Etag=f'"{sibling["lfs"]["sha256"]}"',
                X_Linked_Size=str(sibling["size"]),
            )
            return
        fault = self.hub.fault(repository, file)
        if not self.failed(fault):
            self.send_file(
                repository.files[file],
                fault,
                ETag=f'"{sibling["blobId"]}"',
                X_Repo_Commit=commit,
                Accept_Ranges="bytes",
            )


class _CDNHandler(_Handler):
    def answer(self) -> None:
        owner, name, _, file = unquote(urlsplit(self.path).path)[1:].split("/", 3)
        repository = self.hub.repositories[f"{owner}/{name}"]
        if self.headers.get("Authorization"):
            self.reply(400)
            return
        fault = self.hub.fault(repository, file)
        if not self.failed(fault):
            self.send_file(repository.files[file], fault, Accept_Ranges="bytes")
