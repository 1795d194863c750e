"""Solvers on flows whose solution is known: order of convergence, and what each integrates exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.sampling.leap import Leap
from sora_jax.sampling.sampler import Sampler, sample
from sora_jax.sampling.schedule import Schedule
from sora_jax.sampling.solvers import SOLVERS

pytestmark = pytest.mark.usefixtures("little_optimised")

MEAN, WIDTH = jnp.asarray([[0.7, -1.2]]), jnp.asarray([[0.3, 1.6]])
NOISE = jnp.asarray(np.random.default_rng(3).standard_normal((4, 2)), jnp.float32)


def gaussian_velocity(z: jax.Array, t_B: jax.Array) -> jax.Array:
    """The exact velocity for Gaussian data: paths keep their standard score, so noise n ends at MEAN + WIDTH n."""
    t = t_B[:, None] / 1000
    variance = ((1 - t) * WIDTH) ** 2 + t**2
    slope = (t - (1 - t) * WIDTH**2) / variance
    return MEAN - slope * (z - (1 - t) * MEAN)


def exact(t: float) -> jax.Array:
    return (1 - t) * MEAN + jnp.sqrt(((1 - t) * WIDTH) ** 2 + t**2) * NOISE


def error(solver: str, num_steps: int, shift: float = 1.0) -> float:
    end = sample(gaussian_velocity, NOISE, Schedule.uniform(num_steps, shift=shift), solver=solver).z
    return float(jnp.abs(end - exact(0)).max())


def error_in_log_snr(solver: str, num_steps: int) -> float:
    """The error between t = 0.98 and t = 0.02, at times whose log signal-to-noise ratios are equally spaced."""
    times = 1000 / (1 + np.exp(np.linspace(np.log(0.02 / 0.98), np.log(0.98 / 0.02), num_steps + 1)))
    sampler = Sampler.create(gaussian_velocity, Schedule.from_times(times), solver=solver)
    reached = sampler.run(sampler.start(exact(0.98)), num_steps).z
    return float(jnp.abs(reached - exact(0.02)).max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2), ("heun", 2), ("dpmpp", 2), ("unipc", 3), ("ab3", 3)])
def test_order_of_convergence(solver: str, order: int) -> None:
    """UniPC with a predictor of order 2 is of order 3, as its paper has it: the corrector adds one."""
    coarse, fine = error_in_log_snr(solver, 32), error_in_log_snr(solver, 128)
    assert np.log2(coarse / fine) / 2 == pytest.approx(order, abs=0.2)


# "dpmpp" and "unipc" have their order in log-SNR, which is infinite at both ends of the whole path: no clean order there.
@pytest.mark.parametrize(
    ("solver", "order", "shift", "steps"),
    [
        *((solver, order, shift, 32) for shift in (1.0, 2.5) for solver, order in (("euler", 1), ("ab2", 2), ("heun", 2))),
        ("ab3", 3, 1.0, 16),  # at a shift of 2.5 its error changes sign near 16 steps
    ],
)
def test_order_of_convergence_from_noise_to_data(solver: str, order: int, shift: float, steps: int) -> None:
    coarse, fine = error(solver, steps, shift), error(solver, 4 * steps, shift)
    assert np.log2(coarse / fine) / 2 == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("solver", ["ab2", "ab3", "heun", "dpmpp", "unipc"])
def test_higher_order_is_better_than_euler_at_equal_evaluations(solver: str) -> None:
    steps = 8 if solver == "heun" else 16
    assert error(solver, steps) < 0.5 * error("euler", 16)


def linear_velocity(z: jax.Array, t_B: jax.Array) -> jax.Array:
    return jnp.broadcast_to((1 + 3 * t_B / 1000)[:, None], z.shape)


def constant_velocity(z: jax.Array, t_B: jax.Array) -> jax.Array:
    return jnp.ones_like(z) * jnp.asarray([2.0, -1.0])[None]


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_is_exact_for_constant_velocity(solver: str) -> None:
    end = sample(constant_velocity, NOISE, Schedule.uniform(7, shift=3.0), solver=solver).z
    np.testing.assert_allclose(end, NOISE + jnp.asarray([[2.0, -1.0]]), rtol=0, atol=2e-6)  # 7 additions in float32


def test_ab2_integrates_velocity_linear_in_time_exactly_over_unequal_steps() -> None:
    """All error is that of the first step, which is Euler's: h^2 / 2 times the slope 3."""
    times = np.asarray([1000.0, 900.0, 850.0, 500.0, 333.0, 40.0])
    end = sample(linear_velocity, NOISE, Schedule.from_times(times), solver="ab2").z
    exact = 1 + 3 / 2
    first_step_error = 3 * 0.1**2 / 2
    np.testing.assert_allclose(end - NOISE, exact + first_step_error, rtol=0, atol=3e-6)


def test_ab3_integrates_velocity_quadratic_in_time_exactly_but_for_its_start() -> None:
    """The first step is the trapezoid's, the second AB2's; their errors are h^3 / 12 and that of a parabola left out."""
    times = np.asarray([1000.0, 900.0, 850.0, 500.0, 333.0, 40.0])

    def quadratic(z: jax.Array, t_B: jax.Array) -> jax.Array:
        return jnp.broadcast_to((3 * (t_B / 1000) ** 2)[:, None], z.shape)

    end = sample(quadratic, NOISE, Schedule.from_times(times), solver="ab3").z
    trapezoid = 0.1 / 2 * (3 * 1.0**2 + 3 * 0.9**2) - (1.0**3 - 0.9**3)
    slope = (3 * 1.0**2 - 3 * 0.9**2) / 0.1
    second = 0.05 * 3 * 0.9**2 - slope * 0.05**2 / 2 - (0.9**3 - 0.85**3)
    np.testing.assert_allclose(end - NOISE, 1 + trapezoid + second, rtol=0, atol=3e-6)


def test_leap_moves_by_the_remaining_time() -> None:
    """Equation 5 of the paper with times that are not uniform: the leap of step n adds v_n t_n."""
    schedule = Schedule.uniform(10, shift=3.0)
    z = NOISE
    for i in range(4):
        z = z + linear_velocity(z, jnp.full(4, schedule.visited[i])) * (schedule.visited[i] - schedule.visited[i + 1]) / 1000
    expected = z + linear_velocity(z, jnp.full(4, schedule.visited[4])) * schedule.visited[4] / 1000
    result = sample(linear_velocity, NOISE, schedule, leap=Leap.static(4))
    np.testing.assert_allclose(result.z, expected, rtol=0, atol=2e-6)
    assert result.batch_evaluations == 5


def test_extrapolated_leap_is_exact_for_velocity_linear_in_time() -> None:
    schedule = Schedule.uniform(10, shift=3.0)
    reached = sample(linear_velocity, NOISE, schedule, leap=Leap.static(4, extrapolate=True)).z
    euler_part = sum(3 * ((a - b) / 1000) ** 2 / 2 for a, b in zip(schedule.visited[:4], schedule.visited[1:5], strict=True))
    np.testing.assert_allclose(reached - NOISE, 2.5 + euler_part, rtol=0, atol=3e-6)


@pytest.mark.parametrize("solver", [pytest.param(name, marks=pytest.mark.ci) for name in ("ab3", "dpmpp")] + ["ab2", "unipc"])
def test_solvers_restart_where_merging_ends(solver: str) -> None:
    """A velocity that jumps with the merge switch is constant in each phase, so nothing may be extrapolated over it."""

    class Jumping:
        def evaluate(self, z: jax.Array, t_B: jax.Array, *, frame_mask_BT: None, merged: bool) -> jax.Array:
            return jnp.full_like(z, 5.0 if merged else 1.0)

    end = sample(Jumping(), NOISE, Schedule.uniform(8), solver=solver, merge_steps=3).z
    np.testing.assert_allclose(end - NOISE, 3 / 8 * 5 + 5 / 8, rtol=0, atol=2e-6)


def test_unknown_solver_is_named() -> None:
    with pytest.raises(ValueError, match="solver 'rk45' is unknown; expected one of euler, ab2, ab3, dpmpp, unipc, heun"):
        sample(constant_velocity, NOISE, Schedule.uniform(3), solver="rk45")
