"""Connections between the guards of a mesh's processes: process 0 has one to each of the others, which have one to it.

Invariant: a connection that is closed, or silent for longer than `SILENCE_S`, is told as the end of its process; who does not
know the secret is not let in.  What messages mean is the business of ``guard``.  JAX is not imported.
"""

import contextlib
import hmac
import json
import queue
import secrets
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

BEAT_S = 5.0  # between signs of life
SILENCE_S = 30.0  # without any, a process is taken to be lost
_CONNECT_S = 5.0  # for one address
_MOST_BYTES = 1 << 16  # of a message

Events = queue.SimpleQueue[tuple[str, Any]]
Message = dict[str, Any]


class Peers:
    """The connections of one guard; what arrives goes to ``events`` as ("peer", (process, message)), None for its end."""

    def __init__(self, events: Events):
        self._events = events
        self._connections: dict[int, _Connection] = {}
        self.hosts: dict[int, str] = {}
        self._lock = threading.Lock()
        self._server: socket.socket | None = None

    def listen(self, num_processes: int) -> Message:
        """Lets the other processes in, and returns where and with which secret they find this one."""
        secret = secrets.token_hex(16)
        self._server = socket.create_server(("", 0), backlog=num_processes)
        _in_background(self._let_in, self._server, secret)
        _in_background(self._beat)
        return {"addresses": own_addresses(), "port": self._server.getsockname()[1], "secret": secret}

    def connect(self, hub: Mapping[str, Any], process: int) -> None:
        """Connects to process 0.

        Raises:
          OSError: none of its addresses answers.
        """
        failure: OSError | None = None
        for address in hub["addresses"]:
            try:
                connection = _Connection(socket.create_connection((address, hub["port"]), timeout=_CONNECT_S))
                connection.send({"secret": hub["secret"], "process": process, "host": socket.gethostname()})
                answer = connection.receive() or {}
                if answer.get("welcome") != process:
                    raise ConnectionError("it is not process 0 that answers there")
            except OSError as error:
                failure = error
                continue
            self._keep(0, connection, str(answer["host"]))
            _in_background(self._beat)
            return
        tried = ", ".join(f"{address}:{hub['port']}" for address in hub["addresses"])
        raise OSError(None, f"process 0 cannot be reached at {tried} ({failure}); processes of a mesh must reach each other")

    def send(self, message: Message) -> None:
        """Sends a message to all that are connected."""
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            with contextlib.suppress(OSError):  # its end is told by the reading thread
                connection.send(message)

    def _let_in(self, server: socket.socket, secret: str) -> None:
        while True:
            accepted, _ = server.accept()
            _in_background(self._greet, _Connection(accepted), secret)

    def _greet(self, connection: "_Connection", secret: str) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            message = connection.receive() or {}
            if hmac.compare_digest(str(message.get("secret", "")).encode(), secret.encode()):
                process = int(message["process"])
                connection.send({"welcome": process, "host": socket.gethostname()})
                self._keep(process, connection, str(message["host"]))
                return
        connection.close()

    def _keep(self, process: int, connection: "_Connection", host: str) -> None:
        with self._lock:
            self._connections[process], self.hosts[process] = connection, host
        _in_background(self._read, process, connection)

    def _read(self, process: int, connection: "_Connection") -> None:
        message: Message | None = {}
        while message is not None:
            try:
                message = connection.receive()
            except (OSError, ValueError):
                message = None
            if message is None or "beat" not in message:
                self._events.put(("peer", (process, message)))

    def _beat(self) -> None:
        pause = threading.Event()
        while not pause.wait(BEAT_S):
            self.send({"beat": True})


class _Connection:
    """Messages over a socket, a line of JSON each."""

    def __init__(self, connected: socket.socket):
        connected.settimeout(SILENCE_S)
        self._socket, self._lines = connected, connected.makefile("rb")
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        with self._sending:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Message | None:
        """Returns the next message, None where the connection was closed; raises OSError after silence."""
        line = self._lines.readline(_MOST_BYTES)
        return dict(json.loads(line)) if line.endswith(b"\n") else None

    def close(self) -> None:
        self._socket.close()


def own_addresses() -> Sequence[str]:
    """Returns names and addresses under which other machines may find this one."""
    name = socket.gethostname()
    found = [name]
    with contextlib.suppress(OSError):
        found += [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    return list(dict.fromkeys(found))


def _in_background(function: Any, *arguments: Any) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()
