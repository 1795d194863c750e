"""The T5 encoder against transformers: features, hidden states after each block, position buckets, norms on tiny inputs."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import convert_weights
from convert_weights.rules import Header
from sora_jax.config import T5Config
from sora_jax.networks.t5 import T5Encoder, position_buckets
from tests.parity.fixtures import read_json, read_tensors
from tests.parity.weights import build


def cases(folder: Path) -> dict[str, Path]:
    names = [*read_json(folder / "config.json")["cases"], "units"]
    return {name: folder / f"{name}.safetensors" for name in names}


def compute(folder: Path, case: str) -> dict[str, np.ndarray]:
    config, network, targets = _load(folder.resolve())
    tensors = read_tensors(folder / f"{case}.safetensors")
    if case == "units":
        return _units(network, targets, tensors)
    ids = tensors["in.input_ids"].astype(np.int32)
    mask = tensors["in.attention_mask"] != 0 if "in.attention_mask" in tensors else None
    hidden = jax.jit(_hidden_states)(network, ids, mask)
    offsets = np.arange(1 - ids.shape[1], ids.shape[1])
    buckets = position_buckets(ids.shape[1], config)
    return {
        "out": np.asarray(jax.jit(lambda network, *inputs: network(*inputs))(network, ids, mask)),
        **{f"mid.block.{i}": np.asarray(x) for i, x in enumerate(hidden)},
        "mid.relative_position": offsets,
        "mid.bucket": buckets[np.maximum(-offsets, 0), np.maximum(offsets, 0)],
    }


def _hidden_states(network: T5Encoder, ids: jax.Array, mask: jax.Array | None) -> list[jax.Array]:
    x, bias = network.embed(ids)
    hidden = []
    for block in network.block:
        x = block(x, bias, mask)
        hidden.append(x)
    return hidden


def _units(network: T5Encoder, targets: dict[str, str], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the outputs of single modules, found by their PyTorch names in the conversion table."""
    computed = {}
    for key, x in tensors.items():
        if key.endswith(".in"):
            name = key.removesuffix(".in").removesuffix(".small")
            module: Any = network
            for step in targets[f"{name}.weight"].split(".")[:-1]:
                module = module[int(step)] if step.isdigit() else getattr(module, step)
            computed[f"{key.removesuffix('.in')}.out"] = np.asarray(module(jnp.asarray(x)))
    return computed


@functools.lru_cache(maxsize=1)
def _load(folder: Path) -> tuple[T5Config, T5Encoder, dict[str, str]]:
    described = read_json(folder / "config.json")["config"]
    config = T5Config(**{name: described[name] for name in T5Config.__dataclass_fields__})
    state_dict = read_tensors(folder / "state_dict.safetensors")
    headers = {name: Header(array.shape, str(array.dtype)) for name, array in state_dict.items()}
    plan = convert_weights.plan("t5", headers, config)
    targets = {assignment.source: assignment.target for assignment in plan.assignments if assignment.target is not None}
    return config, build("t5", config, state_dict), targets
