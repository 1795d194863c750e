"""Tables of a few values that stand for the values of a matrix, with the least squared error that can be found.

Invariant: deterministic, so that two functions of one package get the same table from the same weights.

Source: S. Lloyd, Least squares quantization in PCM, 1982.
"""

import numpy as np

_ROUNDS = 300
_SAMPLE = 2**24  # the values that decide; an embedding of T5-XXL has eight times as many, whose sums would take 2 GB


def nearest_table(values: np.ndarray, entries: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a table in ascending order, in the dtype of ``values``, and for every value the index of the nearest entry.

    Indices are uint8 in one dimension.  Sorted once, a round costs nothing: an entry becomes the mean of the values nearest
    to it, which are neighbours in sorted order.  For very large matrices an even sample of the values decides.
    """
    flat = values.ravel()
    step = -(-len(flat) // _SAMPLE) | 1  # odd: no divisor of a width like 4096, so that all its columns are seen
    ordered = np.sort(flat[::step].astype(np.float32))
    sums = np.concatenate([[0.0], np.cumsum(ordered, dtype=np.float64)])
    # Between equal counts, which spares the tails, and equal distances, which sees nothing else.
    shares = (np.arange(entries) + 0.5) / entries
    table = (ordered[(shares * len(ordered)).astype(np.int64)] + ordered[0] + shares * (ordered[-1] - ordered[0])) / 2
    for _ in range(_ROUNDS):
        cuts = np.concatenate([[0], np.searchsorted(ordered, _midpoints(table)), [len(ordered)]])
        counts = np.diff(cuts)
        table = np.where(counts > 0, np.diff(sums[cuts]) / np.maximum(counts, 1), table)
    table = table.astype(values.dtype)
    cuts, indices = _midpoints(table.astype(np.float32)), np.empty(len(flat), np.uint8)
    for start in range(0, len(flat), _SAMPLE):
        part = slice(start, start + _SAMPLE)
        indices[part] = np.searchsorted(cuts, flat[part].astype(np.float32))
    return table, indices


def _midpoints(table: np.ndarray) -> np.ndarray:
    return (table[1:] + table[:-1]) / 2
