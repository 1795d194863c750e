"""The sha256 of source files and the CRC-32 of what lies in them, computed in the background of the conversion.

Invariant: the checksums are of the bytes of the file whose header was read, and a file that changed during the conversion is
refused. Nothing is converted here.
"""

import hashlib
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np

from convert_weights.errors import SourceError
from convert_weights.readers import Checkpoint
from convert_weights.torch_zip import Extent

_PIECE_BYTES = 512 << 10


class Checksums:
    """The sha256 of a checkpoint's files, computed on a thread; use as a context manager.

    Started before the values are converted, it reads ahead of the workers, which then find the pages in memory.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint

    def __enter__(self) -> Self:
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._futures = [self._pool.submit(self._sha256, path) for path in self._checkpoint.files]
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def result(self) -> list[str]:
        """Returns the checksums, in hexadecimal, when all are known.

        Raises:
          SourceError: a storage of a PyTorch file has other bytes than its CRC-32 says, or a file was changed.
        """
        return [future.result() for future in self._futures]

    def _sha256(self, path: Path) -> str:
        digest, sums = hashlib.sha256(), _ExtentSums(path, self._checkpoint.extents.get(path, ()))
        with self._checkpoint.open(path) as file:
            for piece in file.pieces(np.empty(_PIECE_BYTES, np.uint8)):
                if self._stopped.is_set():
                    return ""  # nobody asks for it any more
                digest.update(piece)
                sums.update(piece)
            file.check_unchanged()
        sums.check_all_seen()
        return digest.hexdigest()


class _ExtentSums:
    """Compares the CRC-32 of byte ranges, ordered and apart from each other, while a file passes by."""

    def __init__(self, path: Path, extents: Sequence[Extent]):
        self._path, self._left = path, list(reversed(extents))
        self._offset = self._crc = 0

    def update(self, piece: memoryview) -> None:
        """Takes the next bytes of the file.

        Raises:
          SourceError: a range that ends here has another CRC-32.
        """
        end = self._offset + len(piece)
        while self._left and self._left[-1].start < end:
            extent = self._left[-1]
            first, last = max(extent.start - self._offset, 0), min(extent.stop - self._offset, len(piece))
            self._crc = zlib.crc32(piece[first:last], self._crc)
            if extent.stop > end:
                break
            if self._crc != extent.crc:
                raise SourceError(
                    f"{self._path} is damaged: its {extent.name} has another CRC-32 than recorded; download it again."
                )
            self._left.pop()
            self._crc = 0
        self._offset = end

    def check_all_seen(self) -> None:
        """Refuses a file that ended before its last range did."""
        if self._left:
            raise SourceError(f"{self._path} ended at byte {self._offset}, before its {self._left[-1].name} did.")
