"""From a step's velocity to its next latents: Euler's step, what the solver adds to it, or a leap to the end.

Invariant: only samples and frames with a usable past are corrected by it; all others take Euler's step.  Which past is
usable is decided by the step.

Multistep solvers that look further back than the last step remember more: a `History`.  AB3 and UniPC first correct the latents
they start from, by the velocity just evaluated there, at no further evaluation.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sora_jax.sampling import solvers
from sora_jax.sampling.evaluation import guided_velocity
from sora_jax.sampling.joining import expand
from sora_jax.sampling.options import Sampling
from sora_jax.sampling.state import Carry, History
from sora_jax.sampling.velocity import Point


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moved:
    """Latents after a step, evaluations of the solver's own, and what it remembers."""

    z: Float[Array, "B ..."]
    cost: Float[Array, ""]
    history: History | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Times:
    """Flow times of the step, of the one before it and of the one after it."""

    before: Array
    now: Array
    next: Array


def first_history(sampling: Sampling, z: Float[Array, "B ..."], active_BT: Bool[Array, "B T"] | None) -> History | None:
    """Returns what is remembered before the first step; None where the solver needs the last step only."""
    if sampling.solver not in ("ab3", "unipc"):
        return None
    age = jnp.zeros(() if active_BT is None else active_BT.shape, jnp.int32)
    return History(age=age, older=jnp.zeros_like(z), base=jnp.zeros_like(z) if sampling.solver == "unipc" else None)


def move(
    sampling: Sampling,
    carry: Carry,
    at: Point,
    v: Float[Array, "B ..."],
    *,
    leaps_B: Bool[Array, "B"],
    has_history: Bool[Array, ""],
    joining_BT: Bool[Array, "B T"] | None,
    guided: Bool[Array, ""],
) -> Moved:
    """Returns the latents one step on, or at the end where a sample leaps."""
    times = jnp.asarray(sampling.schedule.times) / sampling.schedule.num_timesteps
    t = _Times(before=times[carry.step - 1], now=times[carry.step], next=times[carry.step + 1])
    leaps = expand(leaps_B, v)
    moved = at.z + v * jnp.where(leaps, t.now, t.now - t.next)
    if joining_BT is not None:
        has_history &= ~joining_BT
    usable = expand(has_history, v) if joining_BT is not None else has_history

    correction, cost, history = jnp.zeros_like(v), jnp.asarray(0.0, jnp.float32), None
    if sampling.solver == "ab2":
        correction = solvers.ab2_correction(v, carry.v, t_before=t.before, t=t.now, t_next=t.next)
        correction = jnp.where(usable, correction, 0)
    elif sampling.solver == "dpmpp":
        correction = jnp.where(usable, _dpmpp(carry, at.z, v, t), 0)
    elif sampling.solver == "heun":
        idle_B = carry.done_B | leaps_B
        if sampling.guidance is not None and sampling.guidance.varies:
            idle_B |= sampling.guidance.stands_still(carry.step)
        correction, cost = _heun_correction(sampling, at, v, t, idle_B, guided)
    elif carry.history is not None:
        age = jnp.where(has_history, jnp.minimum(carry.history.age + 1, 2), 0)
        advance = _ab3 if sampling.solver == "ab3" else _unipc
        correction, history = advance(carry, carry.history, at.z, v, t, age, times[carry.step - 2])

    to_end = jnp.zeros_like(v)
    if sampling.leap is not None and sampling.leap.extrapolate:
        to_end = solvers.ab2_correction(v, carry.v, t_before=t.before, t=t.now, t_next=jnp.zeros_like(t.now))
        to_end = jnp.where(usable, to_end, 0)
    return Moved(z=moved + jnp.where(leaps, to_end, correction), cost=cost, history=history)


def _dpmpp(carry: Carry, z: Array, v: Array, t: _Times) -> Array:
    data, data_before = z + t.now * v, carry.z_in + t.before * carry.v
    return solvers.dpmpp_correction(data, data_before, t_before=t.before, t=t.now, t_next=t.next)


def _ab3(carry: Carry, history: History, z: Array, v: Array, t: _Times, age: Array, t_older: Array) -> tuple[Array, History]:
    """Returns what AB3 adds: Euler's first step is made good by the trapezoid, the second step is AB2's."""
    like = _expanded(age, v)
    second = solvers.ab2_correction(v, carry.v, t_before=t.before, t=t.now, t_next=t.next)
    third = solvers.ab3_correction(v, carry.v, history.older, t_older=t_older, t_before=t.before, t=t.now, t_next=t.next)
    start = solvers.trapezoid_correction(v, carry.v, t_before=t.before, t=t.now)
    correction = jnp.where(like == 0, 0, jnp.where(like == 1, start + second, third))
    return correction, History(age=age, older=carry.v, base=None)


def _unipc(carry: Carry, history: History, z: Array, v: Array, t: _Times, age: Array, t_older: Array) -> tuple[Array, History]:
    """Returns what UniPC adds: the corrected start, carried on, and the second-order term of the step itself."""
    assert history.base is not None
    like = _expanded(age, v)
    data, data_before = z + t.now * v, carry.z_in + t.before * carry.v
    corrected = solvers.unic_corrected(
        history.base, data, data_before, history.older, t_older=t_older, t_before=t.before, t=t.now, second_order=like > 1
    )
    base = jnp.where(like > 0, corrected, z)
    ahead = jnp.where(like > 0, _dpmpp(carry, z, v, t), 0)
    return (base - z) * (t.next / t.now) + ahead, History(age=age, older=data_before, base=base)


def _expanded(age: Array, like: Array) -> Array:
    return expand(age, like) if age.ndim else age


def _heun_correction(sampling: Sampling, at: Point, v: Array, t: _Times, idle_B: Array, guided: Array) -> tuple[Array, Array]:
    """Returns the trapezoid's term and its further evaluation; the last step, to t = 0, is Euler's and costs none."""

    def corrected() -> Array:
        ahead = dataclasses.replace(at, z=at.z + v * (t.now - t.next), t=t.next * sampling.schedule.num_timesteps)
        v_next = guided_velocity(sampling, ahead, guided=guided)
        return (v_next - v) * ((t.now - t.next) / 2)

    wanted = (t.next > 0) & ~jnp.all(idle_B)
    correction = jax.lax.cond(wanted, corrected, lambda: jnp.zeros_like(v))
    if sampling.guidance is None or sampling.guidance.low is None:
        return correction, wanted.astype(jnp.float32)
    return correction, jnp.where(wanted, jnp.where(guided, 1.0, 0.5), 0).astype(jnp.float32)
