"""Reuse plans and their calibration: what is computed, what it costs, and that the chosen plan is the cheapest."""

import dataclasses
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.config import pocket
from sora_jax.networks.stdit3 import STDiT3
from sora_jax.pipeline.velocity import Velocity
from sora_jax.sampling.calibration import Calibration, calibrate
from sora_jax.sampling.reuse import FULL, HALF, REUSE, Plan
from sora_jax.sampling.sampler import sample
from sora_jax.sampling.schedule import Schedule
from tests.support.oracle_velocity import Wavy

pytestmark = pytest.mark.usefixtures("little_optimised")

SHAPE = (2, 4, 3, 4, 2)
Z = jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32)
BIAS = jnp.asarray([0.3, -0.8, 0.1, 0.5])
SCHEDULE = Schedule.uniform(8, shift=2.0)


VELOCITY = Wavy(BIAS)


def test_a_plan_of_full_steps_changes_no_bit() -> None:
    full = Plan.evaluate_at(range(8), 8)
    plain = sample(VELOCITY, Z, SCHEDULE, guidance=3.0)
    np.testing.assert_array_equal(sample(VELOCITY, Z, SCHEDULE, guidance=3.0, plan=full).z, plain.z)


def test_held_velocity_is_a_longer_euler_step() -> None:
    """Holding the velocity from step i to step j is Euler from t_i to t_j: a plan of 4 is the schedule of 4 times."""
    chosen = [0, 2, 3, 6]
    held = sample(VELOCITY, Z, SCHEDULE, plan=Plan.evaluate_at(chosen, 8, keep="velocity"))
    coarse = sample(VELOCITY, Z, Schedule.from_times(SCHEDULE.visited[chosen]))
    np.testing.assert_allclose(held.z, coarse.z, rtol=0, atol=2e-6)
    assert held.batch_evaluations == coarse.batch_evaluations == 4


def test_nothing_kept_crosses_the_end_of_merging() -> None:
    plan = Plan.evaluate_at([0], 8)
    result = sample(VELOCITY, Z, SCHEDULE, plan=plan, merge_steps=3)
    assert np.flatnonzero(result.trace.evaluations_N).tolist() == [0, 3]
    explicit = sample(VELOCITY, Z, SCHEDULE, plan=Plan.evaluate_at([0, 3], 8), merge_steps=3)
    np.testing.assert_array_equal(result.z, explicit.z)


def test_half_steps_cost_half_and_are_exact_where_guidance_does_not_change() -> None:
    def parallel(z: jax.Array, t_R: jax.Array) -> jax.Array:
        row = jnp.arange(len(z)).reshape(-1, 1, 1, 1, 1)
        return jnp.sin(t_R / 500).reshape(-1, 1, 1, 1, 1) - 0.3 * jnp.where(row < SHAPE[0], 2.0, -1.0) + 0 * z

    half = Plan(codes=(FULL, *[HALF] * 7), keep="velocity")
    got = sample(parallel, Z, SCHEDULE, guidance=5.0, plan=half)
    np.testing.assert_allclose(got.z, sample(parallel, Z, SCHEDULE, guidance=5.0).z, rtol=0, atol=1e-5)
    assert got.batch_evaluations == half.evaluations == 4.5
    assert got.trace.evaluations_N.tolist() == [1.0, *[0.5] * 7]
    assert got.trace.reused_N.tolist() == [False, *[True] * 7]


def test_plans_are_made_as_named() -> None:
    plan = Plan.evaluate_at([0, 1, 3, 5, 6], 8)
    assert plan.codes == (FULL, FULL, REUSE, FULL, REUSE, FULL, FULL, REUSE)
    assert plan.with_half_steps(2).codes == (FULL, FULL, REUSE, HALF, REUSE, HALF, HALF, REUSE)
    assert plan.with_half_steps(0).codes == (FULL, HALF, REUSE, HALF, REUSE, HALF, HALF, REUSE)
    assert plan.with_half_steps(2).evaluations == 3.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan(codes=(0, 3)), "plan has the codes [3]; expected 0 (full), 1 (reuse) or 2 (half)"),
        (lambda: Plan(codes=(1, 0)), "plan does not begin with a full evaluation"),
        (lambda: Plan(codes=()), "plan does not begin with a full evaluation"),
        (lambda: Plan.evaluate_at([0, 9], 8), "plan evaluates at the steps [9]; expected steps from 0 to 7"),
        (lambda: Plan(codes=(0, 2), halves=False), "plan has half steps but halves=False"),
    ],
)
def test_bad_plans_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def brute_force(error_NN: np.ndarray, evaluations: int) -> float:
    def total(chosen: tuple[int, ...]) -> float:
        ends = [*chosen[1:], len(error_NN)]
        return sum(error_NN[i, j] for i, end in zip(chosen, ends, strict=True) for j in range(i + 1, end))

    others = itertools.combinations(range(1, len(error_NN)), evaluations - 1)
    return min(total((0, *chosen)) for chosen in others)


def test_calibrated_plans_are_the_cheapest_of_all() -> None:
    calibration = calibrate(VELOCITY, Z, SCHEDULE, guidance=2.0)
    for evaluations in range(1, 9):
        plan = calibration.plan(evaluations)
        assert plan.evaluations == evaluations
        chosen = [i for i, code in enumerate(plan.codes) if code == FULL]
        ends = [*chosen[1:], 8]
        total = sum(calibration.error_NN[i, j] for i, end in zip(chosen, ends, strict=True) for j in range(i + 1, end))
        assert total == pytest.approx(brute_force(calibration.error_NN, evaluations), rel=1e-12)


@pytest.mark.parametrize("keep", ["residual", "velocity"])
def test_measured_error_is_the_shift_of_one_reused_step(keep: Any) -> None:
    """A full run to step j, then one reused step from what step j - 1 kept, differs by just error[j - 1, j]."""
    calibration = calibrate(VELOCITY, Z, SCHEDULE, guidance=2.0, keep=keep)
    truth: list[Any] = []
    sample(VELOCITY, Z, SCHEDULE, guidance=2.0, callback=lambda carry: truth.append(carry.z))
    for j in (1, 4, 7):
        reused: list[Any] = []
        codes = tuple(REUSE if i == j else FULL for i in range(8))
        plan = Plan(codes=codes, keep=keep)
        sample(VELOCITY, Z, SCHEDULE, guidance=2.0, plan=plan, callback=lambda carry, to=reused: to.append(carry.z))
        shift = float(jnp.sqrt(jnp.mean((reused[j] - truth[j]) ** 2)))
        assert calibration.error_NN[j - 1, j] == pytest.approx(shift, rel=1e-3)


def test_calibration_evaluates_where_reuse_is_barred() -> None:
    weights = np.asarray([[1, 1, 0.5, 1]] * 2, np.float32)
    calibration = calibrate(VELOCITY, Z, SCHEDULE, merge_steps=2, frame_weights=weights)
    joins = int(np.argmax(SCHEDULE.visited <= 500))
    plan = calibration.plan(4)
    assert {0, 2, joins} < {i for i, code in enumerate(plan.codes) if code == FULL}
    with pytest.raises(ValueError, match="no plan has 2 evaluations; expected 3 to 8"):
        calibration.plan(2)
    with pytest.raises(ValueError, match="no plan has 9 evaluations; expected 3 to 8"):
        calibration.plan(9)
    sample(VELOCITY, Z, SCHEDULE, plan=plan, merge_steps=2, frame_weights=weights)


def test_a_plan_in_letters() -> None:
    assert Plan(codes=(FULL, REUSE, HALF, REUSE)).letters == "FRHR"


def test_a_step_in_which_a_frame_joins_is_evaluated_whatever_the_plan_says() -> None:
    weights = np.asarray([[1, 1, 0.5, 1]] * 2, np.float32)
    joins = int(np.argmax(SCHEDULE.visited <= 500))
    sparse, full = Plan.evaluate_at([0, 2], 8), Plan.evaluate_at([0, 2, joins], 8)
    assert full.evaluations == sparse.evaluations + 1
    found = sample(VELOCITY, Z, SCHEDULE, plan=sparse, frame_weights=weights)
    expected = sample(VELOCITY, Z, SCHEDULE, plan=full, frame_weights=weights)
    np.testing.assert_array_equal(found.z, expected.z)
    np.testing.assert_array_equal(found.evaluations_B, 3)


def test_ties_and_zero_errors_still_use_every_evaluation() -> None:
    error_NN = np.where(np.triu(np.ones((5, 5)), 1) > 0, 0.0, np.inf)
    assert Calibration(error_NN=error_NN, keep="residual").plan(3).evaluations == 3


@pytest.fixture(scope="module")
def transformer() -> Velocity:
    config = dataclasses.replace(pocket.stdit3, hidden_size=16, num_heads=2, depth=1, caption_channels=8)

    abstract = jax.eval_shape(lambda: STDiT3(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    network = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), abstract)
    sizes = {"fps": jnp.asarray([24.0]), "height_px": jnp.asarray([64.0]), "width_px": jnp.asarray([64.0])}
    caption = jnp.asarray(rng.standard_normal((4, 3, 8)), jnp.float32)
    return Velocity(network=network, caption_RLE=caption, mask_BL=None, **sizes)


def test_the_residual_of_the_block_stack_stands_for_it(transformer: Velocity) -> None:
    z, t = jnp.asarray(np.random.default_rng(4).standard_normal((4, 2, 4, 4, 4)), jnp.float32), jnp.full(4, 600.0)

    @jax.jit
    def evaluate(velocity: Velocity) -> tuple[jax.Array, ...]:
        v, residual = velocity.evaluate_keeping(z, t)
        reused = velocity.reuse(z, t, residual)
        conditional = velocity.evaluate(z[:2], t[:2])
        return v, reused, conditional, velocity.evaluate(z, 0.9 * t), velocity.reuse(z, 0.9 * t, residual)

    v, reused, conditional, later, later_reused = evaluate(transformer)
    np.testing.assert_allclose(reused, v, rtol=0, atol=1e-5)
    np.testing.assert_allclose(conditional, v[:2], rtol=0, atol=1e-5)
    assert 1e-4 < jnp.abs(later - later_reused).max() < jnp.abs(later - v).max()


@pytest.mark.ci
def test_plans_drive_the_transformer(transformer: Velocity) -> None:
    """One full, one reused and one half step, against the three evaluations written out."""
    z = jnp.asarray(np.random.default_rng(4).standard_normal((2, 2, 4, 4, 4)), jnp.float32)
    times = [1000.0, 600.0, 300.0]
    got = sample(transformer, z, Schedule.from_times(times), guidance=2.0, plan=Plan(codes=(FULL, REUSE, HALF)))

    @jax.jit
    def written_out(velocity: Velocity, z: jax.Array) -> jax.Array:
        def both(z: jax.Array, t: float) -> tuple[jax.Array, jax.Array]:
            return jnp.concatenate([z, z]), jnp.full(4, t)

        rows, residual = velocity.evaluate_keeping(*both(z, times[0]))
        difference = rows[:2] - rows[2:]
        z = z + (rows[2:] + 2 * difference) * 0.4
        rows = velocity.reuse(*both(z, times[1]), residual)
        z = z + (rows[2:] + 2 * (rows[:2] - rows[2:])) * 0.3
        return z + (velocity.evaluate(z, jnp.full(2, times[2])) + difference) * 0.3

    np.testing.assert_allclose(got.z, written_out(transformer, z), rtol=0, atol=2e-5)  # float32 network, values near 5
    assert got.evaluations_B.tolist() == [1.5, 1.5]
