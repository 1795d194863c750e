"""One batch, one program, and settings of each sample's own: every sample as if it had been sampled alone."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import Leap, Plan, Schedule, integrate, sample
from tests.support.oracle_state import FULL, HALF, REUSE
from tests.support.oracle_velocity import Wavy

pytestmark = pytest.mark.usefixtures("little_optimised")

SHAPE = (3, 4, 3, 4, 2)
Z = jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32)
BIAS = jnp.asarray([0.3, -0.8, 0.1, 0.5, -0.2, 0.9])
SCALES = [1.0, 2.5, 6.0]
SCHEDULE = Schedule.uniform(12, shift=2.0)


def alone(b: int, **options: Any) -> Any:
    """Returns the sampling of one sample, with its own rows of the velocity."""
    return sample(Wavy(BIAS[jnp.asarray([b, b + 3])]), Z[b : b + 1], SCHEDULE, **options)


@pytest.mark.parametrize("values", [tuple(SCALES), np.asarray(SCALES), jnp.asarray(SCALES)], ids=["tuple", "numpy", "jax"])
def test_guidance_of_each_sample(values: Any) -> None:
    together = sample(Wavy(BIAS), Z, SCHEDULE, guidance=values)
    for b, scale in enumerate(SCALES):
        np.testing.assert_allclose(together.z[b], alone(b, guidance=scale).z[0], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(integrate(Wavy(BIAS), Z, SCHEDULE, guidance=values), together.z)


def test_guidance_of_each_sample_in_full_half_and_reused_steps() -> None:
    plan = Plan(codes=(FULL, REUSE, HALF, REUSE, FULL, HALF, HALF, REUSE, FULL, FULL, REUSE, HALF))
    together = sample(Wavy(BIAS), Z, SCHEDULE, guidance=SCALES, plan=plan, solver="ab2")
    for b, scale in enumerate(SCALES):
        expected = alone(b, guidance=scale, plan=plan, solver="ab2").z[0]
        np.testing.assert_allclose(together.z[b], expected, rtol=0, atol=1e-5)


def test_thresholds_of_each_sample() -> None:
    tolerances, shares, patience = (1e-5, 1e-3, 0.5), (0.0, 0.3, 0.5), (1, 2, 3)
    leap = Leap.dynamic(tolerance=tolerances, min_share=np.asarray(shares), patience=patience)
    together = sample(Wavy(BIAS), Z, SCHEDULE, guidance=SCALES, leap=leap)
    assert len(set(together.evaluations_B.tolist())) == 3, "all samples leapt together: the test is void"
    for b in range(3):
        rule = Leap.dynamic(tolerance=tolerances[b], min_share=shares[b], patience=patience[b])
        single = alone(b, guidance=SCALES[b], leap=rule)
        assert single.evaluations_B[0] == together.evaluations_B[b]
        np.testing.assert_allclose(together.z[b], single.z[0], rtol=0, atol=1e-5)


def test_leap_step_of_each_sample() -> None:
    together = sample(Wavy(BIAS), Z, SCHEDULE, leap=Leap.static((2, 11, 5)))
    assert together.evaluations_B.tolist() == [3, 12, 6]
    for b, index in enumerate((2, 11, 5)):
        np.testing.assert_allclose(together.z[b], alone(b, leap=Leap.static(index)).z[0], rtol=0, atol=1e-5)
    got = integrate(Wavy(BIAS), Z, SCHEDULE, leap=Leap.static((2, 11, 5)))
    np.testing.assert_array_equal(got, together.z)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": (1.0, 2.0)}, "guidance has 2 values; expected one, or one for each of 3 samples."),
        ({"guidance": ((1.0,),)}, "guidance has shape (1, 1); expected one number, or one for each sample of the batch."),
        ({"guidance": (1.0, float("nan"), 2.0)}, "guidance is nan; expected a finite number."),
        ({"leap": Leap.dynamic(tolerance=(0.1, 0.2))}, "leap tolerance has 2 values; expected one, or one for each of 3"),
        ({"leap": Leap.dynamic(min_share=(0.1, 0.2))}, "leap min_share has 2 values; expected one, or one for each of 3"),
        ({"leap": Leap.static((1, 12, 3))}, "leap index 12 is beyond the last of 12 steps"),
    ],
)
def test_numbers_that_do_not_fit_the_batch_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        sample(Wavy(BIAS), Z, SCHEDULE, **options)
