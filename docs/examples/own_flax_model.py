"""A Flax model of your own, trained as a rectified flow and sampled by the compiled sampler.

Command:  python docs/examples/own_flax_model.py
Takes:    half a minute on two cores.
Shows:    a ring of points learnt from noise; the distance of the samples from the ring.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import sora_jax


class Network(nnx.Module):
    """A velocity of points in the plane at a time from 1 (noise) to 0 (data)."""

    def __init__(self, rngs: nnx.Rngs):
        self.inner, self.outer = nnx.Linear(4, 128, rngs=rngs), nnx.Linear(128, 2, rngs=rngs)
        self.middle = nnx.Linear(128, 128, rngs=rngs)

    def __call__(self, z, t):
        """Returns the velocity [B, 2] from noise to data."""
        x = jnp.concatenate([z, jnp.cos(jnp.pi * t)[:, None], jnp.sin(jnp.pi * t)[:, None]], axis=1)
        return self.outer(nnx.silu(self.middle(nnx.silu(self.inner(x)))))


def ring(key, count):
    """Returns points of the unit circle."""
    angle = jax.random.uniform(key, (count,), maxval=2 * jnp.pi)
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)


graph, parameters = nnx.split(Network(nnx.Rngs(0)))
optimiser = optax.adam(2e-3)


def loss(parameters, key):
    """Returns how far the velocity is from data minus noise, on the straight lines between them."""
    keys = jax.random.split(key, 3)
    data, noise, t = ring(keys[0], 512), jax.random.normal(keys[1], (512, 2)), jax.random.uniform(keys[2], (512,))
    z = (1 - t)[:, None] * data + t[:, None] * noise
    return jnp.mean((nnx.merge(graph, parameters)(z, t) - (data - noise)) ** 2)


@jax.jit
def train(parameters, state, keys):
    """Returns parameters and optimiser state after a step for each key."""

    def step(carry, key):
        updates, state = optimiser.update(jax.grad(loss)(carry[0], key), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (parameters, state), keys)[0]


parameters, _ = train(parameters, optimiser.init(parameters), jax.random.split(jax.random.key(1), 3000))
schedule = sora_jax.Schedule.uniform(16, num_timesteps=1)
result = sora_jax.sample(nnx.merge(graph, parameters), jax.random.normal(jax.random.key(2), (1000, 2)), schedule, solver="ab2")
distance = jnp.abs(jnp.linalg.norm(result.z, axis=1) - 1)
print(f"{result.batch_evaluations:.0f} evaluations; median distance from the ring {jnp.median(distance):.3f}")
assert jnp.median(distance) < 0.1
