"""Small checkpoints in the layout of the published ones, made of the golden state dicts; for tests of conversion."""

import functools
import io
import json
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from convert_weights import convert
from sora_jax.config import SpatialVAEConfig, STDiT3Config, T5Config, TemporalVAEConfig, VAEConfig
from sora_jax.storage.checkpoint import load_network

GOLDEN = Path(__file__).parents[1] / "golden"
NETWORKS = ("t5", "stdit3", "vae")

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


def state_dict(network: str) -> dict[str, np.ndarray]:
    """Returns the golden state dict of a network, with PyTorch's names and layouts: a new dictionary of new arrays."""
    return {name: array.copy() for name, array in _loaded(network).items()}


@functools.cache
def _loaded(network: str) -> dict[str, np.ndarray]:
    return load_file(GOLDEN / network / "state_dict.safetensors")


def upstream_config(network: str) -> dict[str, Any]:
    """Returns a config.json as upstream writes it, for the golden state dict."""
    fields = json.loads((GOLDEN / network / "config.json").read_text())
    if network == "t5":
        return {"model_type": "t5", "architectures": ["T5EncoderModel"], **fields["config"]}
    if network == "stdit3":
        extra = {"enable_flash_attn": True, "drop_path": 0.0, "torch_dtype": "float32", "only_train_temporal": False}
        return {"model_type": "STDiT3", "architectures": ["STDiT3"], **fields["config"], **extra}
    return {
        "model_type": "VideoAutoencoderPipeline",
        "micro_frame_size": fields["micro_frame_size"],
        "shift": fields["shift"],
        "scale": fields["scale"],
        "vae_2d": {"type": "VideoAutoencoderKL", "micro_batch_size": 4, **fields["spatial_config"]},
        "vae_temporal": {"type": "VAE_Temporal_SD", "from_pretrained": None, **fields["temporal_config"]},
    }


def golden_config(network: str) -> Any:
    """Returns our configuration of the golden state dict, read independently of ``convert_weights``."""
    fields = json.loads((GOLDEN / network / "config.json").read_text())
    if network == "t5":
        return T5Config(**{name: fields["config"][name] for name in T5Config.__dataclass_fields__})
    if network == "stdit3":
        return STDiT3Config.from_dict({name: fields["config"][name] for name in STDiT3Config.__dataclass_fields__})
    spatial = {
        name: fields["spatial_config"][name] for name in SpatialVAEConfig.__dataclass_fields__ if name != "scaling_factor"
    }
    return VAEConfig(
        spatial=SpatialVAEConfig.from_dict(spatial | {"scaling_factor": fields["spatial_scaling_used"]}),
        temporal=TemporalVAEConfig.from_dict(fields["temporal_config"] | {"norm_num_groups": 32}),
        micro_frame_size=fields["micro_frame_size"],
    )


def write_source(folder: Path, network: str, arrays: Mapping[str, np.ndarray] | None = None) -> Path:
    """Writes ``config.json`` and ``model.safetensors`` and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(upstream_config(network)))
    save_file(dict(arrays if arrays is not None else state_dict(network)), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_shards(folder: Path, network: str, *, shards: int, suffix: str = ".safetensors") -> Path:
    """Writes a checkpoint as shards with an index, as transformers does, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(upstream_config(network)))
    arrays = state_dict(network)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    weight_map = {}
    for shard in range(shards):
        name = f"{stem}-{shard + 1:05d}-of-{shards:05d}{suffix}"
        part = {key: arrays[key] for key in sorted(arrays)[shard::shards]}
        weight_map.update(dict.fromkeys(part, name))
        if suffix == ".safetensors":
            save_file(part, folder / name)
        else:
            write_torch_file(folder / name, part)
    index = {"metadata": {"total_size": sum(array.nbytes for array in arrays.values())}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return folder


class _Call:
    """Pickles as a call of a named function, which need not exist here."""

    def __init__(self, module: str, name: str, *arguments: Any):
        self.module, self.name, self.arguments = module, name, arguments


class _Named:
    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class _StorageOf:
    def __init__(self, key: str, dtype: str, length: int):
        self.key, self.dtype, self.length = key, dtype, length


class _Pickler(pickle._Pickler):  # the Python one, because it can be taught names that cannot be imported
    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        if isinstance(value, _Named):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, _Call):
            self.save(_Named(value.module, value.name))
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        elif isinstance(value, _StorageOf):
            self.save(("storage", _Named("torch", _STORAGES[value.dtype]), value.key, "cpu", value.length))
            self.write(pickle.BINPERSID)
        else:
            super().save(value, save_persistent_id)


def torch_call(module: str, name: str, *arguments: Any) -> Any:
    """Returns a value that a pickle written by ``write_torch_file`` gets by calling a function."""
    return _Call(module, name, *arguments)


def torch_tensor(key: str, dtype: str, length: int, *, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """Returns a value for ``write_torch_file``: a view of the storage ``key`` of ``length`` elements, however impossible."""
    storage = _StorageOf(key, dtype, length)
    arguments = (storage, 0, shape, strides, False, _Call("collections", "OrderedDict"))
    return _Call("torch._utils", "_rebuild_tensor_v2", *arguments)


def torch_program(tensors: Mapping[str, tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Returns the pickle of a state dict whose contiguous tensors have the given storage key, dtype and shape."""
    tree = {}
    for name, (key, dtype, shape) in tensors.items():
        storage = _StorageOf(key, dtype, math.prod(shape))
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        tree[name] = _Call(
            "torch._utils", "_rebuild_tensor_v2", storage, 0, shape, strides, False, _Call("collections", "OrderedDict")
        )
    program = io.BytesIO()
    _Pickler(program, protocol=2).dump(tree)
    return program.getvalue()


def write_torch_file(path: Path, tree: Any) -> Path:
    """Writes nested dictionaries of NumPy arrays as ``torch.save`` does, without PyTorch, and returns the path.

    Arrays that share memory (one a transposed view of the other) share a storage, as tied tensors do.
    """
    storages: dict[int, tuple[str, np.ndarray]] = {}

    def described(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: described(item) for key, item in value.items()}
        if not isinstance(value, np.ndarray):
            return value
        base = value
        while isinstance(base.base, np.ndarray):
            base = base.base
        key, _ = storages.setdefault(id(base), (str(len(storages)), base))
        offset = (value.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // base.itemsize
        strides = tuple(stride // base.itemsize for stride in value.strides)
        storage = _StorageOf(key, base.dtype.name, base.size)
        arguments = (storage, offset, value.shape, strides, False, _Call("collections", "OrderedDict"))
        return _Call("torch._utils", "_rebuild_tensor_v2", *arguments)

    program = io.BytesIO()
    _Pickler(program, protocol=2).dump(described(tree))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{path.stem}/data.pkl", program.getvalue())
        archive.writestr(f"{path.stem}/byteorder", "little")
        for key, base in storages.values():
            archive.writestr(f"{path.stem}/data/{key}", base.tobytes(order="A"))
        archive.writestr(f"{path.stem}/version", "3\n")
    return path


def bits(array: Any) -> bytes:
    """Returns the bytes of an array, for comparison bit for bit."""
    return np.ascontiguousarray(array).tobytes()


def halved(arrays: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Returns the arrays rounded to ``bfloat16`` or ``float16``."""
    target = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return {name: array.astype(target) for name, array in arrays.items()}


def expect_converted(
    directory: Path, network: str, arrays: dict[str, np.ndarray] | None = None, dtype: str = "float32"
) -> None:
    """Checks a converted network against the in-memory engine, bit for bit."""
    config = golden_config(network)
    expected = convert(network, arrays or state_dict(network), config, dtype=dtype, allow_mixed_dtypes=True)
    loaded_config, loaded = load_network(directory, network)
    assert loaded_config == config
    assert loaded.keys() == expected.keys()
    for name, array in expected.items():
        assert loaded[name].dtype == array.dtype
        assert bits(loaded[name]) == bits(array), name
