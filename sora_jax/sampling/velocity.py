"""What the sampler asks of a velocity: four protocols, each with what an option needs.

    velocity(z, t_B)                                            any sampling without the options below
    velocity.evaluate(z, t_B, *, frame_mask_BT, merged)         frame weights, merged steps           (`VideoVelocity`)
    velocity.evaluate_keeping(...), velocity.reuse(...)         reuse of a residual                   (`ReusableVelocity`)
    velocity.modulated_input(...), .first_block(...), .rest(...)  reuse by what has changed           (`WatchedVelocity`)

``z`` are latents [R, ...] and ``t_B`` times [R], num_timesteps being noise and 0 data.  With guidance, rows are those of the
batch with their caption, then the same without; an evaluation without guidance asks for the first rows alone.

Invariant: which protocol a velocity follows is asked once, by ``isinstance``, before anything is compiled; afterwards the
sampler knows a `VideoVelocity` and nothing else.  No argument's name is looked up and no result's type depends on a flag.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast, no_type_check, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sora_jax.sampling.arguments import shown
from sora_jax.sampling.captured import captured, restored


@runtime_checkable
class VideoVelocity(Protocol):
    """A velocity that knows frames, and what to merge."""

    def evaluate(
        self,
        z: Float[Array, "R ..."],
        t_B: Float[Array, "R"],
        *,
        frame_mask_BT: Bool[Array, "R T"] | None,
        merged: bool,
    ) -> Float[Array, "R ..."]:
        """Returns the velocity of the latents.

        Args:
          z: latents, frames on the axis after rows.
          t_B: time of each row.
          frame_mask_BT: frames that are sampled; the others are at time 0, whatever ``t_B`` says.  None: all are.
          merged: whether temporal tokens are merged in this step; a Python bool, so that each way is a program of its own.
        """
        ...


@runtime_checkable
class ReusableVelocity(VideoVelocity, Protocol):
    """A velocity with a costly part, the residual, that another step may take over."""

    def evaluate_keeping(
        self,
        z: Float[Array, "R ..."],
        t_B: Float[Array, "R"],
        *,
        frame_mask_BT: Bool[Array, "R T"] | None,
        merged: bool,
    ) -> tuple[Float[Array, "R ..."], Float[Array, "R ..."]]:
        """Returns what `evaluate` returns, and the residual [R, ...], of any shape."""
        ...

    def reuse(
        self,
        z: Float[Array, "R ..."],
        t_B: Float[Array, "R"],
        residual: Float[Array, "R ..."],
        *,
        frame_mask_BT: Bool[Array, "R T"] | None,
    ) -> Float[Array, "R ..."]:
        """Returns the velocity with a kept residual in place of the costly part."""
        ...


@runtime_checkable
class WatchedVelocity(ReusableVelocity, Protocol):
    """A velocity that shows, before its costly part, by how much its input has changed."""

    def modulated_input(
        self, z: Float[Array, "R ..."], t_B: Float[Array, "R"], *, frame_mask_BT: Bool[Array, "R T"] | None
    ) -> Float[Array, "R ..."]:
        """Returns what the costly part begins with; it costs next to nothing."""
        ...

    def first_block(
        self,
        z: Float[Array, "R ..."],
        t_B: Float[Array, "R"],
        *,
        frame_mask_BT: Bool[Array, "R T"] | None,
        merged: bool,
    ) -> tuple[Float[Array, "R ..."], Float[Array, "R ..."]]:
        """Returns the state after the first block, and what that block added to it."""
        ...

    def rest(
        self,
        z: Float[Array, "R ..."],
        t_B: Float[Array, "R"],
        tokens: Float[Array, "R ..."],
        *,
        frame_mask_BT: Bool[Array, "R T"] | None,
        merged: bool,
    ) -> tuple[Float[Array, "R ..."], Float[Array, "R ..."]]:
        """Returns the velocity from the state after the first block, and what the other blocks added to it.

        What the first block added and what this returns make up the residual that `reuse` takes.
        """
        ...

    def first_block_share(self) -> float:
        """Returns which part of an evaluation the first block is."""
        ...


Velocity = Callable[[Array, Array], Array] | VideoVelocity

# What a protocol adds to the one before it, as errors name it.
_METHODS: Mapping[type, tuple[str, ...]] = {
    VideoVelocity: ("evaluate(z, t_B, *, frame_mask_BT, merged)",),
    ReusableVelocity: (
        "evaluate(z, t_B, *, frame_mask_BT, merged)",
        "evaluate_keeping(z, t_B, *, frame_mask_BT, merged)",
        "reuse(z, t_B, residual, *, frame_mask_BT)",
    ),
    WatchedVelocity: (
        "evaluate(z, t_B, *, frame_mask_BT, merged)",
        "evaluate_keeping(z, t_B, *, frame_mask_BT, merged)",
        "reuse(z, t_B, residual, *, frame_mask_BT)",
        "modulated_input(z, t_B, *, frame_mask_BT)",
        "first_block(z, t_B, *, frame_mask_BT, merged)",
        "rest(z, t_B, tokens, *, frame_mask_BT, merged)",
        "first_block_share()",
    ),
}


@jax.tree_util.register_dataclass
@no_type_check  # the tree also holds shapes and paths
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plain:
    """A callable ``(z, t_B)`` as a velocity of videos all of whose frames are alike."""

    call: Any

    def evaluate(self, z: Array, t_B: Array, *, frame_mask_BT: None, merged: bool) -> Array:
        """Returns what the callable returns; without the options that need more, neither mask nor merging comes along."""
        del frame_mask_BT, merged
        return self.call(z, t_B)


def check_velocity(velocity: Any, needs: Mapping[str, type]) -> None:
    """Refuses an object that is no velocity, or lacks what an option needs; ``needs`` names options and protocols.

    Raises:
      ValueError: says which option needs which method.
    """
    if isinstance(velocity, type):
        raise ValueError(f"velocity is the class {velocity.__name__}; expected an instance of it.")
    if not callable(velocity) and not isinstance(velocity, VideoVelocity):
        raise ValueError(
            f"velocity is {shown(velocity)}; expected a callable (z, t_B), or an object with {_METHODS[VideoVelocity][0]}."
        )
    for option, protocol in needs.items():
        if not isinstance(velocity, protocol):
            lacking = [method for method in _METHODS[protocol] if not hasattr(velocity, method.split("(")[0])]
            raise ValueError(
                f"{option} needs a velocity with {' and '.join(lacking)}; {shown(velocity)} has none "
                f"(sora_jax.sampling.velocity.{protocol.__name__})."
            )


def held(velocity: Velocity) -> Any:
    """Returns the velocity as a pytree that knows all that its calls depend on, see `captured`."""
    return captured(velocity)


def opened(tree: Any) -> VideoVelocity:
    """Returns the velocity that a sampler holds, or a plain callable as a `VideoVelocity`."""
    return as_video(restored(tree))


def as_video(velocity: Velocity) -> VideoVelocity:
    """Returns the velocity itself where it is a `VideoVelocity`, else one that calls it."""
    return velocity if isinstance(velocity, VideoVelocity) else cast(VideoVelocity, _Plain(call=velocity))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """Where a velocity is asked for: at latents and a time, of the sampled frames, merged or not.

    Its methods take the number of copies of the batch that are evaluated: 2 with guidance, 1 without.
    """

    velocity: VideoVelocity
    z: Float[Array, "B ..."]
    t: Float[Array, ""]
    active_BT: Bool[Array, "B T"] | None
    merged: bool

    def evaluate(self, copies: int) -> Float[Array, "R ..."]:
        """Returns the velocity of all rows, in the dtype of the latents."""
        z, t_R, mask = self._rows(copies)
        return _checked(self.velocity.evaluate(z, t_R, frame_mask_BT=mask, merged=self.merged), z)

    def evaluate_keeping(self, copies: int) -> tuple[Float[Array, "R ..."], Float[Array, "R ..."]]:
        """Returns the velocity of all rows, and their residuals."""
        z, t_R, mask = self._rows(copies)
        velocity = cast(ReusableVelocity, self.velocity)
        v, residual = velocity.evaluate_keeping(z, t_R, frame_mask_BT=mask, merged=self.merged)
        return _checked(v, z), residual

    def reuse(self, copies: int, residual: Float[Array, "R ..."]) -> Float[Array, "R ..."]:
        """Returns the velocity of all rows with their kept residuals."""
        z, t_R, mask = self._rows(copies)
        return _checked(cast(ReusableVelocity, self.velocity).reuse(z, t_R, residual, frame_mask_BT=mask), z)

    def modulated_input(self) -> Float[Array, "B ..."]:
        """Returns what the costly part of the first rows begins with; the other rows begin alike."""
        z, t_R, mask = self._rows(1)
        return cast(WatchedVelocity, self.velocity).modulated_input(z, t_R, frame_mask_BT=mask)

    def first_block(self, copies: int) -> tuple[Float[Array, "R ..."], Float[Array, "R ..."]]:
        """Returns the state of all rows after the first block, and what it added."""
        z, t_R, mask = self._rows(copies)
        return cast(WatchedVelocity, self.velocity).first_block(z, t_R, frame_mask_BT=mask, merged=self.merged)

    def rest(self, copies: int, tokens: Float[Array, "R ..."]) -> tuple[Float[Array, "R ..."], Float[Array, "R ..."]]:
        """Returns the velocity of all rows from there, and what the other blocks added."""
        z, t_R, mask = self._rows(copies)
        v, residual = cast(WatchedVelocity, self.velocity).rest(z, t_R, tokens, frame_mask_BT=mask, merged=self.merged)
        return _checked(v, z), residual

    def first_block_share(self) -> float:
        """Returns which part of an evaluation the first block is."""
        return cast(WatchedVelocity, self.velocity).first_block_share()

    def _rows(self, copies: int) -> tuple[Array, Array, Array | None]:
        z = jnp.tile(self.z, (copies,) + (1,) * (self.z.ndim - 1))
        mask = None if self.active_BT is None else jnp.tile(self.active_BT, (copies, 1))
        return z, jnp.full(len(z), self.t, jnp.float32), mask


def _checked(v: Any, z: Array) -> Array:
    """Returns a velocity in the dtype of the latents.

    Raises:
      ValueError: it has another shape, or is no array of real numbers.
    """
    if not isinstance(v, jax.Array | np.ndarray) or not jnp.issubdtype(v.dtype, jnp.floating):
        got = f"an array of {v.dtype}" if isinstance(v, jax.Array | np.ndarray) else shown(v)
        raise ValueError(f"the velocity returned {got}; expected a floating-point array like the latents, {z.dtype}{z.shape}.")
    if v.shape != z.shape:
        raise ValueError(f"the velocity returned shape {v.shape} for latents of shape {z.shape}; expected the same shape.")
    return jnp.asarray(v, z.dtype)
