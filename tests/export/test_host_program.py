"""The reference host against the sampler: both state schedule, guidance, leap and merge switch, each for itself."""

import dataclasses
import math
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sora_jax
from sora_jax.export import describe, host_program
from sora_jax.export.entries import LeapEntry, SamplingEntry
from sora_jax.export.host_program import ExportedModel, LeapState, guided, schedule_times
from sora_jax.sampling.leap import Leap
from sora_jax.sampling.schedule import OPEN_SORA_TIMESTEPS, Schedule
from tests.support.exports import SETTINGS, SIZE, complete_manifest, write_folder
from tests.support.tiny_model import CONFIG

LEAP: LeapEntry = {"mode": "dynamic", "index": None, "tolerance": 1e-4, "min_share": 0.5, "patience": 3}
OFF: LeapEntry = {**LEAP, "mode": "off"}


def test_times_are_the_schedules():
    size = describe.size_entry(CONFIG, SIZE, SETTINGS)
    for num_steps in (1, 4, 7, 30):
        expected = Schedule.open_sora(num_steps, height_px=16, width_px=32, num_frames=20).visited
        # The rule multiplies what the schedule rounds once more: two float32 roundings.
        np.testing.assert_allclose(schedule_times(num_steps, size["shift"], 1000.0), expected, rtol=3e-7)


def test_the_manifests_own_times_serve_its_own_number_of_steps(tmp_path):
    pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema")
    write_folder(tmp_path, complete_manifest())
    model = ExportedModel(tmp_path)
    (size,) = model.manifest["sizes"]
    assert model.times(size, 4).tolist() == size["times"]
    assert len(model.times(size, 9)) == 9


def test_the_host_leaps_where_the_sampler_does():
    """Cosines rise, then stop: the fourth comparison in a row without a better one would be too late."""
    cosines = [0.5, 0.6, 0.6, 0.6, 0.6, 0.6]
    state, rule, carry = LeapState(LEAP, 12), Leap.dynamic().rule(12), Leap.dynamic().rule(12).start(1)
    assert state.first == int(rule.first) == 5
    for step, cosine in enumerate([0.0] * 5 + cosines):
        before, v = np.float32([1, 0]), np.float32([cosine, math.sqrt(1 - cosine**2)])
        compared = np.asarray([step >= 5])
        flags = {"comparable_B": compared, "may_leap_B": compared, "restart": np.bool_(False)}
        carry, leaps_B = rule.decide(carry, np.float32([cosine]), step=np.int32(step), **flags)
        assert state.leaps(step, v, before) == bool(leaps_B[0])
        if leaps_B[0]:
            break
    assert step == 9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bent:
    """A velocity whose direction changes with the time, at first fast; a merged one and an unconditional one are others."""

    target: Any  # of the batch, without axis B

    def evaluate(self, z: Any, t: Any, *, frame_mask_BT: Any = None, merged: bool = False) -> Any:
        """Returns the velocity of the rows [conditional, unconditional]; frames at time 0 are not seen."""
        row = (jnp.arange(len(z)) < 1)[:, None, None, None, None]
        target = jnp.where(row, self.target[None], -0.5 * self.target[None])
        angle = (0.3 if merged else 0.2) * jnp.exp(t / 150 - 7)[:, None, None, None, None]
        return target - 0.1 * z + jnp.roll(target, 1, axis=-1) * angle

    def __call__(self, z: Any, t: Any, *, frame_mask_BT: Any = None, merge: bool = False) -> Any:
        """Returns the same; the sampler's other way to say it."""
        return self.evaluate(z, t, frame_mask_BT=frame_mask_BT, merged=merge)


def on_the_host(velocity: Bent, z: np.ndarray, times: np.ndarray, sampling: SamplingEntry) -> tuple[np.ndarray, int]:
    evaluate = jax.jit(lambda z, t, merged: velocity.evaluate(z, t, merged=merged), static_argnums=2)

    def guided_velocity(z: np.ndarray, time: np.float32, merged: bool) -> np.ndarray:
        rows = np.asarray(evaluate(np.concatenate([z, z]), np.full(2, time, np.float32), merged))
        return guided(rows, sampling["guidance"])

    return host_program.sample(guided_velocity, z, times, sampling, np.ones(z.shape[:2], np.float32))


@pytest.mark.parametrize(
    ("options", "given", "evaluations"),
    [
        ({}, {}, 12),
        ({"guidance": 2.5}, {"guidance": 2.5}, 12),
        ({"merge_steps": 5}, {"merge_steps": 5}, 12),
        ({"leap": Leap.static(7)}, {"leap": {**LEAP, "mode": "static", "index": 7}}, 8),
        ({"leap": Leap.dynamic()}, {"leap": LEAP}, None),
        ({"leap": Leap.dynamic(min_share=0.2, patience=2)}, {"leap": {**LEAP, "min_share": 0.2, "patience": 2}}, None),
        (
            {"leap": Leap.dynamic(tolerance=0.01), "merge_steps": 4},
            {"leap": {**LEAP, "tolerance": 0.01}, "merge_steps": 4},
            None,
        ),
    ],
)
def test_the_hosts_loop_is_the_samplers(options, given, evaluations):
    """Latents to float32's rounding over a dozen steps, the same number of evaluations, and leaps that end before the end."""
    rng = np.random.default_rng(1)
    velocity = Bent(jnp.asarray(rng.standard_normal((3, 2, 4, 4)), jnp.float32))
    z = rng.standard_normal((1, 3, 2, 4, 4)).astype(np.float32)
    schedule = Schedule.uniform(12, num_timesteps=OPEN_SORA_TIMESTEPS)
    sampling: SamplingEntry = {
        "num_steps": 12,
        "num_timesteps": 1000.0,
        "guidance": 3.0,
        "merge_steps": 0,
        "leap": OFF,
        **given,
    }
    result = sora_jax.sample(velocity, jnp.asarray(z), schedule, **{"guidance": 3.0, **options})
    latents, steps = on_the_host(velocity, z, np.asarray(schedule.visited), sampling)
    assert steps == int(result.evaluations_B[0])
    assert steps == evaluations or (evaluations is None and 3 < steps < 12)
    np.testing.assert_allclose(latents, result.z, rtol=1e-5, atol=1e-5)


def test_frames_that_are_given_stay():
    z, mask = np.ones((1, 2, 1, 1, 1), np.float32), np.float32([[0, 1]])
    sampling: SamplingEntry = {"num_steps": 2, "num_timesteps": 1.0, "guidance": 1.0, "merge_steps": 0, "leap": OFF}
    made, _ = host_program.sample(lambda z, time, merged: np.full_like(z, 4), z, np.float32([1, 0.5]), sampling, mask)
    assert made.ravel().tolist() == [1, 5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; expected a whole number from 1"),
        ({"merge_steps": -1}, "merge_steps is -1; expected a whole number from 0"),
        ({"guidance": math.nan}, "guidance is nan; expected a number, at most 10000"),
        ({"guidance": math.inf}, "guidance is inf"),
        ({"leap": {"mode": "released"}}, "leap mode is 'released'; expected off, static or dynamic"),
        ({"leap": {"mode": "static", "index": 4}}, "leap index is 4; expected a step from 0 to 3"),
        ({"leap": {"mode": "static", "index": None}}, "leap index is None"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_loaded(tmp_path, given, message):
    pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema")
    write_folder(tmp_path, complete_manifest())
    model = ExportedModel(tmp_path)
    arrays = np.ones((1, 12), int), np.ones((1, 12), bool), np.zeros((1, 6, 2, 4, 4), np.float32)
    for call in (lambda: model.sampling(**given), lambda: model(*arrays, **given)):
        with pytest.raises(ValueError, match=message):
            call()
    assert not model.loaded


def test_the_host_needs_neither_jax_nor_the_sampler_to_be_imported():
    """What it may use of this package is what a port has to write: the manifest's reader, and a runner of artefacts."""
    lines = "import sys, sora_jax.export.host_program; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    rooms = {".".join(name.split(".")[:2]) for name in done.stdout.split() if name.split(".")[0] in ("sora_jax", "jax")}
    assert rooms <= {"sora_jax", "sora_jax.export", "sora_jax.lazy", "sora_jax.process", "sora_jax.version"}
