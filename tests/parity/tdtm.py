"""Temporal token merging against the published code, on the STDiT3 of the folder beside this one.

Invariant: odd numbers of frames follow the published rule (``odd="released"``); a step at or beyond ``merge_steps`` is the
plain network.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sora_jax.networks.merging import Merge, merge, unmerge
from tests.parity import stdit3
from tests.parity.fixtures import is_input, read_json, read_tensors

_FUNCTIONS = "merge_fn"


def cases(folder: Path) -> dict[str, Path]:
    names = [*read_json(folder / "config.json")["cases"], _FUNCTIONS]
    return {name: folder / f"{name}.safetensors" for name in names}


def compute(folder: Path, case: str) -> dict[str, np.ndarray]:
    tensors = read_tensors(folder / f"{case}.safetensors")
    if case == _FUNCTIONS:
        return _merge_functions(tensors)
    entry = read_json(folder / "config.json")["cases"][case]
    rule = Merge(odd="released") if entry["step"] < entry["merge_steps"] else None
    return stdit3.forward(stdit3.load_network(folder.parent / "stdit3"), tensors, merge=rule)


def _merge_functions(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    computed = {}
    for key, x_BTD in tensors.items():
        if is_input(key):
            merged = merge(jnp.asarray(x_BTD)[:, :, None], odd="released")
            name = key.removesuffix(".in")
            computed[f"{name}.merged"] = np.asarray(merged)[:, :, 0]
            computed[f"{name}.unmerged"] = np.asarray(unmerge(merged, x_BTD.shape[1]))[:, :, 0]
    return computed
