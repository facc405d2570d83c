"""A server of pictures that does what it is told, also what servers should not; for tests."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

from picture_files import photo, saved

PICTURE = saved(photo(), "PNG")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(PICTURE), PICTURE)

# Of use to nobody: valid for localhost only, and known to everybody.
KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgd6/bEzmaObNI91P1
IO083nRTdXb2+pApZbmsTunfhRShRANCAARawQgR7vk/wxGoliUlUWKTdPjPFyuJ
PKDUJwk02jxxS52p+gLY9bn+WkfYhbUttnk5ld8PRjeBf78GFYjH65OV
-----END PRIVATE KEY-----
"""
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBqDCCAU+gAwIBAgIUJCQLYmo8Muw1QpKdYfjfSVkPqrcwCgYIKoZIzj0EAwIw
GzEZMBcGA1UEAwwQbG9jYWwtbGxhdmEgdGVzdDAgFw0yNjExMjMwNDA0MzZaGA8y
MTI2MTAzMDA0MDQzNlowGzEZMBcGA1UEAwwQbG9jYWwtbGxhdmEgdGVzdDBZMBMG
ByqGSM49AgEGCCqGSM49AwEHA0IABFrBCBHu+T/DEaiWJSVRYpN0+M8XK4k8oNQn
CTTaPHFLnan6Atj1uf5aR9iFtS22eTmV3w9GN4F/vwYViMfrk5WjbzBtMB0GA1Ud
DgQWBBR233GLK3Z3bjvES8o40I8CHhbt1DAfBgNVHSMEGDAWgBR233GLK3Z3bjvE
S8o40I8CHhbt1DAPBgNVHRMBAf8EBTADAQH/MBoGA1UdEQQTMBGCCWxvY2FsaG9z
dIcEfwAAATAKBggqhkjOPQQDAgNHADBEAiAzzmiu/tg2U55mRqF+Bbxq43OgoFcc
BphgpPFXTNAeBQIgA3txMR2jdZOFT/R7C6aNx2JTshXjxNuwTlMVwyby6Og=
-----END CERTIFICATE-----
"""

Answer = Callable[[bytes, socket.socket], None] | bytes


class Server:
    """Answers each connection once, on a port of its own."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host
        self.requests: list[bytes] = []
        self.answer: Answer = OK
        self.tls: ssl.SSLContext | None = None
        self._socket = socket.create_server((host, 0))
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def url(self, path: str = "/a.png", host: str | None = None) -> str:
        return f"http{'s' if self.tls else ''}://{host or self.host}:{self.port}{path}"

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        # The client may be gone before all is said.
        with contextlib.suppress(OSError), connection:
            if self.tls:
                connection = self.tls.wrap_socket(connection, server_side=True)
            request = b""
            # Of TLS there may be only the first bytes, where the server speaks http.
            while b"\r\n\r\n" not in request and request[:1] != b"\x16" and (piece := connection.recv(1 << 16)):
                request += piece
            self.requests.append(request)
            if callable(self.answer):
                self.answer(request, connection)
            else:
                connection.sendall(self.answer)
            connection.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # or the thread goes on to accept
        self._socket.close()

    def speak_tls(self, directory: Path) -> Path:
        """From now on; returns a file with its certificate, for localhost and 127.0.0.1."""
        certificate, key = directory / "certificate.pem", directory / "key.pem"
        certificate.write_text(CERTIFICATE)
        key.write_text(KEY)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(certificate, key)
        return certificate
