"""The latents of a sampling as a pure function, under ``jit``, ``vmap`` and ``grad``.

Invariant: `integrate` takes the steps of `sampler.sample`, with the same bits on the CPU, but a number of steps that is known
when it is traced; a leap that waits for the velocities is therefore refused.  It keeps the latents between steps only, and
evaluates each step again for its gradient.
"""

from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sora_jax.sampling.arguments import is_traced
from sora_jax.sampling.options import Options, Sampling, num_steps_of
from sora_jax.sampling.schedule import Schedule
from sora_jax.sampling.state import Carry
from sora_jax.sampling.step import first_carry, take_step
from sora_jax.sampling.velocity import Velocity, as_video, check_velocity


def integrate(
    velocity: Velocity, z: Float[Array, "B ..."], schedule: Schedule, **options: Unpack[Options]
) -> Float[Array, "B ..."]:
    """Returns the latents at the end of the flow that starts at ``z``, those of `sampler.sample` with the same arguments.

    Latents, guidance, times and whatever the velocity holds or closes over may be traced; the number of steps, ``merge_steps``
    and the index of a static leap may not.  Outside ``jax.jit`` every call compiles anew::

        end = jax.jit(lambda z, guidance: sora_jax.integrate(velocity, z, schedule, guidance=guidance))
        slope = jax.grad(lambda guidance: end(z, guidance).sum())(3.0)

    Raises:
      TypeError: there is no such option.
      ValueError: as `sampler.sample`, and for the dynamic and the released leap.
    """
    sampling = Sampling.resolve(schedule, **options)
    check_velocity(velocity, sampling.needs())
    sampling.check_latents(z)
    video = as_video(velocity)

    def steps(carry: Carry, count: int, *, merged: bool) -> Carry:
        step: Callable[[Carry], Carry] = jax.checkpoint(
            lambda carry: take_step(sampling, video, carry, merged=merged),
            prevent_cse=False,  # a loop prevents it already
        )
        return jax.lax.scan(lambda carry, _: (step(carry), None), carry, length=count)[0]

    total = _num_steps(sampling)
    num_merged = 0 if sampling.merge_steps is None else min(int(sampling.merge_steps), total)
    carry = first_carry(sampling, video, jnp.asarray(z), recorded=False)
    carry = steps(carry, num_merged, merged=True) if num_merged else carry
    carry = steps(carry, total - num_merged, merged=False) if total > num_merged else carry
    return carry.z


def _num_steps(sampling: Sampling) -> int:
    """Returns the number of steps until every sample has leapt or arrived.

    Raises:
      ValueError: the velocities decide it.
    """
    leap = sampling.leap
    if leap is None:
        return num_steps_of(sampling.schedule)
    if leap.mode != "static":
        raise ValueError(
            f"integrate takes a fixed number of steps, but leap {leap.mode!r} decides by the velocities when to stop; "
            "use Leap.static, or sample."
        )
    if is_traced(leap.index):
        raise ValueError("integrate takes a fixed number of steps, but the leap's index is traced; close over it.")
    return int(np.max(leap.index)) + 1
