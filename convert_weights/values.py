"""Converts checkpoint files array by array, a few rows at a time, into whatever takes the results.

Invariant: memory is bounded by a few MB and the largest transposed matrix per worker, however large the checkpoint is; the
values are those of ``rules.convert_arrays`` bit for bit.  The caller decides where results go (``Sink``): to a model
directory, to a comparison, or nowhere.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from convert_weights.blending import UNCHANGED, Blend
from convert_weights.encodings import encoding_of
from convert_weights.half_floats import widened
from convert_weights.readers import Checkpoint
from convert_weights.rules import LINEAR, Assignment, Plan, Transform
from convert_weights.source_array import Array
from convert_weights.source_file import OpenFile
from sora_jax.storage.arrays import STORED_DTYPES
from sora_jax.storage.quantisation import SCALE_SUFFIX, is_quantised, quantise_rows, scale_axis

_SLICE_BYTES = 1 << 20  # stays in the cache of a core from reading to writing
_WORKERS = 2
_CACHE_LINE_BYTES = 64
_GATHERED_ROWS = 64
_NOTHING = np.empty(0, np.uint8)

Write = Callable[[np.ndarray], None]


class Sink(Protocol):
    """Takes converted arrays; called from several threads."""

    def wants(self, name: str) -> bool:
        """Returns False for an array that need not be converted (again)."""

    def open_array(
        self, name: str, shape: tuple[int, ...], dtype: str, *, source: Mapping[str, Any] | None = None
    ) -> contextlib.AbstractContextManager[Write]:
        """Returns a context whose value takes the array's values, C-contiguous piece after piece."""


class Discard:
    """A sink for a checkpoint that has faults already: values are checked for further faults and dropped."""

    def wants(self, name: str) -> bool:
        """Returns True."""
        return True

    @contextlib.contextmanager
    def open_array(self, name: str, shape: tuple[int, ...], dtype: str, *, source: Any = None) -> Iterator[Write]:
        """Yields a function that does nothing."""
        yield lambda piece: None


class _Scratch(threading.local):
    """Two buffers for each thread, reused because fresh pages are slower than the disk."""

    def __init__(self) -> None:
        self._buffers = {"input": np.empty(0, np.uint8), "output": np.empty(0, np.uint8)}

    def take(self, which: str, nbytes: int) -> np.ndarray:
        if self._buffers[which].size < nbytes:
            self._buffers[which] = np.empty(0, np.uint8)  # free the old one first
            self._buffers[which] = np.empty(nbytes, np.uint8)
        return self._buffers[which][:nbytes]


def stored_shapes(plan: Plan, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns shape and dtype of every array that a plan will store, scales of int8 included."""
    stored: dict[str, tuple[tuple[int, ...], str]] = {}
    for assignment in plan.assignments:
        if assignment.target is None or assignment.duplicate_of:
            continue
        shape = tuple(shapes[assignment.target])
        if dtype == "int8" and is_quantised(assignment.target, shape):
            stored[assignment.target + SCALE_SUFFIX] = ((shape[scale_axis(assignment.target)],), "float32")
            stored[assignment.target] = (shape, "int8")
        else:
            stored[assignment.target] = (shape, "float32" if dtype == "int8" else dtype)
    return stored


def convert_values(
    plan: Plan,
    checkpoint: Checkpoint,
    sink: Sink,
    *,
    dtype: str,
    blend: Blend = UNCHANGED,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> list[str]:
    """Converts every array of a plan into ``sink`` and returns the faults of the values: NaN, infinity, broken ties.

    Args:
      plan: the assignments; arrays whose header does not fit are not read.
      checkpoint: the source.
      sink: takes the arrays that it wants.
      dtype: stored dtype: ``float32``, ``bfloat16`` or ``int8``.
      blend: what other sources, whose files are among the checkpoint's, add to the values.
      progress: called with the source bytes of each finished array, by one thread at a time.
    """
    scratch, reporting = _Scratch(), threading.Lock()
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(checkpoint.open(path)) for path in checkpoint.files}

        def work(assignment: Assignment) -> list[str]:
            array = checkpoint.arrays[assignment.source]
            if assignment.source in plan.unfit:
                return []  # reported by the plan
            job = _Job(assignment, array, files, scratch, dtype, blend)
            if assignment.duplicate_of:
                faults = job.compare(checkpoint.arrays[assignment.duplicate_of])
            elif assignment.target is None:
                faults = assignment.faults(job.whole())
            elif sink.wants(assignment.target):
                faults = job.convert(sink)
            else:
                faults = []
            with reporting:
                progress(array.nbytes)
            return faults

        pool = stack.enter_context(_pool(_WORKERS))
        order = {name: i for i, name in enumerate(checkpoint.arrays)}
        futures = [pool.submit(work, a) for a in sorted(plan.assignments, key=lambda a: order[a.source])]
        for future in as_completed(futures):
            future.result()  # the first failure ends the others
        for file in files.values():
            file.check_unchanged()
        return [fault for future in futures for fault in future.result()]


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yields a thread pool that drops what has not begun when the block is left by an exception."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _Job:
    """The conversion of one array."""

    def __init__(
        self,
        assignment: Assignment,
        array: Array,
        files: Mapping[Path, OpenFile],
        scratch: _Scratch,
        dtype: str,
        blend: Blend = UNCHANGED,
    ):
        self._assignment, self._array, self._files, self._scratch, self._dtype = assignment, array, files, scratch, dtype
        self._file, self._blend = files[array.file], blend
        self._transform = assignment.rule.transform
        self._bad = self._overflow = 0

    def convert(self, sink: Sink) -> list[str]:
        """Converts the array into ``sink``; returns its faults."""
        name, shape = self._assignment.target, self._transform.shape(self._array.tensor.shape)
        if name is None or shape is None:
            raise ValueError(f"{self._array.name} sets no parameter")  # the plan knows it as unfit
        if self._dtype == "int8" and is_quantised(name, shape):
            self._convert_int8(name, shape, sink)
        else:
            self._convert_float(name, shape, sink)
        return self._faults()

    def whole(self) -> np.ndarray:
        """Returns the source array."""
        stored = np.ascontiguousarray(self._array.read_strided(self._file))
        return self._array.decoded(stored, self._array.read_scale(self._files))

    def compare(self, other: Array) -> list[str]:
        """Returns a fault unless another source array has the same values, bit for bit."""
        fault = [f"{self._array.name}: differs from {other.name}, to which it must be tied"]
        if self._array.file == other.file and self._array.tensor == other.tensor:
            return []
        theirs = _Job(self._assignment, other, self._files, _Scratch(), self._dtype)
        for a, b in zip(self._numbers(), theirs._numbers(), strict=True):
            if not np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)):
                return fault
        return []

    def _convert_float(self, name: str, shape: tuple[int, ...], sink: Sink) -> None:
        stored = "float32" if self._dtype == "int8" else self._dtype
        if self._transform.keeps_rows:
            with sink.open_array(name, shape, stored, source=self._source()) as write:
                for rows in self._slices():
                    write(np.ascontiguousarray(self._transform.apply(self._cast(rows, stored))))
            return
        out = self._output(shape, stored)
        start = 0
        for rows in self._slices():
            _turn(self._transform, _bits(self._cast(rows, stored)), _bits(out), start)
            start += len(rows)
        with sink.open_array(name, shape, stored, source=self._source()) as write:
            write(out)

    def _convert_int8(self, name: str, shape: tuple[int, ...], sink: Sink) -> None:
        """As ``quantisation.quantise``: one scale per source row, in both layouts."""
        out, start = self._output(shape, "int8"), 0
        scale = np.empty(self._array.tensor.shape[0], np.float32)
        for rows in self._slices():
            stop = start + len(rows)
            if self._count(rows):
                start = stop
                continue
            matrix = rows.reshape(len(rows), -1)
            values, scale[start:stop] = quantise_rows(matrix)
            if self._transform.keeps_rows:
                out[start:stop] = values
            else:
                _turn(LINEAR, values, out, start)
            start = stop
        if self._bad:
            return
        with sink.open_array(name + SCALE_SUFFIX, scale.shape, "float32") as write:
            write(scale)
        with sink.open_array(name, shape, "int8", source=self._source()) as write:
            write(out)

    def _slices(self) -> Iterator[np.ndarray]:
        """Yields what the network gets some rows at a time, in the source's layout; each slice is overwritten by the next."""
        if not self._blend.changes(self._array.name):
            yield from self._numbers()
            return
        mixer, start = self._blend.opened(self._array.name, self._files), 0
        for rows in self._numbers():
            yield mixer.rows(rows, start)
            start += len(rows) if rows.ndim else 1

    def _numbers(self) -> Iterator[np.ndarray]:
        """Yields the numbers of the source array some rows at a time; each slice is overwritten by the next."""
        scale = self._array.read_scale(self._files)
        rows_in_all = max(self._array.tensor.shape[0] if self._array.tensor.shape else 1, 1)
        row_bytes = self._array.nbytes // rows_in_all
        unpacked_bytes = 4 * math.prod(self._array.tensor.shape) // rows_in_all  # of packed values, which grow when read
        step = max(1, _SLICE_BYTES // max(row_bytes, unpacked_bytes, 1))
        buffer = self._scratch.take("input", min(step * row_bytes, self._array.nbytes)) if self._array.contiguous else _NOTHING
        for rows in self._array.slices(self._file, buffer, step):
            yield self._array.decoded(rows, scale)

    def _cast(self, rows: np.ndarray, stored: str) -> np.ndarray:
        bad = self._count(rows)
        if rows.dtype == np.float16 and rows.ndim and not bad:
            return widened(rows, stored)
        with np.errstate(over="ignore", invalid="ignore"):
            cast = rows.astype(STORED_DTYPES[stored], copy=False)
        if cast.dtype != rows.dtype and not self._bad:
            self._overflow += not_finite(cast)
        return cast

    def _count(self, rows: np.ndarray) -> int:
        bad = not_finite(rows)
        self._bad += bad
        return bad

    def _output(self, shape: tuple[int, ...], stored: str) -> np.ndarray:
        dtype = STORED_DTYPES[stored]
        return self._scratch.take("output", math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    def _source(self) -> dict[str, Any]:
        header, encoding = self._array.header, encoding_of(self._array.tensor.dtype)
        source: dict[str, Any] = {"name": self._array.name, "shape": list(header.shape), "dtype": header.dtype}
        if self._array.scale is not None:
            source["scale"] = self._array.scale.name
        packed = encoding is not None and not encoding.exact
        if packed or "scale" in source or self._blend.changes(self._array.name):
            source["exact"] = False  # the stored numbers are not those of the source's dtype
        return source

    def _faults(self) -> list[str]:
        size = math.prod(self._array.tensor.shape)
        if self._bad:
            return [f"{self._array.name}: {self._bad} of {size} values are NaN or infinite"]
        return [f"{self._array.name}: {self._overflow} of {size} values overflow {self._dtype}"] if self._overflow else []


def not_finite(array: np.ndarray) -> int:
    """Returns how many values are NaN or infinite; 16-bit types by their bits, which is ten times faster."""
    if array.dtype.itemsize == 2:
        exponent = np.uint16(0x7C00 if array.dtype == np.float16 else 0x7F80)
        return int(np.count_nonzero((array.view(np.uint16) & exponent) == exponent))
    finite = np.isfinite(array)
    return 0 if finite.all() else int(array.size - np.count_nonzero(finite))


def _turn(transform: Transform, rows: np.ndarray, out: np.ndarray, start: int) -> None:
    """Writes transformed rows into ``out`` from index ``start`` of its last axis.

    A cache line's worth of rows at a time: rows of matrices lie a power of two apart, so that more of them would evict each
    other from the cache.  Some lines are gathered in an array of their own first, because every row of ``out`` begins on
    another page (measured for matrices of T5 and STDiT3: 1.0 to 2.1 GB/s instead of 0.7 to 1.2).
    """
    step = _CACHE_LINE_BYTES // rows.dtype.itemsize
    gathered = np.empty((*out.shape[:-1], min(len(rows), _GATHERED_ROWS)), out.dtype)
    for first in range(0, len(rows), _GATHERED_ROWS):
        group = rows[first : first + _GATHERED_ROWS]
        for at in range(0, len(group), step):
            block = group[at : at + step]
            gathered[..., at : at + len(block)] = transform.apply(block)
        out[..., start + first : start + first + len(group)] = gathered[..., : len(group)]


def _bits(array: np.ndarray) -> np.ndarray:
    """Returns bfloat16 as uint16: NumPy moves built-in types faster."""
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array
