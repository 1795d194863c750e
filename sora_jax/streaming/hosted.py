"""The portable back-end: a callback hands a block's arrays over from host memory, where a thread has read them.

Invariant: a layer is in host memory only in a staging slot or because it is retained, files are read into these places without
another copy, and none is mapped.  The program holds the arrays of one block at a time.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sora_jax.config import DTypePolicy
from sora_jax.networks.forms import Forms
from sora_jax.networks.merging import Merge
from sora_jax.networks.stdit3 import Conditioning, Part
from sora_jax.storage.buffers import Buffer, group_bytes
from sora_jax.storage.reader import Reader
from sora_jax.streaming.blocks import run_block
from sora_jax.streaming.callbacks import Number, Outputs, host_call, opened
from sora_jax.streaming.prefetch import Slot
from sora_jax.streaming.retention import Retention
from sora_jax.streaming.stream import BlockProgram, BlockStream, Stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostedProgram(BlockProgram):
    """A loop over pairs of blocks whose arrays a callback delivers; ``portable`` selects it, see `callbacks.host_call`."""

    portable: bool

    def stack(
        self,
        number: Number,
        stored: Stored,
        x_BTSD: Float[Array, "B T S D"],
        conditioning: Conditioning,
        merge: Merge | None,
        part: Part,
    ) -> Float[Array, "B T S D"]:
        """Returns the tokens after a part of the blocks; a loop over pairs, since every pair has the same program."""

        def block(i: Array | int, kind: int, x_BTSD: Array) -> Array:
            arrays = host_call(number, self.results(kind), 2 * i + kind, x_BTSD, portable=self.portable)
            return run_block(self.shell(kind), arrays, x_BTSD, conditioning, merge=merge)

        if part == "first":
            return block(0, 0, x_BTSD)
        if part == "rest":
            x_BTSD = block(0, 1, x_BTSD)
        x_BTSD = jax.lax.fori_loop(
            int(part == "rest"), self.num_blocks // 2, lambda i, x_BTSD: block(i, 1, block(i, 0, x_BTSD)), x_BTSD
        )
        return jnp.where(opened(number, self.num_blocks, x_BTSD, portable=self.portable), x_BTSD, 0)


class HostedBlocks(BlockStream):
    """Blocks whose arrays callbacks deliver; ``portable`` selects the callback, see `callbacks.host_call`."""

    def __init__(
        self,
        reader: Reader,
        policy: DTypePolicy,
        forms: Forms,
        retention: Retention,
        *,
        stall_s: int | float,
        portable: bool,
    ):
        super().__init__(reader, retention, stall_s=stall_s)
        self._program = HostedProgram(
            config=reader.manifest.config,
            policy=policy,
            forms=forms,
            layouts=(self.layout(0), self.layout(1)),
            portable=portable,
        )
        self._parameters = [reader.parameters(reader.manifest.names(layer)) for layer in self.blocks]
        self._slot_bytes = max(map(group_bytes, self._parameters))
        self._retained: dict[int, Buffer] = {}

    @property
    def program(self) -> HostedProgram:
        """What programs of this stream are compiled for."""
        return self._program

    def arguments(self) -> Stored:
        """Returns nothing: the program gets its blocks from callbacks."""
        return ()

    def _load(self, index: int, slot: Slot) -> None:
        if slot.buffer is None:
            slot.buffer = Buffer(self._slot_bytes)
        arrays = slot.buffer.arrays(self._parameters[index])
        self.reader.read(arrays, label=self.blocks[index], stop=lambda: slot.unwanted)

    def _acquire(self, index: int, outputs: Outputs) -> None:
        retained = self._retained.get(index)
        if retained is not None:
            self._prefetcher.want(self._following(index))
            self._hand_over(index, retained, outputs)
            return
        slot = self._take(index)
        self._hand_over(index, slot.buffer, outputs)
        if index < self.retention.count:
            self._retained[index], slot.buffer = slot.buffer, None
        self._prefetcher.free(slot)

    def _hand_over(self, index: int, buffer: Buffer, outputs: Outputs) -> None:
        start, arrays = time.perf_counter(), buffer.arrays(self._parameters[index])
        for name, output in outputs.items():
            np.copyto(output, arrays[f"{self.blocks[index]}.{name}"])
        if self.profile is not None:
            self.profile.add("copy", self.blocks[index], start)

    def _holds(self, index: int) -> bool:
        return index in self._retained

    def _leave_previous(self) -> None:
        for index in [index for index in self._retained if index >= self.retention.count]:
            del self._retained[index]

    def _reset(self) -> None:
        self._prefetcher.discard()

    def _close(self) -> None:
        self._retained.clear()
