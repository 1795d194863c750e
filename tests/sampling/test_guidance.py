"""Guidance rules: what each does to two known velocities, what it costs, and which combinations are refused."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import Guidance, Leap, Plan, Schedule, calibrate, sample
from sora_jax.sampling.guidance import GuidanceRule
from sora_jax.sampling.reuse import FULL, HALF, KINDS, REUSE
from tests.support.oracle_velocity import Wavy

pytestmark = pytest.mark.usefixtures("little_optimised")

SHAPE = (2, 4, 2, 4, 2)  # of no other module whose programs are optimised as users have them
RNG = np.random.default_rng(0)
Z = jnp.asarray(RNG.standard_normal(SHAPE), jnp.float32)
C, U = (jnp.asarray(RNG.standard_normal(SHAPE), jnp.float32) for _ in "cu")
VELOCITY = Wavy(jnp.asarray([0.3, -0.8, 0.1, 0.5]))
SCHEDULE = Schedule.uniform(10)
TIMES = SCHEDULE.visited / 1000


def rule(*args: Any, **options: Any) -> GuidanceRule:
    return Guidance(*args, **options).rule()


def kinds(result: Any) -> list[str]:
    return [KINDS[kind] for kind in result.trace.kind_N]


def test_zero_star_scales_by_the_best_multiple_of_the_unconditional() -> None:
    """The guided velocity of scale 0 is the multiple of u nearest to c: what is left of c is at right angles to u."""
    nearest = rule(0.0, zero_star=True).combine(C, U, None)
    for b in range(2):
        assert float(jnp.sum((C[b] - nearest[b]) * U[b])) == pytest.approx(0, abs=1e-3)
        assert float(jnp.std(nearest[b] / U[b])) < 1e-5
    parallel = rule(7.0, zero_star=True).combine(C, -0.3 * C, None)
    np.testing.assert_allclose(parallel, C, rtol=0, atol=1e-5)  # nothing is left to guide by


def test_rescaling_gives_the_spread_of_the_conditional_back() -> None:
    plain = rule(5.0).combine(C, U, None)
    whole = rule(5.0, rescale=1.0).combine(C, U, None)
    for b in range(2):
        assert float(jnp.std(whole[b])) == pytest.approx(float(jnp.std(C[b])), rel=1e-5)
    np.testing.assert_array_equal(rule(5.0, rescale=0.0).combine(C, U, None), plain)
    half = rule(5.0, rescale=0.5).combine(C, U, None)
    np.testing.assert_allclose(half, (whole + plain) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"zero_star": True}, {"rescale": 0.7}])
def test_only_sampled_frames_count(options: dict[str, Any]) -> None:
    active = jnp.asarray([[True, True, False, False], [True, True, True, True]])
    guided = rule(3.0, **options).combine(C, U, active)
    alone = rule(3.0, **options).combine(C[:1, :2], U[:1, :2], None)
    np.testing.assert_allclose(guided[:1, :2], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"zero_star": True}, {"rescale": 0.7}])
def test_a_half_step_with_a_fresh_difference_is_a_full_one(options: dict[str, Any]) -> None:
    whole = rule(4.0, **options)
    np.testing.assert_allclose(whole.combine_half(C, C - U, None), whole.combine(C, U, None), rtol=0, atol=3e-5)


def test_outside_the_interval_one_row_is_evaluated_and_counted() -> None:
    interval = (0.25, 0.75)
    result = sample(VELOCITY, Z, SCHEDULE, guidance=Guidance(3.0, interval=interval))
    inside = (interval[0] <= TIMES) & (interval[1] >= TIMES)
    assert kinds(result) == ["full" if guided else "one row" for guided in inside]
    assert result.trace.evaluations_N.tolist() == np.where(inside, 1.0, 0.5).tolist()
    assert result.batch_evaluations == inside.sum() + (~inside).sum() / 2
    np.testing.assert_array_equal(result.evaluations_B, result.batch_evaluations)

    z, times = Z, [*TIMES, 0.0]
    for t, t_next in itertools.pairwise(times):
        rows = VELOCITY.evaluate(jnp.concatenate([z, z]), jnp.full(4, 1000 * t), frame_mask_BT=None, merged=False)
        c, u = jnp.split(rows, 2)
        z = z + (u + 3 * (c - u) if interval[0] <= t <= interval[1] else c) * (t - t_next)
    np.testing.assert_allclose(result.z, z, rtol=0, atol=1e-5)


def test_an_interval_of_all_times_is_plain_guidance_and_an_empty_one_is_none() -> None:
    plain = sample(VELOCITY, Z, SCHEDULE, guidance=3.0)
    np.testing.assert_array_equal(sample(VELOCITY, Z, SCHEDULE, guidance=Guidance(3.0, interval=(0, 1))).z, plain.z)
    never = sample(VELOCITY, Z, SCHEDULE, guidance=Guidance(3.0, interval=(0.95, 0.96)))
    np.testing.assert_allclose(never.z, sample(VELOCITY, Z, SCHEDULE).z, rtol=0, atol=1e-6)
    assert never.batch_evaluations == 5


def test_the_ends_of_an_interval_are_values() -> None:
    """One program for all intervals, however many steps are guided."""
    traces: list[None] = []

    def counted(z: jax.Array, t_B: jax.Array) -> jax.Array:
        traces.append(None)
        return -z

    for low, high in ((0.2, 0.9), (0.0, 0.5), (0.95, 1.0)):
        sample(counted, Z, SCHEDULE, guidance=Guidance(2.0, interval=(low, high)))
        first = len(traces) if low == 0.2 else first
    assert len(traces) == first


@pytest.mark.ci
def test_steps_that_stand_still_cost_nothing_and_move_nothing() -> None:
    guidance = Guidance(3.0, zero_star=True, zero_steps=2)
    for solver in ("heun", "unipc"):
        seen: list[Any] = []
        result = sample(VELOCITY, Z, SCHEDULE, guidance=guidance, solver=solver, callback=lambda c, to=seen: to.append(c.z))
        np.testing.assert_array_equal(seen[1], Z)
        assert kinds(result)[:3] == ["still", "still", "full"]
        assert result.trace.evaluations_N[:2].tolist() == [0, 0]
        later = Schedule.from_times(SCHEDULE.visited[2:])
        expected = sample(VELOCITY, Z, later, guidance=Guidance(3.0, zero_star=True), solver=solver)
        np.testing.assert_allclose(result.z, expected.z, rtol=0, atol=1e-5)


def test_a_plan_evaluates_where_guidance_begins_and_ends() -> None:
    plan = Plan(codes=(FULL, REUSE, HALF, REUSE, REUSE, HALF, REUSE, REUSE, REUSE, REUSE))
    result = sample(VELOCITY, Z, SCHEDULE, guidance=Guidance(3.0, interval=(0.35, 0.75)), plan=plan)
    assert kinds(result) == [
        "one row", "reuse of one row", "one row", "full", "reuse", "half", "reuse after half", "one row", "reuse of one row",
        "reuse of one row",
    ]  # fmt: skip


def test_calibration_knows_the_interval() -> None:
    calibration = calibrate(VELOCITY, Z, SCHEDULE, guidance=Guidance(3.0, interval=(0.35, 0.75)))
    plan = calibration.plan(5)
    assert {0, 3, 7} < {i for i, code in enumerate(plan.codes) if code == FULL}
    reused = sample(VELOCITY, Z, SCHEDULE, guidance=Guidance(3.0, interval=(0.35, 0.75)), plan=plan)
    assert reused.batch_evaluations == sum(0.5 if not 3 <= i < 7 else 1 for i, code in enumerate(plan.codes) if code == FULL)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Guidance(3.0, interval=(0.9, 0.2)),
            "guidance interval (0.9, 0.2) is upside down; expected the lower time first",
        ),
        (lambda: Guidance(3.0, interval=(0.2, 900.0)), "guidance interval (0.2, 900) leaves the flow; expected times from 0"),
        (lambda: Guidance(3.0, interval=(0.2, float("nan"))), "guidance interval is nan; expected a finite number"),
        (lambda: Guidance(3.0, zero_steps=1), "guidance zero_steps belong to CFG-Zero*; set zero_star=True"),
        (lambda: Guidance(3.0, zero_star=True, zero_steps=-1), "guidance zero_steps is -1; expected 0 or more"),
        (lambda: Guidance(3.0, rescale=1.5), "guidance rescale is 1.5; expected a share from 0 to 1"),
        (lambda: Guidance(3.0, rescale=0.5, zero_star=True), "guidance has both zero_star and rescale"),
        (lambda: Guidance(float("inf")), "guidance is inf; expected a finite number"),
        (
            lambda: sample(VELOCITY, Z, SCHEDULE, guidance=Guidance(3.0, zero_star=True, zero_steps=2), leap=Leap.static(1)),
            "leap index 1 is one of the first 2 steps, which stand still (zero_steps); smallest legal index: 2.",
        ),
        (
            lambda: sample(VELOCITY, Z, SCHEDULE, guidance=Guidance(3.0, interval=(0, 0.5)), leap=Leap.released()),
            "leap 'released' compares every pair of velocities, also of different guidance; use Leap.dynamic()",
        ),
        (
            lambda: calibrate(VELOCITY, Z, SCHEDULE, guidance=Guidance(3.0, zero_star=True, zero_steps=1)),
            "calibrate measures what each step evaluates, but zero_steps stand still; leave them out.",
        ),
    ],
)
def test_what_is_not_sound_is_refused_in_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as fault:
        make()
    assert "\n" not in str(fault.value)
