"""Where a network's files lie on a network: read through tensorstore from an HTTP server or a bucket, nothing kept.

Invariant: every wait ends.  A connection that is not made, or that stands still, is given up after a limit; a request that
fails is tried again a few times with growing pauses, and then is an error that names the address.  A file's state is told by
its ETag (a bucket's generation), which arrives with every answer, so that no request is made for it alone.
Credentials come from the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE for ``s3://`` (with
AWS_ENDPOINT_URL and AWS_REGION), Google's own variables for ``gs://``; without them S3 is asked anonymously.
What is fetched is compared elsewhere (`reader`).
"""

import errno
import functools
import os
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from sora_jax.storage.location import Address, Location
from sora_jax.storage.place import CutShort, Folder, NotRegular, Unreachable

FETCHING_BYTES = 32 << 20  # under way at a time, for one reader: a few blocks, which one connection alone would not fill

_LIMITS = {  # of tensorstore's connections, unless the environment says otherwise; read when it makes its first one
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "10",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "20",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1024",
}
_RETRIES = {"max_retries": 4, "initial_delay": "250ms", "max_delay": "4s"}
_REQUESTS = {"limit": 16}
_POLL_S = 0.2  # between two looks at whether anybody still waits

_SIZE, _STATUS = re.compile(r"total size (\d+)"), re.compile(r"HTTP code (\d+)")
_DENIED = ("PERMISSION_DENIED", "UNAUTHENTICATED")
_SHOWN = 200  # characters of what went wrong

NO_STOP: Callable[[], bool] = lambda: False  # noqa: E731


class Stopped(Exception):
    """The reading was given up because nobody wants its result any more."""


class Site:
    """Files below an address, named by relative paths with slashes."""

    def __init__(self, address: Address):
        self._address = address

    def locate(self, name: str) -> Address:
        """Returns the address of a file, as users and errors name it."""
        return self._address / name

    def text(self, name: str, limit: int) -> str:
        """Returns the text of a file of at most ``limit`` bytes; as `place.Folder.text`."""
        return self.data(name, limit).decode()

    def data(self, name: str, limit: int) -> bytes:
        """Returns the bytes of a file of at most ``limit`` bytes.

        Raises:
          OSError: it is missing, longer, or cannot be fetched.
        """
        data, _ = self.fetch(name).result()
        if len(data) > limit:
            raise NotRegular(0, f"has more than {limit} bytes", str(self.locate(name)))
        return data

    def has(self, name: str) -> bool:
        """Returns whether there is such a file.

        Raises:
          OSError: the server does not say.
        """
        try:
            self.fetch(name, slice(0, 0)).result()
        except FileNotFoundError:
            return False
        return True

    def fetch(self, name: str, part: slice | None = None, stop: Callable[[], bool] = NO_STOP) -> "Fetch":
        """Begins to fetch a file, or the bytes of a slice of it; ``stop`` is asked while it is waited for.

        Raises:
          OSError: nothing can have this address.
        """
        return Fetch(_opened(self._address).read(name, byte_range=part), self.locate(name), stop)

    def store(self, name: str) -> dict[str, Any]:
        """Returns tensorstore's key-value store of the files below a name."""
        return _kvstore(self.locate(name))


class Fetch:
    """Bytes on their way, in memory of their own."""

    def __init__(self, future: Any, address: Address, stop: Callable[[], bool]):
        self._future, self._address, self._stop = future, address, stop

    def result(self) -> tuple[bytes, str | None]:
        """Returns the bytes, and what distinguishes this state of the file from others, if the server says so.

        Raises:
          OSError: the file is missing (`FileNotFoundError`), too short (`CutShort`), or cannot be fetched (`Unreachable`).
          Stopped: nobody waits any more.
        """
        found = waited(self._future, self._address, self._stop)
        if found.state != "value":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._address))
        state = found.stamp.generation
        return found.value, state.hex() if len(state) > 1 else None  # one byte: there is no ETag

    def cancel(self) -> None:
        """Gives the bytes up."""
        self._future.cancel()


def waited(future: Any, address: Address, stop: Callable[[], bool]) -> Any:
    """Returns what one of tensorstore's futures brings, which ends in time by the limits of this module.

    Raises:
      OSError: it brings an error.
      Stopped: nobody waits any more.
    """
    while True:
        try:
            return future.result(timeout=_POLL_S)
        except TimeoutError:
            if stop():
                future.cancel()
                raise Stopped from None
        except Exception as error:  # tensorstore's are of any kind
            raise _problem(str(error), address) from error


def place_of(location: Location) -> Folder | Site:
    """Returns what reads the files of a location."""
    return Site(location) if isinstance(location, Address) else Folder(location)


def context() -> Any:
    """Returns tensorstore's context for everything that is fetched."""
    for name, value in _LIMITS.items():
        os.environ.setdefault(name, value)
    return _context()


@functools.cache
def _context() -> Any:
    import tensorstore as ts

    limits: dict[str, Any] = {"cache_pool": {"total_bytes_limit": 0}}
    for driver in ("http", "s3", "gcs"):
        limits |= {f"{driver}_request_concurrency": _REQUESTS, f"{driver}_request_retries": _RETRIES}
    return ts.Context(limits)


@functools.lru_cache(maxsize=16)
def _opened(address: Address) -> Any:
    import tensorstore as ts

    try:
        return ts.KvStore.open(_kvstore(address), context=context()).result()
    except ValueError as error:  # a bucket's name that cannot be
        raise _problem(str(error), address) from error


def _kvstore(address: Address) -> dict[str, Any]:
    parts = urlsplit(f"{address}/")
    if parts.scheme in ("http", "https"):
        return {"driver": "http", "base_url": f"{address}/"}
    folder = {"bucket": parts.netloc, "path": parts.path.lstrip("/")}
    return {"driver": "gcs", **folder} if parts.scheme == "gs" else {"driver": "s3", **folder, **_s3()}


def _s3() -> dict[str, Any]:
    """Returns how S3 is asked, from the environment alone: tensorstore's own search would ask the cloud's metadata server."""
    found: dict[str, Any] = {"aws_credentials": {"type": "anonymous"}}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        found = {"aws_credentials": {"type": "environment"}}
    elif "AWS_PROFILE" in os.environ:
        found = {"aws_credentials": {"type": "profile", "profile": os.environ["AWS_PROFILE"]}}
    names = {"endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "aws_region": ("AWS_REGION", "AWS_DEFAULT_REGION")}
    for field, variables in names.items():
        value = next((os.environ[name] for name in variables if os.environ.get(name)), None)
        found |= {field: value} if value else {}
    return found


def _problem(text: str, address: Address) -> OSError:
    """Returns what went wrong as an error of a file."""
    status, size = _STATUS.search(text), _SIZE.search(text)
    if text.startswith("OUT_OF_RANGE"):
        return CutShort(int(size[1]) if size else None, str(address))
    if "ignored by server" in text:
        return Unreachable("the server ignores range requests", str(address), "serve it by one that answers them.")
    if text.startswith(_DENIED):
        said = f"access denied, HTTP {status[1]}" if status else "access denied"
        return Unreachable(said, str(address), "check the address and the credentials.")
    what = " ".join(text.partition("failed: ")[2].split() or text.split()).replace("CURL error ", "")
    what = what.split(" [", 1)[0][:_SHOWN] + (f", HTTP {status[1]}" if status else "")
    return Unreachable(what, str(address), "check the network and the server, and run the same command again.")
