"""Opens StableHLO artefacts: a program and the weights of a stage, compared with the manifest, compiled once.

Invariant: a program and its weights run together only if the program says that it is the function of the manifest, the
weights say that they are the stage's, and names, shapes and dtypes agree on all three sides.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from sora_jax.export import weight_file
from sora_jax.export.contents import Contents, ExportFileError
from sora_jax.export.entries import FunctionEntry, StageEntry
from sora_jax.export.opening import Runner, Tensor, refuse_other_name, refuse_other_tensors, require, rounded

Tensors = dict[str, Tensor]


def open_function(contents: Contents, stage: StageEntry, function: FunctionEntry) -> Runner:
    """Returns a saved function with its weights; stages of one program share its compilation.  See `opening.Opener`."""
    require("stablehlo", "flatbuffers")
    artefact = function["artefact"]
    path = contents.path(artefact["file"])
    saved = program(path, path.stat().st_mtime_ns)
    saved.refuse_other(path, f"{stage['program']}.{function['name']}", function)
    params = jax.device_put(read_weights(contents, artefact.get("weights", ""), stage["name"], saved, prefix=""))
    dtypes = {name: dtype for name, (dtype, _) in saved.inputs.items()}
    call = saved.call

    def run(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = call(params, rounded(given, dtypes))
        return {name: np.asarray(value) for name, value in outputs.items()}

    return run


class Program:
    """A deserialised artefact: its name, and dtype and shape of its stored parameters, inputs and outputs."""

    def __init__(self, path: Path):
        try:
            exported = jax.export.deserialize(bytearray(path.read_bytes()))
            (params, inputs), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
            outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
        except Exception as error:  # of flatbuffers, of MLIR or of JAX, each with its own errors
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ExportFileError(f"{path} is no program that JAX {jax.__version__} reads ({reason}); export again.") from error
        self.name: str = exported.fun_name
        self.exported = exported
        self.params, self.inputs, self.outputs = _tensors(params), _tensors(inputs), _tensors(outputs)

    @functools.cached_property
    def call(self) -> Callable[..., Any]:
        """The program, jitted."""
        return jax.jit(self.exported.call)

    def refuse_other(self, path: Path, name: str, function: FunctionEntry) -> None:
        """Refuses a program that is not the manifest's function.

        Raises:
          ExportFileError: it has another name, other inputs or other outputs.
        """
        lengths = self._lengths(function)
        refuse_other_name(path, "program", self.name, name)
        refuse_other_tensors(path, "input", function["inputs"], _fixed(self.inputs, lengths))
        refuse_other_tensors(path, "output", function["outputs"], _fixed(self.outputs, lengths))

    def _lengths(self, function: FunctionEntry) -> dict[str, int]:
        """Returns what the letters of lengths that may be any stand for in the manifest's inputs."""
        lengths: dict[str, int] = {}
        for tensor in function["inputs"]:
            _, shape = self.inputs.get(tensor["name"], ("", ()))
            for mine, declared in zip(shape, tensor["shape"], strict=False):
                if isinstance(mine, str) and isinstance(declared, int) and mine in function["artefact"].get("symbolic", ""):
                    lengths.setdefault(mine, declared)
        return lengths


@functools.lru_cache(maxsize=32)
def program(path: Path, _modified_ns: int) -> Program:
    """Returns the program of a file, read again only if the file changed."""
    return Program(path)


def read_weights(contents: Contents, name: str, stage: str, saved: Program, *, prefix: str) -> dict[str, np.ndarray]:
    """Returns a stage's weights by the names that a program has for them, which begin with ``prefix``.

    Raises:
      ExportFileError: the file is damaged, another stage's, or not what the program takes.
    """
    with contents.reading(name) as path:
        found = weight_file.index(path)
        refuse_other_name(path, "weights of stage", found.stage, stage)
        wanted = {key.removeprefix(prefix): spec for key, spec in saved.params.items() if key.startswith(prefix)}
        if found.specs != wanted:
            other = sorted(key for key in {*wanted, *found.specs} if wanted.get(key) != found.specs.get(key))
            raise ExportFileError(f"{path} does not hold what {saved.name} takes: {', '.join(other[:4])}; export again.")
        return {prefix + key: array for key, array in weight_file.read(path).items()}


def _fixed(tensors: Tensors, lengths: Mapping[str, int]) -> Tensors:
    """Returns the tensors with numbers in place of letters and of their multiples, such as ``8*H``."""

    def number(length: int | str) -> int | str:
        factor, _, letter = str(length).rpartition("*")
        return lengths[letter] * int(factor or 1) if letter in lengths and (factor or "1").isdecimal() else length

    return {name: (dtype, tuple(map(number, shape))) for name, (dtype, shape) in tensors.items()}


def _tensors(avals: Mapping[str, Any]) -> Tensors:
    """Returns dtype and shape by name; a symbolic length is its text."""
    return {
        name: (np.dtype(aval.dtype).name, tuple(n if isinstance(n, int) else str(n) for n in aval.shape))
        for name, aval in avals.items()
    }
