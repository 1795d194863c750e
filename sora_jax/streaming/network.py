"""The streamed transformer as a network that the sampler's velocity calls like the resident one.

Invariant: what a program is compiled for depends on the model directory's configuration and stored dtypes, on the compute
dtype and on the back-end; how much is retained is state of the host, so one program serves every budget.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Literal, TypeVar, no_type_check

import jax
from flax import nnx
from jaxtyping import Array, Float

from sora_jax.config import STDiT3Config, policy_of
from sora_jax.devices.attention_choice import choose_forms
from sora_jax.networks.merging import Merge
from sora_jax.networks.stdit3 import Conditioning, Embed, Final, Part
from sora_jax.networks.stdit3_block import modulated_input
from sora_jax.storage.checkpoint import read_layer, unflatten
from sora_jax.storage.directory import Manifest, ModelDirectoryError, open_network
from sora_jax.storage.location import Address, Named
from sora_jax.storage.maps import MAP_FROM_BYTES, are_mappable, can_map
from sora_jax.storage.reader import Around, Reader, untouched
from sora_jax.streaming.callbacks import Number
from sora_jax.streaming.hosted import HostedBlocks
from sora_jax.streaming.mapped import MappedBlocks
from sora_jax.streaming.prefetch import STALL_S
from sora_jax.streaming.profile import Profile
from sora_jax.streaming.retention import Retention
from sora_jax.streaming.stream import ENDS, BlockProgram, BlockStream, Stored

Backend = Literal["mmap", "host"]
End = TypeVar("End", Embed, Final)
_TABLE = "spatial_blocks.0.scale_shift_table"


@jax.tree_util.register_dataclass
@no_type_check  # a pytree also holds shapes and paths in place of arrays
@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamedSTDiT3:
    """The transformer whose blocks are read while it runs; to be used while the `STDiT3Stream` it came from is open.

    Attributes:
      embed: in memory.
      final: in memory.
      table_6D: ``scale_shift_table`` of the first block, in memory: by it a sampler decides without reading a block.
      blocks: stored arrays of every block, mapped; empty where callbacks deliver them.
      number: the number that programs pass to reach this stream on the host.
      program: what programs are compiled for; static.
    """

    embed: Embed
    final: Final
    table_6D: Float[Array, "6 D"]
    blocks: Stored
    number: Number
    program: BlockProgram = dataclasses.field(metadata={"static": True})

    @property
    def null_caption_LE(self) -> Float[Array, "L E"]:
        """The learned caption of the unconditional branch, in the space of text features."""
        return self.embed.y_embedder.y_embedding[...]

    def stack(
        self,
        x_BTSD: Float[Array, "B T S D"],
        conditioning: Conditioning,
        *,
        merge: Merge | None = None,
        part: Part = "all",
    ) -> Float[Array, "B T S D"]:
        """Returns the tokens after a part of the blocks, as `stdit3.STDiT3.stack` does."""
        return self.program.stack(self.number, self.blocks, x_BTSD, conditioning, merge, part)

    def modulated_input(self, x_BTSD: Float[Array, "B T S D"], conditioning: Conditioning) -> Float[Array, "B T S D"]:
        """Returns what the self attention of the first block would see; reads no block."""
        return modulated_input(self.table_6D, x_BTSD, conditioning, half_range=self.program.policy.half_range)

    @property
    def config(self) -> STDiT3Config:
        """The transformer's configuration."""
        return self.program.config


class STDiT3Stream:
    """A transformer in a model directory, to be streamed; holds no arrays until it is opened.

    Args:
      directory: the model directory, a folder or an address, or the manifest of its transformer.
      dtype: compute dtype, ``"float32"`` or ``"bfloat16"``.
      attention: its form by name, see `attention_choice.choose_forms`.
      budget: bytes that the process may hold while the transformer runs; None retains ``retained`` blocks.
      retained: blocks to retain without a budget; None: all.
      fixed_bytes: planned bytes of the process without retained blocks.
      backend: ``"mmap"`` (arguments map the files; CPU) or ``"host"`` (callbacks hand arrays over); None: what suits the
        platform.
      portable: the host back-end's callback, `io_callback` instead of `buffer_callback`; None: what the platform has.
      map_from_bytes: arrays from this size on are mapped.
      around: entered around every read of a layer, see `storage.reader.Reader`.
      stall_s: seconds after which a read that does not end is an error.

    Raises:
      ModelDirectoryError: the directory has no transformer, or a damaged one.
      ValueError: the budget is too small, or the back-end does not run here.
    """

    def __init__(
        self,
        directory: Named | Manifest,
        *,
        dtype: str = "float32",
        attention: str = "auto",
        budget: int | None = None,
        retained: int | None = None,
        fixed_bytes: int = 0,
        backend: Backend | None = None,
        portable: bool | None = None,
        map_from_bytes: int = MAP_FROM_BYTES,
        around: Around = untouched,
        stall_s: int | float = STALL_S,
    ):
        manifest = directory if isinstance(directory, Manifest) else open_network(directory, "stdit3")
        reader = Reader(manifest, around=around)
        retention = Retention(block_bytes(manifest), budget=budget, fixed_bytes=fixed_bytes, count=retained)
        self._policy, on_cpu = policy_of(dtype), jax.default_backend() == "cpu"
        forms = choose_forms(attention, platform=jax.default_backend(), dtype=dtype, streamed=True)
        self.blocks: BlockStream
        if _backend(backend, manifest, on_cpu) == "mmap":
            self.blocks = MappedBlocks(reader, self._policy, forms, retention, stall_s=stall_s, map_from_bytes=map_from_bytes)
        else:
            portable = not on_cpu if portable is None else portable
            self.blocks = HostedBlocks(reader, self._policy, forms, retention, stall_s=stall_s, portable=portable)

    @property
    def retention(self) -> Retention:
        """How many blocks are retained; may be changed at any time, also during a run."""
        return self.blocks.retention

    @property
    def profile(self) -> Profile | None:
        """Where the intervals of loading and computing go."""
        return self.blocks.profile

    @profile.setter
    def profile(self, profile: Profile | None) -> None:
        self.blocks.profile = profile

    @contextlib.contextmanager
    def open(self) -> Iterator[StreamedSTDiT3]:
        """Yields the network; everything read is dropped in the end.

        An error in the host's part of a program comes out as it was raised there.

        Raises:
          ModelDirectoryError: a file is missing, unreadable, damaged or changed.
          RuntimeError: it is open already.
        """
        with self.blocks.running() as number:
            yield StreamedSTDiT3(
                embed=self._resident("embed", Embed),
                final=self._resident("final", Final),
                table_6D=jax.device_put(self.blocks.reader.arrays([_TABLE])[_TABLE]),
                blocks=self.blocks.arguments(),
                number=number,
                program=self.blocks.program,
            )

    def _resident(self, layer: str, build: type[End]) -> End:
        """Returns a layer that stays in memory, read and checked like the others."""
        reader, policy = self.blocks.reader, self._policy
        flat = {name.removeprefix(f"{layer}."): array for name, array in read_layer(reader, layer).items()}
        shell = jax.eval_shape(lambda: build(reader.manifest.config, policy=policy, rngs=nnx.Rngs(0)))
        try:
            return jax.block_until_ready(jax.device_put(unflatten(shell, flat)))
        except ValueError as error:
            raise ModelDirectoryError(f"{reader.manifest.path / layer} does not fit its configuration: {error}") from error


def block_bytes(manifest: Manifest) -> list[int]:
    """Returns the stored bytes of every block, in execution order."""
    return [manifest.layer_bytes(layer) for layer in manifest.layers if layer not in ENDS]


def _backend(backend: Backend | None, manifest: Manifest, on_cpu: bool) -> Backend:
    """Returns the back-end asked for, or the one that suits platform and files: maps need local files, with bytes in order."""
    if isinstance(manifest.path, Address):
        if backend == "mmap":
            raise ValueError(f"streaming back-end 'mmap' maps local files, and {manifest.path} is none; use 'host'.")
        return "host"
    if backend == "mmap" and not (on_cpu and can_map()):
        raise ValueError("streaming back-end 'mmap' needs JAX on the CPU and Linux 5.14 or later; use 'host'.")
    if backend not in (None, "mmap", "host"):
        raise ValueError(f"streaming back-end is {backend!r}; expected 'mmap', 'host', or None for what suits the platform.")
    return backend or ("mmap" if on_cpu and can_map() and are_mappable(manifest, manifest.parameters) else "host")
