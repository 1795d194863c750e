"""Opens Core AI assets, compared with the manifest, in Apple's own runtime on the CPU; the converter is not needed.

Invariant: a function runs a program that was compiled from verified bytes when it was opened; a later change of the files
changes nothing.  Functions of one asset that are open at the same time share one model and its weights.
"""

import asyncio
import concurrent.futures
import contextlib
import importlib.metadata
import json
import os
import sys
import threading
import weakref
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sora_jax.export.contents import Contents, ExportFileError, file_sha256
from sora_jax.export.entries import FunctionEntry, StageEntry
from sora_jax.export.opening import (
    MissingExtraError,
    Runner,
    Tensor,
    refuse_other_name,
    refuse_other_tensors,
    require,
    rounded,
)

METADATA, OWN, STAGE = "metadata.json", "creatorDefinedMetadata", "stage"  # where an asset says whose it is
# A beta, whose programs and interface change from one release to the next: another one was never tried.
VERSIONS = {"coreai-core": "1.0.0b3", "coreai-onnx": "1.2.1"}

_RELEASE_S = 1.0  # at most; it takes less than a millisecond

Result = TypeVar("Result")


def open_function(contents: Contents, stage: StageEntry, function: FunctionEntry) -> Runner:
    """Returns a saved function in Apple's runtime; see `opening.Opener`."""
    require("coreai", "coreai")
    require_versions("coreai-core")
    artefact = function["artefact"]
    called, suffix = artefact.get("function", ""), artefact.get("output_suffix", "")
    path = contents.package(artefact["file"])
    model = _open_model(path)
    contents.package(artefact["file"])  # the files are still those that were verified
    refuse_other_name(path, "stage", model.stage, stage["name"])
    refuse_other_name(path, "function", called, function["name"])
    inputs, outputs = model.load(called)
    refuse_other_tensors(path, "input", function["inputs"], inputs)
    named = {name.removesuffix(suffix): tensor for name, tensor in outputs.items()}
    refuse_other_tensors(path, "output", function["outputs"], named)
    dtypes = {name: dtype for name, (dtype, _) in inputs.items()}

    def run(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = model.run(called, rounded(given, dtypes))
        return {name.removesuffix(suffix): values[name] for name in outputs}

    return run


class _Model:
    """An asset in Apple's runtime, with the functions of it that were loaded."""

    def __init__(self, path: Path):
        import coreai.authoring  # before the runtime: the package imports itself in a circle otherwise

        self.path, self.functions = path, dict[str, Any]()
        _refuse_no_program(path)
        try:
            self.stage = json.loads((path / METADATA).read_text("utf-8"))[OWN][STAGE]
            self.loaded = _awaited(_loaded(coreai.authoring.AIModelAsset.load(path)))
        except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ExportFileError(
                f"{path} cannot be run by Core AI ({type(error).__name__}: {reason}); export again."
            ) from error

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the inputs and the outputs of a function, which `run` then runs.

        Raises:
          ExportFileError: it has none of that name.
        """
        if name not in self.loaded.function_names:
            have = ", ".join(sorted(self.loaded.function_names))
            raise ExportFileError(f"{self.path} has no function {name!r}; it has {have}.")
        if name not in self.functions:
            with _quiet():
                self.functions[name] = self.loaded.load_function(name)
        says = self.functions[name].desc
        inputs = {each: _tensor(says.input_descriptor(each)) for each in says.input_names}
        return inputs, {each: _tensor(says.output_descriptor(each)) for each in says.output_names}

    def run(self, name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns copies of the outputs of a loaded function: the runtime's own arrays are its memory."""
        from coreai.runtime import NDArray

        given = {each: NDArray(np.ascontiguousarray(array)) for each, array in arrays.items()}
        return {each: np.array(value.numpy()) for each, value in _awaited(self.functions[name](given)).items()}


_models: "weakref.WeakValueDictionary[Any, _Model]" = weakref.WeakValueDictionary()


def _open_model(path: Path) -> _Model:
    """Returns the model of an asset, the same as long as one of its functions is open and its files are the same."""
    stats = [os.stat(file) for file in sorted(path.iterdir())]
    identity = (path.resolve(), *((one.st_ino, one.st_size, one.st_mtime_ns) for one in stats))
    model = _models.get(identity)
    if model is None:
        model = _models[identity] = _Model(path)
    return model


def _refuse_no_program(path: Path) -> None:
    """Refuses an asset whose program is not the one it was saved with; Apple's parser ends the process where it is none.

    Raises:
      ExportFileError: the program is missing, or is another.
    """
    program, recorded = path / "main.mlirb", path / "main.hash"
    try:
        known = bytes.fromhex(file_sha256(program)) == recorded.read_bytes()
    except OSError as error:
        raise ExportFileError(f"{path} lacks {Path(error.filename).name}; export again.") from None
    if not known:
        raise ExportFileError(f"{program} is not the program that its asset was saved with; export again.")


async def _loaded(asset: Any) -> Any:
    """Returns the compiled model of an asset."""
    async with asset.executable() as model:
        return model


def _tensor(descriptor: Any) -> Tensor:
    return descriptor.dtype, tuple(descriptor.shape)


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that returns nothing to the runtime, which never releases it and so kept the outputs of every call."""

    def call_soon_threadsafe(self, *arguments: Any, **keywords: Any) -> Any:  # type: ignore[override]  # returns no handle
        """Schedules a callback; see asyncio."""
        super().call_soon_threadsafe(*arguments, **keywords)


def _awaited(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Returns what a coroutine of the runtime returns, from a thread of its own: a notebook has a loop running in this one."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(_run_loop, coroutine).result()


def _run_loop(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Returns what a coroutine returns, when the runtime's thread that delivered it has released the loop.

    That thread then needs Python no more.  If Python ended while it does, Swift would abort the process.
    """
    loop = _Loop()
    released = threading.Event()
    weakref.finalize(loop, released.set)
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()
        del loop
        released.wait(_RELEASE_S)


def require_versions(*packages: str) -> None:
    """Refuses other versions of Apple's packages than those that this code was written for.

    Raises:
      MissingExtraError: names the version and the pip line.
    """
    for name in packages:
        found = importlib.metadata.version(name)
        if found != VERSIONS[name]:
            raise MissingExtraError(
                f"{name} is {found}, expected {VERSIONS[name]}; install with: pip install 'sora_jax[coreai]'"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps off the terminal the line that the runtime writes to standard error by itself for every function it loads."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
