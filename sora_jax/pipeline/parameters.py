"""The parameters of one network of a model, for those who compute with them without a pipeline.

Invariant: what is returned is what a pipeline would run with: copies, each compared with its checksum. No module is built.
"""

import os

import numpy as np

from sora_jax.pipeline.model_file import model_path
from sora_jax.storage.checkpoint import load_network


def load_parameters(model: str | os.PathLike[str] | None, network: str, *, dtype: str | None = None) -> dict[str, np.ndarray]:
    """Returns the parameters of a network as a flat dictionary: dotted name to read-only array, int8 multiplied out.

    Args:
      model: a model directory or its URL; None or ``pocket``: the embedded model.
      network: ``t5``, ``stdit3`` or ``vae``.
      dtype: ``float32`` or ``bfloat16``; None keeps the stored dtype, with int8 becoming float32.

    Raises:
      ModelDirectoryError: the network is missing (the message holds the command that adds it) or damaged.
    """
    return load_network(model_path(model), network, dtype=dtype)[1]
