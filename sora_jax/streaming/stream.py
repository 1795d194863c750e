"""A streamed transformer: what its programs are compiled for, and the host's side of a run.

Invariant: the program arrives at blocks 0, 1, ... and then at the end, once for every evaluation, or at block 0 alone where
the rest is reused; whatever happened before, an arrival at block 0 finds the stream in order. Nothing here computes, and
nothing in a callback touches JAX. A program knows shapes, not files: equal `BlockProgram`s share it, and none holds a stream.
How a layer gets into the program is decided by the two back-ends, `mapped` and `hosted`.
"""

import abc
import contextlib
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sora_jax.config import DTypePolicy, STDiT3Config
from sora_jax.networks.forms import Forms
from sora_jax.networks.merging import Merge
from sora_jax.networks.stdit3 import Conditioning, Part, STDiT3Block
from sora_jax.process import PeakMeter, return_freed_memory
from sora_jax.storage.checkpoint import shortened
from sora_jax.storage.directory import ModelDirectoryError
from sora_jax.storage.reader import Reader
from sora_jax.streaming.callbacks import PASSED, Number, answering
from sora_jax.streaming.prefetch import Prefetcher, Slot
from sora_jax.streaming.profile import Profile
from sora_jax.streaming.retention import Retention

Stored = tuple[dict[str, Array], ...]  # stored arrays of every block, by their names within it
Layout = tuple[tuple[str, tuple[int, ...], np.dtype], ...]  # name, shape and dtype of a block's stored arrays

MARGIN = 1.01  # of what is needed: measured again, it varies by half of this
ENDS = ("embed", "final")  # layers that are small, needed twice in a row, and always in memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockProgram(abc.ABC):
    """All that a compiled program depends on; static, and equal for every stream of the same shapes.

    Attributes:
      config: the transformer's configuration.
      policy: what it computes in.
      forms: how it computes what could be large.
      layouts: the stored arrays of spatial and of temporal blocks.
    """

    config: STDiT3Config
    policy: DTypePolicy
    forms: Forms
    layouts: tuple[Layout, Layout]

    @property
    def num_blocks(self) -> int:
        """Blocks that are streamed."""
        return 2 * self.config.depth

    def results(self, kind: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shape and dtype of the stored arrays of spatial (0) or temporal (1) blocks, by name."""
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in self.layouts[kind]}

    def shell(self, kind: int) -> Any:
        """Returns a spatial (0) or temporal (1) block with shapes in place of its arrays."""
        return _shell(self.config, self.policy, self.forms, bool(kind))

    @abc.abstractmethod
    def stack(
        self,
        number: Number,
        stored: Stored,
        x_BTSD: Float[Array, "B T S D"],
        conditioning: Conditioning,
        merge: Merge | None,
        part: Part,
    ) -> Float[Array, "B T S D"]:
        """Returns the tokens after a part of the blocks; ``number`` calls the stream, ``stored`` is what it gave as arguments.

        A first block that no rest follows leaves the stream in order: the next arrival is at block 0 again.
        """


@functools.lru_cache(maxsize=8)
def _shell(config: STDiT3Config, policy: DTypePolicy, forms: Forms, temporal: bool) -> Any:
    return jax.eval_shape(lambda: STDiT3Block(config, temporal=temporal, policy=policy, forms=forms, rngs=nnx.Rngs(0)))


class BlockStream(abc.ABC):
    """Host state of one streamed transformer.

    Attributes:
      reader: the reader of the files.
      blocks: names of the streamed layers, in execution order.
      retention: how many of them stay in memory.
      profile: records the intervals of loading and computing, if one is set.
      bytes_read: bytes of blocks read since the stream was created.
      evaluations: completed, since the stream was opened.
    """

    def __init__(self, reader: Reader, retention: Retention, *, stall_s: int | float):
        manifest = reader.manifest
        self.reader, self.retention = reader, retention
        self.blocks: Sequence[str] = [layer for layer in manifest.layers if layer not in ENDS]
        self.profile: Profile | None = None
        self.bytes_read = self.evaluations = 0
        self._prefetcher = Prefetcher(self._timed_load, self._describe, stall_s=stall_s)
        self._meter, self._needed = PeakMeter(), 0
        self._sizes = [manifest.layer_bytes(layer) for layer in self.blocks]
        self._in_use = threading.Lock()
        self._failure: BaseException | None = None
        self._next = 0
        self._left_s: float | None = None
        self._check_layouts()

    @contextlib.contextmanager
    def running(self) -> Iterator[Int[np.ndarray, ""]]:
        """Yields the number by which programs call this stream; what is retained or read ahead is dropped in the end.

        An error that a callback raised comes out as it was, not as JAX reports it.

        Raises:
          ModelDirectoryError: a file is missing, unreadable or damaged.
          RuntimeError: the stream is open already.
        """
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError("this streamed transformer is in use by another run; open the model directory a second time.")
        try:
            self._failure, self._next, self._left_s, self.evaluations = None, 0, None, 0
            self.reader.check(self.reader.manifest.parameters)
            with answering(self.arrive) as number:
                yield number
        except jax.errors.JaxRuntimeError as error:
            if self._failure is not None:
                raise self._failure from error
            if str(error).rstrip().endswith("KeyboardInterrupt"):  # it came between JAX's call and ours
                raise KeyboardInterrupt from error
            raise
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
            if index == 0:
                if self._next > 1 or self._failure is not None:
                    self._reset()  # the evaluation before was cut short by an error
                self._failure = None
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

        If a block needs more than planned, layers are evicted at once; the first whole evaluation replaces the plan.
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
        """Returns the next layers that have to be read after block ``index``, into the next evaluation.

        After block 0 that is one, unless block 0 stays: where the rest is reused, block 0 comes next again, and would take the
        place of a third layer, which would have been read in vain.
        """
        stays = self._holds(index) or index < self.retention.count
        if index == 0 and not stays:
            return [i for i in range(1, len(self.blocks)) if not self._holds(i)][:1]
        after = itertools.chain(range(index + 1, len(self.blocks)), range(index))
        following = list(itertools.islice((i for i in after if not self._holds(i)), 2))
        return following if stays else [*following, index]

    def _take(self, index: int) -> Slot:
        start = time.perf_counter()
        slot = self._prefetcher.take(index, self._following(index))
        if self.profile is not None:
            self.profile.add("wait", self.blocks[index], start)
        return slot

    def _timed_load(self, index: int, slot: Slot) -> None:
        start = time.perf_counter()
        self._load(index, slot)
        self.bytes_read += self._sizes[index]
        if self.profile is not None:
            self.profile.add("load", self.blocks[index], start)

    def _record_compute(self, index: int, now: float) -> None:
        if self.profile is not None and self._left_s is not None and index > 0:
            self.profile.add("compute", self.blocks[index - 1], self._left_s, now)

    def _describe(self, index: int) -> str:
        layer = self.blocks[index]
        return f"{self.reader.manifest.network} layer {layer} ({self.reader.manifest.path / layer})"

    def layout(self, index: int) -> Layout:
        """Returns name, shape and dtype of every stored array of a block."""
        layer = self.blocks[index]
        parameters = self.reader.parameters(self.reader.manifest.names(layer))
        return tuple(
            (name.removeprefix(f"{layer}."), parameter.shape, parameter.numpy_dtype) for name, parameter in parameters.items()
        )

    def _check_layouts(self) -> None:
        """Checks that blocks of a kind are stored alike: a program has one set of shapes and dtypes for each kind."""
        for index, block in enumerate(self.blocks):
            strange = sorted({name for name, *_ in set(self.layout(index)) ^ set(self.layout(index % 2))})
            if strange:
                manifest = self.reader.manifest
                raise ModelDirectoryError(
                    f"{manifest.path}: layer {block} stores {shortened(strange)} unlike layer {self.blocks[index % 2]}; "
                    f"convert {manifest.network} again with --overwrite."
                )

    @property
    @abc.abstractmethod
    def program(self) -> BlockProgram:
        """What programs of this stream are compiled for."""

    @abc.abstractmethod
    def arguments(self) -> Stored:
        """Returns the blocks' arguments for programs; to be called within `running`."""

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
        """Drops what the block before needed and what is no longer retained."""

    @abc.abstractmethod
    def _reset(self) -> None:
        """Forgets what was read ahead and what an interrupted block had taken."""

    @abc.abstractmethod
    def _close(self) -> None:
        """Drops everything retained."""
