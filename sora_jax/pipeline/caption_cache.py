"""Caption features on disk, so that the text encoder need not be loaded for a prompt that was encoded before.

Invariant: an entry is used only if it was computed by the same parameters, in the same compute dtype, from the same token ids,
and is whole; anything else is computed again.  Files are written whole or not at all, and the oldest are removed where the
folder grows beyond its limit.  Nothing here knows networks or tokenizers.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from sora_jax import files

MAX_BYTES = 1_000_000_000  # features of a full-size prompt are 5 MB
_SUFFIX = ".features"
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class CaptionCache:
    """A folder of features, created with its first entry.

    Args:
      folder: the folder of the cache.
      max_bytes: what the folder may hold.
    """

    def __init__(self, folder: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES):
        self.folder, self.max_bytes = Path(folder), max_bytes

    def find(self, model: str, dtype: str, ids_L: Int[np.ndarray, "L"]) -> Float[np.ndarray, "L E"] | None:
        """Returns the features of a padded caption, or None if they are missing or damaged.

        Args:
          model: digest of the text encoder's parameters.
          dtype: compute dtype.
          ids_L: token ids, padding included.
        """
        path = self._path(model, dtype, ids_L)
        try:
            header, _, data = path.read_bytes().partition(b"\n")
            fields = json.loads(header)
            if hashlib.sha256(data).hexdigest() != fields["sha256"]:
                return None
            features = np.frombuffer(data, _DTYPES[fields["dtype"]]).reshape(fields["shape"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used last, removed last
        return features if features.ndim == 2 and len(features) == len(ids_L) else None

    def keep(self, model: str, dtype: str, ids_L: Int[np.ndarray, "L"], features_LE: Float[np.ndarray, "L E"]) -> None:
        """Writes the features of a caption; a folder that cannot be written is ignored, because nothing depends on it."""
        data = np.ascontiguousarray(features_LE).tobytes()
        fields = {"dtype": features_LE.dtype.name, "shape": features_LE.shape, "sha256": hashlib.sha256(data).hexdigest()}
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with files.whole_file(self._path(model, dtype, ids_L), overwrite=True) as temporary:
                temporary.write_bytes(json.dumps(fields).encode() + b"\n" + data)
            self._prune()

    def _path(self, model: str, dtype: str, ids_L: np.ndarray) -> Path:
        digest = hashlib.sha256(f"{model} {dtype} {ids_L.shape}".encode())
        digest.update(np.ascontiguousarray(ids_L, np.int32).tobytes())
        return self.folder / (digest.hexdigest() + _SUFFIX)

    def _prune(self) -> None:
        entries = [(path, path.stat()) for path in self.folder.glob("*" + _SUFFIX)]
        total = sum(status.st_size for _, status in entries)
        for path, status in sorted(entries, key=lambda entry: entry[1].st_mtime_ns):
            if total <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= status.st_size
