"""A network filled from a PyTorch state dict: the one way from a fixture's weights to a module.

Invariant: every array goes through ``convert_weights.convert``; nothing is renamed or transposed here.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

import convert_weights
from sora_jax.networks.stdit3 import STDiT3
from sora_jax.networks.t5 import T5Encoder
from sora_jax.networks.vae import VAE
from sora_jax.storage.checkpoint import unflatten

_CLASSES: dict[str, Any] = {"t5": T5Encoder, "stdit3": STDiT3, "vae": VAE}


def build(network: str, config: Any, state_dict: Mapping[str, np.ndarray]) -> Any:
    """Returns the network with the weights of a state dict."""
    flat = convert_weights.convert(network, state_dict, config)
    abstract = jax.eval_shape(lambda: _CLASSES[network](config, rngs=nnx.Rngs(0)))
    return unflatten(abstract, {name: jax.device_put(array) for name, array in flat.items()})
