"""The check that no artefact escapes: its measures, its limits, and what cannot hide from it."""

import math

import numpy as np
import pytest

from sora_jax.export import check


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_psnr_is_the_peak_over_the_root_mean_square_error():
    expected = np.float64([0.0, -4.0])
    psnr_db, relative = check.difference(expected, expected + np.float64([0.04, -0.04]))
    assert psnr_db == pytest.approx(20 * math.log10(4 / 0.04))
    assert relative == pytest.approx(0.04 * math.sqrt(2) / 4)
    assert check.difference(expected, expected) == (check.MAX_DB, 0.0)


@pytest.mark.parametrize("got", [[0.0, np.nan], [np.inf, -4.0]])
def test_nan_and_infinity_never_pass(got):
    (one,) = check.compare("captured", {}, {"v": np.float64([0.0, -4.0])}, {"v": np.asarray(got)}, check.Limits(-1000.0, 1e9))
    assert not math.isfinite(one.relative_l2)
    assert one.psnr_db == -check.MAX_DB


def test_what_passes_through_hides_no_error():
    """Tokens of size 100 to which a block adds 1: a block that adds nothing is far from right."""
    x = 100 * random(1, 3, 4, 12)
    update = random(1, 3, 4, 12)
    (one,) = check.compare("captured", {"x_RTSD": x}, {"x_RTSD": x + update}, {"x_RTSD": x}, check.Limits(30.0, 0.1))
    assert one.measured == "update"
    assert one.relative_l2 == pytest.approx(1, rel=1e-4)
    assert not one.passed
    with pytest.raises(
        check.CheckError, match=r"stage full: output x_RTSD .* error of 1 .* at least 30 dB and at most 0\.1; nothing was kept"
    ):
        check.require_passed("stage full", [one])


def test_outliers_are_in_two_channels_and_left_out_of_the_comparison():
    x, mask = random(1, 3, 4, 12), np.ones((1, 5), np.float32)
    moved = check.with_outliers({"x_RTSD": x, "mask_RL": mask})
    assert check.with_outliers({"mask_RL": mask}) is None
    where = np.flatnonzero((moved["x_RTSD"] != x).any(axis=(0, 1, 2)))
    assert tuple(where) == check.outlier_channels(12)
    out = moved["x_RTSD"] + 1
    wrong = out.copy()
    wrong[..., where] += 5
    (one,) = check.compare("outliers", moved, {"x_RTSD": out}, {"x_RTSD": wrong}, check.Limits(100.0, 1e-3))
    assert one.passed


def test_an_output_of_another_shape_is_an_error():
    with pytest.raises(check.CheckError, match=r"output v has shape \(3,\); expected \(2,\)"):
        check.compare("captured", {}, {"v": np.zeros(2)}, {"v": np.zeros(3)}, check.Limits(0.0, 1.0))
