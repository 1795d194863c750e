"""Leap rules driven by velocities whose cosines are prescribed: each decision as written down, counted by hand."""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.sampling.leap import Leap, latent_cosine
from sora_jax.sampling.sampler import Result, sample
from sora_jax.sampling.schedule import Schedule

pytestmark = pytest.mark.usefixtures("little_optimised")

STEPS = 30
FIRST = 14  # ceil(0.5 * 30) - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turning:
    """Velocity of step i and sample b: the unit vector at the sum of the first i turns."""

    angle_NB: jax.Array

    def evaluate(self, z: jax.Array, t_B: jax.Array, *, frame_mask_BT: None, merged: bool) -> jax.Array:
        step = jnp.round((1 - t_B[0] / 1000) * STEPS).astype(int)
        angle_B = jnp.cumsum(self.angle_NB, axis=0)[step]
        return jnp.stack([jnp.cos(angle_B), jnp.sin(angle_B)], axis=-1)


def run(cosines: dict[int, float], leap: Leap, **options: int) -> Result:
    """Samples one row whose cosine at step i is ``cosines[i]``, falling slowly elsewhere so that nothing there is better."""
    cosine_N = np.asarray([cosines.get(i, 0.5 - 0.01 * i) for i in range(STEPS)])
    velocity = Turning(jnp.asarray(np.arccos(cosine_N)[:, None], jnp.float32))
    return sample(velocity, jnp.zeros((1, 2)), Schedule.uniform(STEPS), leap=leap, **options)


def leapt_at(result: Result) -> int | None:
    steps = np.flatnonzero(result.trace.leapt_NB[:, 0])
    return int(steps[0]) if len(steps) else None


def test_cosines_are_those_prescribed() -> None:
    result = run({20: 0.9}, Leap.static(29))
    np.testing.assert_allclose(result.trace.cosine_NB[1:20, 0], 0.5 - 0.01 * np.arange(1, 20), atol=1e-5)
    assert result.trace.cosine_NB[20, 0] == pytest.approx(0.9, abs=1e-5)
    assert np.isnan(result.trace.cosine_NB[0, 0])


def test_earliest_leap_is_patience_after_the_first_comparison() -> None:
    """The first comparison always beats -1; three more without a better one leap: evaluations FIRST + 4."""
    result = run({}, Leap.dynamic())
    assert leapt_at(result) == FIRST + 3
    assert result.evaluations_B.tolist() == [FIRST + 4]


def test_a_better_cosine_restores_patience() -> None:
    assert leapt_at(run({FIRST + 2: 0.6}, Leap.dynamic())) == FIRST + 5
    assert leapt_at(run({FIRST + 2: 0.6, FIRST + 4: 0.7}, Leap.dynamic())) == FIRST + 7
    assert leapt_at(run({i: 0.3 + 0.01 * i for i in range(FIRST, STEPS)}, Leap.dynamic())) is None


def test_better_means_by_more_than_the_tolerance() -> None:
    close = {FIRST: 0.6, FIRST + 2: 0.605}
    assert leapt_at(run(close, Leap.dynamic(tolerance=0.01))) == FIRST + 3
    assert leapt_at(run(close, Leap.dynamic(tolerance=0.001))) == FIRST + 5


def test_cosines_before_the_first_comparison_do_not_count() -> None:
    assert leapt_at(run({FIRST - 1: 0.99}, Leap.dynamic())) == FIRST + 3
    assert leapt_at(run({FIRST: 0.99, FIRST + 1: 0.95}, Leap.dynamic())) == FIRST + 3


@pytest.mark.parametrize(
    ("min_share", "first"), [(0.0, 1), (0.1, 2), (0.5, 14), (0.51, 15), (0.7, 20), (0.8, 23), (0.9, 26), (1.0, None)]
)
def test_comparisons_begin_after_the_minimum_share(min_share: float, first: int | None) -> None:
    """1.0 compares at the last step only; 0.7 * 30 is exactly 21 although floats say 20.999999999999996."""
    expected = None if first is None or first + 3 >= STEPS - 1 else first + 3
    assert leapt_at(run({}, Leap.dynamic(min_share=min_share))) == expected


def test_patience_is_a_value() -> None:
    assert leapt_at(run({}, Leap.dynamic(patience=1))) == FIRST + 1
    assert leapt_at(run({}, Leap.dynamic(patience=6))) == FIRST + 6


def test_end_of_merging_resets_and_its_cosine_is_not_compared() -> None:
    """At step 16 the velocities belong to different phases; comparisons start anew at 17, so the leap is at 20."""
    result = run({}, Leap.dynamic(), merge_steps=16)
    assert np.isnan(result.trace.cosine_NB[16, 0])
    assert leapt_at(result) == 20
    assert leapt_at(run({}, Leap.dynamic(), merge_steps=5)) == FIRST + 3


def released_run(cosine_N: np.ndarray, num_steps: int, others: float) -> Result:
    """Samples two videos; rows of channel 0 of frame 0 of sample 0 turn as prescribed, everything else by ``others``."""

    def velocity(z: jax.Array, t_B: jax.Array) -> jax.Array:
        step = jnp.round((1 - t_B[0] / 1000) * num_steps).astype(int)
        angle = jnp.cumsum(jnp.arccos(jnp.asarray(cosine_N)))[step]
        rows = jnp.stack([jnp.cos(angle), jnp.sin(angle)])
        elsewhere = jnp.stack([jnp.cos(others * step), jnp.sin(others * step)])
        v = jnp.broadcast_to(elsewhere[None, None, None, :, None], z.shape)
        return v.at[0, 0, :, :, 0].set(jnp.asarray([[1.0], [3.0]]) * rows[None])

    return sample(velocity, jnp.zeros((2, 2, 2, 2, 2)), Schedule.uniform(num_steps), leap=Leap.released())


def test_released_rule_reads_sample_0_and_begins_at_step_14() -> None:
    cosine_N = np.full(40, 0.5, np.float32)
    cosine_N[13] = 0.9
    assert released_run(cosine_N, 40, others=0.1).trace.leapt_NB.argmax(axis=0).tolist() == [17, 17]
    cosine_N[15] = 0.5 + 2e-3
    assert released_run(cosine_N, 40, others=0.1).trace.leapt_NB.argmax(axis=0).tolist() == [18, 18]
    cosine_N[15] = 0.5 + 5e-4
    assert released_run(cosine_N, 40, others=0.1).trace.leapt_NB.argmax(axis=0).tolist() == [17, 17]


def test_released_rule_starts_from_cosine_0() -> None:
    """A first cosine below 1e-3 is no improvement on 0, so patience runs out one comparison earlier."""
    cosine_N = np.full(40, -0.2, np.float32)
    assert released_run(cosine_N, 40, others=0.0).trace.leapt_NB.argmax(axis=0).tolist() == [16, 16]


def test_cosine_of_active_frames_only() -> None:
    rng = np.random.default_rng(0)
    v, before = rng.standard_normal((2, 3, 5, 2, 2, 1)).astype(np.float32)
    active = np.asarray([[1, 1, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], bool)
    got = latent_cosine(jnp.asarray(v), jnp.asarray(before), jnp.asarray(active))
    for b in range(3):
        x, y = v[b][active[b]].ravel(), before[b][active[b]].ravel()
        assert got[b] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=2e-7)
    assert latent_cosine(jnp.zeros((1, 4)), jnp.ones((1, 4)), None)[0] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Leap.static(-1), "leap index is -1; expected 0 or more"),
        (lambda: Leap.dynamic(tolerance=-1e-4), "leap tolerance is -0.0001; expected 0 or more"),
        (lambda: Leap.dynamic(tolerance=float("nan")), "leap tolerance is nan"),
        (lambda: Leap.dynamic(min_share=1.5), "leap min_share is 1.5; expected a share from 0 to 1"),
        (lambda: Leap.dynamic(patience=0), "leap patience is 0; expected at least 1"),
    ],
)
def test_bad_rules_are_named(make: Callable[[], Leap], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def evaluations_of_released_rule(*, cosines_are_positive: bool) -> list[int]:
    """Returns the evaluations of 30 steps for every way in which the comparisons of a fresh scheduler may turn out."""
    outcomes = np.indices((2,) * (STEPS - FIRST)).reshape(STEPS - FIRST, -1).T.astype(bool)  # better or not, from step 14 on
    count = np.cumsum(outcomes, axis=1)
    # Better: 0.01 above the best so far.  Not better: just above 0, which beats the 0 the rule starts from only if negative.
    cosine = np.where(outcomes, 0.01 * count, np.where(count > 0, 0.005, -0.5)).astype(np.float32)
    if cosines_are_positive:
        cosine = cosine[outcomes[:, 0]]
    rule = Leap.released().rule(STEPS)

    @jax.jit
    @jax.vmap
    def leap_step(cosine_N: jax.Array) -> jax.Array:
        def step(carry: tuple, at: tuple) -> tuple:
            state, left = carry
            i, cosine = at
            yes, no = jnp.ones(1, bool), jnp.asarray(False)
            state, leaps = rule.decide(state, cosine[None], step=i, comparable_B=yes, may_leap_B=yes, restart=no)
            return (state, jnp.where(leaps[0], jnp.minimum(left, i), left)), None

        steps = jnp.arange(FIRST, STEPS)
        return jax.lax.scan(step, (rule.start(1), jnp.asarray(STEPS - 1)), (steps, cosine_N))[0][1]

    return sorted({int(step) + 1 for step in leap_step(jnp.asarray(cosine))})


@pytest.mark.ci
def test_released_rule_never_makes_fewer_than_18_evaluations() -> None:
    """The paper's mean of 17.73 of 30 is no number of evaluations: from 18 on every one can happen, and none below."""
    assert evaluations_of_released_rule(cosines_are_positive=True) == list(range(18, 31))
    # Three velocities in a row at right angles or more to the one before save one evaluation.
    assert evaluations_of_released_rule(cosines_are_positive=False) == list(range(17, 31))
