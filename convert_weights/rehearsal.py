"""What a conversion would do: everything that can be known before values are read, and no file is written.

Invariant: what refuses a conversion for its names, shapes, types, configuration, tokenizer or target refuses its rehearsal in
the same words. Values are not looked at, so that damage to them shows only in the conversion.
"""

import dataclasses
import os
import shutil
from pathlib import Path

from convert_weights.checkpoint import check_directory
from convert_weights.companions import Companions
from convert_weights.opening import DEFAULTS, Options, Source, open_source
from convert_weights.rules import ConversionError
from convert_weights.survey import stored_bytes
from sora_jax.storage.directory import ModelDirectoryError
from sora_jax.storage.writer import check_dtype


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What would be written.

    Attributes:
      source: the source, matched with the network's table.
      target: the folder that would appear.
      dtype: stored dtype.
      arrays: number of parameters.
      nbytes: bytes of all of them.
      free_bytes: bytes that are free there.
      tokenizer: whether a tokenizer would be copied.
    """

    source: Source
    target: Path
    dtype: str
    arrays: int
    nbytes: int
    free_bytes: int
    tokenizer: bool


def rehearse(
    network: str,
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    options: Options = DEFAULTS,
) -> Rehearsal:
    """Returns what `convert_checkpoint` would write; arguments as there.

    Raises:
      ConversionError, SourceError, ModelDirectoryError: as there, but for values.
    """
    directory = Path(directory)
    check_dtype(network, dtype)
    check_directory(directory)
    opened = open_source(network, source, options)
    companions = Companions(network, opened.checkpoint.folder, options.tokenizer)
    if opened.plan.faults:
        raise ConversionError(f"{opened.checkpoint.path} does not fit {network}", opened.plan.faults)
    target = directory / network
    if target.exists() and not overwrite:
        raise ModelDirectoryError(f"{target} exists; pass --overwrite (overwrite=True) to replace it.")
    needed = stored_bytes(opened, dtype)
    free = shutil.disk_usage(next(place for place in (directory, *directory.absolute().parents) if place.exists())).free
    if needed > free:
        raise ModelDirectoryError(f"{network} needs {needed / 1e9:.2f} GB in {directory}, {free / 1e9:.2f} GB are free.")
    return Rehearsal(opened, target, dtype, len(opened.shapes), needed, free, companions.tokenizer is not None)
