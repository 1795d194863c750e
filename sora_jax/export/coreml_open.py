"""Opens Core ML packages, compared with the manifest, in the interpreter of `mil_check`.

Invariant: a package runs only while all its files have the recorded bytes: constants are read at every call, so the files
are looked at before every call.  Nothing runs on Apple hardware.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sora_jax.export.contents import Contents, ExportFileError
from sora_jax.export.entries import FunctionEntry, StageEntry
from sora_jax.export.opening import Runner, refuse_other_name, refuse_other_tensors, require


def open_function(contents: Contents, stage: StageEntry, function: FunctionEntry) -> Runner:
    """Returns a saved function, run by the interpreter; see `opening.Opener`."""
    require("coreml", "coremltools")
    with _without_notes():
        from sora_jax.export import mil_check
        from sora_jax.export.mil_package import MilError

    artefact = function["artefact"]
    called, suffix = artefact.get("function", "main"), artefact.get("output_suffix", "")
    path = contents.package(artefact["file"])
    try:
        program = mil_check.load(path)
        inputs, outputs = program.inputs(called), program.outputs(called)
    except (MilError, KeyError, OSError) as error:
        raise ExportFileError(f"{path} has no function {called} that can be run ({error}); export again.") from error
    refuse_other_name(path, "stage", program.package.metadata.get("stage"), stage["name"])
    refuse_other_name(path, "function", called, function["name"] if len(stage["functions"]) > 1 else "main")
    refuse_other_tensors(path, "input", function["inputs"], _tensors(inputs))
    refuse_other_tensors(path, "output", function["outputs"], _tensors(outputs, suffix))

    def run(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        contents.package(artefact["file"])
        try:
            values = program.run(called, {name: np.asarray(given[name]) for name in inputs})
        except MilError as error:  # inputs are the manifest's, so the program is at fault
            raise ExportFileError(f"{path} cannot be run ({error}); export again.") from error
        return {name.removesuffix(suffix): value for name, value in values.items()}

    return run


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """Silences what coremltools logs when it is imported away from Apple's systems: eight lines that change nothing here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _tensors(tensors: Mapping[str, Any], suffix: str = "") -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name.removesuffix(suffix): (np.dtype(dtype).name, shape) for name, (dtype, shape) in tensors.items()}
