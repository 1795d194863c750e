"""The T5 encoder as mathematics: what the mask hides, what the position bias sees, steps against the whole, three platforms."""

import copy
import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax import config as presets
from sora_jax.config import BFLOAT16, T5Config
from sora_jax.networks.attention import DENSE
from sora_jax.networks.t5 import T5Encoder, position_buckets
from sora_jax.storage.checkpoint import flatten, unflatten

pytestmark = pytest.mark.usefixtures("little_optimised")

TINY = dataclasses.replace(presets.pocket.t5, vocab_size=50, d_model=32, d_kv=12, num_heads=3, d_ff=40)


@jax.jit
def forward(network: T5Encoder, ids: jax.Array, mask: jax.Array | None) -> jax.Array:
    return network(ids, mask)


@pytest.fixture(scope="module")
def network() -> T5Encoder:
    return jax.jit(lambda: T5Encoder(TINY, rngs=nnx.Rngs(0)))()


def ids_and_mask(lengths: list[int], total: int) -> tuple[jax.Array, jax.Array]:
    ids = np.random.default_rng(0).integers(2, TINY.vocab_size, (len(lengths), total), dtype=np.int32)
    return jnp.asarray(ids), jnp.asarray(np.arange(total)[None, :] < np.asarray(lengths)[:, None])


def test_real_tokens_do_not_see_padding(network: T5Encoder) -> None:
    ids, mask = ids_and_mask([9, 4], 9)
    repainted = jnp.asarray(np.where(mask, ids, 7))
    real = np.asarray(mask)
    first, second = (np.asarray(forward(network, x, mask)) for x in (ids, repainted))
    np.testing.assert_array_equal(first[real], second[real])
    shorter = np.asarray(forward(network, ids[1:, :4], None))
    np.testing.assert_allclose(first[1, :4], shorter[0], rtol=0, atol=2e-6)  # float32 rounding of sums of other lengths


def test_order_of_tokens_matters_only_through_the_position_bias(network: T5Encoder) -> None:
    ids, _ = ids_and_mask([8], 8)
    permutation = [3, 1, 7, 0, 2, 6, 5, 4]
    permuted = jnp.asarray(np.asarray(ids)[:, permutation])
    without = copy.copy(network)
    without.embed = copy.copy(network.embed)
    without.embed.relative_attention_bias = nnx.Param(jnp.zeros((32, TINY.num_heads)))
    moved, fixed = (np.asarray(forward(without, x, None)) for x in (permuted, ids))
    np.testing.assert_allclose(moved, fixed[:, permutation], rtol=0, atol=5e-6)  # sums in another order
    moved, fixed = (np.asarray(forward(network, x, None)) for x in (permuted, ids))
    assert np.max(np.abs(moved - fixed[:, permutation])) > 1e-2


def test_layers_called_one_at_a_time_are_the_encoder(network: T5Encoder) -> None:
    ids, mask = ids_and_mask([9, 2], 9)
    x, bias = jax.jit(lambda embed, ids: embed(ids))(network.embed, ids)
    step = jax.jit(lambda block, *inputs: block(*inputs))
    for block in network.block:
        x = step(block, x, bias, mask)
    stepped = jax.jit(lambda final, x: final(x))(network.final, x)
    np.testing.assert_allclose(
        stepped, forward(network, ids, mask), rtol=0, atol=1e-6
    )  # fusion across blocks may round differently


def test_parameters_belong_to_the_layers_of_the_configuration(network: T5Encoder) -> None:
    owners = {next(layer for layer in TINY.layers if name.startswith(f"{layer}.")) for name in flatten(network)}
    assert owners == set(TINY.layers)


def test_buckets_are_exact_near_logarithmic_far_and_directed() -> None:
    buckets = position_buckets(300, presets.open_sora_1_2.t5)
    after, before = buckets[0], buckets[:, 0]
    np.testing.assert_array_equal(before[:8], np.arange(8))
    np.testing.assert_array_equal(after[1:] - before[1:], 16)
    assert np.all(np.diff(before) >= 0)
    np.testing.assert_array_equal(before[[16, 32, 64]], [10, 12, 14])  # two more buckets with each doubling
    assert np.all(before[128:] == 15)
    np.testing.assert_array_equal(buckets[3:, 3:], buckets[:-3, :-3])  # relative: the same along every diagonal


def test_initial_attention_logits_have_unit_variance() -> None:
    config = dataclasses.replace(TINY, num_layers=1, d_model=256, d_kv=32, num_heads=4)
    attn = jax.jit(lambda: T5Encoder(config, rngs=nnx.Rngs(1)))().block[0].attn
    x = np.random.default_rng(0).standard_normal((200, config.d_model), dtype=np.float32)
    q, k = (np.reshape(x @ np.asarray(projection.kernel[...]), (200, 4, 32)) for projection in (attn.q, attn.k))
    logits = np.einsum("qnk,lnk->nql", q, k)
    assert 0.9 < np.std(logits) < 1.1  # the sample deviation of 160,000 correlated values


def test_attention_weights_each_key_by_its_logit() -> None:
    v = np.asarray([[[[1.0], [10.0], [100.0]]]], np.float32)
    bias = np.log(np.asarray([[[[1.0, 3.0, 5.0]]]], np.float32))
    weigh = jax.jit(lambda v, bias, mask: DENSE(v[:, :, :1] * 0, v * 0, v, scale=1.0, bias=bias, mask=mask)[0, 0, 0, 0])
    assert float(weigh(v, bias, np.ones((1, 1, 1, 3), bool))) == pytest.approx(531 / 9, rel=1e-6)
    assert float(weigh(v, bias, np.asarray([[[[True, True, False]]]]))) == pytest.approx(31 / 4, rel=1e-6)


def test_every_parameter_moves_the_output(network: T5Encoder) -> None:
    ids, mask = ids_and_mask([9, 4], 9)
    target = np.random.default_rng(3).standard_normal((2, 9, TINY.d_model), dtype=np.float32)
    gradient = jax.jit(jax.grad(lambda network: jnp.sum(network(ids, mask) * target)))(network)
    assert [name for name, value in flatten(gradient).items() if not np.any(np.asarray(value))] == []


def test_bfloat16_computes_what_float32_does_to_its_precision(network: T5Encoder) -> None:
    ids, mask = ids_and_mask([9, 4], 9)
    mixed = dataclasses.replace(BFLOAT16, param=jnp.float32)
    narrow = unflatten(jax.eval_shape(lambda: T5Encoder(TINY, policy=mixed, rngs=nnx.Rngs(0))), flatten(network))
    out, truth = forward(narrow, ids, mask), np.asarray(forward(network, ids, mask))
    assert out.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(out, np.float32) - truth) / np.linalg.norm(truth)
    assert 1e-4 < error < 2e-2  # 2^-8 a rounding, a few of them in each of two blocks


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_for(platform: str, network: T5Encoder) -> None:
    ids, mask = ids_and_mask([4], 6)
    lower = jax.export.export(forward, platforms=[platform])
    assert lower(jax.eval_shape(lambda: network), ids, mask).platforms == (platform,)


def test_a_configuration_survives_its_json() -> None:
    assert T5Config.from_dict(TINY.to_dict()) == TINY
