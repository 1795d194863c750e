"""How large the functions of an export are, before anything of it is written: values, weights, inputs and outputs in bytes.

A function is traced, and every value that depends on its inputs is measured; what depends on weights alone is part of them.
The numbers are floors: a runtime holds several values at once, and copies.  What is above a limit does not fit for certain.

Invariant: nothing is computed, compiled or read; shapes are those of the stages that are saved.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.export.entries import TargetName, Weights
from sora_jax.export.program import Function, Specs, Stage
from sora_jax.export.targets import Options
from sora_jax.storage.quantisation import is_quantised, scale_axis

# Reported by others (docs/export.md): the Neural Engine refuses longer dimensions, one component is one Metal allocation.
MAX_DIMENSION = 16_384
COMPONENT_BYTES = 4 * 2**30
APPLE: tuple[TargetName, ...] = ("coreml", "coreai")  # the targets that these two limits are of

_BITS: Mapping[Weights, float] = {"int8": 8, "lut6": 6, "int4": 4}
_SCALES = 4  # bytes: of a float32 scale; a float16 one takes half of it
_TABLE = 64  # entries of a lut6 table


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of a traced function; ``rows``: those that a multiplication of it by a matrix of weights flattens, else 1."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """One function of a program, in bytes.

    Attributes:
      program: the program, whose stages differ in their weights only.
      stages: how many they are.
      function: the function's name.
      sizes: the sizes of video that it serves.
      largest: bytes of its largest value.
      shape: that value's shape.
      dimension: its longest dimension: of any value, or the rows that a multiplication by a matrix flattens.
      weights: bytes of one stage's weights as they are stored.
      inputs: bytes of the inputs.
      outputs: bytes of the outputs.
    """

    program: str
    stages: int
    function: str
    sizes: tuple[str, ...]
    largest: int
    shape: tuple[int, ...]
    dimension: int
    weights: int
    inputs: int
    outputs: int

    @property
    def memory(self) -> int:
        """What running it takes at least: weights, inputs, outputs, and its largest value."""
        return self.weights + self.inputs + self.outputs + self.largest

    def faults(self, target: TargetName, memory_limit: int | None) -> Iterator[str]:
        """Yields what exceeds a limit of the target's devices, or the memory."""
        if target in APPLE:
            if self.dimension > MAX_DIMENSION:
                yield f"a dimension of {self.dimension}, at most {MAX_DIMENSION} fit the Neural Engine"
            largest = max(self.weights, self.largest)
            if largest > COMPONENT_BYTES:
                what = "weights" if largest == self.weights else "a value"
                yield f"{what} of {largest / 2**30:.2f} GiB, at most 4 GiB fit one allocation"
        if memory_limit is not None and self.memory > memory_limit:
            yield f"a need of at least {_amount(self.memory)} of memory, the limit is {_amount(memory_limit)}"


def measure(stages: Sequence[Stage], options: Options, target: TargetName) -> list[Footprint]:
    """Returns every function of every program once, in order."""
    programs: dict[str, list[Stage]] = {}
    for stage in stages:
        programs.setdefault(stage.program.name, []).append(stage)
    return [
        _measured(members[0], function, options, target, len(members))
        for members in programs.values()
        for function in members[0].functions
    ]


def refuse_oversize(found: Sequence[Footprint], target: TargetName, memory_limit: int | None) -> None:
    """Refuses functions that exceed a limit.

    Raises:
      ValueError: names the first, what it exceeds, and how many others do.
    """
    faults = [f"{one.program} {one.function} has {fault}" for one in found for fault in one.faults(target, memory_limit)]
    if faults:
        more = f" ({len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"{faults[0]}{more}; choose a smaller size, or pass --allow-oversize (--dry-run lists all).")


def lines(found: Sequence[Footprint], target: TargetName, memory_limit: int | None) -> Iterator[str]:
    """Yields a table: a heading, a line for every function, and the bytes of all weights."""
    yield f"{'function':44}  {'largest':>9}  {'weights':>9}  {'inputs':>9}  {'outputs':>9}  dimension"
    for one in found:
        name = f"{one.program} {one.function}" + (f" x {one.stages}" if one.stages > 1 else "")
        numbers = "  ".join(f"{_amount(size):>9}" for size in (one.largest, one.weights, one.inputs, one.outputs))
        faults = "; ".join(one.faults(target, memory_limit))
        yield f"{name:44}  {numbers}  {one.dimension:>9}" + (f"  OVERSIZE: {faults}" if faults else "")
    yield f"weights of all stages: {_amount(total_weights(found))}"


def total_weights(found: Sequence[Footprint]) -> int:
    """Returns the bytes of all stages' weights; functions of one stage share them."""
    return sum({one.program: one.stages * one.weights for one in found}.values())


def weight_bytes(stage: Stage, options: Options) -> int:
    """Returns the bytes that a stage's weights take where matrices are stored as the options say."""
    width, stored, total = 2 if options.precision_of(stage) == "float16" else 4, options.weights_of(stage), 0.0
    for name, spec in stage.program.abstract.items():
        values = math.prod(spec.shape)
        if stored == "float" or not is_quantised(name, spec.shape):
            total += values * width
        elif stored == "mixed":
            total += values * (options.mean_bits or 0) / 8  # its tables too
        else:
            total += values * _BITS[stored] / 8 + _SCALES * _scales(name, spec.shape, stored)
    return round(total)


def _scales(name: str, shape: Sequence[int], stored: Weights) -> int:
    if stored == "lut6":
        return _TABLE
    return shape[scale_axis(name)] if stored == "int8" else math.prod(shape) // 32


def _measured(stage: Stage, function: Function, options: Options, target: TargetName, stages: int) -> Footprint:
    halved = target != "stablehlo" and options.precision_of(stage) == "float16"  # StableHLO is traced as it is saved
    values = list(traced_values(stage.program.abstract, function))
    widest = max(values, key=lambda value: _bytes(value.shape, value.dtype, halved=halved))
    return Footprint(
        program=stage.program.name,
        stages=stages,
        function=function.name,
        sizes=function.sizes,
        largest=_bytes(widest.shape, widest.dtype, halved=halved),
        shape=widest.shape,
        dimension=max(length for value in values for length in (value.rows, *value.shape)),
        weights=weight_bytes(stage, options),
        inputs=sum(_bytes(spec.shape, spec.dtype, halved=False) for spec in function.inputs.values()),
        outputs=sum(_bytes(spec.shape, spec.dtype, halved=False) for spec in function.outputs.values()),
    )


def traced_values(abstract: Specs, function: Function) -> Iterator[Value]:
    """Yields the inputs of a function and every value that depends on them, those inside loops as they are in one round."""
    params = dict(sorted(abstract.items()))  # as JAX flattens a dictionary
    closed = jax.make_jaxpr(lambda params, inputs: function.call(params, **inputs))(params, dict(function.inputs))
    yield from (Value(tuple(spec.shape), np.dtype(spec.dtype)) for spec in function.inputs.values())
    yield from _dependent(closed.jaxpr, [True] * len(params) + [False] * len(function.inputs))


def _dependent(jaxpr: Any, constant: Sequence[bool]) -> Iterator[Value]:
    """Yields the values of a jaxpr that depend on other inputs than those that are constant."""
    known = {*jaxpr.constvars, *(var for var, fixed in zip(jaxpr.invars, constant, strict=True) if fixed)}
    for equation in jaxpr.eqns:
        fixed = [not _is_variable(var) or var in known for var in equation.invars]
        if all(fixed):
            known.update(equation.outvars)
            continue
        rows = _flattened_rows(equation) if equation.primitive.name == "dot_general" and any(fixed) else 1
        yield from (Value(tuple(var.aval.shape), np.dtype(var.aval.dtype), rows) for var in equation.outvars)
        for inner in _inner(equation.params):
            # The last operands are the inner ones: those before them choose a branch, or belong to the loop's condition.
            ours = fixed[len(fixed) - len(inner.invars) :] if len(inner.invars) <= len(fixed) else []
            yield from _dependent(inner, ours or [False] * len(inner.invars))


def _flattened_rows(equation: Any) -> int:
    """Returns the rows of a product of activations and weights: what is neither contracted nor a batch, on the left."""
    ((contracted, _), (batch, _)) = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return math.prod(length for axis, length in enumerate(shape) if axis not in (*contracted, *batch))


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(each, "jaxpr", each)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def _is_variable(var: Any) -> bool:
    return not hasattr(var, "val")  # a literal has its value


def _bytes(shape: Sequence[int], dtype: Any, *, halved: bool) -> int:
    width = 2 if halved and jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype).itemsize
    return math.prod(shape) * width


def _amount(size: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 1e3:.2f} kB"
