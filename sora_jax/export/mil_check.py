"""Runs a saved Core ML package with NumPy, so that what is shipped is what is checked.

Invariant: operations, types and weights are read back from the files of the package; every result is rounded to the dtype
that the program declares for it and must have the declared shape.  Nothing is shared with the conversion.

What it does not show: the order and the width of a runtime's sums inside an operation (here float32), whether float16's
smallest numbers are flushed to zero, and whether Apple's compiler takes the program at all.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.export.mil_ops import OPERATIONS
from sora_jax.export.mil_package import MilError, Package, tensor_type

_LISTS = ("values", "loop_vars")  # parameters that take several values

Values = dict[str, Any]


def load(path: Path) -> "Program":
    """Returns the program of a saved package.

    Raises:
      FileNotFoundError: there is no such package.
      MilError: it is not an ML program.
    """
    return Program(Package(path))


class Program:
    """The functions of a saved package; floats are computed as float32 and held rounded to their declared dtype."""

    def __init__(self, package: Package):
        self.package = package

    @property
    def functions(self) -> tuple[str, ...]:
        """The names of the functions."""
        return tuple(self.package.functions)

    def inputs(self, function: str) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Returns dtype and shape of a function's inputs."""
        return self.package.inputs(function)

    def outputs(self, function: str) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Returns dtype and shape of a function's outputs."""
        return self.package.outputs(function)

    def operation_counts(self, function: str) -> collections.Counter[str]:
        """Returns how often each operation occurs, constants left out."""
        operations = self.package.block(function).operations
        return collections.Counter(operation.type for operation in operations if operation.type != "const")

    def run(self, function: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the outputs of one call by name, in their declared dtypes.

        Inputs are converted to the declared dtypes, as a host would have to.

        Raises:
          KeyError: there is no such function.
          MilError: an input is missing, unknown or of another shape; an operation is not known or breaks its declaration.
        """
        block = self.package.block(function)
        declared = self.inputs(function)
        if declared.keys() != inputs.keys():
            raise MilError(f"function {function} takes {', '.join(declared)}; got {', '.join(inputs)}.")
        known: Values = {}
        for name, (dtype, shape) in declared.items():
            if np.shape(inputs[name]) != shape:
                raise MilError(f"input {name} of {function} has shape {np.shape(inputs[name])}; expected {shape}.")
            known[name] = _rounded(np.asarray(inputs[name]), dtype)
        with np.errstate(all="ignore"):  # infinities and NaN are results here, and fail the comparison
            results = self._run_block(block, known)
        outputs = self.outputs(function).items()
        return {name: value.astype(dtype) for (name, (dtype, _)), value in zip(outputs, results, strict=True)}

    def _run_block(self, block: Any, known: Values) -> list[Any]:
        """Returns the outputs of a block; a value is freed after the last operation that reads it."""
        last_use = {name: i for i, operation in enumerate(block.operations) for name in _reads(operation)}
        kept = {*known, *block.outputs}
        for i, operation in enumerate(block.operations):
            results = self._results(operation, known)
            for output, result in zip(operation.outputs, results, strict=True):
                known[output.name] = _declared(result, output, operation.type)
            for name in {*_reads(operation), *(output.name for output in operation.outputs)} - kept:
                if last_use.get(name, i) == i:
                    known.pop(name, None)
        return [known[name] for name in block.outputs]

    def _results(self, operation: Any, known: Values) -> Sequence[Any]:
        kind = operation.type
        if kind == "const":
            return [self.package.value(operation.attributes["val"])]
        given = {name: self._argument(name, argument, known) for name, argument in operation.inputs.items()}
        if kind == "while_loop":
            return self._while(operation.blocks, given["loop_vars"], known)
        if kind not in OPERATIONS:
            raise MilError(f"operation {kind} ({_first_output(operation)}) is not known to the check; add it to mil_ops.")
        try:
            result = OPERATIONS[kind](**given)
        except (TypeError, ValueError, IndexError, NotImplementedError) as error:
            raise MilError(f"operation {kind} ({_first_output(operation)}) cannot be run: {error}") from error
        return result if isinstance(result, tuple) else [result]

    def _argument(self, name: str, argument: Any, known: Values) -> Any:
        bindings = argument.arguments
        for binding in bindings:
            if binding.WhichOneof("binding") == "name" and binding.name not in known:
                raise MilError(f"an operation reads {binding.name!a}, which nothing computes.")
        values = [known[b.name] if b.WhichOneof("binding") == "name" else _held(self.package.value(b.value)) for b in bindings]
        return values if name in _LISTS else values[0]

    def _while(self, blocks: Sequence[Any], carry: list[Any], known: Values) -> list[Any]:
        condition, body = blocks
        while self._run_nested(condition, carry, known)[0]:
            carry = self._run_nested(body, carry, known)
        return carry

    def _run_nested(self, block: Any, values: Sequence[Any], known: Values) -> list[Any]:
        names = [entry.name for entry in block.inputs]
        return self._run_block(block, {**known, **dict(zip(names, values, strict=True))})


def _reads(operation: Any) -> Iterator[str]:
    """Yields the names that an operation and the blocks inside it read."""
    for argument in operation.inputs.values():
        yield from (binding.name for binding in argument.arguments if binding.WhichOneof("binding") == "name")
    for block in operation.blocks:
        yield from block.outputs
        for inner in block.operations:
            yield from _reads(inner)


def _declared(result: Any, output: Any, kind: str) -> Any:
    """Returns a result in the declared dtype; its shape must be the declared one."""
    if isinstance(result, str):
        return result
    dtype, shape = tensor_type(output.type)
    if np.shape(result) != shape:
        raise MilError(f"operation {kind} ({output.name}) gives shape {np.shape(result)}; the program declares {shape}.")
    return _rounded(np.asarray(result), dtype)


def _rounded(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return _held(value.astype(dtype, copy=False))


def _held(value: Any) -> Any:
    """Returns a float16 array as float32, so that operations sum in float32."""
    return value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == np.float16 else value


def _first_output(operation: Any) -> str:
    return operation.outputs[0].name if operation.outputs else "without output"
