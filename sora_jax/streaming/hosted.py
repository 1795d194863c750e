"""The portable back-end: a callback hands a block's arrays over from host memory, where a thread has read them.

Invariant: a layer is in host memory only in a staging slot or because it is retained, files are read into these places without
another copy, and none is mapped.  The program holds the arrays of one block at a time.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sora_jax.config import DTypePolicy
from sora_jax.networks.merging import Merge
from sora_jax.networks.stdit3 import Conditioning
from sora_jax.streaming.blocks import run_block
from sora_jax.streaming.callbacks import Outputs, host_call, opened
from sora_jax.streaming.prefetch import Slot
from sora_jax.streaming.retention import Retention
from sora_jax.streaming.source import LayerSource, staging
from sora_jax.streaming.stream import BlockStream, Stored

Arrays = dict[str, np.ndarray]


class HostedBlocks(BlockStream):
    """Blocks whose arrays callbacks deliver; ``portable`` chooses the callback, see `callbacks.host_call`."""

    def __init__(self, source: LayerSource, policy: DTypePolicy, retention: Retention, *, stall_s: int | float, portable: bool):
        super().__init__(source, policy, retention, stall_s=stall_s)
        self.portable = portable
        self._retained: dict[int, Arrays] = {}

    def arguments(self) -> Stored:
        """Returns nothing: the program gets its blocks from callbacks."""
        return ()

    def stack(
        self, stored: Stored, x_BTSD: Float[Array, "B T S D"], conditioning: Conditioning, merge: Merge | None
    ) -> Float[Array, "B T S D"]:
        """Returns the tokens after all blocks; a loop over pairs, since every pair has the same program."""

        def pair(i: Array, x_BTSD: Array) -> Array:
            for kind, shell in enumerate(self.shells):
                arrays = host_call(self.arrive, self.layout(kind), 2 * i + kind, x_BTSD, portable=self.portable)
                x_BTSD = run_block(shell, arrays, x_BTSD, conditioning, merge=merge)
            return x_BTSD

        x_BTSD = jax.lax.fori_loop(0, len(self.blocks) // 2, pair, x_BTSD)
        return jnp.where(opened(self.arrive, len(self.blocks), x_BTSD, portable=self.portable), x_BTSD, 0)

    def _load(self, index: int, slot: Slot) -> None:
        if slot.buffer is None:
            slot.buffer = staging(self.source.files(self.blocks[index]))
        self.source.read(self.blocks[index], slot.buffer)

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

    def _hand_over(self, index: int, arrays: Arrays, outputs: Outputs) -> None:
        start = time.perf_counter()
        for name, output in outputs.items():
            np.copyto(output, arrays[name])
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
