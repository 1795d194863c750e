"""A width for every matrix of a stage, by the error that rounding it alone makes in the stage's outputs.

Widths are those of Core ML's tables: 2^bits values for a matrix.  A stage has so many bits for its matrices as the mean asks
for; from the least widths on, the step that saves most error for its bytes is taken while it fits.  Stages are of equal worth:
each keeps the mean, so that no stage has to be measured before another is written.

Invariant: widths follow from weights, inputs and the mean alone, and the bytes of tables and indices are within the mean.
Nothing is written here.

Source: greedy allocation along the convex hull; Y. Shoham and A. Gersho, Efficient bit allocation for an arbitrary set of
quantizers, 1988.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sora_jax.export import check
from sora_jax.export.palettes import nearest_table
from sora_jax.storage.quantisation import is_quantised

WIDTHS = (3, 4, 6, 8)
_TABLE_VALUE = 2  # bytes: float16
_NO_LIMITS = check.Limits(-math.inf, math.inf)

Arrays = Mapping[str, np.ndarray]
Widths = dict[str, int]
Call = Callable[[Arrays, Arrays], Arrays]


def choose_widths(params: Arrays, mean_bits: float, cases: Mapping[str, tuple[Arrays, Arrays]], call: Call) -> Widths:
    """Returns bits by name for the matrices of a stage.

    Args:
      params: the weights.
      mean_bits: bits for each value of all matrices, tables included.
      cases: inputs and exact outputs of the function that judges, as they are checked: captured, and with outlier channels,
        which some matrices see and others, behind a norm, do not.
      call: that function, of weights and inputs.
    """
    matrices = {name: array for name, array in params.items() if is_quantised(name, array.shape)}
    costs: dict[str, dict[int, float]] = {name: {} for name in matrices}
    for name, array in matrices.items():
        for width in WIDTHS:
            costs[name][width] = error(cases, {**params, name: table_rounded(array, width)}, call)
    sizes = {name: {width: table_bytes(array.shape, width) for width in WIDTHS} for name, array in matrices.items()}
    return allocate(costs, sizes, mean_bits / 8 * sum(array.size for array in matrices.values()))


def error(cases: Mapping[str, tuple[Arrays, Arrays]], params: Arrays, call: Call) -> float:
    """Returns the squared relative errors of weights, of all outputs in all cases together, measured as by the check."""
    checks: list[check.Check] = []
    for case, (inputs, expected) in cases.items():
        checks += check.compare(case, inputs, expected, call(params, inputs), _NO_LIMITS)
    return sum(one.relative_l2**2 for one in checks)


def allocate(costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, Mapping[int, float]], budget: float) -> Widths:
    """Returns a width for each matrix within the budget; the least of each where the budget is too small for more.

    Args:
      costs: error by matrix and width, of that matrix alone.
      sizes: bytes likewise.
      budget: bytes of all matrices.
    """
    widths = {name: min(by_width) for name, by_width in sizes.items()}
    while True:
        left = budget - sum(sizes[name][width] for name, width in widths.items())
        steps: list[tuple[float, str, int]] = []
        for name, width in widths.items():
            for more in sizes[name]:
                extra = sizes[name][more] - sizes[name][width]
                if more > width and extra <= left:
                    steps.append(((costs[name][width] - costs[name][more]) / extra, name, more))
        gain, name, width = max(steps, default=(0.0, "", 0))
        if gain <= 0:
            return widths
        widths[name] = width


def table_rounded(matrix: np.ndarray, width: int) -> np.ndarray:
    """Returns a matrix as it is looked up in its table of float16 values."""
    table, indices = nearest_table(matrix.astype(np.float16), 2**width)
    return np.asarray(table.astype(np.float32)[indices].reshape(matrix.shape), np.float32)


def table_bytes(shape: tuple[int, ...], width: int) -> float:
    """Returns the bytes of a matrix's indices and its table."""
    return math.prod(shape) * width / 8 + _TABLE_VALUE * 2**width


class ByContent:
    """The width of a matrix that a converter hands over, transposed or rounded, without its name.

    Matrices are told apart by their number of values and the sum of their magnitudes, which neither changes much.  What is
    no matrix of the stage keeps the largest width.
    """

    def __init__(self, params: Arrays, widths: Mapping[str, int]):
        self._known = [(params[name].size, _magnitude(params[name]), width) for name, width in widths.items()]

    def width(self, values: np.ndarray) -> int:
        """Returns the bits of these values."""
        magnitude = _magnitude(values)
        same = [(abs(magnitude - known), width) for size, known, width in self._known if size == values.size]
        distance, width = min(same, default=(math.inf, 0))
        return width if distance <= 1e-2 * magnitude else max(WIDTHS)

    def table(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns table and indices of these values, as a converter asks for them."""
        return nearest_table(values, 2 ** self.width(values))


def _magnitude(values: Any) -> float:
    return float(np.sum(np.abs(np.asarray(values, np.float64))))
