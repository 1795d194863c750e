"""The sampler's promises: one program, the same bits however it is cut, samples independent, frames kept, errors named."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.sampling import noise
from sora_jax.sampling.joining import smallest_legal_leap
from sora_jax.sampling.leap import Leap
from sora_jax.sampling.reuse import Plan
from sora_jax.sampling.sampler import Sampler, finish, sample
from sora_jax.sampling.schedule import Schedule

pytestmark = pytest.mark.usefixtures("little_optimised")

SHAPE = (3, 4, 2, 3, 2)
Z = np.random.default_rng(5).standard_normal(SHAPE).astype(np.float32)
FULL_SCHEDULE = Schedule.uniform(12, shift=2.0)


class Traces(list):
    """Counts traces; hashable, so that it may be static."""

    __hash__ = object.__hash__


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wavy:
    """Rows of the second half differ, as those without a caption do."""

    scale: jax.Array
    traces: Traces | None = dataclasses.field(default=None, metadata={"static": True})

    def evaluate(self, z: jax.Array, t_B: jax.Array, *, frame_mask_BT: Any, merged: bool) -> jax.Array:
        if self.traces is not None:
            self.traces.append(None)
        tau = (t_B / 1000).reshape(-1, *[1] * (z.ndim - 1))
        if frame_mask_BT is not None:
            tau = jnp.where(frame_mask_BT.reshape(*frame_mask_BT.shape, *[1] * (z.ndim - 2)), tau, 0)
        rows = jnp.arange(len(z)).reshape(tau.shape[0], *[1] * (z.ndim - 1)) // SHAPE[0]
        return self.scale * jnp.sin(2 * z + rows) - tau * z + (0.1 if merged else 0.0)


WAVY = Wavy(jnp.asarray(0.8))


def test_cutting_a_run_changes_no_bit() -> None:
    weights = np.asarray([[1, 0.5, 0, 0.7]] * 3)
    sampler = Sampler.create(
        WAVY,
        FULL_SCHEDULE,
        guidance=2.0,
        leap=Leap.dynamic(tolerance=1e-3),
        merge_steps=4,
        solver="ab2",
        frame_weights=weights,
        seed=3,
    )
    whole = sampler.run(sampler.start(jnp.asarray(Z)), 12)
    for cuts in ([*range(1, 13)], [3, 4, 5, 12], [0, 7, 7, 100]):
        carry = sampler.start(jnp.asarray(Z))
        for until in cuts:
            carry = sampler.run(carry, until)
        jax.tree.map(np.testing.assert_array_equal, carry, whole)


def test_callback_sees_every_step_and_changes_no_bit() -> None:
    seen: list[int] = []
    with_callback = sample(WAVY, jnp.asarray(Z), FULL_SCHEDULE, callback=lambda carry: seen.append(int(carry.step)))
    assert seen == [*range(1, 13)]
    np.testing.assert_array_equal(with_callback.z, sample(WAVY, jnp.asarray(Z), FULL_SCHEDULE).z)


def test_values_compile_nothing() -> None:
    traces = Traces()
    for draw in range(4):
        steps = 5 + 60 * draw
        codes = (0, *np.random.default_rng(draw).integers(0, 3, steps - 1).tolist())
        sample(
            Wavy(jnp.asarray(0.3 + draw, jnp.float32), traces),
            jnp.asarray(Z) * draw,
            Schedule.open_sora(steps, height_px=144 + draw, width_px=256, num_frames=17),
            guidance=1.0 + draw,
            leap=Leap.dynamic(tolerance=0.01 * draw, min_share=0.1 * draw, patience=1 + draw),
            plan=Plan(codes=codes, keep="velocity", halves=True),
            merge_steps=draw,
            seed=draw,
            callback=(lambda carry: None) if draw % 2 else None,
        )
        if not draw:
            first = len(traces)
    assert len(traces) == first


def test_a_sample_does_not_depend_on_its_batch() -> None:
    weights = np.asarray([[1, 0.5, 0, 0.7], [1, 1, 1, 1], [0, 0.2, 0.9, 1]])
    options: dict[str, Any] = {"leap": Leap.dynamic(tolerance=1e-2, min_share=0.2), "solver": "ab2"}
    together = sample(WavyAlone(), jnp.asarray(Z), FULL_SCHEDULE, frame_weights=weights, seed=20, guidance=1.5, **options)
    for b in range(3):
        alone = sample(
            WavyAlone(),
            jnp.asarray(Z[b : b + 1]),
            FULL_SCHEDULE,
            frame_weights=weights[b : b + 1],
            seed=20 + b,
            guidance=1.5,
            **options,
        )
        np.testing.assert_allclose(alone.z[0], together.z[b], rtol=0, atol=1e-5)
        assert alone.evaluations_B[0] == together.evaluations_B[b]
    assert together.batch_evaluations == together.evaluations_B.max()
    assert len(set(together.evaluations_B.tolist())) > 1, "all samples leapt together: the test is void"


class WavyAlone:
    def evaluate(self, z: jax.Array, t_B: jax.Array, *, frame_mask_BT: jax.Array, merged: bool) -> jax.Array:
        tau = jnp.where(frame_mask_BT, (t_B / 1000)[:, None], 0)[..., None, None, None]
        return jnp.sin(2 * z + 3 * tau) - tau * z


def test_initial_noise_of_a_sample_is_that_of_its_seed() -> None:
    alone = noise.initial_noise(7, (1, *SHAPE[1:]))
    np.testing.assert_array_equal(alone[0], noise.initial_noise(5, SHAPE)[2])
    # Threefry's bits are fixed for ever; these figures fail if the generator or the keys change.
    np.testing.assert_allclose(noise.initial_noise(0, (1, 3))[0], PINNED, rtol=0, atol=1e-6)


PINNED = [1.0040143, -0.9063372, -0.7481722]


def test_guidance_combines_conditional_first() -> None:
    def by_row(z: jax.Array, t_B: jax.Array) -> jax.Array:
        assert len(z) == 2 * SHAPE[0] == len(t_B)
        first = jnp.arange(len(z)) < SHAPE[0]
        return jnp.broadcast_to(jnp.where(first, 3.0, 1.0).reshape(-1, 1, 1, 1, 1), z.shape)

    end = sample(by_row, jnp.asarray(Z), FULL_SCHEDULE, guidance=7.0).z
    np.testing.assert_allclose(end - Z, 1 + 7 * (3 - 1), rtol=1e-6)


class Flag:
    def evaluate(self, z: jax.Array, t_B: jax.Array, *, frame_mask_BT: None, merged: bool) -> jax.Array:
        return jnp.full_like(z, 1.0 if merged else 0.0)


@pytest.mark.parametrize("merge_steps", [0, 1, 5, 12, 40])
def test_merge_steps_are_the_first_steps(merge_steps: int) -> None:
    result = sample(Flag(), jnp.asarray(Z), Schedule.uniform(12), merge_steps=merge_steps)
    share = min(merge_steps, 12) / 12
    np.testing.assert_allclose(result.z - Z, share, rtol=0, atol=2e-6)
    assert result.trace.merged_N.tolist() == [i < merge_steps for i in range(12)]


def test_frames_of_weight_0_stay_and_joining_frames_are_noised_to_their_time() -> None:
    weights = np.asarray([[0.0, 0.4, 1.0, 0.0]] * 3)
    recorded = np.random.default_rng(0).standard_normal((12, *SHAPE)).astype(np.float32)
    sampler = Sampler.create(WAVY, Schedule.uniform(12), frame_weights=weights, noise_per_step=recorded, merge_steps=None)
    before = sampler.start(jnp.asarray(Z))
    for step, carry in enumerate(sampler.steps(before)):
        active = weights[0] * 1000 >= float(carry.trace.time_N[step])
        np.testing.assert_array_equal(carry.active_BT[0], active)
        np.testing.assert_array_equal(carry.z[:, ~active], before.z[:, ~active])
        if active[1] and not bool(before.active_BT[0, 1]):
            t = float(carry.trace.time_N[step]) / 1000
            np.testing.assert_allclose(carry.z_in[:, 1], (1 - t) * Z[:, 1] + t * recorded[step, :, 1], rtol=0, atol=1e-6)
        before = carry
    np.testing.assert_array_equal(carry.z[:, [0, 3]], Z[:, [0, 3]])
    assert not np.allclose(carry.z[:, 1], Z[:, 1])


def test_generated_noise_is_standard_normal_and_differs_by_step() -> None:
    draws = [np.asarray(noise.draw(noise.as_seed(1), (2, 4000), jnp.uint32(stream))) for stream in (0, 1, 2)]
    for values in draws:
        assert abs(values.mean()) < 4 / np.sqrt(8000)
        assert abs(values.std() - 1) < 4 / np.sqrt(16000)
    assert abs(np.corrcoef([*draws[0], *draws[1], *draws[2]]) - np.eye(6)).max() < 4.5 / np.sqrt(4000)


def test_no_leap_before_all_frames_join() -> None:
    weights = np.full((3, 4), 1.0)
    weights[1, 2] = 0.3
    schedule = Schedule.uniform(40)
    joined = int(np.argmax(schedule.visited <= 300))
    for leap in (Leap.dynamic(tolerance=1.0), Leap.released()):
        free = sample(WAVY, jnp.asarray(Z), schedule, leap=leap, frame_weights=np.ones((3, 4)))
        held = sample(WAVY, jnp.asarray(Z), schedule, leap=leap, frame_weights=weights)
        assert free.trace.leapt_NB[:joined, 1].any()
        assert not held.trace.leapt_NB[:joined, 1].any()
        assert held.trace.leapt_NB[:, 1].any()
    smallest = smallest_legal_leap(weights.astype(np.float32), schedule.visited, 1000.0)
    assert smallest == joined
    with pytest.raises(ValueError, match=f"smallest legal index: {smallest}"):
        sample(WAVY, jnp.asarray(Z), schedule, leap=Leap.static(smallest - 1), frame_weights=weights)
    sample(WAVY, jnp.asarray(Z), schedule, leap=Leap.static(smallest), frame_weights=weights)


def test_the_run_stops_when_all_samples_are_done() -> None:
    result = sample(WAVY, jnp.asarray(Z), FULL_SCHEDULE, leap=Leap.static(2))
    assert result.batch_evaluations == 3
    assert len(result.trace.time_N) == 3
    assert result.trace.leapt_NB.tolist() == [[False] * 3, [False] * 3, [True] * 3]
    last = sample(WAVY, jnp.asarray(Z), FULL_SCHEDULE, leap=Leap.static(11))
    assert not last.trace.leapt_NB.any()
    np.testing.assert_allclose(last.z, sample(WAVY, jnp.asarray(Z), FULL_SCHEDULE).z, rtol=0, atol=1e-6)


def test_a_callable_pytree_is_a_velocity() -> None:
    @functools.partial(jax.tree_util.register_dataclass, data_fields=["slope"], meta_fields=[])
    class Slope:
        def __init__(self, slope: jax.Array) -> None:
            self.slope = slope

        def __call__(self, z: jax.Array, t_B: jax.Array) -> jax.Array:
            return jnp.full_like(z, 1.0) * self.slope

    end = sample(Slope(jnp.asarray(2.0)), jnp.asarray(Z), Schedule.uniform(3)).z
    np.testing.assert_allclose(end - Z, 2.0, rtol=1e-6)


HALVES = Plan(codes=(0, 2, 0), keep="velocity")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leap": Leap.static(3)}, "leap index 3 is beyond the last of 3 steps; expected 0 to 2"),
        ({"plan": Plan.evaluate_at([0], 5)}, "plan has 5 steps but the schedule 3"),
        ({"plan": Plan.evaluate_at([0], 3), "solver": "heun"}, "a plan cannot drive solver 'heun'"),
        ({"plan": HALVES}, "plan has half steps, which reuse the guidance difference, but guidance is None"),
        ({"plan": Plan.evaluate_at([0], 3), "leap": Leap.released()}, "use Leap.dynamic() with a plan"),
        ({"merge_steps": -1}, "merge_steps is -1; expected 0 or more"),
        ({"seed": -1}, "seed is -1; expected a whole number from 0"),
        ({"frame_weights": np.full((3, 4), 1.5)}, "frame_weights must be [B, T] with values from 0 to 1"),
        ({"frame_weights": np.ones((3, 5))}, "frame_weights have shape (3, 5); expected (3, 4)"),
        ({"noise_per_step": np.zeros((2, *SHAPE))}, "noise_per_step has 2 entries; expected one for each of 3 steps"),
        ({"noise_per_step": np.zeros((3, 1))}, "noise_per_step has shape (1,) after the step axis"),
    ],
)
def test_illegal_combinations_are_named_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as fault:
        sample(WAVY, jnp.asarray(Z), Schedule.uniform(3), **options)
    assert "\n" not in str(fault.value)


def test_a_velocity_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match="the velocity returned shape"):
        sample(lambda z, t_B: z[..., :1], jnp.asarray(Z), Schedule.uniform(3))


def test_released_leap_needs_video_latents() -> None:
    with pytest.raises(ValueError, match="leap 'released' reads rows of video latents"):
        sample(lambda z, t_B: z, jnp.zeros((2, 2)), Schedule.uniform(3), leap=Leap.released())


def test_finish_reports_the_steps_taken_so_far() -> None:
    sampler = Sampler.create(WAVY, FULL_SCHEDULE)
    result = finish(sampler.run(sampler.start(jnp.asarray(Z)), 5))
    assert len(result.trace.time_N) == 5
    np.testing.assert_array_equal(result.trace.time_N, FULL_SCHEDULE.visited[:5])
