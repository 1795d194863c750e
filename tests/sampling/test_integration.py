"""Sampling as a pure function: the latents of `sample` to the bit, under jit, vmap and grad, with the right gradients."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import sora_jax
from sora_jax import Leap, Pipeline, Plan, Schedule, integrate, sample
from sora_jax.pipeline.run import Generation
from sora_jax.process import Timings
from sora_jax.sampling.sampler import Sampler
from tests.support.oracle_state import FULL, HALF, REUSE
from tests.support.oracle_velocity import Wavy

SHAPE = (2, 4, 3, 4, 2)
Z = jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32)
VELOCITY = Wavy(jnp.asarray([0.3, -0.8, 0.1, 0.5]))
SCHEDULE = Schedule.uniform(6, shift=2.0)
MASKED = {
    "frame_weights": np.asarray([[1, 0.5, 0, 0.7], [1, 1, 0.3, 1]], np.float32),
    "noise_per_step": np.random.default_rng(3).standard_normal((6, *SHAPE)).astype(np.float32),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "euler": {},
    "guided ab2": {"guidance": 3.0, "solver": "ab2"},
    "heun merged": {"solver": "heun", "merge_steps": 2},
    "dpmpp leap": {"solver": "dpmpp", "guidance": 2.0, "leap": Leap.static(3, extrapolate=True)},
    "all merged, leap": {"merge_steps": 9, "leap": Leap.static(2)},
    "plan": {"guidance": 2.0, "plan": Plan(codes=(FULL, REUSE, HALF, REUSE, FULL, HALF))},
    "masked": {"guidance": 2.0, **MASKED, "merge_steps": 1, "solver": "ab2"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_latents_are_those_of_sample_to_the_bit(name: str) -> None:
    options = OPTIONS[name]
    expected = sample(VELOCITY, Z, SCHEDULE, **options)
    got = jax.jit(lambda velocity, z: integrate(velocity, z, SCHEDULE, **options))(VELOCITY, Z)
    np.testing.assert_array_equal(got, expected.z)


def test_the_toy_flow_to_the_bit() -> None:
    mean, width = jnp.asarray([[0.7, -1.2]]), jnp.asarray([[0.3, 1.6]])

    def velocity(z: jax.Array, t: jax.Array) -> jax.Array:
        t = t[:, None]
        return mean - (t - (1 - t) * width**2) / (((1 - t) * width) ** 2 + t**2) * (z - (1 - t) * mean)

    noise, schedule = jax.random.normal(jax.random.key(0), (1000, 2)), Schedule.uniform(16, num_timesteps=1)
    for options in ({}, {"solver": "ab2"}, {"solver": "dpmpp"}, {"leap": Leap.static(9)}):
        got = jax.jit(lambda z, options=options: integrate(velocity, z, schedule, **options))(noise)
        np.testing.assert_array_equal(got, sample(velocity, noise, schedule, **options).z)


@pytest.mark.slow
def test_the_embedded_model_to_the_bit() -> None:
    pipe = Pipeline.from_pretrained()
    settings = pipe.resolve({"num_steps": 3, "num_frames": 17, "guidance": 3.0})
    generation = Generation(pipe.networks, pipe.tokenizer, settings, Timings(), None)
    captions, mask, z, _ = generation.prepare(pipe.read("a red circle moves right", settings))
    schedule = Schedule.open_sora(3, height_px=settings.height, width_px=settings.width, num_frames=settings.num_frames)
    with pipe.networks.use("stdit3", "float32", generation.timings) as stdit3:
        velocity = generation.velocity(stdit3, captions, mask)
        expected = sample(velocity, jnp.asarray(z), schedule, guidance=3.0).z
        got = jax.jit(lambda velocity, z: integrate(velocity, z, schedule, guidance=3.0))(velocity, jnp.asarray(z))
    np.testing.assert_array_equal(got, expected)


def test_samples_and_settings_may_be_mapped() -> None:
    """vmap over latents, guidance and weights, against single samplings."""
    scales = jnp.asarray([1.5, 4.0])
    biases = jnp.stack([VELOCITY.bias_R, -VELOCITY.bias_R])

    def one(z: jax.Array, guidance: jax.Array, bias_R: jax.Array) -> jax.Array:
        return integrate(Wavy(bias_R), z, SCHEDULE, guidance=guidance, solver="ab2", merge_steps=2)

    got = jax.jit(jax.vmap(one))(jnp.stack([Z, 2 * Z]), scales, biases)
    for i, factor in enumerate((1, 2)):
        alone = sample(Wavy(biases[i]), factor * Z, SCHEDULE, guidance=scales[i], solver="ab2", merge_steps=2).z
        np.testing.assert_allclose(got[i], alone, rtol=0, atol=2e-6)


GRADIENTS: dict[str, dict[str, Any]] = {
    "euler": {},
    "ab2 merged": {"solver": "ab2", "merge_steps": 2},
    "dpmpp": {"solver": "dpmpp"},
    "heun leap": {"solver": "heun", "leap": Leap.static(4)},
    "plan": {"plan": Plan(codes=(FULL, REUSE, HALF, REUSE, FULL, REUSE)), "solver": "ab2"},
    "masked": {**MASKED, "leap": Leap.static(5, extrapolate=True)},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.ci if name in ("dpmpp", "heun leap", "plan") else ()) for name in GRADIENTS]
)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """With respect to guidance, latents and the velocity's own weights, along a random direction, in float64."""
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        options = GRADIENTS[name]
        goal = jnp.asarray(rng.standard_normal(SHAPE))
        at = {
            "guidance": jnp.asarray(2.5),
            "z": jnp.asarray(Z, jnp.float64),
            "bias_R": jnp.asarray(VELOCITY.bias_R, jnp.float64),
        }

        @jax.jit
        def loss(at: dict[str, jax.Array]) -> jax.Array:
            end = integrate(Wavy(at["bias_R"]), at["z"], SCHEDULE, guidance=at["guidance"], **options)
            assert end.dtype == jnp.float64
            return jnp.sum((end - goal) ** 2)

        gradient = jax.jit(jax.grad(loss))(at)
        for input_name in at:
            direction = jnp.asarray(rng.standard_normal(at[input_name].shape))
            step = 1e-5
            ahead, behind = ({**at, input_name: at[input_name] + sign * step * direction} for sign in (1, -1))
            expected = float(loss(ahead) - loss(behind)) / (2 * step)
            assert float(jnp.sum(gradient[input_name] * direction)) == pytest.approx(expected, rel=1e-4), input_name


def test_gradients_keep_the_latents_between_steps_only() -> None:
    """What a step's velocity computes is computed again: nothing as wide as its hidden layer is stored for every step."""
    wide = 512

    def loss(kernel: jax.Array, z: jax.Array) -> jax.Array:
        return integrate(lambda z, t_B: jnp.tanh(z @ kernel) @ kernel.T, z, Schedule.uniform(20)).sum()

    kernel, z = jnp.ones((4, wide)) / 40, jnp.ones((8, 4))
    shapes = {value.aval.shape for value in _values(jax.make_jaxpr(jax.grad(loss))(kernel, z).jaxpr)}
    assert (20, 8, 4) in shapes, "the latents of every step are kept"
    assert (8, wide) in shapes
    assert (20, 8, wide) not in shapes


def _values(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _values(inner)


@pytest.mark.parametrize("leap", [Leap.dynamic(), Leap.released()])
def test_a_leap_that_waits_for_the_velocities_is_refused(leap: Leap) -> None:
    with pytest.raises(ValueError, match=f"leap '{leap.mode}' decides by the velocities when to stop; use Leap.static"):
        integrate(VELOCITY, Z, SCHEDULE, leap=leap)


def test_a_traced_number_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="the schedule's number of steps is traced"):
        jax.jit(lambda schedule: integrate(VELOCITY, Z, schedule))(SCHEDULE)


@pytest.mark.parametrize(
    "call",
    [
        lambda: jax.jit(lambda z: sample(VELOCITY, z, SCHEDULE).z)(Z),
        lambda: jax.vmap(lambda z: sample(VELOCITY, z[None], SCHEDULE).z)(Z),
        lambda: jax.grad(lambda guidance: sample(VELOCITY, Z, SCHEDULE, guidance=guidance).z.sum())(2.0),
        lambda: jax.grad(lambda bias: sample(Wavy(bias), Z, SCHEDULE).z.sum())(VELOCITY.bias_R),
        lambda: jax.grad(lambda scale: sample(lambda z, t_B: z * scale, Z, SCHEDULE).z.sum())(2.0),
        lambda: jax.jit(lambda: sample(VELOCITY, jnp.zeros(SHAPE), SCHEDULE).z)(),
        lambda: jax.jit(lambda z: sample(VELOCITY, z, SCHEDULE, callback=print).z)(Z),
        lambda: jax.jit(lambda z: list(Sampler.create(VELOCITY, SCHEDULE).steps(z)))(Z),
        lambda: jax.jit(lambda z: sora_jax.calibrate(VELOCITY, z, SCHEDULE).error_NN)(Z),
    ],
    ids=["jit", "vmap", "grad guidance", "grad weights", "grad closure", "jit constant", "callback", "steps", "calibrate"],
)
def test_what_reads_on_the_host_names_integrate(call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=re.escape("use sora_jax.integrate, which returns the latents")) as fault:
        call()
    assert "\n" not in str(fault.value)


def test_both_packages_name_it() -> None:
    assert sora_jax.integrate is sora_jax.sampling.integrate is integrate


@dataclasses.dataclass
class Own:
    """A plain object with weights."""

    weight: Any

    def __call__(self, z: jax.Array, t_B: jax.Array) -> jax.Array:
        return self.weight * jnp.sin(z)


def test_plain_objects_and_closures_may_be_differentiated() -> None:
    def end(weight: jax.Array, how: Callable[[jax.Array], Any]) -> jax.Array:
        return integrate(how(weight), Z, SCHEDULE).sum()

    ways = [Own, lambda weight: lambda z, t_B: weight * jnp.sin(z)]
    slopes = [float(jax.grad(end)(jnp.asarray(0.3), how)) for how in ways]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-6)
    assert abs(slopes[0]) > 1e-3
