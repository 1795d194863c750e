"""One stored array that is fetched over a network, a piece at a time, with the index of its file.

Invariant: bytes arrive in memory of tensorstore's and are copied when they are wanted, so that a read which is given up writes
nowhere.  A file is taken to hold its array in order, and its index, fetched along with the first pieces, must say so; of one
that does not, every piece is read by the index, which takes longer.  What was fetched is not compared here.
"""

from collections.abc import Callable

import numpy as np

from sora_jax.storage.arrays import Parameter, chunk_name, shard_index
from sora_jax.storage.pieces import Piece, Reading, StoredArray
from sora_jax.storage.place import CutShort
from sora_jax.storage.site import NO_STOP, Fetch, Site, context, waited


class FetchedArray:
    """An array to be fetched.

    Args:
      parameter: what the manifest says of it.
      site: where its network lies.
      location: its folder there.
      stop: asked while a piece is waited for.
    """

    def __init__(self, parameter: Parameter, site: Site, location: str, stop: Callable[[], bool] = NO_STOP):
        self._parameter, self._site, self._location, self._stop = parameter, site, location, stop
        self._file = f"{location}/{chunk_name(parameter.shape)}"
        count = len(parameter.checksums) if parameter.rows is not None else 0
        self._index = shard_index(parameter.nbytes, count) if count else b""
        self._whole = count == 1  # the only block comes with the index, in one request
        self._fetch = self._begin(parameter.nbytes, self._size) if count > 1 else None
        self._in_order: bool | None = None if count else True
        self._stored: StoredArray | None = None

    @property
    def _size(self) -> int:
        return self._parameter.nbytes + len(self._index)

    def read(self, piece: Piece, target: np.ndarray) -> Reading:
        """Begins to fetch a piece, which is in ``target`` once the reading has its result."""
        return FetchedPiece(self, self._begin(piece.start, self._size if self._whole else piece.stop), piece, target)

    def close(self) -> None:
        """Does nothing: no connection belongs to an array."""

    def take(self, fetch: Fetch, piece: Piece, target: np.ndarray) -> str | None:
        """Copies a piece that was fetched, and returns the state of the file that it is from, if that is known.

        Raises:
          OSError: the file is missing, too short, or cannot be fetched.
          Stopped: nobody waits any more.
        """
        try:
            data, state = fetch.result()
            if self._in_order is None:
                index = data[piece.nbytes :] if self._fetch is None else self._fetch.result()[0]
                self._in_order = index == self._index
        except CutShort as error:
            raise self._expecting(error) from None
        if self._in_order:
            target[...] = np.frombuffer(data, np.uint8, piece.nbytes)
            return state
        self._read_by_index(piece, target)
        return None

    def cancel(self) -> None:
        """Gives up the index, if it is under way."""
        if self._fetch is not None:
            self._fetch.cancel()

    def _begin(self, start: int, stop: int) -> Fetch:
        return self._site.fetch(self._file, slice(start, stop), self._stop)

    def _read_by_index(self, piece: Piece, target: np.ndarray) -> None:
        if self._stored is None:
            self._stored = StoredArray(self._parameter, self._site.store(self._location), context())
        own = np.empty_like(target)
        waited(self._stored.read(piece, own), self._site.locate(self._file), self._stop)
        target[...] = own

    def _expecting(self, error: CutShort) -> CutShort:
        """Returns the error of a file that is too short as that of a local one reads."""
        known = error.size is not None and error.size < self._size
        error.strerror = f"has {error.size} bytes, expected {self._size}" if known else f"ends before its {self._size} bytes"
        return error


class FetchedPiece:
    """A piece under way."""

    def __init__(self, array: FetchedArray, fetch: Fetch, piece: Piece, target: np.ndarray):
        self._array, self._fetch, self._piece, self._target = array, fetch, piece, target

    def result(self) -> str | None:
        """Returns, once the piece is in its place, the state of the file that it is from; see `FetchedArray.take`."""
        return self._array.take(self._fetch, self._piece, self._target)

    def cancel(self) -> None:
        """Gives the piece up; nothing is written any more."""
        self._fetch.cancel()
        self._array.cancel()
