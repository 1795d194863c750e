"""All three networks at once, from a folder that holds their checkpoints.

Each network stays an atomic unit of its own: networks that were converted stay when a later one fails.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from convert_weights.checkpoint import check_directory, convert_checkpoint
from convert_weights.errors import SourceError, reading
from convert_weights.opening import DEFAULTS, SPATIAL_PREFIX, Options
from convert_weights.readers import choose_file, open_checkpoint
from convert_weights.source_config import network_of
from sora_jax.config import NETWORKS
from sora_jax.storage.directory import Manifest, present_networks
from sora_jax.storage.writer import check_dtype


def find_networks(source: str | os.PathLike[str], networks: Sequence[str] = NETWORKS) -> dict[str, Path]:
    """Returns the folder of each network (and of ``spatial``, if present) below ``source``, recognised by its config.json.

    Raises:
      SourceError: one of ``networks`` is missing, or there are two of it.
    """
    root = Path(source)
    with reading(root):
        folders = sorted({file.parent for pattern in ("*", "*/*") for file in root.glob(f"{pattern}/config.json")})
        if not root.is_dir():
            raise SourceError(f"{root} is not a folder; expected one that holds the folders of {', '.join(networks)}.")
    found: dict[str, list[Path]] = {}
    for folder in folders:
        found.setdefault(network_of(folder) or "other", []).append(folder)
    problems = [f"no {network}" for network in networks if network not in found]
    problems += [
        f"{len(found[network])} of {network} ({', '.join(map(str, found[network]))})"
        for network in (*networks, "spatial")
        if len(found.get(network, ())) > 1
    ]
    if problems:
        raise SourceError(
            f"{root} holds {'; '.join(problems)} (recognised by their config.json); convert the networks one by one."
        )
    return {network: folders[0] for network, folders in found.items() if network in (*networks, "spatial")}


def is_pipeline(source: str | os.PathLike[str]) -> bool:
    """Returns whether a source is a folder of networks, and not itself a checkpoint of one."""
    if not Path(source).is_dir():
        return False
    try:
        choose_file(Path(source))
    except SourceError:
        return any(path.is_file() for pattern in ("*", "*/*") for path in Path(source).glob(f"{pattern}/config.json"))
    return False


def options_of(network: str, folders: Mapping[str, Path], options: Options) -> Options:
    """Returns how a network of ``find_networks`` is read: a VAE without its spatial part takes the AutoencoderKL next to it."""
    apart = network == "vae" and "spatial" in folders and options.spatial is None
    if apart and not _has_spatial(folders["vae"], options):
        return dataclasses.replace(options, spatial=folders["spatial"])
    return options


def convert_pipeline(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    dtypes: Mapping[str, str],
    overwrite: bool = False,
    options: Options = DEFAULTS,
    progress: Callable[[str, int, int], None] = lambda network, done, total: None,
) -> dict[str, Manifest]:
    """Converts the three networks below ``source`` one after another and returns their manifests.

    Networks that an interrupted run has finished are left as they are unless ``overwrite`` is set.

    Args:
      source: a folder of three checkpoint folders, and possibly the VAE's AutoencoderKL.
      directory: the model directory.
      dtypes: stored dtype of each network.
      overwrite: replace existing networks.
      options: how the sources are read.
      progress: called with the network, its source bytes converted so far, and their total.
    """
    for network in NETWORKS:
        check_dtype(network, dtypes[network])
    check_directory(Path(directory))
    folders = find_networks(source)
    present = () if overwrite else present_networks(directory)
    manifests = {}
    for network in NETWORKS:
        if network in present:
            continue
        own = options_of(network, folders, options)

        def report(done: int, total: int, network: str = network) -> None:
            progress(network, done, total)

        manifests[network] = convert_checkpoint(
            network, folders[network], directory, dtype=dtypes[network], overwrite=overwrite, options=own, progress=report
        )
    return manifests


def _has_spatial(folder: Path, options: Options) -> bool:
    return any(SPATIAL_PREFIX in name for name in open_checkpoint(folder, section=options.section).arrays)
