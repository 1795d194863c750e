"""One array of a checkpoint, read a few rows at a time from where it lies.

``Array.read`` reads with ``preadv`` into the caller's buffer, so that memory is bounded by that buffer; packed values are
decoded by `encodings` when a caller asks for numbers. Invariant: what is read are the bytes that the header describes. Where
arrays lie is found by the readers.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from convert_weights.encodings import decoded, stored_layout
from convert_weights.errors import SourceError
from convert_weights.rules import Header, numpy_dtype
from convert_weights.source_file import OpenFile
from convert_weights.torch_zip import Tensor

# A view that is spread over more than this many times its own bytes is not read (part of a fused matrix: 3 times).
_MAX_SPREAD = 4
_SMALL_SPAN_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a checkpoint: where its bytes lie, and how.

    Attributes:
      name: its name in the checkpoint.
      file: the file that holds it.
      tensor: where it lies there.
      key: its name in the file.
      scale: an array of one float32 number with which all values are multiplied.
    """

    name: str
    file: Path
    tensor: Tensor
    key: str
    scale: "Array | None" = None

    @property
    def header(self) -> Header:
        """Shape and dtype."""
        return Header(self.tensor.shape, self.tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements, as they lie in the file."""
        dtype, shape = self._layout
        return math.prod(shape) * dtype.itemsize

    @property
    def _layout(self) -> tuple[np.dtype, tuple[int, ...]]:
        return stored_layout(self.tensor.dtype, self.tensor.shape, numpy_dtype)

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie one after another in C order."""
        step, shape = 1, self.tensor.shape
        for size, stride in zip(reversed(shape), reversed(self.tensor.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    def read(self, file: OpenFile, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Returns rows ``start:stop`` (of the first axis) as they lie in the file, undecoded: a view of ``buffer`` (uint8)."""
        dtype, whole = self._layout
        shape = (stop - start, *whole[1:]) if whole else ()
        row_bytes = math.prod(whole[1:]) * dtype.itemsize
        raw = buffer[: math.prod(shape) * dtype.itemsize]
        file.read(self.tensor.offset + start * row_bytes, raw)
        return raw.view(dtype).reshape(shape)

    def read_strided(self, file: OpenFile) -> np.ndarray:
        """Returns an array whose elements need not lie in C order, as a view of its bytes as they lie in the file.

        Raises:
          SourceError: the bytes between its first and its last element are many times its own.
        """
        dtype, shape = self._layout
        if not self.nbytes:
            return np.empty(shape, dtype)
        if dtype == np.uint8:
            raw = np.empty(self.nbytes, np.uint8)  # packed values are contiguous
            file.read(self.tensor.offset, raw)
            return raw.reshape(shape)
        last = sum((size - 1) * stride for size, stride in zip(self.tensor.shape, self.tensor.strides, strict=True))
        span_bytes = (last + 1) * dtype.itemsize
        if span_bytes > max(_MAX_SPREAD * self.nbytes, _SMALL_SPAN_BYTES):
            raise SourceError(
                f"{self.file}: {self.name} has {self.nbytes} bytes, spread over {span_bytes}; save it as a contiguous tensor."
            )
        raw = np.empty(span_bytes, np.uint8)
        file.read(self.tensor.offset, raw)
        strides = [stride * dtype.itemsize for stride in self.tensor.strides]
        return np.lib.stride_tricks.as_strided(raw.view(dtype), self.tensor.shape, strides, writeable=False)

    def decoded(self, rows: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        """Returns rows of ``read`` as numbers: plain floats as they are, packed ones as float32, multiplied with ``scale``."""
        values = decoded(self.tensor.dtype, rows, (len(rows), *self.tensor.shape[1:]) if self.tensor.shape else ())
        return values if scale is None else values * scale

    def read_scale(self, open_files: Mapping[Path, OpenFile]) -> np.ndarray | None:
        """Returns the number with which all values are multiplied; None without one."""
        if self.scale is None:
            return None
        return self.scale.read_strided(open_files[self.scale.file]).reshape(())

    def slices(self, file: OpenFile, buffer: np.ndarray, step: int) -> Iterator[np.ndarray]:
        """Yields the array ``step`` rows at a time in C order, in ``buffer`` where it is contiguous; nothing if it is empty."""
        if not self.nbytes:
            return
        count = self.tensor.shape[0] if self.tensor.shape else 1
        if self.contiguous:
            for start in range(0, count, step):
                yield self.read(file, start, min(start + step, count), buffer)
            return
        view = self.read_strided(file)
        for start in range(0, count, step):
            yield np.ascontiguousarray(view[start : start + step])
