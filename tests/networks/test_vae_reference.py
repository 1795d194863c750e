"""The spatial autoencoder against diffusers, live: random tiny models through the real conversion."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import convert_weights
from sora_jax import config as presets
from sora_jax.config import SpatialVAEConfig
from sora_jax.networks.vae import VAE, split_moments
from sora_jax.storage.checkpoint import unflatten
from tests.parity import limits
from tests.parity.wide import state_dict_shapes

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("little_optimised")]

POCKET = presets.pocket.vae.spatial
CONFIGS = {
    "pocket": (POCKET, (16, 24)),
    "odd_sizes": (
        dataclasses.replace(POCKET, block_out_channels=(8, 8, 16, 24), norm_num_groups=4, layers_per_block=2),
        (17, 30),
    ),
    "three_levels": (
        dataclasses.replace(POCKET, block_out_channels=(12, 6, 24), norm_num_groups=3, latent_channels=6),
        (12, 5),
    ),
}


def reference_model(config: SpatialVAEConfig, seed: int):
    """A diffusers AutoencoderKL with every parameter random, norms and biases included."""
    torch = pytest.importorskip("torch", reason="the reference extra is not installed")
    diffusers = pytest.importorskip("diffusers", reason="the reference extra is not installed")
    levels = len(config.block_out_channels)
    fields = {name: value for name, value in config.to_dict().items() if name != "scaling_factor"}
    down, up = ["DownEncoderBlock2D"] * levels, ["UpDecoderBlock2D"] * levels
    model = diffusers.AutoencoderKL(**fields, down_block_types=down, up_block_types=up, act_fn="silu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.1 * noise)
    return torch, model


def converted(config: SpatialVAEConfig, spatial: dict) -> VAE:
    """Our autoencoder with the spatial part of a state dict; the rest is drawn."""
    temporal = dataclasses.replace(
        presets.pocket.vae.temporal, filters=4, norm_num_groups=1, in_out_channels=config.latent_channels
    )
    whole = dataclasses.replace(presets.pocket.vae, spatial=config, temporal=temporal)
    state_dict = {name: np.ones(shape, np.float32) for name, shape in state_dict_shapes("vae", whole).items()}
    named = {f"spatial_vae.module.{name}": array for name, array in spatial.items()}
    assert named.keys() == {name for name in state_dict if name.startswith("spatial_vae.")}
    flat = convert_weights.convert("vae", {**state_dict, **named}, whole)
    return unflatten(jax.eval_shape(lambda: VAE(whole, rngs=nnx.Rngs(0))), flat)


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_diffusers(name: str) -> None:
    config, (height, width) = CONFIGS[name]
    torch, model = reference_model(config, seed=sum(map(ord, name)))
    vae = converted(config, model.state_dict())
    draw = np.random.default_rng(3)
    frames = np.tanh(draw.standard_normal((2, height, width, 3), dtype=np.float32))
    with torch.no_grad():
        moments = model.encode(torch.from_numpy(frames).permute(0, 3, 1, 2)).latent_dist.parameters
        pixels = model.decode(moments[:, : config.latent_channels]).sample
    latents = moments[:, : config.latent_channels].permute(0, 2, 3, 1).numpy()
    for case, network, given, expected in (
        ("encode", vae.spatial_encoder, frames, moments),
        ("decode", vae.spatial_decoder, latents, pixels),
    ):
        out = np.asarray(jax.jit(lambda network, x: network(x))(network, jnp.asarray(given)))
        comparison = limits.compare(out, expected.permute(0, 2, 3, 1).numpy(), limits.limit_for("vae", "live", case))
        assert comparison.passed, comparison


def test_posterior_agrees_with_diffusers() -> None:
    torch, model = reference_model(POCKET, seed=4)
    vae = converted(POCKET, model.state_dict())
    video = np.tanh(np.random.default_rng(5).standard_normal((1, 1, 16, 16, 3), dtype=np.float32))
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(video[0]).permute(0, 3, 1, 2)).latent_dist
    expected = posterior.mode().permute(0, 2, 3, 1).numpy() * POCKET.scaling_factor
    mean, logvar = split_moments(jax.jit(lambda vae, x: vae.spatial_moments(x))(vae, video))
    np.testing.assert_allclose(vae.scale_spatial(mean)[0], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(logvar[0], posterior.logvar.permute(0, 2, 3, 1).numpy(), rtol=0, atol=5e-5)
