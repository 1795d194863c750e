"""A network's segments run from its files: each is one compiled program; the next one's parameters are read ahead.

Invariant: parameters of at most ``num_slots`` segments are in memory, in their stored dtype, and none when a method returns.
Segments of one method and shape share a program.  Which segments make up a network is the network's own knowledge.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sora_jax.config import DTypePolicy
from sora_jax.networks import registry
from sora_jax.networks.forms import WHOLE, Forms
from sora_jax.networks.kernels import Int8Matrix
from sora_jax.networks.layers import precision_chosen
from sora_jax.networks.segment import Segment
from sora_jax.process import Timings, return_freed_memory
from sora_jax.storage.buffers import Buffer, group_bytes
from sora_jax.storage.checkpoint import flatten
from sora_jax.storage.directory import Manifest, ModelDirectoryError, layer_of
from sora_jax.storage.quantisation import SCALE_SUFFIX
from sora_jax.storage.reader import Around, Reader, untouched
from sora_jax.streaming.prefetch import NUM_SLOTS, STALL_S, Prefetcher, Slot
from sora_jax.streaming.profile import Lane, Profile

Stored = Mapping[str, tuple[Any, ...]]  # by name inside its module: a stored array, and its scale where it is int8


class SegmentLoop:
    """The files of a network, as something that runs.

    Args:
      manifest: the network.
      policy: compute dtype; parameters are cast where they are used, int8 a few columns at a time.
      forms: how the network computes.
      timings: waiting for files counts as ``load``, compiling and each stage as themselves.
      num_slots: segments in memory; with 1 nothing is read ahead.
      profile: records the intervals of loading and computing.
      around: entered around every read of a segment, with its name and bytes, on the reading thread.
      stall_s: seconds after which the read of a segment that does not end is an error.
    """

    def __init__(
        self,
        manifest: Manifest,
        policy: DTypePolicy,
        timings: Timings,
        *,
        forms: Forms = WHOLE,
        num_slots: int = NUM_SLOTS,
        profile: Profile | None = None,
        around: Around = untouched,
        stall_s: int | float = STALL_S,
    ):
        self.manifest, self.policy, self.timings = manifest, policy, timings
        self.reader = Reader(manifest, around=around)
        self._profile, self._num_slots, self._stall_s = profile, num_slots, stall_s
        self._abstract = registry.abstract(manifest.network, manifest.config, policy=policy, forms=forms)

    def run(self, stage: str, segments: Sequence[Segment], x: Any, *context: Any) -> jax.Array:
        """Returns the activations ``x`` after the segments; those that take it get ``context`` too.

        Raises:
          ModelDirectoryError: a parameter is missing or damaged.
        """
        with contextlib.closing(self._loaded(segments)) as loaded:
            for segment, stored in zip(segments, loaded, strict=True):
                x = self._apply(stage, segment, stored, x, *(context if segment.takes_context else ()))
        return x

    @contextlib.contextmanager
    def held(self, stage: str, segment: Segment) -> Iterator[Callable[[Any], jax.Array]]:
        """Yields a segment as a function of its activations; its parameters are read once, for all calls of it.

        Raises:
          ModelDirectoryError: a parameter is missing or damaged.
        """
        with contextlib.closing(self._loaded([segment])) as loaded:
            stored = next(loaded)
            yield lambda x: self._apply(stage, segment, stored, x)

    def _loaded(self, segments: Sequence[Segment]) -> Generator[Stored]:
        """Yields the stored arrays of each segment."""
        names = [self._stored_names(segment) for segment in segments]
        groups = [self.reader.parameters(name for leaf in stored.values() for name in leaf) for stored in names]
        size = max(map(group_bytes, groups))

        def load(position: int, slot: Slot) -> None:
            if slot.buffer is None:
                slot.buffer = Buffer(size)
            with self._recorded("load", segments[position]):
                arrays = slot.buffer.arrays(groups[position])
                self.reader.read(arrays, label=_name(segments[position]), stop=lambda: slot.unwanted)

        def describe(position: int) -> str:
            layer = layer_of(next(iter(groups[position])), self.manifest.layers)
            return f"{self.manifest.network} layer {layer} in {self.manifest.path}"

        prefetcher = Prefetcher(load, describe, num_slots=self._num_slots, stall_s=self._stall_s)
        with contextlib.closing(prefetcher):
            for position, (stored, segment) in enumerate(zip(names, segments, strict=True)):
                with self.timings.measure("load"), self._recorded("wait", segment):
                    slot = prefetcher.take(position, range(position + 1, len(segments)))
                arrays = slot.buffer.arrays(groups[position])
                yield {local: tuple(arrays[name] for name in leaf) for local, leaf in stored.items()}
                del arrays
                prefetcher.free(slot)

    def _stored_names(self, segment: Segment) -> dict[str, tuple[str, ...]]:
        """Returns what a segment reads, by name inside its module: the stored array, and its scale where it is int8."""
        module, parts = ".".join(map(str, segment.path)), tuple(f"{part}." for part in segment.parts)
        stored: dict[str, tuple[str, ...]] = {}
        for local, leaf in flatten(segment.module(self._abstract)).items():
            if parts and not local.startswith(parts):
                continue
            full = f"{module}.{local}" if module else local
            found = self.manifest.parameters.get(full)
            if found is None or tuple(found.shape) != tuple(leaf.shape):
                state = "is missing" if found is None else f"has shape {tuple(found.shape)}, expected {tuple(leaf.shape)}"
                raise ModelDirectoryError(f"{self.manifest.path} does not fit its configuration: {full} {state}.")
            scale = full + SCALE_SUFFIX
            stored[local] = (full, scale) if scale in self.manifest.parameters else (full,)
        return stored

    def _apply(self, stage: str, segment: Segment, stored: Stored, *args: Any) -> jax.Array:
        module = segment.module(self._abstract)
        leaves, structure = jax.tree.flatten((stored, args))
        with self.timings.measure("compile"):
            kind = segment.method, segment.static, jax.tree.structure(module), tuple(flatten(module))
            shapes = tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves)
            program = _compiled(kind, structure, shapes, precision_chosen())
        with self.timings.measure(stage), self._recorded("compute", segment):
            return jax.block_until_ready(program(stored, args))

    @contextlib.contextmanager
    def _recorded(self, lane: Lane, segment: Segment) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._profile is not None:
            self._profile.add(lane, _name(segment), start)


@functools.lru_cache(maxsize=128)
def _compiled(kind: tuple[Any, ...], structure: Any, shapes: tuple[Any, ...], _precision: str | None) -> Any:
    """Returns the program of a kind of segment, for stored arrays and arguments of these shapes; it holds no arrays.

    Parameters that the segment does not read are no arrays in its module, so that reading one is an error.
    """
    method, static, module, names = kind

    def program(stored: Stored, args: tuple[Any, ...]) -> Any:
        x, *context = args
        values = [_value(*stored[name]) if name in stored else None for name in names]
        return method(jax.tree.unflatten(module, values), x, *context, *static)

    abstract = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes])
    compiled = jax.jit(program).lower(*abstract).compile()
    return_freed_memory()
    return compiled


def _name(segment: Segment) -> str:
    """Returns what a segment is called in a profile: the module that does its work."""
    return segment.names[-1]


def _value(stored: jax.Array, scale_O: jax.Array | None = None) -> jax.Array | Int8Matrix:
    return stored if scale_O is None else Int8Matrix(stored, scale_O)
