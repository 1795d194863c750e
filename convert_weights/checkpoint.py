"""Checkpoint files into a model directory: plan, stream, record.

Invariant: either everything fits and ``MODEL_DIR/<network>`` appears complete, or every fault is raised in one
``ConversionError`` and nothing of the attempt remains.  An attempt that was killed goes on where it stopped.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights.checksums import Checksums
from convert_weights.companions import Companions, tokenizer_fault
from convert_weights.errors import SourceError, UnreadableSource, reading
from convert_weights.opening import DEFAULTS, SPATIAL_PREFIX, Options, Source, match, open_files, open_source
from convert_weights.readers import Checkpoint
from convert_weights.rules import ConversionError
from convert_weights.values import Discard, Write, convert_values, stored_shapes
from sora_jax.storage.arrays import Parameter
from sora_jax.storage.directory import NETWORK_FILE, Manifest, ModelDirectoryError, open_network, read_model_file
from sora_jax.storage.location import local_path
from sora_jax.storage.writer import NetworkWriter, check_dtype

__all__ = ["DEFAULTS", "SPATIAL_PREFIX", "Options", "Source", "check_directory", "convert_checkpoint", "open_source"]


def convert_checkpoint(
    network: str,
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    options: Options = DEFAULTS,
    report: Callable[[Source], None] = lambda opened: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Converts a checkpoint on disk into ``directory/<network>`` and returns the new manifest.

    Args:
      network: ``t5``, ``stdit3`` or ``vae``.
      source: a weight file, an index of shards, or a folder of one checkpoint.
      directory: the model directory; created if needed.
      dtype: stored dtype: ``float32``, ``bfloat16`` or (not for the VAE) ``int8``.
      overwrite: replace an existing network.
      options: how the source is read.
      report: called with the plan, before anything is written.
      progress: called with the source bytes converted so far, and their total.

    Raises:
      ConversionError: arrays or config.json do not fit; one report of all faults.
      SourceError: the source is missing, unsafe, truncated or damaged.
      ModelDirectoryError: the network exists, is being written, or does not fit on the disk.
    """
    target = Path(directory)
    check_dtype(network, dtype)
    check_directory(target)
    checkpoint, spatial_folder = open_files(network, source, options)
    with reading(checkpoint.folder):
        companions = Companions(network, checkpoint.folder, options.tokenizer)
    if not overwrite:
        if finished := _finish_former(network, target, checkpoint, companions):
            return finished
        if (target / network).exists():
            raise ModelDirectoryError(f"{target / network} exists; pass --overwrite (overwrite=True) to replace it.")
    early = match(network, checkpoint, spatial_folder, options) if options.merged or options.adapters else None
    # Begun before the plan of a single source, whose tracing keeps one core busy for a second or two: the other reads and
    # hashes in the background.
    with Checksums(early.checkpoint if early else checkpoint) as checksums:
        opened = early or match(network, checkpoint, spatial_folder, options)
        report(opened)
        writer = NetworkWriter(
            target, network, opened.resolved.config, dtype=dtype, overwrite=overwrite, identity=_identity(opened, options)
        )
        return _Conversion(opened, writer, companions, checksums, progress).run()


def check_directory(directory: Path) -> None:
    """Refuses a path that cannot be a model directory, and an index in it that cannot be read, before any work is done.

    Raises:
      ModelDirectoryError: it is a file, or lies below one; or its model.json is damaged.
      ValueError: it is an address.
    """
    directory = local_path(directory)
    for place in (directory, *directory.parents):
        if place.exists() and not place.is_dir():
            raise ModelDirectoryError(f"{place} is a file; expected the folder of a model directory, or a new name.")
    read_model_file(directory)


def _finish_former(network: str, directory: Path, checkpoint: Checkpoint, companions: Companions) -> Manifest | None:
    """Returns the manifest of a network whose conversion from this source only lost the tokenizer, after adding it again.

    Releases before 0.2 copied the tokenizer after the weights; whoever was interrupted between them finishes so.
    """
    if companions.tokenizer is None or not (directory / network / NETWORK_FILE).is_file():
        return None
    manifest = open_network(directory, network)
    recorded = [(entry.get("name"), entry.get("bytes")) for entry in manifest.origin.get("files", ())]
    same = recorded == [(file.name, identity.size) for file, identity in checkpoint.files.items()]
    named = read_model_file(directory).get("tokenizer")
    lost = tokenizer_fault(manifest) if "tokenizer" in manifest.origin else not (named and (directory / named).is_file())
    if not same or not lost:
        return None
    companions.write(directory)
    return manifest


class _Conversion:
    """Converts every value of a source into the model directory, or raises all that is wrong with it."""

    def __init__(
        self,
        opened: Source,
        writer: NetworkWriter,
        companions: Companions,
        checksums: Checksums,
        progress: Callable[[int, int], None],
    ):
        self._opened, self._writer, self._companions = opened, writer, companions
        self._checksums, self._progress = checksums, progress
        self._done = 0

    def run(self) -> Manifest:
        """Returns the manifest of the finished network."""
        opened, dtype = self._opened, self._writer.dtype
        subject = f"{opened.checkpoint.path} does not fit {opened.network}"
        if opened.plan.faults:
            found = convert_values(opened.plan, opened.checkpoint, Discard(), dtype=dtype) if not opened.added else []
            raise ConversionError(subject, [*opened.plan.faults, *found])
        with _whole_or_resumable(self._writer):
            _check_space(self._writer, stored_shapes(opened.plan, opened.shapes, dtype))
            sink = _WriterSink(self._writer)
            found = convert_values(opened.plan, opened.checkpoint, sink, dtype=dtype, blend=opened.blend, progress=self._count)
            if found:
                raise ConversionError(subject, found)
            origin = _origin(opened, self._checksums.result()) | self._companions.origin()
            # Before the weights, so that no interruption leaves a T5 without its tokenizer.
            self._companions.write(self._writer.directory)
            return self._writer.finish(origin)

    def _count(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress(self._done, self._opened.nbytes)


@contextlib.contextmanager
def _whole_or_resumable(writer: NetworkWriter) -> Iterator[None]:
    """Holds the writer; removes what was written if the source proved unfit, keeps it after any other interruption."""
    with writer:
        try:
            yield
        except UnreadableSource:
            raise
        except (ConversionError, SourceError):
            writer.discard()
            raise


class _WriterSink:
    """Writes what an earlier, interrupted attempt has not recorded."""

    def __init__(self, writer: NetworkWriter):
        self._writer = writer
        self._recorded = set(writer.recorded)

    def wants(self, name: str) -> bool:
        return name not in self._recorded

    def open_array(
        self, name: str, shape: tuple[int, ...], dtype: str, *, source: Mapping[str, Any] | None = None
    ) -> contextlib.AbstractContextManager[Write]:
        return self._writer.open_array(name, shape, dtype, source=source)


def _identity(opened: Source, options: Options) -> dict[str, Any]:
    found = opened.checkpoint.files.items()
    return {
        "files": [[str(file.resolve()), identity.size, identity.mtime_ns] for file, identity in found],
        "section": options.section,
        "added": [dict(each.record) for each in opened.added],
    }


def _check_space(writer: NetworkWriter, stored: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    needed = sum(Parameter(*entry, "").nbytes for name, entry in stored.items() if name not in writer.recorded)
    free = shutil.disk_usage(writer.directory).free
    if needed > free:
        raise ModelDirectoryError(
            f"{writer.network} needs {needed / 1e9:.2f} GB in {writer.directory}, {free / 1e9:.2f} GB are free; "
            "make room and run the same command again."
        )


def _origin(opened: Source, checksums: list[str]) -> dict[str, Any]:
    """Returns what ``network.json`` says about the source: enough to check it, and to write it back."""
    entries = {
        file: {"name": file.name, "bytes": identity.size, "sha256": checksum}
        for (file, identity), checksum in zip(opened.checkpoint.files.items(), checksums, strict=True)
    }
    further = {file for each in opened.added for file in each.checkpoint.files}
    added: dict[str, list[Any]] = {}
    for each in opened.added:
        added.setdefault(each.kind, []).append({**each.record, "files": [entries[file] for file in each.checkpoint.files]})
    return {
        **added,
        "files": [entry for file, entry in entries.items() if file not in further],
        "format": opened.checkpoint.format,
        "config": opened.resolved.origin,
        "ignored_config_keys": list(opened.resolved.ignored),
        "ignored_arrays": dict(opened.plan.ignored),
        "tied": {a.source: a.duplicate_of for a in opened.plan.assignments if a.duplicate_of},
        "constants": {a.source: _constant(opened, a.source) for a in opened.plan.assignments if a.target is None},
    }


def _constant(opened: Source, name: str) -> dict[str, Any]:
    """Returns an array that only had to have its formula's value, so that it can be written back bit for bit."""
    array = opened.checkpoint.arrays[name]
    with opened.checkpoint.open(array.file) as file:
        values = array.decoded(array.read_strided(file), None)
    return {"shape": list(values.shape), "dtype": values.dtype.name, "hex": np.ascontiguousarray(values).tobytes().hex()}
