"""Rows of a stored embedding, read one by one: a prompt needs a few hundred of its tens of thousands.

Invariant: memory is that of the rows returned.
"""

import os
import threading

import numpy as np
from jaxtyping import Float, Int

from sora_jax.storage.directory import STORED_DTYPES, Manifest, damaged
from sora_jax.storage.quantisation import SCALE_SUFFIX, dequantise
from sora_jax.streaming.staging import Verified, parameter_file, read_parameter


def read_rows(manifest: Manifest, name: str, ids: Int[np.ndarray, "*ids"]) -> Float[np.ndarray, "*ids E"]:
    """Returns the rows of a stored embedding, in its stored dtype; int8 is multiplied out to float32.

    The checksum of the whole is not compared, because only these rows are read.

    Raises:
      ModelDirectoryError: the file is missing, unreadable or of the wrong size.
      ValueError: there is no such row.
    """
    parameter = manifest.parameters[name]
    num_rows, width = parameter.shape
    unique, inverse = np.unique(ids, return_inverse=True)
    if unique[0] < 0 or unique[-1] >= num_rows:
        raise ValueError(f"token ids {unique[0]} to {unique[-1]} are not all in the vocabulary, 0 to {num_rows - 1}.")
    rows = np.empty((len(unique), width), STORED_DTYPES[parameter.dtype])
    with parameter_file(manifest, name) as descriptor:
        for row, at in zip(rows, unique, strict=True):
            got = os.preadv(descriptor, [row.view(np.uint8).data], int(at) * row.nbytes)
            if got != row.nbytes:
                raise damaged(manifest, name, f"ended at byte {int(at) * row.nbytes + got} while it was read")
    if name + SCALE_SUFFIX in manifest.parameters:
        scale = read_whole(manifest, name + SCALE_SUFFIX, Verified())
        rows = dequantise(name, rows, scale[unique])
    return rows[inverse.reshape(ids.shape)]


def read_whole(manifest: Manifest, name: str, verified: Verified) -> np.ndarray:
    """Returns a stored array, read and compared with its checksum.

    Raises:
      ModelDirectoryError: the file is missing, unreadable, of the wrong size, or not what the manifest says.
    """
    parameter = manifest.parameters[name]
    array = np.empty(parameter.shape, STORED_DTYPES[parameter.dtype])
    read_parameter(manifest, name, array.reshape(-1).view(np.uint8).data, verified, threading.Event())
    return array
