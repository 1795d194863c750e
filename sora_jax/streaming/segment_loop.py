"""A network's segments run from its files: each is one compiled program, and the next one's parameters are read meanwhile.

Invariant: parameters of at most ``num_slots`` segments are in memory, in their stored dtype, and none when a method returns.
Segments of one kind and shape share a program.  Which segments make up a network is not known here.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from sora_jax.config import DTypePolicy
from sora_jax.networks.kernels import Int8Matrix
from sora_jax.networks.layers import precision_chosen
from sora_jax.networks.segments import Segment, part
from sora_jax.process import Timings, return_freed_memory
from sora_jax.storage.checkpoint import flatten
from sora_jax.storage.directory import Manifest, ModelDirectoryError
from sora_jax.storage.quantisation import SCALE_SUFFIX
from sora_jax.streaming.profile import Lane, Profile
from sora_jax.streaming.source import Around
from sora_jax.streaming.staging import Staging, Verified

NUM_SLOTS = 2

Stored = tuple[Any, ...]  # a stored array, and its scale where it is int8


class SegmentLoop:
    """The files of a network, as something that runs.

    Args:
      manifest: the network.
      build: its class; only its shapes are made.
      policy: compute dtype; parameters are cast where they are used, int8 a few columns at a time.
      timings: waiting for files counts as ``load``, compiling and each stage as themselves.
      num_slots: segments in memory; with 1 nothing is read ahead.
      verified: which files' checksums need no comparison any more.
      profile: takes the intervals of loading and computing.
      around: entered around every read of a segment, with its name and bytes, on the reading thread.
    """

    def __init__(
        self,
        manifest: Manifest,
        build: Callable[..., Any],
        policy: DTypePolicy,
        timings: Timings,
        *,
        num_slots: int = NUM_SLOTS,
        verified: Verified | None = None,
        profile: Profile | None = None,
        around: Around = lambda _segment, _bytes: contextlib.nullcontext(),
    ):
        self.manifest, self.policy, self.timings = manifest, policy, timings
        self._profile, self._around = profile, around
        self._num_slots, self._verified = num_slots, Verified() if verified is None else verified
        self._abstract = jax.eval_shape(lambda: build(manifest.config, policy=policy, rngs=nnx.Rngs(0)))

    def run(self, stage: str, segments: Sequence[Segment], x: Any, *context: Any) -> jax.Array:
        """Returns the activations ``x`` after the segments; every one is handed ``context`` too.

        Raises:
          ModelDirectoryError: a parameter is missing or damaged.
        """
        with contextlib.closing(self._loaded(segments)) as loaded:
            for segment, parts in zip(segments, loaded, strict=True):
                x = self._apply(stage, segment, parts, x, *context)
        return x

    def each(self, stage: str, segment: Segment, inputs: Iterable[Any]) -> Generator[np.ndarray]:
        """Yields what one segment, read once, makes of each of the inputs.

        Raises:
          ModelDirectoryError: a parameter is missing or damaged.
        """
        with contextlib.closing(self._loaded([segment])) as loaded:
            parts = next(loaded)
            for x in inputs:
                yield np.asarray(self._apply(stage, segment, parts, x))

    def _loaded(self, segments: Sequence[Segment]) -> Generator[list[list[Stored]]]:
        """Yields for each segment, and each of its parts, the stored arrays in the order of the part's leaves."""
        names = [[self._stored_names(name) for name in segment.parts] for segment in segments]
        groups = [[name for stored in parts for leaf in stored for name in leaf] for parts in names]

        @contextlib.contextmanager
        def around(position: int, num_bytes: int) -> Iterator[None]:
            with self._recorded("load", segments[position]), self._around(_name(segments[position]), num_bytes):
                yield

        with Staging(self.manifest, groups, num_slots=self._num_slots, verified=self._verified, around=around) as staging:
            arrays_of_group = iter(staging)
            for parts, segment in zip(names, segments, strict=True):
                with self.timings.measure("load"), self._recorded("wait", segment):
                    arrays = next(arrays_of_group)
                yield [[tuple(arrays[name] for name in leaf) for leaf in stored] for stored in parts]
                del arrays

    def _stored_names(self, name: str) -> list[tuple[str, ...]]:
        """Returns the stored arrays of a part, for each of its leaves: the array, and its scale where it is int8."""
        stored: list[tuple[str, ...]] = []
        for rest, leaf in flatten(part(self._abstract, name)).items():
            full = f"{name}.{rest}"
            found = self.manifest.parameters.get(full)
            if found is None or tuple(found.shape) != tuple(leaf.shape):
                state = "is missing" if found is None else f"has shape {tuple(found.shape)}, expected {tuple(leaf.shape)}"
                raise ModelDirectoryError(f"{self.manifest.path} does not fit its configuration: {full} {state}.")
            scale = full + SCALE_SUFFIX
            stored.append((full, scale) if scale in self.manifest.parameters else (full,))
        return stored

    def _apply(self, stage: str, segment: Segment, loaded: list[list[Stored]], *args: Any) -> jax.Array:
        structures = tuple(jax.tree.structure(part(self._abstract, name)) for name in segment.parts)
        leaves, structure = jax.tree.flatten((loaded, args))
        with self.timings.measure("compile"):
            shapes = tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves)
            program = _compiled(segment.apply, structures, structure, shapes, precision_chosen())
        with self.timings.measure(stage), self._recorded("compute", segment):
            return jax.block_until_ready(program(loaded, args))

    @contextlib.contextmanager
    def _recorded(self, lane: Lane, segment: Segment) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._profile is not None:
            self._profile.add(lane, _name(segment), start)


@functools.lru_cache(maxsize=128)
def _compiled(
    apply: Callable[..., Any], structures: tuple[Any, ...], structure: Any, shapes: tuple[Any, ...], _precision: str | None
) -> Any:
    """Returns the program of a kind of segment, for stored arrays and arguments of these shapes; it holds no arrays."""

    def program(loaded: Sequence[Sequence[Stored]], args: tuple[Any, ...]) -> Any:
        modules = [
            jax.tree.unflatten(module, [_value(*leaf) for leaf in leaves])
            for module, leaves in zip(structures, loaded, strict=True)
        ]
        return apply(*modules, *args)

    abstract = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes])
    compiled = jax.jit(program).lower(*abstract).compile()
    return_freed_memory()
    return compiled


def _name(segment: Segment) -> str:
    """Returns what a segment is called in a profile: the submodule that does its work."""
    return segment.parts[-1]


def _value(stored: jax.Array, scale_O: jax.Array | None = None) -> jax.Array | Int8Matrix:
    return stored if scale_O is None else Int8Matrix(stored, scale_O)
