"""Names of what holds a model: a path on this machine, or an address on a network.

Invariant: an address is joined and taken apart like a path, holds no secret, and naming one asks nothing of the network.  What
lies there is read by `place.Folder` and `site.Site`.
"""

import dataclasses
import os
import re
from pathlib import Path, PurePath
from urllib.parse import urlsplit

SCHEMES = ("http", "https", "gs", "s3")

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_COLLAPSED = re.compile(rf"^({'|'.join(SCHEMES)}):/(?=[^/])")  # what is left of a URL in a Path


@dataclasses.dataclass(frozen=True)
class Address:
    """A URL without a slash at its end; `location_of` makes one from a user's text."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str | PurePath) -> "Address":
        return Address(f"{self.url}/{name.as_posix() if isinstance(name, PurePath) else name}")

    @property
    def name(self) -> str:
        """The part behind the last slash."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "Address":
        """What lies one slash higher."""
        return Address(self.url.rpartition("/")[0])


Location = Path | Address
Named = str | os.PathLike[str] | Address  # what users and callers may write for a location


def location_of(name: Named) -> Location:
    """Returns the path or the address of a name.

    Raises:
      ValueError: it is a URL that no model is read from.
    """
    if isinstance(name, Address):
        return name
    text = name if isinstance(name, str) else _COLLAPSED.sub(r"\1://", os.fspath(name))
    if not _SCHEME.match(text):
        return Path(name)
    parts = urlsplit(text)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if parts.scheme not in SCHEMES:
        raise ValueError(f"{shown} has the scheme {parts.scheme!r}; models are read from {', '.join(SCHEMES)} and folders.")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(f"{shown} comes with a user, a query or a fragment; expected scheme, host and path alone.")
    if not parts.hostname:
        what = "bucket" if parts.scheme in ("gs", "s3") else "host"
        raise ValueError(f"{text} names no {what}; expected {parts.scheme}://{what.upper()}/PATH.")
    return Address(shown.rstrip("/"))


def absolute(location: Location) -> Location:
    """Returns a location that means the same in another working directory."""
    return location.resolve() if isinstance(location, Path) else location


def local_path(name: Named) -> Path:
    """Returns the path of a name, where only a folder on this machine will do.

    Raises:
      ValueError: it is an address.
    """
    location = location_of(name)
    if isinstance(location, Address):
        raise ValueError(f"{location} lies on a network; this needs a folder on this machine, so copy the model into one.")
    return location
