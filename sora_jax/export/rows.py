"""The rows of guidance as a host hands them to the functions of a step: both in one call, or one after the other.

Invariant: an array has rows where the letters that end its name begin with R; the first row is the conditional one.
"""

from collections.abc import Iterator, Mapping

import numpy as np

Arrays = dict[str, np.ndarray]


def has_rows(name: str) -> bool:
    """Returns whether an array of this name has an axis of rows."""
    return name.rpartition("_")[2].startswith("R")


def each_call(values: Mapping[str, np.ndarray], guidance_rows: int) -> Iterator[Arrays]:
    """Yields the arrays of every call of a function: all with 2 rows in a call, with 1 those of each row."""
    if guidance_rows == 2:
        yield dict(values)
        return
    for row in range(2):
        yield {name: array[row : row + 1] if has_rows(name) else array for name, array in values.items()}
