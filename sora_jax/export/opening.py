"""Saved functions, opened by the target's name, and what a program says of itself held against what the manifest says.

Every target has a module ``<target>_open`` with ``open_function``.  It reads verified files only (`contents`), refuses a
program or weights of another stage or function, and runs what lies on the disk, from the files alone.

Invariant: nothing here or in those modules knows a network, the sampler, or how an artefact was made.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from sora_jax.export.contents import Contents, ExportFileError
from sora_jax.export.entries import FunctionEntry, StageEntry, TargetName, TensorEntry

Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
Tensor = tuple[str, tuple[int | str, ...]]  # dtype and shape


class MissingExtraError(ValueError):
    """A package of an optional extra is not installed; the message holds the pip line."""


@runtime_checkable  # for the type checks of the tests
class Opener(Protocol):
    """What a target's opening module has."""

    def open_function(self, contents: Contents, stage: StageEntry, function: FunctionEntry) -> Runner:
        """Returns a saved function: named arrays in (converted to the declared dtypes), named arrays out.

        Raises:
          ExportFileError: a file is damaged, or is not what the entries say.
          MissingExtraError: what runs it is not installed.
        """


def open_function(target: TargetName, contents: Contents, stage: StageEntry, function: FunctionEntry) -> Runner:
    """Returns a saved function of a target; see `Opener`."""
    opener = cast(Opener, importlib.import_module(f"sora_jax.export.{target}_open"))
    return opener.open_function(contents, stage, function)


def require(extra: str, *modules: str) -> None:
    """Refuses to go on where a package of an extra is missing.

    Raises:
      MissingExtraError: names the packages and the pip line that installs them.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtraError(f"{', '.join(missing)} not installed; install with: pip install 'sora_jax[{extra}]'")


def rounded(inputs: Mapping[str, Any], dtypes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the named inputs in the dtypes a function declares, in its order.

    Raises:
      KeyError: an input is missing.
    """
    return {name: np.asarray(inputs[name]).astype(dtype, copy=False) for name, dtype in dtypes.items()}


def refuse_other_tensors(path: Path, kind: str, declared: Sequence[TensorEntry], tensors: Mapping[str, Tensor]) -> None:
    """Refuses a program whose inputs or outputs are not those that the manifest declares.

    Args:
      path: file of the program, for the message.
      kind: ``input`` or ``output``.
      declared: entries of the manifest, in order.
      tensors: dtype and shape that the program has, by name.

    Raises:
      ExportFileError: names what differs.
    """
    names = [entry["name"] for entry in declared]
    if sorted(names) != sorted(tensors):
        raise ExportFileError(f"{path} has the {kind}s {', '.join(tensors)}; the manifest says {', '.join(names)}.")
    for entry in declared:
        dtype, shape = tensors[entry["name"]]
        if dtype != entry["dtype"] or list(shape) != entry["shape"]:
            raise ExportFileError(
                f"{path} has the {kind} {entry['name']} as {dtype}{list(shape)}; the manifest says "
                f"{entry['dtype']}{entry['shape']}."
            )


def refuse_other_name(path: Path, what: str, name: object, expected: str) -> None:
    """Refuses a program, or weights, that were made for another function or stage.

    Raises:
      ExportFileError: names both.
    """
    if name != expected:
        raise ExportFileError(f"{path} holds the {what} {name!r}; the manifest says {expected!r}.")
