"""Checkpoints in the formats that circulate, from a plain state dict: eight-bit floats, GGUF, original names of the VAE."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from sora_jax.config import T5Config
from tests.support import sources

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
# The smallest T5 that every type of GGUF can hold, whose blocks have up to 256 values in a row.
BLOCKS = T5Config(
    vocab_size=16,
    d_model=256,
    d_kv=64,
    num_heads=4,
    d_ff=256,
    num_layers=1,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=128,
    layer_norm_epsilon=1e-6,
)
_PARTS = {"wi_0": "ffn_gate", "wi_1": "ffn_up", "wo": "ffn_down"}


def t5_arrays(config: T5Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns a random encoder under transformers' names."""
    width, inner = config.d_model, config.num_heads * config.d_kv
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (config.vocab_size, width)}
    shapes["encoder.final_layer_norm.weight"] = (width,)
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shapes[bias] = (config.relative_attention_num_buckets, config.num_heads)
    for i in range(config.num_layers):
        block = f"encoder.block.{i}.layer"
        shapes |= {f"{block}.0.SelfAttention.{x}.weight": (inner, width) for x in "qkv"}
        shapes[f"{block}.0.SelfAttention.o.weight"] = (width, inner)
        shapes |= {f"{block}.1.DenseReluDense.{x}.weight": (config.d_ff, width) for x in ("wi_0", "wi_1")}
        shapes[f"{block}.1.DenseReluDense.wo.weight"] = (width, config.d_ff)
        shapes |= {f"{block}.{j}.layer_norm.weight": (width,) for j in range(2)}
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def load(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a safetensors file whose eight-bit floats NumPy alone cannot name."""
    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": E4M3}
    return {
        name: np.frombuffer(bytes(entry["data"]), dtypes[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in safetensors.deserialize(path.read_bytes())
    }


def is_matrix(name: str) -> bool:
    """Returns whether an array is stored in eight bits by those who do so: matrices of the blocks."""
    return re.search(r"\.(q|k|v|o|wi_0|wi_1|wo)\.weight$", name) is not None


def float8(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays with their matrices in eight bits and the rest in float16."""
    return {name: array.astype(E4M3 if is_matrix(name) else np.float16) for name, array in arrays.items()}


def scaled_float8(arrays: Mapping[str, np.ndarray], scale_name: str = "scale_weight") -> dict[str, np.ndarray]:
    """Returns the arrays as ComfyUI scales them: each matrix divided by a number that stands next to it."""
    found: dict[str, np.ndarray] = {"scaled_fp8": np.zeros(2, E4M3)}
    for name, array in arrays.items():
        if not is_matrix(name):
            found[name] = array.astype(ml_dtypes.bfloat16)
            continue
        scale = np.float32(np.abs(array).max() / 448)
        found[name] = (array / scale).astype(E4M3)
        found[name.removesuffix("weight") + scale_name] = np.array(scale, np.float32)
        found[name.removesuffix("weight") + "scale_input"] = np.array(1, np.float32)
    return found


def unscaled(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the plain float32 numbers that arrays in eight bits stand for, without their bookkeeping."""
    found = {}
    for name, array in arrays.items():
        stem = name.removesuffix("weight")
        if stem == name or name.endswith("scale_weight"):
            continue
        scale = next((arrays[stem + spelling] for spelling in ("scale_weight", "weight_scale") if stem + spelling in arrays), 1)
        found[name] = array.astype(np.float32) * np.float32(scale)
    return found


def gguf_name(name: str) -> str:
    """Returns the GGUF name of an encoder's array."""
    if name == "shared.weight":
        return "token_embd.weight"
    if name == "encoder.final_layer_norm.weight":
        return "enc.output_norm.weight"
    block = name.split(".")[2]
    if "layer_norm" in name:
        return f"enc.blk.{block}.{('attn_norm', 'ffn_norm')[int(name.split('.')[4])]}.weight"
    part = name.split(".")[-2]
    part = "attn_rel_b" if part == "relative_attention_bias" else _PARTS.get(part, f"attn_{part}")
    return f"enc.blk.{block}.{part}.weight"


def write_gguf(
    path: Path,
    config: T5Config,
    arrays: Mapping[str, np.ndarray],
    kind: str,
    *,
    pack: Callable[[np.ndarray, str], np.ndarray] | None = None,
    change: Callable[[Any], None] = lambda writer: None,
) -> dict[str, np.ndarray]:
    """Writes an encoder with the ``gguf`` package, matrices and embedding as ``kind``; returns the numbers that it then holds.

    Args:
      path: the file.
      config: the configuration, for the metadata.
      arrays: float32 by transformers' names.
      kind: the package's name of a type.
      pack: quantises; default the package's own.
      change: changes the writer before it writes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf_writer(path, config)
    held = {}
    for name, array in arrays.items():
        packed = kind if is_matrix(name) or name == "shared.weight" else "F32"
        held[name] = _add(writer, gguf_name(name), array, packed, pack)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def gguf_writer(path: Path, config: T5Config) -> Any:
    """Returns the package's writer with the metadata of an encoder, as llama.cpp's conversion sets them."""
    import gguf

    writer = gguf.GGUFWriter(path, "t5encoder")
    writer.add_context_length(512)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_key_length(config.d_kv)
    writer.add_value_length(config.d_kv)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_relative_attn_buckets_count(config.relative_attention_num_buckets)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_token_list(["<pad>", "</s>", "<unk>"])
    writer.add_token_scores([0.0, 0.0, 0.0])
    return writer


def _add(writer: Any, name: str, array: np.ndarray, kind: str, pack: Any) -> np.ndarray:
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        plain = array.astype(kind.replace("F", "float"))
        writer.add_tensor(name, plain)
        return plain.astype(np.float32)
    raw = (pack or (lambda values, which: gguf.quants.quantize(values, gguf.GGMLQuantizationType[which])))(array, kind)
    writer.add_tensor(name, raw, raw_dtype=number)
    if kind == "BF16":
        return raw.view(ml_dtypes.bfloat16).reshape(array.shape).astype(np.float32)
    return np.asarray(gguf.quants.dequantize(raw, number), np.float32).reshape(array.shape)


def random_blocks(array: np.ndarray, kind: str) -> np.ndarray:
    """Returns blocks of a type that the package only decodes: bytes so small that no scale in them is infinite."""
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    draw = np.random.default_rng(array.size)
    return draw.integers(0, 48, (*array.shape[:-1], array.shape[-1] // block * block_bytes), dtype=np.uint8)


def original_names(arrays: Mapping[str, np.ndarray], levels: int, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns the spatial part of a VAE's state dict under latent diffusion's own names, attention as convolutions."""
    found = {}
    for name, array in arrays.items():
        if not name.startswith("spatial_vae.module."):
            continue
        new = name.removeprefix("spatial_vae.module.")
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", new)
        new = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", new)
        attention = "mid_block.attentions.0." in new
        if attention:
            new = (
                new.replace("mid_block.attentions.0.", "mid.attn_1.")
                .replace("group_norm", "norm")
                .replace("to_out.0", "proj_out")
            )
            new = re.sub(r"to_([qkv])", r"\1", new)
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        found[prefix + new] = array[:, :, None, None] if attention and array.ndim == 2 else array
    return found


def write_t5(path: Path, arrays: Mapping[str, np.ndarray], config: dict[str, Any] | None = None) -> Path:
    """Writes one safetensors file, with a config.json next to it, and returns its path."""
    import json

    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "config.json").write_text(json.dumps(config or sources.upstream_config("t5")))
    save_file(dict(arrays), path)
    return path
