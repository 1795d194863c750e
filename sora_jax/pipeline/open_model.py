"""The three networks of an opened model directory: loaded when a stage begins, freed when it ends.

Invariant: with ``keep=False`` a network is in memory only while someone uses it, provided that the caller drops its reference
at the end of the ``with`` block: at most one for one thread at a time, and one copy for all threads.  Everything comes from the
manifests that were read when the model was opened.  Programs compile once per configuration, dtype and shapes, and that time is
measured separately.  With a memory budget the transformer is streamed: `Networks.transformer` yields it either way.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sora_jax.config import ModelConfig, policy_of
from sora_jax.devices.attention_choice import choose_forms
from sora_jax.devices.axes import check_weights
from sora_jax.devices.compute_dtype import choose_dtype
from sora_jax.devices.hosts import check_processes
from sora_jax.devices.load_onto import load_onto
from sora_jax.devices.mesh import is_spread, make_mesh, place, sharding_on_mesh
from sora_jax.devices.names import check_attention
from sora_jax.networks import registry
from sora_jax.networks.forms import Forms
from sora_jax.networks.layers import precision_chosen
from sora_jax.pipeline.caption_cache import CaptionCache
from sora_jax.pipeline.settings import Settings
from sora_jax.process import Timings
from sora_jax.storage.checkpoint import load_parameters, unflatten
from sora_jax.storage.directory import Manifest, ModelDirectoryError
from sora_jax.storage.reader import Reader
from sora_jax.streaming.fitting import check_fits
from sora_jax.streaming.network import STDiT3Stream
from sora_jax.streaming.profile import Profile

KEEP_BYTES = 1_000_000_000  # models up to this size stay loaded between stages and calls


class Networks:
    """The open model directory; ``keep`` says whether networks stay in memory after their stage.

    With a ``budget`` in bytes networks are streamed; ``profile`` then records the times of their layers.  ``manifests`` say
    what is on disk, ``caption_cache`` where features are kept.  Threads may share it; with a budget one generation at a time.
    ``attention`` names the form of every attention, see `attention_choice.choose_forms`.  On a ``mesh`` the transformer's
    ``weights`` are ``replicated`` or ``spread``, the others' replicated.
    """

    def __init__(
        self,
        manifests: Mapping[str, Manifest],
        *,
        keep: bool,
        budget: int | None = None,
        attention: str = "auto",
        mesh: Mesh | None = None,
        weights: str = "replicated",
    ):
        self.manifests, self.mesh, self.weights = manifests, mesh, weights
        self.config = ModelConfig(**{network: manifest.config for network, manifest in manifests.items()})
        self.directory = manifests["stdit3"].path.parent
        self.keep, self.attention = keep, attention
        self.profile: Profile | None = None
        self.caption_cache: CaptionCache | None = None
        self._budget = budget
        self._streams: dict[str, STDiT3Stream] = {}
        self._lock = threading.Lock()
        self._loaded: dict[tuple[str, str], _Loaded] = {}

    @classmethod
    def open(
        cls,
        manifests: Mapping[str, Manifest],
        *,
        keep: bool | None,
        budget: int | None = None,
        attention: str = "auto",
        mesh: str | Mesh | None = None,
        weights: str = "replicated",
    ) -> Self:
        """Returns the networks of a complete model directory from their manifests, none of them loaded.

        ``keep=None`` keeps models of up to 1 GB, and none if there is a budget in bytes.

        Raises:
          ModelDirectoryError: a network is damaged.
          ValueError: there is no attention of that name, or no such mesh here.
        """
        check_attention(attention)
        check_weights(weights, mesh)
        if mesh is not None and budget is not None:
            raise ValueError(
                "a memory budget streams weights into one device; it does not go with a mesh: leave one of them out."
            )
        try:
            ModelConfig(**{network: manifest.config for network, manifest in manifests.items()})
        except ValueError as error:
            directory = manifests["stdit3"].path.parent
            raise ModelDirectoryError(f"{directory} holds networks that do not belong together: {error}") from error
        for manifest in manifests.values():
            check_fits(manifest)
            Reader(manifest).check(manifest.parameters)
        num_bytes = sum(manifest.nbytes for manifest in manifests.values())
        keep = num_bytes <= KEEP_BYTES and budget is None if keep is None else keep
        devices = None if mesh is None else make_mesh(mesh)
        if devices is not None:
            check_processes(devices)
        return cls(manifests, keep=keep, budget=budget, attention=attention, mesh=devices, weights=weights)

    @property
    def budget(self) -> int | None:
        """Bytes that the process may hold; a change takes effect at the next block, also during a run.

        Raises:
          ValueError: the model was opened without a budget, or the budget is too small for what runs.
        """
        return self._budget

    @budget.setter
    def budget(self, budget: int) -> None:
        if self._budget is None:
            raise ValueError("the model was opened without memory_budget; open it again with memory_budget=...")
        for stream in self._streams.values():
            stream.retention.budget = budget
        self._budget = budget

    def decide(self, settings: Settings) -> Settings:
        """Returns the settings with the compute dtype that they have on this machine's device."""
        return dataclasses.replace(settings, dtype=choose_dtype(settings.dtype, platform=jax.default_backend()))

    def forms(self, dtype: str) -> Forms:
        """Returns how networks compute in ``dtype`` on this machine.

        Raises:
          ValueError: the attention asked for does not run here, or not in this dtype.
        """
        return choose_forms(self.attention, platform=jax.default_backend(), dtype=dtype, streamed=self._budget is not None)

    def on_mesh(self) -> AbstractContextManager[Any]:
        """Returns a context in which programs run on the mesh, if there is one."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def place(self, x: Any) -> jax.Array:
        """Returns a host array on the device, or whole on every device of the mesh."""
        return jnp.asarray(x) if self.mesh is None else place(x, self.mesh)

    def whole_batch(self, num_clips: int) -> int:
        """Returns the clips that are computed for so many: the next number that the mesh divides."""
        at_once = 1 if self.mesh is None else self.mesh.shape["data"]
        return -(-num_clips // at_once) * at_once

    def whole_parameters(self) -> list[str]:
        """Returns the parameters that stay whole on every device although weights are to be spread."""
        if self.mesh is None or self.weights != "spread":
            return []
        stored = self.manifests["stdit3"].parameters
        return [name for name in stored if len(stored[name].shape) > 1 and not is_spread(stored[name].shape, self.mesh.size)]

    @contextmanager
    def transformer(self, dtype: str, timings: Timings, *, fixed_bytes: int) -> Iterator[Any]:
        """Yields the transformer: streamed if there is a budget, of which ``fixed_bytes`` are needed whatever is retained.

        Raises:
          ModelDirectoryError: a parameter is missing, damaged, or changed while it was streamed.
          ValueError: the budget is too small for this size.
        """
        if self._budget is None:
            with self.use("stdit3", dtype, timings) as network:
                yield network
            return
        with self._lock:
            if dtype not in self._streams:
                self._streams[dtype] = STDiT3Stream(
                    self.manifests["stdit3"], dtype=dtype, attention=self.attention, budget=self._budget
                )
            stream = self._streams[dtype]
        stream.profile = self.profile
        stream.retention.fixed_bytes = fixed_bytes
        with ExitStack() as resources:
            with timings.measure("load"):
                network = resources.enter_context(stream.open())
            yield network

    def bytes_read(self, dtype: str) -> int | None:
        """Returns the bytes of blocks that the streamed transformer has read; None where it is in memory."""
        return self._streams[dtype].blocks.bytes_read if dtype in self._streams else None

    @contextmanager
    def use(self, network: str, dtype: str, timings: Timings) -> Iterator[Any]:
        """Yields a network that computes in ``dtype``, on the device.

        Raises:
          ModelDirectoryError: a parameter is missing or damaged.
        """
        with self._lock:
            loaded = self._loaded.setdefault((network, dtype), _Loaded())
            loaded.num_users += 1
        try:
            with loaded.lock:  # the first user loads, the others wait for it
                if loaded.network is None:
                    with timings.measure("load"):
                        loaded.network = self._load(network, dtype)
            yield loaded.network
        finally:
            with self._lock:
                loaded.num_users -= 1
                if not loaded.num_users and not (self.keep and loaded.network is not None):
                    loaded.network = None
                    del self._loaded[network, dtype]

    def _load(self, network: str, dtype: str) -> Any:
        manifest = self.manifests[network]
        abstract = registry.abstract(network, manifest.config, policy=policy_of(dtype), forms=self.forms(dtype))
        try:
            if self.mesh is None:
                return jax.block_until_ready(jax.device_put(unflatten(abstract, load_parameters(manifest))))
            weights = self.weights if network == "stdit3" else "replicated"
            return jax.block_until_ready(unflatten(abstract, load_onto(manifest, self.mesh, weights)))
        except ValueError as error:
            if isinstance(error, ModelDirectoryError):
                raise
            raise ModelDirectoryError(f"{manifest.path} does not fit its configuration: {error}") from error


@dataclasses.dataclass
class _Loaded:
    """A network that is in memory, or about to be, and how many use it."""

    network: Any = None
    num_users: int = 0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


def call(stage: str, timings: Timings, function: Callable[..., Any], static: tuple[Any, ...], *args: Any) -> Any:
    """Returns ``function(*static, *args)``, compiled once for the shapes of ``args``; compile time counts as such."""
    leaves, structure = jax.tree.flatten(args)
    with timings.measure("compile"):
        shapes = tuple((leaf.shape, leaf.dtype, sharding_on_mesh(leaf)) for leaf in leaves)
        executable = _compiled(function, static, structure, shapes, precision_chosen())
    with timings.measure(stage):
        return jax.block_until_ready(executable(*args))


@functools.lru_cache(maxsize=64)
def _compiled(
    function: Callable[..., Any], static: tuple[Any, ...], structure: Any, leaves: tuple[Any, ...], _precision: str | None
) -> Any:
    """Returns a program that holds no arrays; `jax.jit` would do the same, but would hide how long compiling took."""
    args = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype, where in leaves])
    return jax.jit(functools.partial(function, *static)).lower(*args).compile()
