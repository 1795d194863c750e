"""The compiled sampler: from noise to latents in one program that the host may interrupt after any step.

``sampler.run(carry, until)`` is the only jitted program: two while loops over one step function, the first with merged
temporal tokens, the second without.  ``sampler.steps(z)`` is the only loop over it on the host.

Invariant: cutting a sampling into several ``run`` calls changes no bit, and only what `options.Sampling` and `captured` list
as static compiles anew.  The sampler knows numbers and a velocity (`velocity`), no model.  Under ``jit``, ``vmap`` or
``grad`` it is `integration.integrate` that samples.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Self, Unpack, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sora_jax import layout
from sora_jax.sampling.arguments import is_traced, shown
from sora_jax.sampling.options import Options, Sampling
from sora_jax.sampling.schedule import Schedule
from sora_jax.sampling.state import Carry, Trace
from sora_jax.sampling.step import first_carry, take_step
from sora_jax.sampling.velocity import Velocity, VideoVelocity, check_velocity, held, opened

__all__ = ["Carry", "Options", "Result", "Sampler", "Trace", "finish", "sample"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A finished sampling.

    Attributes:
      z: latents [B, ...].
      evaluations_B: velocity evaluations that went into each sample.
      batch_evaluations: velocity evaluations computed for the batch: the figure that time depends on.
      trace: record of every step, cut to the steps taken.
    """

    z: Float[Array, "B ..."]
    evaluations_B: np.ndarray
    batch_evaluations: float
    trace: Trace


@jax.tree_util.register_dataclass
@no_type_check  # the tree also holds shapes and paths
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """A velocity and how to sample with it; make one with `create`.

    Attributes:
      sampling: times and options.
      velocity: the velocity, as `velocity.held` holds it.
    """

    sampling: Sampling
    velocity: Any

    @classmethod
    def create(cls, velocity: Velocity, schedule: Schedule, **options: Unpack[Options]) -> Self:
        """Returns a sampler of the velocity as it is now; an attribute that is set afterwards changes nothing.

        Raises:
          TypeError: there is no such option.
          ValueError: a value is out of range, a combination is illegal, or the velocity lacks what an option needs.
        """
        return cls.of(velocity, Sampling.resolve(schedule, **options))

    @classmethod
    def of(cls, velocity: Velocity, sampling: Sampling) -> Self:
        """Returns the same from options that are resolved.

        Raises:
          ValueError: the velocity lacks what an option needs.
        """
        check_velocity(velocity, sampling.needs())
        return cls(sampling=sampling, velocity=held(velocity))

    def start(self, z: Float[Array, "B ..."]) -> Carry:
        """Returns the carry before the first step.

        Raises:
          ValueError: the latents are no float array, or do not fit the options.
        """
        self.sampling.check_latents(z)
        return _start(self, jnp.asarray(z))

    def run(self, carry: Carry, until: int | Int[Array, ""]) -> Carry:
        """Returns the carry after steps ``carry.step`` to ``until - 1``, or earlier once every sample is done."""
        return _run(self, carry, jnp.asarray(until, jnp.int32))

    def steps(self, start: Float[Array, "B ..."] | Carry) -> Iterator[Carry]:
        """Yields the carry after every step, each finished when it is yielded, until every sample is done.

        ``start`` are latents at the schedule's first time, or the carry to go on from.

        Raises:
          ValueError: the latents do not fit, or something is traced by jit, vmap or grad.
        """
        carry = start if isinstance(start, Carry) else self.start(start)
        _refuse_tracing("Sampler.steps", (self, start, carry))
        for step in range(int(carry.step), int(self.sampling.schedule.num_steps)):
            carry = jax.block_until_ready(self.run(carry, step + 1))
            yield carry
            if np.asarray(carry.done_B).all():
                return


def sample(
    velocity: Velocity,
    z: Float[Array, "B ..."],
    schedule: Schedule,
    *,
    callback: Callable[[Carry], Any] | None = None,
    **options: Unpack[Options],
) -> Result:
    """Returns the latents at the end of the flow that starts at ``z``, and what it took.

    Args:
      velocity: a callable ``(z, t_B)`` that JAX can trace, or an object with the methods that the options need, see
        `velocity`.
      z: latents [B, ...] in float32, noise at the schedule's first time.
      schedule: the times to visit.
      callback: called on the host after every step with the carry; the result has the same bits with and without it.
      **options: see `options.Options`.

    Raises:
      TypeError: there is no such option.
      ValueError: a value is out of range, a combination is illegal, or the velocity lacks what an option needs; the message
        names it.  Also under jit, vmap or grad, where `integrate` samples.
    """
    if callback is not None and not callable(callback):
        raise ValueError(f"callback is {shown(callback)}; expected a function of the carry.")
    sampler = Sampler.create(velocity, schedule, **options)
    start = sampler.start(z)
    _refuse_tracing("sample", (sampler, z, start))
    if callback is None:
        return finish(sampler.run(start, int(schedule.num_steps)))
    for carry in sampler.steps(start):
        callback(carry)
    return finish(carry)


def finish(carry: Carry) -> Result:
    """Returns the result that a carry holds."""
    _refuse_tracing("sample", carry)
    taken = int(carry.step)
    return Result(
        z=carry.z,
        evaluations_B=np.asarray(carry.evaluations_B),
        batch_evaluations=float(carry.batch_evaluations),
        trace=carry.trace.completed(taken),
    )


def _refuse_tracing(name: str, tree: Any) -> None:
    if is_traced(tree):
        raise ValueError(
            f"{name} reads its decisions on the host, so it cannot run under jit, vmap or grad; "
            "use sora_jax.integrate, which returns the latents of the same sampling as a pure function."
        )


@jax.jit
def _start(sampler: Sampler, z: Array) -> Carry:
    return _placed(first_carry(sampler.sampling, opened(sampler.velocity), z, recorded=True))


@jax.jit
def _run(sampler: Sampler, carry: Carry, until: Array) -> Carry:
    sampling, velocity = sampler.sampling, opened(sampler.velocity)
    until = jnp.minimum(until, sampling.schedule.num_steps)
    if sampling.merge_steps is not None:
        carry = _loop(sampling, velocity, carry, jnp.minimum(until, sampling.merge_steps), merged=True)
    return _placed(_loop(sampling, velocity, carry, until, merged=False))


def _placed(carry: Carry) -> Carry:
    """Returns the carry in the one layout that every call of the program takes and returns it in."""
    kept = carry.kept
    whole = layout.everywhere(dataclasses.replace(carry, kept=None))
    if kept is None:
        return whole
    residual = None if kept.residual is None else layout.residual(kept.residual)
    rest = layout.everywhere(dataclasses.replace(kept, residual=None))
    return dataclasses.replace(whole, kept=dataclasses.replace(rest, residual=residual))


def _loop(sampling: Sampling, velocity: VideoVelocity, carry: Carry, until: Array, *, merged: bool) -> Carry:
    return jax.lax.while_loop(
        lambda carry: (carry.step < until) & ~jnp.all(carry.done_B),
        lambda carry: take_step(sampling, velocity, carry, merged=merged),
        carry,
    )
