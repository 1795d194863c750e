"""The host's side of a streamed transformer: what happens when the compiled program arrives at a block.

Invariant: the program arrives at blocks 0, 1, ... and then at the end, once for every evaluation; whatever happened before, an
arrival at block 0 finds the stream in order.  Nothing here computes, and nothing in a callback touches JAX.  How a layer gets
into the program is decided by the two back-ends, `mapped` and `hosted`.
"""

import abc
import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from sora_jax.config import DTypePolicy
from sora_jax.networks.merging import Merge
from sora_jax.networks.stdit3 import Conditioning, STDiT3Block
from sora_jax.process import PeakMeter, return_freed_memory
from sora_jax.storage.directory import ModelDirectoryError
from sora_jax.streaming.callbacks import PASSED
from sora_jax.streaming.prefetch import Prefetcher, Slot
from sora_jax.streaming.profile import Profile
from sora_jax.streaming.retention import Retention
from sora_jax.streaming.source import LayerSource

Stored = tuple[dict[str, Array], ...]  # stored arrays of every block, by name

MARGIN = 1.01  # of what is needed: measured again, it varies by half of this
ENDS = ("embed", "final")  # layers that are small, needed twice in a row, and always in memory


class BlockStream(abc.ABC):
    """Host state of one streamed transformer; static in the programs that stream it, so they live as long as it does.

    Attributes:
      source: the files.
      blocks: names of the streamed layers, in execution order.
      retention: how many of them stay in memory.
      profile: takes the intervals of loading and computing, if one is set.
      bytes_read: of blocks, since the stream was made.
      evaluations: completed, since the stream was opened.
    """

    def __init__(self, source: LayerSource, policy: DTypePolicy, retention: Retention, *, stall_s: int | float):
        config = source.manifest.config
        self.source, self.retention, self.policy = source, retention, policy
        self.blocks: Sequence[str] = [layer for layer in source.manifest.layers if layer not in ENDS]
        self.profile: Profile | None = None
        self.bytes_read = self.evaluations = 0
        self.shells = [
            jax.eval_shape(lambda temporal=temporal: STDiT3Block(config, temporal=temporal, policy=policy, rngs=nnx.Rngs(0)))
            for temporal in (False, True)
        ]
        self._prefetcher = Prefetcher(self._timed_load, self._describe, stall_s=stall_s)
        self._meter, self._needed = PeakMeter(), 0
        self._sizes = [source.num_bytes(layer) for layer in self.blocks]
        self._in_use = threading.Lock()
        self._failure: BaseException | None = None
        self._next = 0
        self._left_s: float | None = None
        self._check_layouts()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Opens the stream for programs; what is retained or read ahead is let go in the end.

        An error that a callback raised comes out as it was, not as JAX reports it.

        Raises:
          ModelDirectoryError: a file is missing, unreadable, damaged or changed.
          RuntimeError: the stream is open already.
        """
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError("this streamed transformer is in use by another run; open the model directory a second time.")
        try:
            self._failure, self._next, self._left_s, self.evaluations = None, 0, None, 0
            self.source.begin()
            yield
        except jax.errors.JaxRuntimeError as error:
            if self._failure is None:
                raise
            raise self._failure from error
        finally:
            self._reset()
            self._prefetcher.close()
            self._close()
            self._in_use.release()

    @property
    def retained(self) -> tuple[str, ...]:
        """The layers that are in memory to stay."""
        return tuple(layer for index, layer in enumerate(self.blocks) if self._holds(index))

    def arrive(self, index: int, outputs: Any) -> None:
        """Called by the program when it arrives at block ``index``, or past the last; returns when the block may compute."""
        try:
            now = time.perf_counter()
            if not self._in_use.locked():
                raise RuntimeError("the streamed transformer is not open; sample within its `open` block.")
            if index == 0:
                self._failure = None
                if self._next:
                    self._reset()  # the evaluation before was cut short by an error
            self._record_compute(index, now)
            self._observe(index)
            self._leave_previous()
            if index < len(self.blocks):
                self._acquire(index, outputs)
            else:
                outputs["passed"][...] = PASSED
            self._left_s = time.perf_counter()
        except BaseException as error:
            self._failure = error
            raise

    def _observe(self, index: int) -> None:
        """Keeps count of evaluations and measures what they need besides retained layers, block by block.

        A block that needs more than was known lets go of layers at once; the first whole evaluation replaces the plan.
        """
        self._next = (index + 1) % (len(self.blocks) + 1)
        if index == 0:
            if self.evaluations == 0:
                return_freed_memory()
            self._meter.start()  # what happened between evaluations is not theirs
            self._needed = 0
            return
        held = self._meter.sample()
        if held is not None:
            retained = sum(size for i, size in enumerate(self._sizes) if self._holds(i))
            self._needed = max(self._needed, int(MARGIN * (held - retained)))
            self.retention.guard(self._needed)
        if index == len(self.blocks):
            self.evaluations += 1
            if self.evaluations == 1 and held is not None:
                self.retention.correct(self._needed)

    def _following(self, index: int) -> list[int]:
        """Returns the next layers that have to be read after block ``index``, into the next evaluation."""
        after = itertools.chain(range(index + 1, len(self.blocks)), range(index))
        following = list(itertools.islice((i for i in after if not self._holds(i)), 2))
        return following if self._holds(index) or index < self.retention.count else [*following, index]

    def _take(self, index: int) -> Slot:
        start = time.perf_counter()
        slot = self._prefetcher.take(index, self._following(index))
        if self.profile is not None:
            self.profile.add("wait", self.blocks[index], start)
        return slot

    def _timed_load(self, index: int, slot: Slot) -> None:
        start = time.perf_counter()
        self._load(index, slot)
        self.bytes_read += self.source.num_bytes(self.blocks[index])
        if self.profile is not None:
            self.profile.add("load", self.blocks[index], start)

    def _record_compute(self, index: int, now: float) -> None:
        if self.profile is not None and self._left_s is not None and index > 0:
            self.profile.add("compute", self.blocks[index - 1], self._left_s, now)

    def _describe(self, index: int) -> str:
        layer = self.blocks[index]
        return f"{self.source.manifest.network} layer {layer} ({self.source.manifest.path / layer})"

    def _check_layouts(self) -> None:
        """Sees that blocks of a kind are stored alike: a program has one set of shapes and dtypes for each kind."""
        for i, block in enumerate(self.blocks):
            layout, expected = self.layout(i), self.layout(i % 2)
            if layout != expected:
                strange = sorted(name for name in layout.keys() | expected.keys() if layout.get(name) != expected.get(name))
                manifest = self.source.manifest
                raise ModelDirectoryError(
                    f"{manifest.path}: layer {block} stores {', '.join(strange)} unlike layer {self.blocks[i % 2]}; "
                    f"convert {manifest.network} again with --overwrite."
                )

    def layout(self, index: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shape and dtype of every stored array of a block, by name."""
        files = self.source.files(self.blocks[index])
        return {file.name: jax.ShapeDtypeStruct(file.shape, file.dtype) for file in files}

    @abc.abstractmethod
    def arguments(self) -> Stored:
        """Returns what programs are given of the blocks, as arguments; to be called within `running`."""

    @abc.abstractmethod
    def stack(
        self, stored: Stored, x_BTSD: Float[Array, "B T S D"], conditioning: Conditioning, merge: Merge | None
    ) -> Float[Array, "B T S D"]:
        """Returns the tokens after all blocks; ``stored`` is what `arguments` returned."""

    @abc.abstractmethod
    def _load(self, index: int, slot: Slot) -> None:
        """Reads a layer, on the reading thread."""

    @abc.abstractmethod
    def _acquire(self, index: int, outputs: Any) -> None:
        """Makes a block's layer available to the program."""

    @abc.abstractmethod
    def _holds(self, index: int) -> bool:
        """Returns whether a layer is retained now."""

    @abc.abstractmethod
    def _leave_previous(self) -> None:
        """Lets go of what the block before needed and of what is no longer retained."""

    @abc.abstractmethod
    def _reset(self) -> None:
        """Forgets what was read ahead and what a block cut short had taken."""

    @abc.abstractmethod
    def _close(self) -> None:
        """Lets go of everything retained."""
