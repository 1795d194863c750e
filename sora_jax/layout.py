"""Where a token lies on a mesh: which rows, places and frames a device computes, and what it has to fetch from the others.

A mesh has three axes: ``data`` (clips), ``guidance`` (rows with and without caption), ``sequence`` (tokens).  `over_mesh` runs
a function once on every device of JAX's ambient mesh, on that device's part of the arrays; inside it tokens [B, T, S, D] are
spread over places S, and for spatial self attention over frames T.  Neither has to be a multiple of the axis: the last device
has padding, which is cut off wherever places or frames are whole again.

Invariant: without an ambient mesh every function here returns its argument, so that programs for one device do not change.
Nothing here knows networks or files; JAX alone is imported.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

DATA, GUIDANCE, SEQUENCE = "data", "guidance", "sequence"
ROWS = (GUIDANCE, DATA)  # rows of a guided batch are [conditional, unconditional], so guidance varies slowest
DEVICES = (*ROWS, SEQUENCE)

NOWHERE = PartitionSpec()  # the same array on every device


def sizes() -> dict[str, int]:
    """Returns the axes of the ambient mesh, by name; empty without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def num_devices() -> int:
    """Returns the devices of the ambient mesh; 1 without a mesh."""
    count = 1
    for size in sizes().values():
        count *= size
    return count


def is_part() -> bool:
    """Returns whether the code that is traced runs on one device's part of the arrays, inside `over_mesh`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def rows(count: int) -> PartitionSpec:
    """Returns how ``count`` rows of a batch are spread: over as much of the mesh as divides them."""
    axes = sizes()
    for names in (ROWS, (DATA,), (GUIDANCE,)):
        over = 1
        for name in names:
            over *= axes.get(name, 1)
        if over > 1 and count % over == 0:
            return PartitionSpec(names)
    return NOWHERE


def tokens(count: int) -> PartitionSpec:
    """Returns how tokens [B, T, S, D] of ``count`` rows are spread between `over_mesh` calls: places are spread."""
    return PartitionSpec(*(rows(count) or (None,)), None, SEQUENCE)


def over_mesh(function: Callable[..., Any], arguments: tuple[Any, ...], specs: tuple[Any, ...], results: Any) -> Any:
    """Returns ``function(*arguments)``, computed on every device from its part of the arguments.

    Args:
      function: the computation; what it does is the same on all devices.
      arguments: its arguments.
      specs: how each argument is spread.
      results: how its results are spread.
    """
    if not sizes() or is_part():
        return function(*arguments)
    return jax.shard_map(function, in_specs=specs, out_specs=results, check_vma=False)(*arguments)


def residual(x: jax.Array) -> jax.Array:
    """Returns tokens [R, T, S, D] that stay on the devices from one evaluation to the next, spread as they are computed."""
    if not sizes() or x.ndim != 4:
        return x
    return jax.lax.with_sharding_constraint(x, tokens(len(x)))


def joined(first: jax.Array, rest: jax.Array) -> jax.Array:
    """Returns the tokens of some rows followed by those of others; rows move between devices, places do not."""
    if sizes() and first.ndim == 4:
        one = PartitionSpec(None, None, SEQUENCE)
        first, rest = (jax.lax.with_sharding_constraint(x, one) for x in (first, rest))
    return jnp.concatenate([first, rest])


def everywhere(x: Any) -> Any:
    """Returns a tree of arrays that every device holds whole, as it holds latents and the state of a sampling."""
    if not sizes():
        return x
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, NOWHERE), x)


def divided(num_places: int) -> int | None:
    """Returns the places of a frame where they are spread over devices, None where each device has them all."""
    return num_places if is_part() and sizes()[SEQUENCE] > 1 else None


def padded(length: int) -> int:
    """Returns the places of all devices together, padding included."""
    each = sizes().get(SEQUENCE, 1)
    return -(-length // each) * each


def own_places(x_BTSD: jax.Array) -> jax.Array:
    """Returns this device's places of tokens [B, T, S, D]."""
    if divided(x_BTSD.shape[2]) is None:
        return x_BTSD
    each = padded(x_BTSD.shape[2]) // sizes()[SEQUENCE]
    return jax.lax.dynamic_slice_in_dim(_filled(x_BTSD, 2), jax.lax.axis_index(SEQUENCE) * each, each, axis=2)


def frames(x_BTSD: jax.Array, num_places: int | None) -> jax.Array:
    """Returns this device's frames, each whole, of tokens spread over places; ``num_places`` as `divided` returned it."""
    if num_places is None:
        return x_BTSD
    moved = jax.lax.all_to_all(_filled(x_BTSD, 1), SEQUENCE, split_axis=1, concat_axis=2, tiled=True)
    return moved[:, :, :num_places]


def places(x_BTSD: jax.Array, num_frames: int, num_places: int | None) -> jax.Array:
    """Returns this device's places, each whole in time, of tokens spread over frames."""
    if num_places is None:
        return x_BTSD
    moved = jax.lax.all_to_all(_filled(x_BTSD, 2), SEQUENCE, split_axis=2, concat_axis=1, tiled=True)
    return moved[:, :num_frames]


def all_places(x_BTSD: jax.Array, num_places: int | None) -> jax.Array:
    """Returns the places of all devices: for what is small, as the patches of the velocity."""
    if num_places is None:
        return x_BTSD
    return jax.lax.all_gather(x_BTSD, SEQUENCE, axis=2, tiled=True)[:, :, :num_places]


def all_rows(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Returns the rows of all devices of an array that is spread as ``spec`` says."""
    if not is_part() or not len(spec):
        return x
    return jax.lax.all_gather(x, spec[0], axis=0, tiled=True)


def _filled(x: jax.Array, axis: int) -> jax.Array:
    """Returns ``x`` with zeros at the end of an axis, until every device can have as many entries."""
    missing = -x.shape[axis] % sizes()[SEQUENCE]
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


@jax.tree_util.register_dataclass
@no_type_check  # a pytree also holds shapes and paths in place of arrays
@dataclasses.dataclass(frozen=True)
class Spread:
    """A parameter of which every device holds some rows; ``[...]`` fetches the others for as long as they are used.

    Attributes:
      values: the array.
      axis: its axis of rows: not 0 only where parameters of equal blocks are stacked, for a scan to take them apart.
    """

    values: Any
    axis: int = dataclasses.field(default=0, metadata={"static": True})

    def __getitem__(self, key: object) -> jax.Array:
        """Returns the whole parameter for ``[...]``, which is how a parameter is read; other indices are refused."""
        if key is not Ellipsis:
            raise TypeError(f"a parameter spread over devices has no part {key!r}; only [...], the whole, is defined.")
        return jax.lax.all_gather(self.values, DEVICES, axis=0, tiled=True) if is_part() else self.values

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole outside `over_mesh`, of this device's rows inside."""
        return self.values.shape


def after(x: jax.Array, module: Any) -> Any:
    """Returns a module whose spread parameters are fetched only once ``x`` is there: one block's at a time, in every step.

    The compiler would fetch all of them before the loop over steps otherwise, and keep them.
    """
    if not is_part():
        return module
    leaves, structure = jax.tree.flatten(module, is_leaf=lambda leaf: isinstance(leaf, Spread))
    spread = [leaf.values for leaf in leaves if isinstance(leaf, Spread)]
    if not spread:
        return module
    _, *tied = jax.lax.optimization_barrier((x, *spread))
    values = iter(tied)
    return jax.tree.unflatten(
        structure, [dataclasses.replace(leaf, values=next(values)) if isinstance(leaf, Spread) else leaf for leaf in leaves]
    )


def parameters(network: Any) -> Any:
    """Returns how the parameters of a network are spread: as a tree for `over_mesh`."""
    return jax.tree.map(
        lambda leaf: dataclasses.replace(leaf, values=_by_rows(leaf.axis)) if isinstance(leaf, Spread) else NOWHERE,
        network,
        is_leaf=lambda leaf: isinstance(leaf, Spread),
    )


def _by_rows(axis: int) -> PartitionSpec:
    return PartitionSpec(*(None,) * axis, DEVICES)
