"""What mutants are made from: tiny checkpoints in every layout, and the values that they hold.

Invariant: the expected values come from the state dict itself by the in-memory engine, not from a converted file.
"""

import atexit
import dataclasses
import functools
import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from convert_weights import convert
from convert_weights.orbax_checkpoint import to_orbax
from convert_weights.source_config import to_upstream
from convert_weights.to_torch import to_torch
from sora_jax.config import T5Config
from sora_jax.storage.checkpoint import load_network, save_network
from tests.support import formats, sources, tiny_model

T5 = T5Config(
    vocab_size=16,
    d_model=8,
    d_kv=4,
    num_heads=2,
    d_ff=12,
    num_layers=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    layer_norm_epsilon=1e-6,
)
BLOCKS = dataclasses.replace(
    T5, d_model=32, d_kv=16, d_ff=32, relative_attention_max_distance=128
)  # whose rows are whole blocks of Q8_0
LAYOUTS = ("safetensors", "torch", "shards", "torch shards", "float8", "gguf", "adapter", "orbax")
ADAPTED, RANK, ALPHA, SCALE = "encoder.block.1.layer.0.SelfAttention.q", 2, 3.0, 0.5  # of layout "adapter"
TOKENIZER = b'{"model": "a tokenizer"}'


@dataclasses.dataclass(frozen=True)
class Base:
    """A network's source and what it must become."""

    network: str
    config: Any
    arrays: Mapping[str, np.ndarray]
    expected: Mapping[str, np.ndarray]

    def write(self, folder: Path, layout: str) -> Path:
        """Writes the source in one of ``LAYOUTS`` and returns its folder; of "adapter" only what is added to the source."""
        if layout == "orbax":
            return Path(shutil.copytree(_orbax(self.network), folder))
        folder.mkdir(parents=True)
        if layout == "adapter":
            fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": ["q"]}
            (folder / "adapter_config.json").write_text(json.dumps(fields))
            write_arrays(folder / "model.safetensors", _factors())
            return folder
        (folder / "config.json").write_text(json.dumps(to_upstream(self.network, self.config)))
        if self.network == "t5":
            (folder / "tokenizer.json").write_bytes(TOKENIZER)
        if layout == "gguf":
            formats.write_gguf(folder / "model.gguf", self.config, self.arrays, "Q8_0")
            return folder
        layout = layout.replace("float8", "safetensors")
        suffix = ".bin" if layout.startswith("torch") else ".safetensors"
        stem = "pytorch_model" if suffix == ".bin" else "model"
        if layout in ("safetensors", "torch"):
            write_arrays(folder / f"{stem}{suffix}", self.arrays)
            return folder
        names = sorted(self.arrays)
        weight_map = {}
        for shard in range(2):
            path = folder / f"{stem}-{shard + 1:05d}-of-00002{suffix}"
            write_arrays(path, {name: self.arrays[name] for name in names[shard::2]})
            weight_map.update(dict.fromkeys(names[shard::2], path.name))
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes a state dict as safetensors or as a PyTorch file, by the suffix."""
    if path.suffix == ".safetensors":
        save_file(dict(arrays), path, {"format": "pt"})
    else:
        sources.write_torch_file(path, dict(arrays))


@functools.cache
def base(network: str, layout: str = "safetensors") -> Base:
    """Returns a tiny network's source in a layout."""
    if layout == "float8":
        packed = formats.scaled_float8(_t5_arrays())
        return Base(network, T5, packed, convert("t5", formats.unscaled(packed), T5))
    if layout == "adapter":
        a, b = _factors().values()
        arrays, name = _t5_arrays(), f"{ADAPTED}.weight"
        return Base(
            network, T5, arrays, convert("t5", {**arrays, name: arrays[name] + (b * np.float32(SCALE * ALPHA / RANK)) @ a}, T5)
        )
    if layout == "gguf":
        plain = formats.t5_arrays(BLOCKS)
        with tempfile.TemporaryDirectory() as folder:
            held = formats.write_gguf(Path(folder) / "model.gguf", BLOCKS, plain, "Q8_0")
        return Base(network, BLOCKS, plain, convert("t5", held, BLOCKS))
    if network == "t5":
        arrays = _t5_arrays()
        return Base(network, T5, arrays, convert("t5", arrays, T5))
    config = getattr(tiny_model.CONFIG, network)
    arrays = _state_dict(network, config)
    return Base(network, config, arrays, convert(network, arrays, config))


def _factors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    shapes = {"A": (RANK, T5.d_model), "B": (T5.num_heads * T5.d_kv, RANK)}
    return {
        f"base_model.model.{ADAPTED}.lora_{factor}.weight": draw.standard_normal(shape, dtype=np.float32)
        for factor, shape in shapes.items()
    }


@functools.cache
def _orbax(network: str) -> Path:
    """Returns an orbax checkpoint of a source, written once in a process."""
    folder = Path(tempfile.mkdtemp(prefix="orbax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = base(network)
    return to_orbax(save_network(folder / "model", network, source.config, source.expected), folder / "checkpoint")


def _t5_arrays() -> dict[str, np.ndarray]:
    matrices = {f"layer.0.SelfAttention.{x}": (8, 8) for x in "qkvo"}
    matrices |= {f"layer.1.DenseReluDense.{x}": (12, 8) for x in ("wi_0", "wi_1")} | {"layer.1.DenseReluDense.wo": (8, 12)}
    norms = {f"layer.{i}.layer_norm": (8,) for i in range(2)}
    shapes: dict[str, tuple[int, ...]] = {
        f"encoder.block.{i}.{name}.weight": shape for i in range(2) for name, shape in {**matrices, **norms}.items()
    }
    shapes |= {"shared.weight": (16, 8), "encoder.final_layer_norm.weight": (8,)}
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (8, 2)
    draw = np.random.default_rng(0)
    return {name: draw.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def _state_dict(network: str, config: Any) -> dict[str, np.ndarray]:
    """Returns a random network under PyTorch's names."""
    with tempfile.TemporaryDirectory() as folder:
        save_network(folder, network, config, tiny_model.random_flat(network))
        from sora_jax.storage.directory import open_network

        return load_file(to_torch(open_network(folder, network), Path(folder) / "back"))


def differing(model: Path, source: Base) -> list[str]:
    """Returns the parameters of a converted network that are not those of its unmutated source, bit for bit."""
    config, flat = load_network(model, source.network)
    if config != source.config:
        return ["the configuration"]
    names = flat.keys() | source.expected.keys()
    return [name for name in sorted(names) if not _same(flat.get(name), source.expected.get(name))]


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and a.shape == b.shape and sources.bits(a) == sources.bits(b)


def zip_parts(path: Path) -> dict[str, bytes]:
    """Returns the entries of a PyTorch file by name."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path: Path, parts: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Writes entries as a new zip file with correct headers and CRC-32."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
