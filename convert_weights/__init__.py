"""PyTorch checkpoints to the flat parameters of sora_jax, strictly.

``convert(network, state_dict, config)`` is the whole in-memory interface; ``python -m convert_weights`` converts files.
This is the only package that knows PyTorch's names and layouts.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert_weights.rules import ConversionError, Header, Plan, Rule, convert_arrays, make_plan
from sora_jax.config import NETWORKS

__all__ = ["ConversionError", "convert", "parameter_shapes", "plan", "table"]


def convert(
    network: str, state_dict: Mapping[str, Any], config: Any, *, dtype: str = "float32", allow_mixed_dtypes: bool = False
) -> dict[str, np.ndarray]:
    """Returns the flat parameters of a network from a PyTorch state dict (NumPy arrays or tensors by name).

    Args:
      network: ``t5``, ``stdit3`` or ``vae``.
      state_dict: PyTorch names to arrays of float32, bfloat16 or float16.
      config: the network's configuration; it decides which parameters exist and their shapes.
      dtype: dtype of the result, ``float32`` or ``bfloat16``.
      allow_mixed_dtypes: accept a state dict whose arrays differ in dtype.

    Raises:
      ConversionError: unknown, missing, twice-set, mis-shaped or mistyped arrays, NaN or infinite values; all in one report.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}; expected float32 or bfloat16 (int8 exists only on disk: checkpoint.save_network).")
    headers = {}
    for name, array in state_dict.items():
        dtype_name = str(array.dtype).removeprefix("torch.")
        headers[name] = Header(tuple(array.shape), dtype_name)
    made = plan(network, headers, config, allow_mixed_dtypes=allow_mixed_dtypes)
    return convert_arrays(made, state_dict, subject=f"{network} state dict", dtype=dtype)


def plan(network: str, headers: Mapping[str, Header], config: Any, *, allow_mixed_dtypes: bool = False) -> Plan:
    """Returns what becomes of every array of a checkpoint, from names, shapes and dtypes alone."""
    rules, ignored = table(network, config)
    return make_plan(rules, ignored, headers, parameter_shapes(network, config), allow_mixed_dtypes=allow_mixed_dtypes)


def table(network: str, config: Any) -> tuple[list[Rule], dict[str, str]]:
    """Returns a network's rules, and its ignored source patterns with reasons."""
    if network not in NETWORKS:
        raise ValueError(f"unknown network {network!r}; expected one of {', '.join(NETWORKS)}.")
    module = importlib.import_module(f"convert_weights.{network}")
    return module.rules(config), module.IGNORED


def parameter_shapes(network: str, config: Any) -> Mapping[str, tuple[int, ...]]:
    """Returns the shapes of all parameters of a network by flat name; allocates none of them."""
    from sora_jax.streaming import fitting

    return fitting.parameter_shapes(network, config)
