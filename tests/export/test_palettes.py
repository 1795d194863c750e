"""Tables for compressed weights: the error is that of the best table for a known distribution."""

import numpy as np
import pytest

from sora_jax.export import palettes
from sora_jax.export.palettes import nearest_table


def test_the_error_for_normal_values_is_the_least_possible() -> None:
    """A best table of N entries for a normal distribution has the mean square error sqrt(3) pi / (2 N^2), for large N."""
    values = np.random.default_rng(0).standard_normal((500, 400), np.float32)
    table, indices = nearest_table(values, 64)
    error = np.mean((table[indices].reshape(values.shape) - values) ** 2)
    assert error == pytest.approx(np.sqrt(3) * np.pi / 2 / 64**2, rel=0.05)


def test_every_value_gets_its_nearest_entry() -> None:
    values = np.random.default_rng(1).standard_normal(1000).astype(np.float16)
    table, indices = nearest_table(values, 16)
    assert (table.dtype, indices.dtype, table.shape) == (np.float16, np.uint8, (16,))
    distances = np.abs(values.astype(np.float32)[:, None] - table.astype(np.float32))
    np.testing.assert_allclose(distances[np.arange(1000), indices], distances.min(axis=1), atol=1e-6)


def test_equal_values_are_kept() -> None:
    table, indices = nearest_table(np.full(10, 0.25, np.float32), 4)
    np.testing.assert_array_equal(table[indices], np.full(10, 0.25))


def test_a_selection_of_very_many_values_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).standard_normal((500, 401), np.float32)
    whole, _ = nearest_table(values, 16)
    monkeypatch.setattr(palettes, "_SAMPLE", 30_000)
    table, indices = nearest_table(values, 16)
    distances, least = (np.abs(values.ravel()[:, None] - one) for one in (table, whole))
    assert np.mean(distances.min(axis=1) ** 2) == pytest.approx(np.mean(least.min(axis=1) ** 2), rel=0.05)
    np.testing.assert_array_equal(indices, distances.argmin(axis=1))
