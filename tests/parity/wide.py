"""Networks at the released checkpoints' widths, with weights drawn by name instead of stored.

Invariant: one network is in memory at a time.  The rule of each draw is that of the folder's README; the names and shapes
are those of the conversion tables, so that a name the table gets wrong draws other weights and fails.
"""

import re
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import convert_weights
from sora_jax import config as presets
from sora_jax.config import STDiT3Config, T5Config
from sora_jax.networks.merging import Merge
from sora_jax.networks.stdit3 import STDiT3
from tests.parity.fixtures import FixtureError, read_json, read_tensors
from tests.parity.weights import build

_DESCRIPTIONS = {"tdtm_wide": "stdit3_wide"}  # the JSON file of a case, where it is not its own


def cases(folder: Path) -> dict[str, Path]:
    described = {path.stem for path in folder.glob("*.json")}
    shared = {case for case, description in _DESCRIPTIONS.items() if description in described}
    return {case: folder / f"{case}.safetensors" for case in sorted(described | shared)}


def compute(folder: Path, case: str) -> dict[str, np.ndarray]:
    if case not in _COMPUTE:
        raise FixtureError(f"{case} is not known; expected one of {', '.join(_COMPUTE)}.")
    description = read_json(folder / f"{_DESCRIPTIONS.get(case, case)}.json")
    tensors = read_tensors(folder / f"{_DESCRIPTIONS.get(case, case)}.safetensors")
    try:
        return _COMPUTE[case](description, tensors)
    finally:
        jax.clear_caches()


def _stdit3(description: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    network, call = _stdit3_call(description, tensors)
    forward = jax.jit(lambda network, frame_mask_BT: network(*call["positional"], **call["named"], frame_mask_BT=frame_mask_BT))
    return {
        "out.plain": _channels_second(forward(network, None)),
        "out.x_mask": _channels_second(forward(network, tensors["in.x_mask"])),
    }


def _tdtm(description: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    network, call = _stdit3_call(description, tensors)
    forward = jax.jit(lambda network: network(*call["positional"], **call["named"], merge=Merge(odd="released")))
    return {"out.merged": _channels_second(forward(network))}


def _stdit3_call(description: dict[str, Any], tensors: dict[str, np.ndarray]) -> tuple[STDiT3, dict[str, Any]]:
    seed = description["seed"]
    sizes = {
        "in_channels": description["in_channels"],
        "patch_size": tuple(description["patch_size"]),
        "hidden_size": description["hidden_size"],
        "num_heads": description["num_heads"],
        "depth": description["depth"],
        "caption_channels": description["caption_channels"],
        "model_max_length": description["model_max_length"],
    }
    config = STDiT3Config(**{**presets.open_sora_1_2.stdit3.to_dict(), **sizes})
    shapes = {name: tuple(shape) for name, shape in description["keys"].items()}
    network = build("stdit3", config, {name: _weight(seed, name, shape) for name, shape in shapes.items()})
    x, y = (draw(seed, f"in.{name}", description[f"{name}_shape"]) for name in ("x", "y"))
    one = {name: jnp.asarray([description[name]], jnp.float32) for name in ("fps", "height", "width")}
    call = {
        "positional": (
            jnp.asarray(x.transpose(0, 2, 3, 4, 1)),
            jnp.asarray(description["timestep"], jnp.float32),
            jnp.asarray(y[:, 0]),
            jnp.asarray(tensors["in.mask"] != 0),
        ),
        "named": {"fps_B": one["fps"], "height_px_B": one["height"], "width_px_B": one["width"]},
    }
    return network, jax.device_put(call)


def _t5(description: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    fields = T5Config.__dataclass_fields__
    config = T5Config(**{name: description[name] for name in fields})
    drawn = {name: _t5_weight(description["seed"], name, shape) for name, shape in state_dict_shapes("t5", config).items()}
    network = build("t5", config, drawn)
    mask = tensors["in.mask"].astype(bool)
    out = np.asarray(jax.jit(lambda network, *inputs: network(*inputs))(network, tensors["in.ids"].astype(np.int32), mask))
    real = mask[:, :, None]
    return {"out.first16": out[:, :16], "out.mean_valid": np.sum(out * real, axis=1) / np.sum(real, axis=1)}


def _vae(description: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    seed, config = description["seed"], presets.open_sora_1_2.vae
    given = {name: np.asarray(description[name], np.float32).reshape(1, -1, 1, 1, 1) for name in ("scale", "shift")}
    drawn = {name: _weight(seed, name, shape) for name, shape in state_dict_shapes("vae", config).items() if name not in given}
    network = build("vae", config, {**drawn, **given})
    z = draw(seed, "in.z", description["z_shape"]).transpose(0, 2, 3, 4, 1)
    video = np.tanh(draw(seed, "in.video", description["video_shape"])).transpose(0, 2, 3, 4, 1)
    num_frames = description["num_frames"]
    return {
        "out.decode": _channels_second(jax.jit(lambda vae, z: vae.decode(z, num_frames))(network, z)),
        "out.encode": _channels_second(jax.jit(lambda vae, video: vae.encode(video))(network, video)),
    }


_COMPUTE = {"stdit3_wide": _stdit3, "tdtm_wide": _tdtm, "t5_wide": _t5, "vae_wide": _vae}


def draw(seed: int, name: str, shape: Any) -> np.ndarray:
    """Returns the standard normal float32 values that belong to a name."""
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    return generator.standard_normal(tuple(shape), dtype=np.float32)


def _weight(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name == "rope.freqs":
        size = 2 * shape[0]
        return (1.0 / 10000 ** (np.arange(0, size, 2)[: size // 2] / size)).astype(np.float32)
    values = draw(seed, name, shape)
    if name.endswith("scale_shift_table"):
        return np.float32(0.3) * values
    if name.endswith("y_embedding"):
        return values
    if len(shape) >= 2:
        return values / np.float32(np.sqrt(np.prod(shape[1:])))
    return 1 + np.float32(0.2) * values if name.endswith("weight") else np.float32(0.1) * values


def _t5_weight(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name in ("shared.weight", "encoder.embed_tokens.weight"):
        return draw(seed, "shared.weight", shape)
    if "relative_attention_bias" in name:
        return draw(seed, name, shape)
    if name.endswith((".q.weight", ".k.weight")):
        return draw(seed, name, shape) / np.float32(np.sqrt(shape[1]) * 64**0.25)
    return _weight(seed, name, shape)


def state_dict_shapes(network: str, config: Any) -> dict[str, tuple[int, ...]]:
    """Returns PyTorch's names and shapes of all parameters of a network: its conversion table, read backwards."""
    rules, _ = convert_weights.table(network, config)
    found: dict[str, tuple[int, ...]] = {}
    for target, shape in convert_weights.parameter_shapes(network, config).items():
        for rule in rules:
            match = re.fullmatch(_as_pattern(rule.target), target) if rule.target is not None else None
            if match:
                original = rule.transform.inverse(np.broadcast_to(np.float32(0), shape))
                found[rule.source.format(**match.groupdict())] = original.shape
                break
    return found


def _as_pattern(template: str) -> str:
    return re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(template))


def _channels_second(x: jax.Array) -> np.ndarray:
    return np.asarray(x).transpose(0, 4, 1, 2, 3)
