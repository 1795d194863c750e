"""The three networks by the names they have on disk and in commands.

Invariant: every name in `config.NETWORKS` has its class here, and no other list of the classes exists.  Parameters are neither
made nor read: `abstract` knows shapes only.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx

from sora_jax.config import FLOAT32, DTypePolicy
from sora_jax.networks.forms import WHOLE, Forms
from sora_jax.networks.stdit3 import STDiT3
from sora_jax.networks.t5 import T5Encoder
from sora_jax.networks.vae.codec import VAE

Network = T5Encoder | STDiT3 | VAE

CLASSES: Mapping[str, type[Network]] = MappingProxyType({"t5": T5Encoder, "stdit3": STDiT3, "vae": VAE})


def class_of(network: str) -> type[Network]:
    """Returns the class of a network.

    Raises:
      ValueError: there is no network of that name.
    """
    if network not in CLASSES:
        raise ValueError(f"unknown network {network!r}; expected one of {', '.join(CLASSES)}.")
    return CLASSES[network]


@functools.lru_cache(maxsize=16)
def abstract(network: str, config: Any, *, policy: DTypePolicy = FLOAT32, forms: Forms = WHOLE) -> Any:
    """Returns the network with shapes in place of its arrays, to be filled by ``storage.checkpoint.unflatten``.

    Tracing a network takes up to seconds, so the answer is kept; it is read only.

    Args:
      network: ``t5``, ``stdit3`` or ``vae``.
      config: its configuration.
      policy: what it computes in.
      forms: how it computes what could be large.

    Raises:
      ValueError: there is no network of that name.
    """
    build = class_of(network)
    return jax.eval_shape(lambda: build(config, policy=policy, forms=forms, rngs=nnx.Rngs(0)))
