"""Floating-point operations of a traced program: those of its products of matrices and its convolutions.

Invariant: a loop with a known number of turns counts with all of them, whatever form attention has, and a loop without one (the
sampler's) counts once.  Everything else (norms, softmax, sums) is left out: it is bound by memory.
"""

import math
from collections.abc import Iterator
from typing import Any

_CUDNN = "dot_product_attention_fwd"  # the primitive of cuDNN's attention: a kernel without a jaxpr inside


def operations(jaxpr: Any) -> float:
    """Returns the operations of a jaxpr, closed or not: two for each multiplication with its addition."""
    return sum((_of_equation(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns), 0.0)


def count(jaxpr: Any, primitive: str) -> int:
    """Returns how often a primitive stands in a jaxpr, those inside other jaxprs included."""
    equations = getattr(jaxpr, "jaxpr", jaxpr).eqns
    inner = (count(part, primitive) for equation in equations for part in _jaxprs(equation.params))
    return sum(equation.primitive.name == primitive for equation in equations) + sum(inner)


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * equation.outvars[0].aval.size * kernel.size / features
    if name.startswith(_CUDNN):
        (batch, queries, heads, size), keys = (equation.invars[0].aval.shape, equation.invars[1].aval.shape[1])
        return 4.0 * batch * heads * queries * keys * size
    parts = [operations(part) for part in _jaxprs(params)]
    if name == "cond":
        return max(parts)
    return _turns(name, params) * sum(parts, 0.0)


def _turns(name: str, params: Any) -> int:
    """Returns how often an equation runs what is inside it."""
    if name == "scan":
        return int(params["length"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _jaxprs(params: Any) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(part, "jaxpr", part), "eqns"):
                yield part
