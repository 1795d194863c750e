"""Writes one network into a model directory, atomically and so that an interrupted writer can go on.

Invariant: at every moment ``DIR/<network>`` is absent or complete.  Arrays go to ``DIR/.<network>.partial``; each is
recorded in ``DIR/.<network>.journal`` after it has reached the disk; the finished directory is renamed.  One process at
a time holds the lock ``DIR/.<network>.lock``, which the kernel releases when the process dies.  Conversion and dtypes
are decided elsewhere.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np

from sora_jax.config import CONFIGS
from sora_jax.files import write_durably
from sora_jax.storage.arrays import (
    STORED_DTYPES,
    Parameter,
    array_metadata,
    chunk_name,
    num_blocks,
    rows_of_a_block,
    shard_index,
)
from sora_jax.storage.checksums import Digests
from sora_jax.storage.directory import (
    FORMAT_VERSION,
    MODEL_FILE,
    NETWORK_FILE,
    Manifest,
    ModelDirectoryError,
    array_location,
    generation_of,
    layer_of,
    read_model_file,
)
from sora_jax.storage.durable import created, locked, sync_all, write_all
from sora_jax.storage.location import local_path
from sora_jax.storage.manifest_file import MAX_BYTES, Fault, parameter_of, parse
from sora_jax.storage.place import Folder

_BATCH_BYTES = 64 << 20  # what may be lost and is written again after a power failure
_BATCH_ARRAYS = 128
_PIECE_BYTES = 1 << 20

_log = logging.getLogger(__name__)


def check_dtype(network: str, dtype: str) -> None:
    """Refuses an unknown network, or one that cannot be stored as ``dtype``."""
    if network not in CONFIGS:
        raise ValueError(f"unknown network {network!r}; expected one of {', '.join(CONFIGS)}.")
    if dtype not in STORED_DTYPES or (network == "vae" and dtype == "int8"):
        allowed = [name for name in STORED_DTYPES if network != "vae" or name != "int8"]
        raise ValueError(f"{network} cannot be stored as {dtype!r}; expected one of {', '.join(allowed)}.")


class NetworkWriter:
    """An open, locked ``.partial`` directory; use as a context manager and end with ``finish``.

    ``identity`` (JSON values) says what is being written: an interrupted attempt of the same identity is continued, any
    other is discarded; None always starts anew.  ``recorded`` holds the parameters that are already on disk.

    Raises:
      ModelDirectoryError: the network exists and ``overwrite`` is False, or another process is writing it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        network: str,
        config: Any,
        *,
        dtype: str,
        overwrite: bool = False,
        identity: Mapping[str, Any] | None = None,
    ):
        check_dtype(network, dtype)
        self.network, self.config, self.dtype, self.overwrite = network, config, dtype, overwrite
        self.directory = local_path(directory)
        self.final = self.directory / network
        self.partial = self.directory / f".{network}.partial"
        self.journal = self.directory / f".{network}.journal"
        self.recorded: dict[str, Parameter] = {}
        # Through JSON and back, so that tuples compare equal to what the journal gives.
        self._identity = json.loads(
            json.dumps({"format_version": FORMAT_VERSION, "config": config.to_dict(), "dtype": dtype, "identity": identity})
        )
        self._resumable = identity is not None
        self._pending: list[tuple[str, Parameter]] = []
        self._pending_bytes = 0
        self._made: set[Path] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._is_new = not self.directory.exists()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._resources = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.directory / f".{self.network}.lock", f"{self.network} in {self.directory}"))
            self._restore_replaced()
            if self.final.exists() and not self.overwrite:
                raise ModelDirectoryError(f"{self.final} exists; pass --overwrite (overwrite=True) to replace it.")
            self._open_journal()
            self._committer = stack.enter_context(ThreadPoolExecutor(1))
            self._resources = stack.pop_all()
        self._commit_done: Future[None] | None = None
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            # After a failure (a full disk), what can still be recorded is; the first error is the one to report.
            with self._resources, contextlib.suppress(*(() if kind is None else (OSError,))):
                self._commit()
                self._wait()
        finally:
            if self._is_new:
                with contextlib.suppress(OSError):  # not empty: something is there to go on with
                    self.directory.rmdir()

    def write(self, name: str, array: np.ndarray, *, source: Mapping[str, Any] | None = None) -> None:
        """Stores one array of float32, bfloat16 or int8."""
        array = np.ascontiguousarray(array)
        with self.open_array(name, tuple(array.shape), array.dtype.name, source=source) as write:
            write(array)

    @contextlib.contextmanager
    def open_array(
        self, name: str, shape: tuple[int, ...], dtype: str, *, source: Mapping[str, Any] | None = None, sha256: str = ""
    ) -> Iterator[Callable[[np.ndarray], None]]:
        """Yields a function that takes an array's values, C-contiguous piece after piece; threads may each have one open.

        The array is recorded when the block ends without an exception, and is on the disk with the batch it falls in or
        after ``finish``.  ``sha256`` is the whole array's, where the caller compares it: each block has its own here, and
        hashing all bytes once more would take a tenth of a conversion.

        Raises:
          ValueError: the caller wrote too few or too many bytes.
        """
        rows = rows_of_a_block(shape, dtype)
        parameter = Parameter(shape, dtype, sha256, source, rows)
        location = self.partial / array_location(name, self.config.layers)
        chunk = location / chunk_name(shape)
        self._make(chunk.parent)
        metadata = json.dumps(array_metadata(shape, dtype, rows), separators=(",", ":"))
        with created(location / "zarr.json") as descriptor:
            write_all(descriptor, memoryview(metadata.encode()))
        digests = Digests(parameter.nbytes // num_blocks(shape, rows))
        with created(chunk) as descriptor:

            def write(piece: np.ndarray) -> None:
                raw = piece.reshape(-1).view(np.uint8).data
                digests.update(raw)
                write_all(descriptor, raw)

            yield write
            if digests.count != parameter.nbytes:
                raise ValueError(f"{name}: {digests.count} bytes were written, expected {parameter.nbytes}.")
            write_all(descriptor, memoryview(shard_index(parameter.nbytes, len(digests.blocks))))
        blocks = tuple(digests.blocks)
        self._record(name, dataclasses.replace(parameter, sha256=blocks[0] if len(blocks) == 1 else sha256, blocks=blocks))

    def _record(self, name: str, parameter: Parameter) -> None:
        with self._lock:
            if not self._resumable:
                self.recorded[name] = parameter
                return
            self._pending.append((name, parameter))
            self._pending_bytes += parameter.nbytes
            if self._pending_bytes >= _BATCH_BYTES or len(self._pending) >= _BATCH_ARRAYS:
                self._commit()

    def finish(self, origin: Mapping[str, Any] | None = None) -> Manifest:
        """Makes the network visible and returns its manifest; ``origin`` is recorded in it.

        Raises:
          ModelDirectoryError: a layer of the configuration has no parameter.
        """
        self._wait()
        self.recorded.update(self._pending)
        self._pending = []
        order = {layer: i for i, layer in enumerate(self.config.layers)}
        names = sorted(self.recorded, key=lambda name: (order[layer_of(name, self.config.layers)], name))
        parameters = {name: self.recorded[name] for name in names}
        manifest = Manifest(self.final, self.network, self.config, self.dtype, parameters, dict(origin or {}))
        empty = [layer for layer in manifest.layers if not manifest.names(layer)]
        if empty:
            raise ModelDirectoryError(f"{self.network}: nothing was written for layers {', '.join(empty)}.")
        text = manifest.text()
        with created(self.partial / NETWORK_FILE) as descriptor:
            write_all(descriptor, memoryview(text.encode()))
        sync_all([*self._files(parameters.items()), self.partial / NETWORK_FILE, *sorted(self._made), self.partial])
        self._replace()
        self.journal.unlink(missing_ok=True)
        update_model_file(self.directory)
        return dataclasses.replace(manifest, generation=generation_of(text))

    def discard(self) -> None:
        """Removes everything written so far; the writer cannot be used afterwards."""
        self._wait()
        self._pending.clear()
        shutil.rmtree(self.partial, ignore_errors=True)
        self.journal.unlink(missing_ok=True)

    @property
    def _replaced(self) -> Path:
        return self.directory / f".{self.network}.replaced"

    def _replace(self) -> None:
        if self.final.exists():
            self.final.rename(self._replaced)
        self.partial.rename(self.final)
        shutil.rmtree(self._replaced, ignore_errors=True)

    def _restore_replaced(self) -> None:
        """Undoes a replacement that was interrupted between its two renames, and removes what a finished one left."""
        if self._replaced.exists() and not self.final.exists():
            self._replaced.rename(self.final)
        shutil.rmtree(self._replaced, ignore_errors=True)

    def _open_journal(self) -> None:
        if self.partial.is_symlink():
            self.partial.unlink()  # what is written goes nowhere else
        entries = _read_journal(self.journal) if self._resumable else []
        if entries and entries[0] == self._identity and self.partial.is_dir():
            self._take_over(entries[1:])
            _log.info("%s: going on; %d arrays are already written", self.network, len(self.recorded))
        elif self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(exist_ok=True)
        if self._resumable:
            lines = [self._identity, *({"name": name, **entry.to_dict()} for name, entry in self.recorded.items())]
            write_durably(self.journal, "".join(json.dumps(line) + "\n" for line in lines).encode())
        else:
            self.journal.unlink(missing_ok=True)

    def _take_over(self, entries: Sequence[Any]) -> None:
        """Records what an interrupted attempt wrote, as far as its bytes are still those that it recorded."""
        layers = frozenset(self.config.layers)
        for entry in entries:
            try:
                parameter = parameter_of(entry["name"], entry, layers, FORMAT_VERSION)
            except (Fault, KeyError, TypeError):
                return  # what follows a damaged line is written again
            metadata, chunk = self._files([(entry["name"], parameter)])
            if metadata.is_file() and _holds(chunk, parameter):
                self.recorded[entry["name"]] = parameter
                self._made |= {chunk.parent, *(p for p in chunk.parents if self.partial in p.parents)}

    def _make(self, folder: Path) -> None:
        if folder not in self._made:
            folder.mkdir(parents=True, exist_ok=True)
            self._made |= {folder, *(parent for parent in folder.parents if self.partial in parent.parents)}

    def _commit(self) -> None:
        """Hands the pending arrays to the thread that waits for the disk."""
        self._wait()
        if self._pending:
            batch, self._pending, self._pending_bytes = self._pending, [], 0
            self._commit_done = self._committer.submit(self._journal_batch, batch)

    def _wait(self) -> None:
        if self._commit_done is not None:
            done, self._commit_done = self._commit_done, None
            done.result()

    def _files(self, arrays: Iterable[tuple[str, Parameter]]) -> list[Path]:
        files = []
        for name, parameter in arrays:
            location = self.partial / array_location(name, self.config.layers)
            files += [location / "zarr.json", location / chunk_name(parameter.shape)]
        return files

    def _journal_batch(self, batch: list[tuple[str, Parameter]]) -> None:
        sync_all(self._files(batch))
        lines = "".join(json.dumps({"name": name, **parameter.to_dict()}) + "\n" for name, parameter in batch)
        descriptor = os.open(self.journal, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        try:
            write_all(descriptor, memoryview(lines.encode()))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.recorded.update(batch)


def update_model_file(directory: str | os.PathLike[str], **fields: Any) -> None:
    """Rewrites ``model.json`` with the networks now present; ``tokenizer``, ``defaults`` and ``trained`` may be given.

    Raises:
      ValueError: there is another field.
      ModelDirectoryError: what is there cannot be read.
    """
    unknown = fields.keys() - {"tokenizer", "defaults", "trained"}
    if unknown:
        raise ValueError(f"model.json has no fields {sorted(unknown)}; expected tokenizer, defaults or trained.")
    with locked(Path(directory) / ".model.lock", f"{MODEL_FILE} in {directory}", wait=True):
        index = read_model_file(directory) | fields | {"format_version": FORMAT_VERSION}
        write_durably(Path(directory) / MODEL_FILE, f"{json.dumps(index, indent=1)}\n".encode())


def _read_journal(path: Path) -> list[Any]:
    """Returns the journal's entries up to the first line that was not written completely."""
    entries: list[Any] = []
    try:
        for line in Folder(path.parent).text(path.name, MAX_BYTES).splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            entries.append(parse(line))
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        _log.warning("%s is damaged after %d entries; the rest is written again", path, len(entries))
    return entries


def _holds(path: Path, parameter: Parameter) -> bool:
    """Returns whether a file has the size and the bytes of a parameter."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != parameter.file_bytes(FORMAT_VERSION):
        return False
    digests = Digests(parameter.block_bytes)
    with open(path, "rb") as file:
        for start in range(0, parameter.nbytes, _PIECE_BYTES):
            digests.update(memoryview(file.read(min(_PIECE_BYTES, parameter.nbytes - start))))
        index = file.read()
    return tuple(digests.blocks) == parameter.checksums and index == shard_index(parameter.nbytes, len(parameter.checksums))
