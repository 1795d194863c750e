"""A network filled from a PyTorch state dict: the one way from a fixture's weights to a module.

Invariant: every array goes through ``convert_weights.convert``; nothing is renamed or transposed here.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import convert_weights
from sora_jax.networks import registry
from sora_jax.storage.checkpoint import unflatten


def build(network: str, config: Any, state_dict: Mapping[str, np.ndarray]) -> Any:
    """Returns the network with the weights of a state dict."""
    flat = convert_weights.convert(network, state_dict, config)
    return unflatten(registry.abstract(network, config), {name: jax.device_put(array) for name, array in flat.items()})
