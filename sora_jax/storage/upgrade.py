"""Networks of an older format written anew in the present one, without the checkpoint they came from.

Invariant: every byte is compared with its checksum on the way, the new network appears in one step in the place of the old one,
and an interrupted upgrade goes on.  Values, names and origin stay as they are.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from sora_jax.storage.arrays import num_blocks, rows_of_a_block, shard_index
from sora_jax.storage.directory import FORMAT_VERSION, Manifest, ModelDirectoryError, open_network, present_networks
from sora_jax.storage.location import Named, local_path
from sora_jax.storage.reader import Reader
from sora_jax.storage.writer import NetworkWriter


def outdated(directory: Named) -> list[Manifest]:
    """Returns the networks of a model directory that are stored in an older format.

    Raises:
      ModelDirectoryError: there is no network, or one whose manifest is unusable.
      ValueError: the directory is an address.
    """
    networks = present_networks(local_path(directory))
    if not networks:
        raise ModelDirectoryError(f"{directory} holds no network; nothing to upgrade.")
    manifests = [open_network(directory, network) for network in networks]
    return [manifest for manifest in manifests if manifest.format_version < FORMAT_VERSION]


def upgraded_bytes(manifest: Manifest) -> int:
    """Returns the disk space that upgrading a network takes until the old one is removed."""
    total = 0
    for parameter in manifest.parameters.values():
        count = num_blocks(parameter.shape, rows_of_a_block(parameter.shape, parameter.dtype))
        total += parameter.nbytes + len(shard_index(parameter.nbytes, count))
    return total


def upgrade(old: Manifest, *, progress: Callable[[int, int], None] = lambda done, total: None) -> Manifest:
    """Writes a network in the present format in the place of the old one, and returns its manifest.

    Args:
      old: the network.
      progress: called with the bytes that are done, and all.

    Raises:
      ModelDirectoryError: a parameter is damaged, the disk has too little room, or another process writes the network.
    """
    directory, reader, done = local_path(old.path.parent), Reader(old), 0
    identity = {"upgraded from": old.generation}
    with NetworkWriter(directory, old.network, old.config, dtype=old.dtype, overwrite=True, identity=identity) as writer:
        try:
            _check_space(old, directory, sum(parameter.nbytes for parameter in writer.recorded.values()))
            for name, parameter in old.parameters.items():
                if name not in writer.recorded:
                    with writer.open_array(
                        name, parameter.shape, parameter.dtype, source=parameter.source, sha256=parameter.sha256
                    ) as write:
                        for piece in reader.pieces(name):
                            write(piece)
                done += parameter.nbytes
                progress(done, old.nbytes)
        except ModelDirectoryError:
            writer.discard()  # nothing to go on with
            raise
        return writer.finish(old.origin)


def _check_space(old: Manifest, directory: Path, written: int) -> None:
    needed, free = upgraded_bytes(old) - written, shutil.disk_usage(directory).free
    if needed > free:
        raise ModelDirectoryError(
            f"upgrading {old.network} needs {needed / 1e9:.2f} GB in {directory}, {free / 1e9:.2f} GB are free; make room and "
            "run the same command again."
        )
