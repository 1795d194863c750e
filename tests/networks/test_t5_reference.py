"""T5 against transformers, live: random tiny models, through the real conversion."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import convert_weights
from sora_jax import config as presets
from sora_jax.config import T5Config
from sora_jax.networks.t5 import T5Encoder, position_buckets
from sora_jax.storage.checkpoint import flatten, unflatten
from tests.parity import limits

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("little_optimised")]

SMALL = dataclasses.replace(presets.pocket.t5, vocab_size=61, d_model=40, d_kv=12, num_heads=3, d_ff=56, num_layers=2)
CONFIGS = {
    "heads_wider_than_model": dataclasses.replace(SMALL, d_kv=24),
    "heads_narrower_than_model": SMALL,
    "few_buckets": dataclasses.replace(SMALL, relative_attention_num_buckets=8, relative_attention_max_distance=20),
    "large_epsilon": dataclasses.replace(SMALL, layer_norm_epsilon=0.1),
}


def reference_model(config: T5Config, seed: int):
    """A T5 v1.1 encoder with every parameter random, norms and biases included."""
    torch = pytest.importorskip("torch", reason="the reference extra is not installed")
    transformers = pytest.importorskip("transformers", reason="the reference extra is not installed")
    fields = {**config.to_dict(), "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False}
    model = transformers.T5EncoderModel(transformers.T5Config(**fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "layer_norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif "bias" in name or "shared" in name or "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return torch, model


def converted(config: T5Config, state_dict: dict) -> T5Encoder:
    flat = convert_weights.convert("t5", state_dict, config)
    return unflatten(jax.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0))), flat)


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_transformers(name: str) -> None:
    config = CONFIGS[name]
    torch, model = reference_model(config, seed=sum(map(ord, name)))
    draw = np.random.default_rng(5)
    ids = draw.integers(0, config.vocab_size, (3, 40), dtype=np.int32)
    mask = np.arange(40)[None, :] < np.asarray([40, 17, 1])[:, None]
    with torch.no_grad():
        expected = model(
            input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long()
        ).last_hidden_state.numpy()
    network = converted(config, model.state_dict())
    out = np.asarray(jax.jit(lambda network, ids, mask: network(ids, mask))(network, ids, mask))
    comparison = limits.compare(out, expected, limits.limit_for("t5", "live", "out"))
    assert comparison.passed, comparison


def test_bfloat16_weights_convert_bit_for_bit() -> None:
    torch, model = reference_model(SMALL, seed=1)
    flat = convert_weights.convert("t5", model.to(torch.bfloat16).state_dict(), SMALL, dtype="bfloat16")
    expected = model.state_dict()["encoder.block.1.layer.1.DenseReluDense.wo.weight"].float().numpy().T
    np.testing.assert_array_equal(flat["block.1.mlp.wo.kernel"].astype(np.float32), expected)


def test_embedding_under_either_of_its_names() -> None:
    _, model = reference_model(SMALL, seed=2)
    state_dict = {name: array.numpy() for name, array in model.state_dict().items()}
    table = state_dict["shared.weight"]
    bare = {name: array for name, array in state_dict.items() if name not in ("shared.weight", "encoder.embed_tokens.weight")}
    for names in (["shared.weight"], ["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]):
        flat = convert_weights.convert("t5", {**bare, **dict.fromkeys(names, table)}, SMALL)
        np.testing.assert_array_equal(flat["embed.embedding"], table)
    untied = {**bare, "shared.weight": table, "encoder.embed_tokens.weight": table + 1}
    with pytest.raises(convert_weights.ConversionError, match="must be tied"):
        convert_weights.convert("t5", untied, SMALL)
    with pytest.raises(convert_weights.ConversionError, match=r"embed\.embedding: missing"):
        convert_weights.convert("t5", bare, SMALL)


def test_conversion_sets_every_parameter() -> None:
    _, model = reference_model(SMALL, seed=3)
    flat = convert_weights.convert("t5", model.state_dict(), SMALL)
    network = jax.eval_shape(lambda: T5Encoder(SMALL, rngs=nnx.Rngs(0)))
    assert {name: value.shape for name, value in flat.items()} == {name: leaf.shape for name, leaf in flatten(network).items()}


@pytest.mark.parametrize("num_buckets", [8, 20, 32, 64])
@pytest.mark.parametrize("max_distance", [20, 33, 64, 128, 256])
def test_buckets_agree_with_transformers(num_buckets: int, max_distance: int) -> None:
    torch = pytest.importorskip("torch", reason="the reference extra is not installed")
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5", reason="the reference extra is not installed")
    sizes = {"relative_attention_num_buckets": num_buckets, "relative_attention_max_distance": max_distance}
    ours = position_buckets(600, dataclasses.replace(SMALL, **sizes))[[0, -1]]
    positions = torch.arange(600)[None, :] - torch.tensor([[0], [599]])
    np.testing.assert_array_equal(
        ours, modeling.T5Attention._relative_position_bucket(positions, True, num_buckets, max_distance)
    )
