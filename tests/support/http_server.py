"""A server of one folder on the loopback interface: range requests, ETags, requests counted, and faults on demand."""

import dataclasses
import hashlib
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest

from sora_jax.storage import site as site_module

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclasses.dataclass(frozen=True)
class Request:
    """One request, and the bytes of the body that answers it."""

    method: str
    path: str
    first: int
    num_bytes: int


class Handler(BaseHTTPRequestHandler):
    """Answers one request after the other of a connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        """Answers without a body."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """Answers with the file, or the range that is asked for."""
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        """Prints nothing."""

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, length: int | None = None) -> None:
        """Sends an answer; ``length`` is what its header says."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reset(self) -> None:
        """Ends the connection without an answer, so that the client sees a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _answer(self, *, body: bool) -> None:
        site = cast("Server", self.server).site
        path = site.folder / self.path.lstrip("/")
        data = path.read_bytes() if path.is_file() else b""
        match = _RANGE.fullmatch(self.headers.get("Range", "")) if site.ranges else None
        first, last = _bounds(match, len(data)) if match else (0, len(data) - 1)
        part = data[first : last + 1]
        request = Request(self.command, self.path.lstrip("/"), first, len(part) if body else 0)
        with site.lock:
            site.requests.append(request)
        if site.fault(self, request):
            return
        headers = {"Accept-Ranges": "bytes"} | ({"ETag": f'"{hashlib.md5(data).hexdigest()}"'} if site.etags else {})
        if not path.is_file():
            self.send(404, b"not here")
        elif match and first > last:
            self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        elif match:
            self.send(206, part, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})
        else:
            self.send(200, part, headers)


class Server(ThreadingHTTPServer):
    """The sockets; one thread for every connection, ended with the test."""

    daemon_threads = True
    site: "Site"

    def handle_error(self, *_: Any) -> None:
        """Says nothing: clients that give up are part of the tests."""


@dataclasses.dataclass
class Site:
    """What is served, and what was asked for.

    Attributes:
      folder: whose files are served.
      url: where.
      fault: called before every answer with its handler and request; returns True where it has answered itself.
      ranges: whether range requests are answered as such.
      etags: whether answers name the state of their file.
      requests: every request, in the order of arrival.
    """

    folder: Path
    url: str = ""
    fault: Callable[[Handler, Request], bool] = lambda _handler, _request: False
    ranges: bool = True
    etags: bool = True
    requests: list[Request] = dataclasses.field(default_factory=list)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def bytes_of(self, part: str) -> int:
        """Returns the bytes that were sent of files whose path holds ``part``."""
        return sum(request.num_bytes for request in self.requests if part in request.path)


os.environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] = "1"  # read when the first connection is made
NUM_RETRIES = 1


@pytest.fixture(scope="module")
def impatient() -> Iterator[None]:
    """Requests are tried twice, without a pause that a test would notice."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"max_retries": NUM_RETRIES, "initial_delay": "10ms", "max_delay": "20ms"}.items():
            patch.setitem(site_module._RETRIES, name, value)
        for cached in (site_module._context, site_module._opened):
            cached.cache_clear()
        yield
    for cached in (site_module._context, site_module._opened):
        cached.cache_clear()


@contextmanager
def serving(folder: Path) -> Iterator[Site]:
    """Yields the site of a folder while it is served."""
    server = Server(("127.0.0.1", 0), Handler)
    server.site = Site(folder)
    server.site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="test-server", daemon=True)
    thread.start()
    try:
        yield server.site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _bounds(match: re.Match[str], size: int) -> tuple[int, int]:
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size - 1
    return int(first), min(int(last) if last else size - 1, size - 1)
