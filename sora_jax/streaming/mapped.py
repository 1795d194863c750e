"""The back-end of the CPU: every block is an argument that maps its files, and a gate before each keeps the pages in step.

The gate waits until the pages of block i are in memory, has those of block i + 1 read by a thread, and lets go of those of
block i - 1 unless it is retained.

Invariant: pages are advice.  A page that is not there when a block computes is read by the system then, so an advice that is
wrong or late costs time or memory, never a bit.  Files are checked (size, time, inode) before and after the pages are read,
and an error of reading them is raised by the gate.  What remains: a file that is cut short while its block computes
ends the process (SIGBUS), and one that is overwritten in place in that moment is noticed only after the block.
"""

import errno
import functools
import mmap

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sora_jax.config import DTypePolicy
from sora_jax.networks.merging import Merge
from sora_jax.networks.stdit3 import Conditioning
from sora_jax.streaming.blocks import run_block
from sora_jax.streaming.callbacks import PASSED, Outputs, opened
from sora_jax.streaming.prefetch import Slot
from sora_jax.streaming.retention import Retention
from sora_jax.streaming.source import LayerFile, LayerSource
from sora_jax.streaming.stream import BlockStream, Stored

MAP_FROM_BYTES = 1 << 16  # smaller arrays are read: a mapping costs a file descriptor and a page
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14; not among Python's names
_PIECE_BYTES = 1 << 23  # Python holds its lock while the system reads a piece


class MappedBlocks(BlockStream):
    """Blocks that are arguments of the program; ``map_from_bytes`` is the size from which an array is mapped."""

    def __init__(
        self, source: LayerSource, policy: DTypePolicy, retention: Retention, *, stall_s: int | float, map_from_bytes: int
    ):
        super().__init__(source, policy, retention, stall_s=stall_s)
        self._map_from_bytes = map_from_bytes
        self._maps: list[dict[str, mmap.mmap]] = []
        self._retained: set[int] = set()
        self._populated: set[int] = set()
        self._current: Slot | None = None

    def arguments(self) -> Stored:
        """Returns the stored arrays of every block: maps of their files where large."""
        self._maps = [{} for _ in self.blocks]
        return tuple(jax.device_put(self._views(index)) for index in range(len(self.blocks)))

    def stack(
        self, stored: Stored, x_BTSD: Float[Array, "B T S D"], conditioning: Conditioning, merge: Merge | None
    ) -> Float[Array, "B T S D"]:
        """Returns the tokens after all blocks.

        A block is the branch that is taken once its gate has opened: otherwise a compiler would compute what depends on
        weights alone (casts, dequantisation) of all blocks at once, which takes memory for all of them.  It drops
        `optimization_barrier` before that.
        """
        for i, arrays in enumerate(stored):
            is_open = opened(self.arrive, i, x_BTSD, portable=False)
            block = functools.partial(run_block, self.shells[i % 2], merge=merge)
            x_BTSD = jax.lax.cond(is_open, block, lambda _arrays, x_BTSD, _: x_BTSD, arrays, x_BTSD, conditioning)
        return jnp.where(opened(self.arrive, len(stored), x_BTSD, portable=False), x_BTSD, 0)

    def _views(self, index: int) -> dict[str, np.ndarray]:
        layer, views, small = self.blocks[index], {}, {}
        for file in self.source.files(layer):
            try:
                view = self._view(index, file)
            except OSError as error:
                raise self.source.fault(file, error) from error
            views[file.name] = np.frombuffer(view, file.dtype).reshape(file.shape)
            if isinstance(view, bytes):
                small[file.name] = views[file.name]
        self.source.verify_layer(layer, small)
        return views

    def _view(self, index: int, file: LayerFile) -> mmap.mmap | bytes:
        with open(file.path, "rb", buffering=0) as opened:
            if file.nbytes < self._map_from_bytes:
                return opened.read()
            mapping = mmap.mmap(opened.fileno(), file.nbytes, access=mmap.ACCESS_READ)
        self._maps[index][file.name] = mapping
        return mapping

    def _load(self, index: int, slot: Slot) -> None:
        layer, maps = self.blocks[index], self._maps[index]
        self._populated.add(index)
        with self.source.reading(layer):
            for file in self.source.files(layer):
                if file.name in maps:
                    self._populate(file, maps[file.name])
            files = {file.name: file for file in self.source.files(layer)}
            views = {name: np.frombuffer(mapping, files[name].dtype) for name, mapping in maps.items()}
            self.source.verify_layer(layer, views)

    def _populate(self, file: LayerFile, mapping: mmap.mmap) -> None:
        try:
            for start in range(0, file.nbytes, _PIECE_BYTES):
                mapping.madvise(_POPULATE_READ, start, min(_PIECE_BYTES, file.nbytes - start))
        except OSError as error:
            raise self.source.fault(file, error) from error

    def _acquire(self, index: int, outputs: Outputs) -> None:
        outputs["passed"][...] = PASSED
        if index in self._retained:
            self._prefetcher.want(self._following(index))
            return
        slot = self._take(index)
        if index < self.retention.count:
            self._retained.add(index)
            self._prefetcher.free(slot)
        else:
            self._current = slot

    def _holds(self, index: int) -> bool:
        return index in self._retained

    def _leave_previous(self) -> None:
        self._retained = {index for index in self._retained if index < self.retention.count}
        current, self._current = self._current, None
        if current is not None:
            assert current.index is not None
            self._let_go(current.index)
            self._prefetcher.free(current)
        for index in self._populated - self._prefetcher.holding() - self._retained:
            self._let_go(index)

    def _let_go(self, index: int) -> None:
        for mapping in self._maps[index].values():
            mapping.madvise(mmap.MADV_DONTNEED)
        self._populated.discard(index)

    def _reset(self) -> None:
        self._current = None
        self._prefetcher.discard()

    def _close(self) -> None:
        for index in list(self._populated):
            self._let_go(index)
        self._retained.clear()
        self._maps = []


def can_map() -> bool:
    """Returns whether this system reads the pages of a mapping on request and says whether that went well."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return False
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as probe:
            probe.madvise(_POPULATE_READ)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True
