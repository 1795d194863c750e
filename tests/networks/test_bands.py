"""Frames decoded in bands of rows: the numbers of whole frames, and the memory of a band."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_jax.networks import registry
from sora_jax.networks.forms import Forms
from sora_jax.networks.vae.bands import HALO, Bands, bands, in_bands
from sora_jax.storage.checkpoint import unflatten
from tests.support.tiny_model import CONFIG, random_flat

REL_L2 = 1e-6  # float32 rounding: convolutions of another height


def decoder(hidden_bytes: int | None, width: int = 4) -> Any:
    spatial = dataclasses.replace(CONFIG.vae.spatial, block_out_channels=(width, 2 * width, 2 * width, 2 * width))
    config = dataclasses.replace(CONFIG.vae, spatial=spatial)
    network = registry.abstract("vae", config, forms=Forms(hidden_bytes=hidden_bytes))
    return network.spatial_decoder, config


def drawn(most: int | None) -> Any:
    network, config = decoder(most)
    flat, prefix = random_flat("vae", config), "spatial_decoder."
    return unflatten(network, {name.removeprefix(prefix): flat[name] for name in flat if name.startswith(prefix)})


@jax.jit
def decoded(network: Any, z: jax.Array) -> jax.Array:
    return network(z)


@pytest.mark.ci
def test_frames_in_bands_are_the_whole_frames() -> None:
    z = jnp.asarray(np.random.default_rng(5).standard_normal((2, 9, 5, 4), np.float32))
    whole, banded = (decoded(drawn(most), z) for most in (None, 2 * 40 * 8 * 4 * 30))
    assert "while" not in decoded.lower(drawn(None), z).as_text()
    error = float(jnp.linalg.norm((whole - banded).ravel()) / jnp.linalg.norm(whole.ravel()))
    assert error <= REL_L2, f"relative L2 {error:.2e}"


def test_small_frames_are_the_program_without_bands() -> None:
    z = jnp.zeros((1, 4, 4, 4))
    texts = [decoded.lower(drawn(most), z).as_text() for most in (None, 2**28)]
    assert texts[0] == texts[1]


@pytest.mark.ci
def test_a_frame_in_bands_holds_input_and_output_of_one_convolution() -> None:
    z = jax.ShapeDtypeStruct((1, 32, 16, 4), jnp.float32)

    def temporary_bytes(most: int | None) -> int:
        return decoded.lower(decoder(most, width=16)[0], z).compile().memory_analysis().temp_size_in_bytes

    pixels_bytes = 4 * 256 * 128 * 16  # of one feature map of the last level
    assert temporary_bytes(None) >= 5 * pixels_bytes  # two maps of twice the width, one of the width
    assert temporary_bytes(pixels_bytes // 4) < 4.6 * pixels_bytes  # one of twice the width, two of the width, bands


@given(height=st.integers(1, 900), width=st.integers(1, 20), most=st.integers(1, 4000))
def test_bands_cover_the_rows_and_hold_half_of_the_bytes(height: int, width: int, most: int) -> None:
    divided = bands((1, height, width, 1), most, 4)
    if divided is None:
        assert 4 * height * width <= most or height <= max(1, most // (8 * width)) + 2 * HALO
        return
    assert (divided.number - 1) * divided.rows < height <= divided.number * divided.rows
    assert 4 * divided.rows * width <= max(most // 2, 4 * width)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("divided", [Bands(4, 3), Bands(6, 2), Bands(11, 1), Bands(2, 6)])
def test_every_row_sees_its_neighbours_and_the_zeros_beyond_the_edge(divided: Bands, factor: int) -> None:
    x = np.arange(1, 23, dtype=np.float32).reshape(1, 11, 2, 1)

    def sums(x: Any) -> Any:
        padded = jnp.pad(jnp.repeat(jnp.asarray(x), factor, axis=1), ((0, 0), (1, 1), (0, 0), (0, 0)))
        return padded[:, :-2] + 10 * padded[:, 1:-1] + 100 * padded[:, 2:]

    np.testing.assert_array_equal(in_bands(sums, divided, jnp.asarray(x), factor=factor), sums(x))
