"""The back-end of the CPU: every block is an argument that maps its files, and a gate before each keeps the pages in step.

The gate waits until the pages of block i are in memory, has those of block i + 1 read by a thread, and drops those of block
i - 1 unless it is retained.

Invariant: at every gate the files are the ones whose values were compared, of the same size, or they are compared again; an
error of reading them is raised by the gate.  `storage.maps` says what remains possible between two gates.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sora_jax.config import DTypePolicy
from sora_jax.networks.forms import Forms
from sora_jax.networks.merging import Merge
from sora_jax.networks.stdit3 import PARTS, Conditioning, Part
from sora_jax.storage.maps import MappedLayer
from sora_jax.storage.reader import Reader
from sora_jax.streaming.blocks import run_block
from sora_jax.streaming.callbacks import PASSED, Number, Outputs, opened
from sora_jax.streaming.prefetch import Slot
from sora_jax.streaming.retention import Retention
from sora_jax.streaming.stream import BlockProgram, BlockStream, Stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class MappedProgram(BlockProgram):
    """Blocks that are arguments, each behind a gate."""

    def stack(
        self,
        number: Number,
        stored: Stored,
        x_BTSD: Float[Array, "B T S D"],
        conditioning: Conditioning,
        merge: Merge | None,
        part: Part,
    ) -> Float[Array, "B T S D"]:
        """Returns the tokens after a part of the blocks.

        A block is the branch that is taken once its gate has opened: otherwise a compiler would compute what depends on
        weights alone (casts, dequantisation) of all blocks at once, which takes memory for all of them.  XLA removes
        `optimization_barrier` too early to prevent this.
        """
        for i, arrays in list(enumerate(stored))[PARTS[part]]:
            is_open = opened(number, i, x_BTSD, portable=False)
            block = functools.partial(run_block, self.shell(i % 2), merge=merge)
            x_BTSD = jax.lax.cond(is_open, block, lambda _arrays, x_BTSD, _: x_BTSD, arrays, x_BTSD, conditioning)
        if part == "first":
            return x_BTSD
        return jnp.where(opened(number, len(stored), x_BTSD, portable=False), x_BTSD, 0)


class MappedBlocks(BlockStream):
    """Blocks that are arguments of the program; ``map_from_bytes`` is the size from which an array is mapped."""

    def __init__(
        self,
        reader: Reader,
        policy: DTypePolicy,
        forms: Forms,
        retention: Retention,
        *,
        stall_s: int | float,
        map_from_bytes: int,
    ):
        super().__init__(reader, retention, stall_s=stall_s)
        self._program = MappedProgram(
            config=reader.manifest.config, policy=policy, forms=forms, layouts=(self.layout(0), self.layout(1))
        )
        self._map_from_bytes = map_from_bytes
        self._layers: list[MappedLayer] = []
        self._retained: set[int] = set()
        self._populated: set[int] = set()
        self._current: Slot | None = None

    @property
    def program(self) -> MappedProgram:
        """What programs of this stream are compiled for."""
        return self._program

    def arguments(self) -> Stored:
        """Returns the stored arrays of every block: maps of their files where large."""
        self._layers = [MappedLayer(self.reader, layer, map_from_bytes=self._map_from_bytes) for layer in self.blocks]
        return tuple(
            jax.device_put({name.removeprefix(f"{block}."): array for name, array in layer.arrays.items()})
            for block, layer in zip(self.blocks, self._layers, strict=True)
        )

    def _load(self, index: int, slot: Slot) -> None:
        self._populated.add(index)
        self._layers[index].populate()

    def _acquire(self, index: int, outputs: Outputs) -> None:
        outputs["passed"][...] = PASSED
        if index in self._retained and not self._layers[index].is_unchanged():
            self._retained.discard(index)  # to be compared again
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
            self._drop(current.index)
            self._prefetcher.free(current)
        for index in self._populated - self._prefetcher.holding() - self._retained:
            self._drop(index)

    def _drop(self, index: int) -> None:
        self._layers[index].release()
        self._populated.discard(index)

    def _reset(self) -> None:
        self._current = None
        self._prefetcher.discard()

    def _close(self) -> None:
        for index in list(self._populated):
            self._drop(index)
        self._retained.clear()
        self._layers = []
