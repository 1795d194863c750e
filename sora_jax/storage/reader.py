"""The only way from stored files to arrays: into memory of the caller, compared with the manifest.

Invariant: no value leaves this module that was not compared with its sha256, or its block's, for the file as it is: once a
process (`checksums`), again whenever the file changed. A local file that begins with its array is read by the system itself
(`in_order`), any other through tensorstore (`pieces`), over a network too (`fetched`), a few reads at a time; nothing is
cached. Reading needs memory for a few blocks besides the caller's. Large local files may be mapped instead (`maps`) and are
compared alike. Other modules decide which array is read when.
"""

import collections
import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from jaxtyping import Int, Num

from sora_jax.storage.arrays import Parameter, chunk_name
from sora_jax.storage.buffers import Buffer, group_bytes
from sora_jax.storage.checksums import Comparison, Mismatch, blocks_of
from sora_jax.storage.directory import Manifest, ModelDirectoryError, array_location, damaged
from sora_jax.storage.fetched import FetchedArray, FetchedPiece
from sora_jax.storage.in_order import FileInOrder, open_in_order
from sora_jax.storage.pieces import Piece, Reading, StoredArray, pieces_of, problem_of
from sora_jax.storage.place import Identity
from sora_jax.storage.quantisation import SCALE_SUFFIX, dequantise, scale_axis
from sora_jax.storage.site import FETCHING_BYTES, NO_STOP, Site, Stopped, place_of

IN_FLIGHT_BYTES = 8 << 20  # being read at a time: what tensorstore needs in addition to the caller's memory, at least a piece
_MAX_IN_FLIGHT = 64  # pieces, however small

DIFFERS = "does not have the checksum that network.json records"

Around = Callable[[str, int], AbstractContextManager[Any]]
Stop = Callable[[], bool]
Request = tuple[str, Piece, np.ndarray]  # flat name, what is read of it, and the bytes it is read into
Opened = StoredArray | FileInOrder | FetchedArray


def untouched(_layer: str, _num_bytes: int) -> AbstractContextManager[None]:
    """Returns a context manager that does nothing."""
    return contextlib.nullcontext()


class Reader:
    """The stored arrays of a network.

    Args:
      manifest: the network's manifest; the generation that is read.
      around: entered around every `read`, with its label and bytes, on the reading thread: a benchmark limits the rate with
        it, a test injects faults.
    """

    def __init__(self, manifest: Manifest, *, around: Around = untouched):
        self.manifest = manifest
        self._around = around
        self._place = place_of(manifest.path)

    def parameters(self, names: Iterable[str]) -> dict[str, Parameter]:
        """Returns what the manifest says of some arrays, by flat name."""
        return {name: self.manifest.parameters[name] for name in names}

    def check(self, names: Iterable[str]) -> dict[str, Identity]:
        """Returns what distinguishes the files of some arrays from others, after comparing their sizes.

        Nothing is asked of a network: there it turns out when an array is fetched.

        Raises:
          ModelDirectoryError: one is missing, no regular file, or of the wrong size.
        """
        identities: dict[str, Identity] = {}
        if isinstance(self._place, Site):
            return identities
        for name in names:
            expected = self.manifest.parameters[name].file_bytes(self.manifest.format_version)
            try:
                identities[name] = self._place.identity(self._file(name))
            except OSError as error:
                raise damaged(self.manifest, name, error) from error
            size = identities[name][2]
            if size != expected:
                raise damaged(self.manifest, name, f"has {size} bytes, expected {expected}")
        return identities

    def read(self, into: Mapping[str, np.ndarray], *, label: str = "", stop: Stop = NO_STOP) -> None:
        """Fills arrays, by flat name, with their stored values.

        Args:
          into: contiguous arrays of the stored shape and dtype.
          label: what the group is called, for ``around``; a read without one is not watched.
          stop: asked between reads whether to give up.

        Raises:
          ModelDirectoryError: a file is missing, unreadable or not what the manifest says.
          Stopped: ``stop`` returned True.
        """
        with self.comparing(into, into) as comparison, self.watched(label, into):
            self._fill(into, comparison, stop)

    @contextlib.contextmanager
    def watched(self, label: str, arrays: Mapping[str, np.ndarray]) -> Iterator[None]:
        """Enters what is around every read of a layer, and names the file of a system error.

        Raises:
          ModelDirectoryError: the system could not read.
        """
        num_bytes = sum(array.nbytes for array in arrays.values())
        try:
            with self._around(label, num_bytes) if label else contextlib.nullcontext():
                yield
        except OSError as error:
            raise damaged(self.manifest, self._named_by(error, arrays), error) from error

    def arrays(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns arrays by flat name, in memory of their own and read-only.

        Raises:
          ModelDirectoryError: a file is missing, unreadable or not what the manifest says.
        """
        parameters = self.parameters(names)
        arrays = Buffer(group_bytes(parameters)).arrays(parameters)
        self.read(arrays)
        for array in arrays.values():
            array.flags.writeable = False
        return arrays

    def rows(self, name: str, ids: Int[np.ndarray, "*ids"]) -> Num[np.ndarray, "*ids E"]:
        """Returns rows of a matrix in its stored dtype, int8 multiplied out to float32; only their blocks are read.

        In format 1, whose only block is the whole, all of it is read the first time.

        Raises:
          ModelDirectoryError: a file is missing, unreadable or not what the manifest says.
          ValueError: there is no such row.
        """
        parameter = self.manifest.parameters[name]
        num_rows, width = parameter.shape
        unique, inverse = np.unique(ids, return_inverse=True)
        if unique[0] < 0 or unique[-1] >= num_rows:
            raise ValueError(f"token ids {unique[0]} to {unique[-1]} are not all in the vocabulary, 0 to {num_rows - 1}.")
        rows = np.empty((len(unique), width), parameter.numpy_dtype)
        row_bytes = width * rows.itemsize
        pieces = pieces_of(parameter)
        wanted = np.unique(np.searchsorted([piece.stop for piece in pieces], unique.astype(np.int64) * row_bytes, side="right"))
        for piece, values in self._stream(name, [pieces[number] for number in wanted]):
            first = piece.start // row_bytes
            here = slice(*np.searchsorted(unique, [first, piece.stop // row_bytes]))
            rows[here] = values.view(rows.dtype).reshape(-1, width)[unique[here] - first]
        if name + SCALE_SUFFIX in self.manifest.parameters:
            rows = dequantise(name, rows, self.arrays([name + SCALE_SUFFIX])[name + SCALE_SUFFIX][unique])
        return rows[inverse.reshape(ids.shape)]

    def slice(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns rows ``start`` to ``stop - 1`` of axis 0 in their stored dtype, int8 multiplied out to float32.

        Only their blocks are read; in format 1, whose only block is the whole, all of it is read the first time.

        Raises:
          ModelDirectoryError: the file is missing, unreadable or not what the manifest says.
        """
        parameter = self.manifest.parameters[name]
        rows = np.empty((stop - start, *parameter.shape[1:]), parameter.numpy_dtype)
        values, row_bytes = rows.reshape(-1).view(np.uint8), parameter.nbytes // parameter.shape[0]
        first, last = start * row_bytes, stop * row_bytes
        wanted = [piece for piece in pieces_of(parameter) if piece.start < last and first < piece.stop]
        for piece, data in self._stream(name, wanted):
            begin, end = max(first, piece.start), min(last, piece.stop)
            values[begin - first : end - first] = data[begin - piece.start : end - piece.start]
        if name + SCALE_SUFFIX in self.manifest.parameters:
            scale = self.arrays([name + SCALE_SUFFIX])[name + SCALE_SUFFIX]
            rows = dequantise(name, rows, scale if scale_axis(name) else scale[start:stop])
        return rows

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """Yields the bytes of an array piece by piece; a piece is overwritten by the next.

        Raises:
          ModelDirectoryError: the file is missing, unreadable or not what the manifest says; at the latest in the end, so that
            nothing may be believed before.
        """
        for _, values in self._stream(name, pieces_of(self.manifest.parameters[name]), afresh=True):
            yield values

    def verify(self, name: str) -> None:
        """Reads an array and compares every byte, whatever is known of it.

        Raises:
          ModelDirectoryError: the file is missing, unreadable or not what the manifest says.
        """
        parameter, whole = self.manifest.parameters[name], hashlib.sha256()
        twice = len(parameter.blocks) > 1 and parameter.sha256  # as in the embedded model
        for values in self.pieces(name):
            if twice:
                whole.update(values.data)
        if twice and whole.hexdigest() != parameter.sha256:  # the blocks' checksums were not made of this array
            raise damaged(self.manifest, name, DIFFERS)

    @contextlib.contextmanager
    def comparing(self, names: Iterable[str], arrays: Mapping[str, np.ndarray] | None = None) -> Iterator[Comparison]:
        """Yields the comparison that a reading hands its blocks to; ends it, and names what does not fit.

        Args:
          names: names of the arrays that are read.
          arrays: these arrays, if they are whole in memory when the block ends.

        Raises:
          ModelDirectoryError: a file is missing, of the wrong size, or not what the manifest says.
        """
        paths = {name: self.manifest.chunk_path(name) for name in names}
        comparison = Comparison(self.parameters(paths), paths, self.check(paths))
        yield comparison
        try:
            comparison.end(self.check(paths), arrays)
        except Mismatch as mismatch:
            raise damaged(self.manifest, str(mismatch), DIFFERS) from None

    def _fill(self, into: Mapping[str, np.ndarray], comparison: Comparison, stop: Stop) -> None:
        """Reads whole arrays, and hands over every block as it is complete."""
        requests = (
            (name, piece, array.reshape(-1).view(np.uint8)[piece.start : piece.stop])
            for name, array in into.items()
            for piece in pieces_of(self.manifest.parameters[name])
        )
        for (name, piece, _), state in self._window(requests, stop):
            if piece.ends_block:
                data = blocks_of(into[name], self.manifest.parameters[name])[piece.block]
                comparison.add(name, piece.block, data, state if piece.begins_block else None)

    def _stream(self, name: str, wanted: Sequence[Piece], *, afresh: bool = False) -> Iterator[tuple[Piece, np.ndarray]]:
        """Yields pieces of an array, in memory that a later one overwrites; blocks that are not known are read whole."""
        pieces, yielded = pieces_of(self.manifest.parameters[name]), set(wanted)
        size = pieces[0].nbytes
        with self.comparing([name]) as comparison:
            unknown = {piece.block for piece in wanted if afresh or not comparison.is_known(name, piece.block)}
            read = [piece for piece in pieces if piece in yielded or piece.block in unknown]
            count = min(len(read), max(1, min(_MAX_IN_FLIGHT, self._limit_bytes // size))) + 1  # one is with the caller
            scratch = itertools.cycle(np.empty((count, size), np.uint8))
            digest = hashlib.sha256()
            for (_, piece, values), _ in self._window((name, piece, next(scratch)) for piece in read):
                if piece.block in unknown:
                    digest = hashlib.sha256() if piece.begins_block else digest
                    digest.update(values.data)
                    if piece.ends_block:
                        comparison.add_digest(name, piece.block, digest.hexdigest())
                else:
                    comparison.trust(name)
                if piece in yielded:
                    yield piece, values

    @property
    def _limit_bytes(self) -> int:
        return FETCHING_BYTES if isinstance(self._place, Site) else IN_FLIGHT_BYTES

    def _window(self, requests: Iterable[Request], stop: Stop = NO_STOP) -> Iterator[tuple[Request, str | None]]:
        """Reads pieces into the bytes they come with, a few ahead, and yields each when it is there.

        With it comes the state of a file on a network, if the server tells it.

        Raises:
          ModelDirectoryError: a read failed.
          Stopped: ``stop`` returned True.
        """
        ahead: collections.deque[tuple[Request, Reading]] = collections.deque()
        in_flight, opened = 0, ""
        stored: Opened | None = None
        try:
            for request in requests:
                name, piece, _ = request
                while ahead and (in_flight + piece.nbytes > self._limit_bytes or len(ahead) >= _MAX_IN_FLIGHT):
                    done, state = self._finished(*ahead.popleft())
                    in_flight -= done[1].nbytes
                    yield done, state
                if stop():
                    raise Stopped
                if stored is None or opened != name:
                    if stored is not None:
                        stored.close()
                        stored = None
                    stored, opened = self._open(name, stop), name
                ahead.append((request, self._begun(stored, request)))
                in_flight += piece.nbytes
            while ahead:
                yield self._finished(*ahead.popleft())
        finally:
            if stored is not None:
                stored.close()
            for _, reading in ahead:
                if isinstance(reading, FetchedPiece):
                    reading.cancel()
                    continue
                with contextlib.suppress(Exception):  # it writes into memory that may be used again
                    reading.result()

    def _begun(self, stored: Opened, request: Request) -> Reading:
        try:
            return stored.read(*request[1:])
        except (OSError, ValueError) as error:
            raise self._fault(request[0], error) from error

    def _finished(self, request: Request, reading: Reading) -> tuple[Request, str | None]:
        try:
            return request, reading.result()
        except Stopped:
            raise
        except Exception as error:  # tensorstore's are of any kind
            raise self._fault(request[0], error) from error

    def _fault(self, name: str, error: Exception) -> ModelDirectoryError:
        self.check([name])  # missing, or cut short during the read
        return damaged(self.manifest, name, problem_of(error))

    def _open(self, name: str, stop: Stop) -> Opened:
        parameter, location = self.manifest.parameters[name], array_location(name, self.manifest.layers).as_posix()
        if isinstance(self._place, Site):
            return FetchedArray(parameter, self._place, location, stop)
        try:
            if in_order := open_in_order(self._place.locate(self._file(name)), parameter):
                return in_order
        except OSError as error:
            raise self._fault(name, error) from error
        return StoredArray(parameter, self._place.store(location))

    def _file(self, name: str) -> str:
        location = array_location(name, self.manifest.layers)
        return f"{location.as_posix()}/{chunk_name(self.manifest.parameters[name].shape)}"

    def _named_by(self, error: OSError, names: Iterable[str]) -> str:
        """Returns the array whose file an error names, or the first."""
        paths = {str(self.manifest.chunk_path(name)): name for name in names}
        return paths.get(str(error.filename), next(iter(paths.values())))
