"""Galleries: the clips that each visitor of the page has made, kept apart from those of the others.

Invariant: a visitor is known by a secret that only their browser has, and a clip is served under a name that nobody can guess,
so that no visitor lists, plays or continues the clip of another.  The folder of the page keeps every clip under its number.
"""

import os
import re
import secrets
import shutil
import threading
from collections import OrderedDict
from pathlib import Path

from sora_jax.commands.web.made import Made
from sora_jax.streaming.profile import Profile

SERVED = "served"  # the folder that the browser's files come from, inside the page's
COOKIE = "sora_jax_visitor"
MAX_VISITORS = 256  # that the page remembers; the clips of others stay in its folder
_MAX_LISTED = 100  # clips of a visitor
_SECRET = re.compile(r"[\w-]{32,64}", re.ASCII)


class Gallery:
    """The clips of one visitor, newest last, and the profile of the last streamed one.

    Args:
      served: where the visitor's clips are served from; created with the first one.
    """

    def __init__(self, served: Path):
        self.served = served
        self.made: list[Made] = []
        self.profile: Profile | None = None

    def add(self, made: Made) -> None:
        """Lists a clip, and forgets the oldest where there are too many."""
        self.made = [*self.made[-_MAX_LISTED + 1 :], made]

    def find(self, number: int | None) -> Made | None:
        """Returns the clip of a number, if this visitor has made it."""
        return next((made for made in self.made if made.number == number), None)

    def titles(self) -> list[tuple[str, int]]:
        """Returns the clips, newest first, each with its number."""
        return [(made.title, made.number) for made in reversed(self.made)]

    def place(self, path: Path) -> Path:
        """Returns where a file of the page's folder is served from: a link to it, or a copy where links cannot be."""
        served = self.served / path.name
        if not served.exists():
            self.served.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, served)
            except OSError:
                shutil.copyfile(path, served)
        return served


class Galleries:
    """The galleries of all visitors, by their secrets.

    Args:
      folder: where clips are served from.
    """

    def __init__(self, folder: Path):
        self._folder, self._lock = folder, threading.Lock()
        self._known: OrderedDict[str, Gallery] = OrderedDict()

    def of(self, secret: str | None) -> Gallery:
        """Returns the gallery of a visitor; a new one where there is no such secret."""
        with self._lock:
            key = secret if secret is not None and is_secret(secret) else new_secret()
            if key not in self._known:
                self._known[key] = Gallery(self._folder / new_secret())
            self._known.move_to_end(key)
            while len(self._known) > MAX_VISITORS:
                _, gone = self._known.popitem(last=False)
                shutil.rmtree(gone.served, ignore_errors=True)
            return self._known[key]


def new_secret() -> str:
    """Returns a name that nobody can guess."""
    return secrets.token_urlsafe(24)


def is_secret(text: str) -> bool:
    """Returns whether a text can be a visitor's secret."""
    return _SECRET.fullmatch(text) is not None


def secret_of(cookies: str) -> str | None:
    """Returns the visitor's secret from the header of their cookies, None where it has none."""
    for part in cookies.split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE and is_secret(value):
            return value
    return None
