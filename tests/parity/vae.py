"""The VAE suite: whole codec, its two halves, and single layers, against Open-Sora 1.2's VideoAutoencoderPipeline.

Invariant: every tensor comes from the public modules filled through ``convert_weights``; only layouts change here.
"""

import ast
import functools
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from sora_jax.config import SpatialVAEConfig, TemporalVAEConfig, VAEConfig
from sora_jax.networks.vae import VAE, chunks, latent_size, split_moments
from tests.parity.fixtures import is_input, read_json, read_tensors
from tests.parity.weights import build

Tensors = dict[str, np.ndarray]

_GROUPS = 32  # Open-Sora's temporal autoencoder always has 32 unless the configuration names them

# Short unit names of the fixtures (their config.json describes them); other units carry their PyTorch path.
_UNITS = {
    "causal_stride2": "temporal_vae.encoder.conv_blocks.1",
    "causal_k3": "temporal_vae.encoder.conv_in",
    "down2d": "spatial_vae.module.encoder.down_blocks.0.downsamplers.0",
    "mid_attn": "spatial_vae.module.decoder.mid_block.attentions.0",
}

_PATHS = (
    (r"^(spatial|temporal)_vae\.(?:module\.)?(encoder|decoder)\.", r"\1_\2."),
    (r"^(spatial|temporal)_vae\.(?:module\.)?quant_conv", r"\1_encoder.quant_conv"),
    (r"^(spatial|temporal)_vae\.(?:module\.)?post_quant_conv", r"\1_decoder.post_quant_conv"),
    (r"\.downsamplers\.0", ".downsampler"),
    (r"\.attentions\.0", ".attention"),
    (r"\.to_out\.0", ".to_out"),
    (r"\.conv$", ""),
)


def cases(folder: Path) -> dict[str, Path]:
    """Returns the fixture file of every case that config.json promises, the units, and the table of latent sizes."""
    config = read_json(folder / "config.json")
    files = {name: folder / f"{name}.safetensors" for name in (*config["cases"], "units")}
    return {**files, "latent_size": folder / "config.json"}


def check(folder: Path, case: str) -> list[str]:
    """Returns the differences from the table of latent sizes in config.json, whose keys are ``(frames, rows, columns)``."""
    config = read_json(folder / "config.json")
    differences = [] if config["get_latent_size"] else ["config.json holds no latent sizes"]
    for size, expected in config["get_latent_size"].items():
        got = list(latent_size(read_config(config), *ast.literal_eval(size)))
        if got != expected:
            differences.append(f"{size}: got {got}, expected {expected}")
    return differences


def compute(folder: Path, case: str) -> Tensors:
    """Returns the computed tensors of a case under the fixture's keys, in PyTorch's layout."""
    config = read_json(folder / "config.json")
    vae = _load(folder)
    tensors = read_tensors(folder / f"{case}.safetensors")
    if case == "units":
        return _units(vae, tensors)
    entry = config["cases"][case]
    (inputs,) = (array for key, array in tensors.items() if is_input(key))
    return _KINDS[entry["kind"]](vae, _last(inputs), entry["num_frames"])


def read_config(config: Mapping[str, Any]) -> VAEConfig:
    """Returns our configuration of a fixture's config.json."""
    spatial, temporal = config["spatial_config"], config["temporal_config"]
    return VAEConfig(
        spatial=SpatialVAEConfig(
            in_channels=spatial["in_channels"],
            out_channels=spatial["out_channels"],
            latent_channels=spatial["latent_channels"],
            block_out_channels=tuple(spatial["block_out_channels"]),
            layers_per_block=spatial["layers_per_block"],
            norm_num_groups=spatial["norm_num_groups"],
            scaling_factor=config["spatial_scaling_used"],
        ),
        temporal=TemporalVAEConfig(
            in_out_channels=temporal["in_out_channels"],
            latent_embed_dim=temporal["latent_embed_dim"],
            embed_dim=temporal["embed_dim"],
            filters=temporal["filters"],
            num_res_blocks=temporal["num_res_blocks"],
            channel_multipliers=tuple(temporal["channel_multipliers"]),
            temporal_downsample=tuple(temporal["temporal_downsample"]),
            norm_num_groups=temporal.get("num_groups", _GROUPS),
        ),
        micro_frame_size=config["micro_frame_size"],
    )


@functools.lru_cache(maxsize=1)
def _load(folder: Path) -> VAE:
    return build("vae", read_config(read_json(folder / "config.json")), read_tensors(folder / "state_dict.safetensors"))


def _decode(vae: VAE, z: jax.Array, num_frames: int) -> Tensors:
    @jax.jit
    def run(vae: VAE, z: jax.Array) -> dict[str, jax.Array]:
        clips = [
            vae.temporal_decoder(vae.stats.restore(z[:, chunk.latents]), chunk.num_frames)
            for chunk in chunks(vae.config, num_frames)
        ]
        return {"mid.temporal_out": jnp.concatenate(clips, axis=1), "out": vae.decode(z, num_frames)}

    return {key: _first(array) for key, array in run(vae, z).items()}


def _encode(vae: VAE, video: jax.Array, _: None) -> Tensors:
    @jax.jit
    def run(vae: VAE, video: jax.Array) -> dict[str, jax.Array]:
        spatial = [vae.spatial_moments(video[:, chunk.frames]) for chunk in chunks(vae.config, video.shape[1])]
        temporal = [vae.temporal_encoder(vae.scale_spatial(split_moments(moments)[0])) for moments in spatial]
        return {
            "mid.spatial_moments": jnp.concatenate(spatial, axis=1),
            "mid.temporal_moments": jnp.concatenate(temporal, axis=1),
            "out": vae.encode(video),
        }

    out = {key: _first(array) for key, array in run(vae, video).items()}
    return {**out, "mid.spatial_moments": rearrange(out["mid.spatial_moments"], "b c t h w -> (b t) c h w")}


def _temporal_encode(vae: VAE, x: jax.Array, _: None) -> Tensors:
    moments = _call(vae.temporal_encoder, x)
    return {"mid.moments": _first(moments), "out": _first(split_moments(moments)[0])}


def _temporal_decode(vae: VAE, z: jax.Array, num_frames: int) -> Tensors:
    return {"out": _first(jax.jit(lambda net, z: net(z, num_frames))(vae.temporal_decoder, z))}


def _spatial_encode(vae: VAE, video: jax.Array, _: None) -> Tensors:
    moments = jax.jit(lambda vae, video: vae.spatial_moments(video))(vae, video)
    out = _first(vae.scale_spatial(split_moments(moments)[0]))
    return {"mid.moments": rearrange(_first(moments), "b c t h w -> (b t) c h w"), "out": out}


def _spatial_decode(vae: VAE, x: jax.Array, _: None) -> Tensors:
    return {"out": _first(jax.jit(lambda vae, x: vae.decode_frames(x))(vae, x))}


_KINDS: dict[str, Callable[[VAE, jax.Array, Any], Tensors]] = {
    "decode": _decode,
    "encode": _encode,
    "temporal_encode": _temporal_encode,
    "temporal_decode": _temporal_decode,
    "spatial_encode": _spatial_encode,
    "spatial_decode": _spatial_decode,
}


def _units(vae: VAE, tensors: Tensors) -> Tensors:
    out = {}
    for key, array in tensors.items():
        if is_input(key):
            unit = key.removesuffix(".in")
            path = _UNITS.get(unit, unit.removesuffix(".small"))
            for pattern, ours in _PATHS:
                path = re.sub(pattern, ours, path)
            layer = functools.reduce(_child, path.split("."), vae)
            out[f"{unit}.out"] = _first(_call(layer, _last(array)))
    return out


def _child(module: Any, name: str) -> Any:
    return module[int(name)] if name.isdigit() else operator.attrgetter(name)(module)


def _call(layer: Any, x: jax.Array) -> jax.Array:
    return jax.jit(lambda layer, x: layer(x))(layer, x)


def _last(x: np.ndarray) -> jax.Array:
    """PyTorch's layout with channels second, to ours with channels last."""
    return jnp.asarray(np.moveaxis(x, 1, -1))


def _first(x: jax.Array) -> np.ndarray:
    return np.moveaxis(np.asarray(x, np.float32), -1, 1)
