"""Checkpoint files into a model directory: plan, stream, record.

Invariant: either everything fits and ``MODEL_DIR/<network>`` appears complete, or every fault is raised in one
``ConversionError`` and nothing of the attempt remains.  An attempt that was killed goes on where it stopped.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights import parameter_shapes, table
from convert_weights.readers import Checkpoint, OpenFile, merge, open_checkpoint
from convert_weights.rules import ConversionError, Plan, make_plan
from convert_weights.source_config import Resolved, resolve
from convert_weights.torch_zip import SourceError
from convert_weights.values import Checksums, Discard, Write, convert_values, stored_shapes
from sora_jax.storage.directory import Manifest, ModelDirectoryError, Parameter
from sora_jax.storage.writer import NetworkWriter, update_model_file

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
SPATIAL_PREFIX = "spatial_vae.module."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a checkpoint is read; the defaults suit the published ones.

    Attributes:
      section: which state dict of a training checkpoint to take (default: EMA where there is one).
      config_file: read instead of the config.json beside the weights.
      spatial: for the VAE: the AutoencoderKL, where the source holds only the temporal part.
      ignore_config_keys: unknown config.json keys that are known not to change the network.
      allow_mixed_dtypes: accept arrays that differ in dtype.
    """

    section: str | None = None
    config_file: Path | None = None
    spatial: Path | None = None
    ignore_config_keys: Collection[str] = ()
    allow_mixed_dtypes: bool = False


DEFAULTS = Options()


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint whose names and shapes have been matched with a network's table."""

    network: str
    checkpoint: Checkpoint
    resolved: Resolved
    plan: Plan
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.checkpoint.files)


def open_source(network: str, source: str | os.PathLike[str], options: Options = DEFAULTS) -> Source:
    """Returns the plan of a conversion, faults included; reads headers only.

    Raises:
      SourceError: no usable checkpoint is there.
      ConversionError: its config.json describes another network.
    """
    return _match(network, *_open_files(network, source, options), options)


def _open_files(network: str, source: str | os.PathLike[str], options: Options) -> tuple[Checkpoint, Path | None]:
    """Returns the arrays of a source, and the folder of a spatial part that is given apart."""
    checkpoint = open_checkpoint(source, section=options.section)
    if options.spatial is None:
        return checkpoint, None
    if network != "vae":
        raise SourceError(f"a spatial part belongs to the vae, not to {network}.")
    spatial = open_checkpoint(options.spatial)
    return merge(checkpoint, spatial, SPATIAL_PREFIX), spatial.folder


def _match(network: str, checkpoint: Checkpoint, spatial_folder: Path | None, options: Options) -> Source:
    """Returns the arrays matched with the network that the configuration describes."""
    resolved = resolve(
        network,
        checkpoint.folder,
        config_file=options.config_file,
        spatial_folder=spatial_folder,
        ignore=options.ignore_config_keys,
    )
    rules, ignored = table(network, resolved.config)
    shapes = parameter_shapes(network, resolved.config)
    plan = make_plan(rules, ignored, checkpoint.headers, shapes, allow_mixed_dtypes=options.allow_mixed_dtypes)
    return Source(network, checkpoint, resolved, plan, shapes)


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
      progress: called with the source bytes converted so far, and all.

    Raises:
      ConversionError: arrays or config.json do not fit; everything that is wrong, at once.
      SourceError: the source is missing, unsafe, truncated or damaged.
      ModelDirectoryError: the network exists, is being written, or does not fit on the disk.
    """
    checkpoint, spatial_folder = _open_files(network, source, options)
    # Begun before the plan, whose tracing keeps one core busy for a second or two: the other reads and hashes meanwhile.
    with Checksums(checkpoint.files) as checksums:
        opened = _match(network, checkpoint, spatial_folder, options)
        report(opened)
        manifest = _write(opened, Path(directory), dtype, overwrite, options, checksums, progress)
    if network == "t5":
        _copy_tokenizer(checkpoint.folder, Path(directory))
    return manifest


def _write(
    opened: Source,
    directory: Path,
    dtype: str,
    overwrite: bool,
    options: Options,
    checksums: Checksums,
    progress: Callable[[int, int], None],
) -> Manifest:
    """Converts every value into the model directory, or raises all that is wrong with the source."""
    subject = f"{opened.checkpoint.path} does not fit {opened.network}"
    identity = _identity(opened, options)
    writer = NetworkWriter(
        directory, opened.network, opened.resolved.config, dtype=dtype, overwrite=overwrite, identity=identity
    )
    if opened.plan.faults:
        found = convert_values(opened.plan, opened.checkpoint, Discard(), dtype=dtype)
        raise ConversionError(subject, [*opened.plan.faults, *found])
    with _whole_or_resumable(writer):
        _check_space(writer, stored_shapes(opened.plan, opened.shapes, dtype))
        done = 0

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, opened.nbytes)

        found = convert_values(opened.plan, opened.checkpoint, _WriterSink(writer), dtype=dtype, progress=count)
        if found:
            raise ConversionError(subject, found)
        return writer.finish(_origin(opened, checksums.result()))


@contextlib.contextmanager
def _whole_or_resumable(writer: NetworkWriter) -> Iterator[None]:
    """Holds the writer; removes what was written if the values proved unfit, keeps it after any other interruption."""
    with writer:
        try:
            yield
        except ConversionError:
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
    stats = [(file, file.stat()) for file in opened.checkpoint.files]
    return {
        "files": [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats],
        "section": options.section,
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
    files = [
        {"name": file.name, "bytes": file.stat().st_size, "sha256": checksum}
        for file, checksum in zip(opened.checkpoint.files, checksums, strict=True)
    ]
    return {
        "files": files,
        "config": opened.resolved.origin,
        "ignored_config_keys": list(opened.resolved.ignored),
        "ignored_arrays": dict(opened.plan.ignored),
        "tied": {a.source: a.duplicate_of for a in opened.plan.assignments if a.duplicate_of},
        "constants": {a.source: _constant(opened, a.source) for a in opened.plan.assignments if a.target is None},
    }


def _constant(opened: Source, name: str) -> dict[str, Any]:
    """Returns an array that only had to have its formula's value, so that it can be written back bit for bit."""
    array = opened.checkpoint.arrays[name]
    with OpenFile(array.file) as file:
        values = array.read_strided(file)
    return {"shape": list(values.shape), "dtype": values.dtype.name, "hex": np.ascontiguousarray(values).tobytes().hex()}


def _copy_tokenizer(folder: Path, directory: Path) -> None:
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            temporary = directory / f".{name}.new"
            shutil.copyfile(folder / name, temporary)
            temporary.replace(directory / name)
            update_model_file(directory, tokenizer=name)
            return
