"""Compares a model directory with its own manifests, and with the checkpoint it was made from.

Invariant: every byte of every parameter is read, and every array of a source twice, by our reader and by one that shares
nothing with it.  Nothing is written or repaired.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights import second_reader
from convert_weights.all_networks import find_networks, is_pipeline, options_of
from convert_weights.checksums import Checksums
from convert_weights.companions import differs_from_source, tokenizer_fault
from convert_weights.errors import SourceError
from convert_weights.json_text import parse_object, read_object
from convert_weights.opening import DEFAULTS, Options, Source, open_source
from convert_weights.readers import open_checkpoint
from convert_weights.rules import common_prefix
from convert_weights.values import Write, convert_values
from sora_jax.storage.arrays import BLOCK_BYTES, chunk_name, describes
from sora_jax.storage.checksums import Digests
from sora_jax.storage.directory import (
    NETWORK_FILE,
    Manifest,
    ModelDirectoryError,
    array_location,
    open_network,
    present_networks,
)
from sora_jax.storage.location import Location, Named
from sora_jax.storage.reader import Reader
from sora_jax.storage.site import place_of
from sora_jax.streaming import fitting

_MAX_METADATA_BYTES = 1 << 16
_FETCHED_AT_A_TIME = 8  # arrays, over a network


def verify(
    directory: Named,
    *,
    source: str | os.PathLike[str] | None = None,
    network: str | None = None,
    options: Options = DEFAULTS,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, list[str]]:
    """Returns the faults of each network: of checksum, shape, dtype or presence, and of the values against ``source``.

    Args:
      directory: the model directory, a folder or an address; of an address files that do not belong there are not looked for.
      source: the checkpoint of one network, or the folder of several that ``convert pipeline`` takes; its values are read by
        two readers, converted again and compared bit for bit.
      network: look at this one only; with ``source``, default is the network whose arrays have the source's names.
      options: how the source is read.
      note: called with what is worth knowing about how the source was compared.

    Raises:
      ModelDirectoryError: nothing to verify, or a manifest that cannot be read.
      SourceError: the source cannot be read, or is the source of none of the networks.
    """
    networks = [network] if network else present_networks(directory)
    if not networks:
        raise ModelDirectoryError(f"{directory} holds no network; nothing to verify.")
    manifests = {name: open_network(directory, name) for name in networks}
    faults = {name: _stored_faults(manifest) for name, manifest in manifests.items()}
    if source is not None:
        for name, opened in _sources(source, manifests, network, options):
            faults[name] += _source_faults(manifests[name], opened, options, note)
    return faults


def _sources(
    source: str | os.PathLike[str], manifests: Mapping[str, Manifest], network: str | None, options: Options
) -> Iterator[tuple[str, Source]]:
    """Yields the networks that a source is to be compared with."""
    if is_pipeline(source):
        folders = find_networks(source, list(manifests))
        for name in manifests:
            yield name, open_source(name, folders[name], options_of(name, folders, options))
    else:
        name = network or _network_of_source(source, manifests, options)
        yield name, open_source(name, source, options)


def _stored_faults(manifest: Manifest) -> list[str]:
    expected = fitting.stored_arrays(manifest.network, manifest.config, manifest.dtype)
    names, reader = manifest.parameters.keys(), Reader(manifest)
    faults = [f"{name}: not recorded in {NETWORK_FILE}" for name in sorted(expected.keys() - names)]
    faults += [
        f"{name}: recorded in {NETWORK_FILE}, but unknown to this configuration" for name in sorted(names - expected.keys())
    ]
    with ThreadPoolExecutor(1 if isinstance(manifest.path, Path) else _FETCHED_AT_A_TIME) as pool:
        of_arrays = pool.map(lambda name: _array_faults(reader, name), manifest.parameters)
        for name, found in zip(manifest.parameters, of_arrays, strict=True):
            recorded = (manifest.parameters[name].shape, manifest.parameters[name].dtype)
            if name in expected and recorded != expected[name]:
                faults.append(f"{name}: recorded as {recorded}, expected {expected[name]}")
            faults += found
    lost = tokenizer_fault(manifest)
    return faults + ([lost] if lost else []) + _stray_files(manifest)


def _array_faults(reader: Reader, name: str) -> list[str]:
    parameter, faults = reader.manifest.parameters[name], []
    metadata = reader.manifest.array_path(name) / "zarr.json"
    try:
        if not describes(_description(metadata), parameter):
            faults.append(f"{name}: {metadata} does not describe {list(parameter.shape)} of {parameter.dtype}")
    except (SourceError, OSError) as error:
        faults.append(f"{name}: {error}")
    try:
        reader.verify(name)
    except ModelDirectoryError as error:
        faults.append(f"{name}: {error}")
    return faults


def _description(location: Location) -> dict[str, Any]:
    """Returns what a ``zarr.json`` holds.

    Raises:
      SourceError: it cannot be read, or is something else.
    """
    what = "the description of an array"
    if isinstance(location, Path):
        return read_object(location, what, max_bytes=_MAX_METADATA_BYTES)
    try:
        return parse_object(place_of(location.parent).data(location.name, _MAX_METADATA_BYTES), location, what)
    except OSError as error:
        raise SourceError(f"{location} cannot be read ({error.strerror}).") from error


def _stray_files(manifest: Manifest) -> list[str]:
    """Returns what does not belong into a network's folder; a server lists none."""
    if not isinstance(manifest.path, Path):
        return []
    expected = {Path(NETWORK_FILE)}
    for name, parameter in manifest.parameters.items():
        location = array_location(name, manifest.layers)
        expected |= {location / "zarr.json", location / chunk_name(parameter.shape)}
    found = {path.relative_to(manifest.path) for path in manifest.path.rglob("*") if not path.is_dir()}
    return [f"{manifest.path / stray}: not part of the network" for stray in sorted(found - expected)]


def _network_of_source(source: str | os.PathLike[str], manifests: Mapping[str, Manifest], options: Options) -> str:
    found = open_checkpoint(source, section=options.section).arrays
    recorded = {
        network: {entry.source["name"] for entry in manifest.parameters.values() if entry.source}
        for network, manifest in manifests.items()
    }
    best = max(recorded, key=lambda network: len(_bare(recorded[network]) & _bare(found)))
    if not _bare(recorded[best]) & _bare(found):
        raise SourceError(f"{source} is the source of none of {', '.join(manifests)}; name the network with --network.")
    return best


def _bare(names: Any) -> set[str]:
    prefix = common_prefix(names)
    return {name.removeprefix(prefix) for name in names}


def _source_faults(manifest: Manifest, opened: Source, options: Options, note: Callable[[str], None]) -> list[str]:
    faults = [f"source: {fault}" for fault in opened.plan.faults]
    if opened.resolved.config != manifest.config:
        faults.append(f"source: its configuration {opened.resolved.config} differs from {manifest.config}")
    if faults:
        return faults
    sink = _Compare(manifest)
    with Checksums(opened.checkpoint) as checksums:
        faults += convert_values(opened.plan, opened.checkpoint, sink, dtype=manifest.dtype, blend=opened.blend)
        digests = checksums.result()
    names = [assignment.source for assignment in opened.plan.assignments]
    faults += second_reader.differences(opened.checkpoint, names, opened.blend.arrays(), note=note)
    faults += sink.faults()
    if other := differs_from_source(manifest, opened.checkpoint.folder, options.tokenizer):
        faults.append(other)
    recorded: dict[str, set[str]] = {}
    for entry in _recorded_files(manifest):
        recorded.setdefault(entry["name"], set()).add(entry["sha256"])
    for file, digest in zip(opened.checkpoint.files, digests, strict=True):
        if digest not in recorded.get(file.name, {digest}):
            faults.append(f"source: {file} is not the file that was converted (its checksum differs)")
    return faults


def _recorded_files(manifest: Manifest) -> Iterator[Mapping[str, str]]:
    """Yields the source files that a manifest names, those of merged checkpoints and adapters included."""
    yield from manifest.origin.get("files", ())
    for kind in ("merged", "adapters"):
        for each in manifest.origin.get(kind, ()):
            yield from each["files"]


class _Compare:
    """A sink that compares checksums with the manifest's."""

    def __init__(self, manifest: Manifest):
        self._manifest = manifest
        self._digests: dict[str, tuple[str, ...]] = {}

    def wants(self, name: str) -> bool:
        return True

    @contextlib.contextmanager
    def open_array(self, name: str, shape: tuple[int, ...], dtype: str, *, source: Any = None) -> Iterator[Write]:
        recorded = self._manifest.parameters.get(name)
        digests = Digests(recorded.block_bytes if recorded else BLOCK_BYTES)
        yield lambda piece: digests.update(piece.reshape(-1).view(np.uint8).data)
        self._digests[name] = tuple(digests.blocks) if recorded and digests.count == recorded.nbytes else ()

    def faults(self) -> list[str]:
        """Returns a line for each parameter that the source does not reproduce bit for bit."""
        parameters = self._manifest.parameters
        faults = [f"{name}: the source does not contain it" for name in parameters if name not in self._digests]
        return faults + [
            f"{name}: differs from the source's value"
            for name, blocks in self._digests.items()
            if name not in parameters or parameters[name].checksums != blocks
        ]
