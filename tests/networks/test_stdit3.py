"""STDiT3 as mathematics: what each block may mix, what masks hide, how time and place enter, what is compiled once.

Agreement with the PyTorch reference is tested on its fixtures (test_parity.py).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax import config as presets
from sora_jax.config import BFLOAT16, FLOAT32, DTypePolicy
from sora_jax.networks.attention import DENSE
from sora_jax.networks.positions import position_embedding, rotate, sinusoid
from sora_jax.networks.stdit3 import Conditioning, ScalarEmbedder, STDiT3, STDiT3Block
from sora_jax.storage.checkpoint import flatten, unflatten

pytestmark = pytest.mark.usefixtures("little_optimised")

# 12 channels a head: not a power of two, as the real 72.
TINY = dataclasses.replace(presets.pocket.stdit3, hidden_size=24, num_heads=2, depth=1, caption_channels=20, model_max_length=9)
WORLD = jax.random.key(7)
# Sums of a few dozen float32 terms in another order, through one block pair.
ROUNDING = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def network() -> STDiT3:
    return shaken(FLOAT32)


def shaken(policy: DTypePolicy) -> STDiT3:
    """Returns a network without the zeros of the initialisation, which would hide errors."""
    abstract = jax.eval_shape(lambda: STDiT3(TINY, policy=policy, rngs=nnx.Rngs(0)))
    generator = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("kernel"):
            return generator.standard_normal(shape) / np.prod(shape[:-1]) ** 0.5
        return 0.2 * generator.standard_normal(shape) + ("norm" in name)

    return unflatten(abstract, {name: jnp.asarray(draw(name, x.shape), x.dtype) for name, x in flatten(abstract).items()})


def inputs(batch: int = 2, frames: int = 3, height: int = 4, width: int = 6) -> dict[str, Any]:
    keys = jax.random.split(WORLD, 2)
    return {
        "z_BTHWC": jax.random.normal(keys[0], (batch, frames, height, width, TINY.in_channels)),
        "t_B": jnp.linspace(900.0, 200.0, batch),
        "caption_BLE": jax.random.normal(keys[1], (batch, TINY.model_max_length, TINY.caption_channels)),
        "mask_BL": jnp.arange(TINY.model_max_length)[None] < jnp.asarray([4, 7][:batch])[:, None],
        "fps_B": jnp.asarray([24.0, 8.0][:batch]),
        "height_px_B": jnp.full(batch, 8.0 * height),
        "width_px_B": jnp.full(batch, 8.0 * width),
    }


@jax.jit
def forward(network: STDiT3, arguments: dict[str, Any]) -> jax.Array:
    return network(**arguments)


@jax.jit
def embedded(network: STDiT3, arguments: dict[str, Any]) -> tuple[jax.Array, Conditioning]:
    return network.embed(**arguments)


@jax.jit
def through(block: STDiT3Block, x_BTSD: jax.Array, conditioning: Conditioning) -> jax.Array:
    return block(x_BTSD, conditioning)


def test_a_masked_caption_is_a_shorter_caption_and_a_batch_is_its_samples(network: STDiT3) -> None:
    given = inputs()
    alone = {name: value[:1] for name, value in given.items()}
    alone |= {"caption_BLE": alone["caption_BLE"][:, :4], "mask_BL": None}
    np.testing.assert_allclose(forward(network, given)[:1], forward(network, alone), **ROUNDING)


def test_what_the_mask_hides_changes_no_bit(network: STDiT3) -> None:
    given = inputs()
    repainted = given | {"caption_BLE": jnp.where(given["mask_BL"][..., None], given["caption_BLE"], 1e4)}
    np.testing.assert_array_equal(forward(network, given), forward(network, repainted))


def test_conditions_of_one_sample_serve_the_batch(network: STDiT3) -> None:
    given = inputs()
    one = given | {name: given[name][:1] for name in ("mask_BL", "fps_B", "height_px_B", "width_px_B")}
    tiled = given | {name: jnp.tile(one[name], (2,) + (1,) * (one[name].ndim - 1)) for name in one if len(one[name]) == 1}
    np.testing.assert_array_equal(forward(network, one), forward(network, tiled))


def test_conditions_that_do_not_divide_the_batch_are_refused(network: STDiT3) -> None:
    given = inputs() | {"fps_B": jnp.ones(3)}
    with pytest.raises(ValueError, match="fps_B has batch 3, which does not divide the batch 2"):
        forward(network, given)


def test_a_spatial_block_mixes_places_and_a_temporal_block_mixes_frames(network: STDiT3) -> None:
    x, conditioning = embedded(network, inputs())
    moved = x.at[:, 1, 2, ::2].add(1.0)  # one token, and not by what its norm removes
    for block, changed in ((network.spatial_blocks[0], np.s_[:, 1, :]), (network.temporal_blocks[0], np.s_[:, :, 2])):
        difference = np.abs(np.asarray(through(block, moved, conditioning) - through(block, x, conditioning))).max(axis=-1)
        seen = np.zeros(difference.shape, bool)
        seen[changed] = True
        assert np.all(difference[seen] > 1e-4)
        assert np.all(difference[~seen] == 0)


def test_only_the_temporal_block_knows_the_order_of_frames(network: STDiT3) -> None:
    x, conditioning = embedded(network, inputs())
    order = jnp.asarray([2, 0, 1])
    spatial, temporal = network.spatial_blocks[0], network.temporal_blocks[0]
    np.testing.assert_allclose(
        through(spatial, x[:, order], conditioning), through(spatial, x, conditioning)[:, order], **ROUNDING
    )
    turned = through(temporal, x[:, order], conditioning) - through(temporal, x, conditioning)[:, order]
    assert np.abs(np.asarray(turned)).max() > 1e-3


def test_odd_sizes_are_padded_sizes_cropped(network: STDiT3) -> None:
    given = inputs(height=3, width=5)
    padded = given | {"z_BTHWC": jnp.pad(given["z_BTHWC"], ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)))}
    np.testing.assert_array_equal(forward(network, given), forward(network, padded)[:, :, :3, :5])


def test_frames_of_time_zero_in_embed_and_blocks(network: STDiT3) -> None:
    given = inputs()
    mask = jnp.zeros((2, 3), bool).at[:, 1].set(True)
    _, mixed = embedded(network, given | {"frame_mask_BT": mask})
    _, at_t = embedded(network, given)
    _, at_zero = embedded(network, given | {"t_B": jnp.zeros(2)})
    np.testing.assert_array_equal(mixed.mod_BF6D[:, 1], at_t.mod_BF6D[:, 0])
    np.testing.assert_array_equal(mixed.mod_BF6D[:, 0], at_zero.mod_BF6D[:, 0])
    np.testing.assert_array_equal(mixed.mod_BF6D[:, 2], at_zero.mod_BF6D[:, 0])


def test_frames_all_of_time_t_are_no_mask(network: STDiT3) -> None:
    given = inputs()
    everything = given | {"frame_mask_BT": jnp.ones((2, 3), bool)}
    np.testing.assert_allclose(forward(network, everything), forward(network, given), **ROUNDING)


def test_the_final_layer_modulates_frames_of_time_zero_twice(network: STDiT3) -> None:
    x, conditioning = embedded(network, inputs() | {"frame_mask_BT": jnp.zeros((2, 3), bool)})
    table = network.final.scale_shift_table[...]

    def modulated(x: jax.Array, t_BD: jax.Array) -> jax.Array:
        shift, scale = ((row[None] + t_BD)[:, None, None] for row in table)
        return jax.nn.standardize(x, epsilon=1e-6) * (1 + scale) + shift

    twice = modulated(modulated(x, conditioning.t_BD), conditioning.t0_BD)
    expected = network.final.linear(twice)
    np.testing.assert_allclose(jax.jit(network.final.patches)(x, conditioning), expected, rtol=0, atol=3e-5)
    once = network.final.linear(modulated(x, conditioning.t0_BD))
    assert np.abs(np.asarray(once - expected)).max() > 0.1


def test_sizes_of_the_first_sample_count_for_all(network: STDiT3) -> None:
    given = inputs()
    others = given | {"height_px_B": given["height_px_B"].at[1].set(999.0)}
    np.testing.assert_array_equal(forward(network, given), forward(network, others))
    first = given | {"height_px_B": given["height_px_B"].at[0].set(999.0)}
    assert np.abs(np.asarray(forward(network, first) - forward(network, given)))[1].max() > 1e-2


@pytest.mark.ci
def test_every_parameter_has_an_effect(network: STDiT3) -> None:
    given = inputs() | {"frame_mask_BT": jnp.ones((2, 3), bool).at[:, 0].set(False)}
    weights = jax.random.normal(WORLD, (2, 3, 4, 6, TINY.out_channels))
    gradient = flatten(jax.jit(jax.grad(lambda network: jnp.sum(weights * network(**given))))(network))
    width = TINY.hidden_size
    for name, value in gradient.items():
        if name == "embed.y_embedder.y_embedding":  # callers pass it as a caption
            assert not np.any(value)
        elif name.endswith("kv_linear.bias"):  # adds the same to all logits of a query
            np.testing.assert_allclose(value[:width], 0, atol=1e-3 * float(jnp.abs(value[width:]).max()))
        else:
            effective = np.any(np.asarray(value).reshape(-1, value.shape[-1]), axis=0)
            assert np.all(effective), name


def test_at_initialisation_temporal_blocks_and_frame_rate_do_nothing(network: STDiT3) -> None:
    x, conditioning = embedded(network, inputs())
    fresh = jax.jit(lambda: STDiT3Block(TINY, temporal=True, rngs=nnx.Rngs(0)))()
    np.testing.assert_array_equal(through(fresh, x, conditioning), x)
    embedder = ScalarEmbedder(8, policy=FLOAT32, rngs=nnx.Rngs(0), zero=True)
    assert not np.any(embedder(jnp.asarray([24.0, 120.0])))


def test_bfloat16_leaves_conditioning_in_float32() -> None:
    compute = dataclasses.replace(FLOAT32, compute=jnp.bfloat16)
    given = inputs()
    x, low = embedded(shaken(compute), given)
    _, high = embedded(shaken(FLOAT32), given)
    assert x.dtype == low.caption_BLD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low.mod_BF6D, high.mod_BF6D)
    np.testing.assert_array_equal(low.t_BD, high.t_BD)
    full, half = (np.asarray(forward(shaken(policy), given)) for policy in (FLOAT32, BFLOAT16))
    assert half.dtype == np.float32
    # bfloat16 rounds by 2^-9 = 2e-3; about ten roundings in a row on the way through a pair.
    assert np.linalg.norm(half - full) < 3e-2 * np.linalg.norm(full)


def test_values_are_runtime_inputs(network: STDiT3) -> None:
    traces = 0

    @jax.jit
    def counted(network: STDiT3, arguments: dict[str, Any]) -> jax.Array:
        nonlocal traces
        traces += 1
        return network(**arguments)

    given = inputs()
    for i in range(3):
        counted(network, {name: value if name == "mask_BL" else value + i for name, value in given.items()})
    counted(network, given | {"mask_BL": ~given["mask_BL"]})
    assert traces == 1


def test_steps_called_one_at_a_time_are_the_forward(network: STDiT3) -> None:
    given = inputs(height=3) | {"frame_mask_BT": jnp.ones((2, 3), bool).at[:, 0].set(False)}
    x, conditioning = embedded(network, given)
    for block in (network.spatial_blocks[0], network.temporal_blocks[0]):
        x = through(block, x, conditioning)
    out = jax.jit(lambda final, x, conditioning: final(x, conditioning, height=3, width=6))(network.final, x, conditioning)
    np.testing.assert_allclose(out, forward(network, given), **ROUNDING)


def test_rotation_is_a_complex_phase_and_products_see_distances() -> None:
    x = np.asarray(jax.random.normal(WORLD, (2, 5, 12)))
    positions = np.asarray([0.0, 1.0, 2.5, 7.0, 19.0])
    phase = np.exp(1j * positions[:, None] * 10000.0 ** (-np.arange(6) / 6))
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * phase
    got = np.asarray(rotate(jnp.asarray(x), positions))
    np.testing.assert_allclose(got[..., ::2] + 1j * got[..., 1::2], turned, rtol=0, atol=1e-6)
    q, k = jax.random.normal(WORLD, (2, 1, 12))
    products = [float(jnp.vdot(rotate(q, np.asarray([p])), rotate(k, np.asarray([p + 3])))) for p in (0, 4, 11)]
    np.testing.assert_allclose(products, products[0], rtol=1e-5)


def test_sinusoid_is_cosines_then_sines() -> None:
    value = jnp.asarray([0.0, 1.0, 731.25])
    got = np.asarray(sinusoid(value), np.float64)
    angle = np.asarray(value, np.float64)[:, None] * np.exp(-np.log(10000.0) * np.arange(128) / 128)
    # A float32 frequency times 731 is off by 731 * 2^-24.
    np.testing.assert_allclose(got, np.concatenate([np.cos(angle), np.sin(angle)], axis=1), rtol=0, atol=1e-4)


def test_position_is_column_then_row_in_trained_units() -> None:
    height, width, size = 3, 5, 24
    area = 40.0 * 64.0
    got = np.asarray(position_embedding(height, width, size, scale=jnp.sqrt(area) / 512))
    frequency = 10000.0 ** (-np.arange(size // 4) / (size // 4))
    for row, column in np.ndindex(height, width):
        base = round((height * width) ** 0.5)
        places = (column * base / width, row * base / height)
        angles = [place * 512 / area**0.5 * frequency for place in places]
        expected = np.concatenate([part(angle) for angle in angles for part in (np.sin, np.cos)])
        np.testing.assert_allclose(got[row, column], expected, rtol=0, atol=2e-5)


def test_attention_is_softmax_of_scaled_products() -> None:
    q, k, v = jax.random.normal(WORLD, (3, 2, 2, 5, 4))
    mask = jnp.arange(5)[None, None, None] < jnp.asarray([3, 5])[:, None, None, None]
    logits = np.where(mask, np.einsum("bnsk,bnlk->bnsl", q, k) * 0.5, -np.inf).astype(np.float64)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    expected = np.einsum("bnsl,bnlk->bnsk", weights / weights.sum(axis=-1, keepdims=True), v)
    np.testing.assert_allclose(DENSE(q, k, v, scale=0.5, mask=mask), expected, rtol=0, atol=2e-6)
