"""Previews: latents as pictures through a linear map, without the decoder.

A map takes the latents around a place (3 x 3 places in three latent frames, and a constant) to the pixels of that place.  It
is fitted once for an autoencoder by `preview_fit` and kept as a small file.

Invariant: a map belongs to one autoencoder, by the checksums of its parameters, and is used for no other; a picture shows what
the decoder would show as far as a linear map can, and no more.
"""

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from sora_jax import files
from sora_jax.config import VAEConfig
from sora_jax.pipeline.video import quantise
from sora_jax.storage.directory import Manifest

FILE_NAME = "preview.map"  # in a model directory
_RADIUS = 1  # places around a place, and latent frames before and after it
_MAX_BYTES = 16 << 20
_FORMAT = "sora_jax preview map 1"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PreviewMap:
    """The map of an autoencoder.

    Attributes:
      weights: one row for each channel of each neighbour, and a last one for the constant; one column for each value of a
        place's pixels, in [-1, 1].
      chunk: latent frames that the autoencoder encodes together; neighbours in time are those of the same chunk.
    """

    weights: Float[np.ndarray, "F P"]
    chunk: int

    def pixels(self, z_BTHWC: Float[np.ndarray, "B T H W C"]) -> Float[np.ndarray, "B T h w 3"]:
        """Returns a picture for each latent frame, nominally in [-1, 1], in the size of the clip's frames."""
        rows, constant = self.weights[:-1], self.weights[-1]
        return np.stack([_unfolded(features @ rows + constant) for features in frame_features(z_BTHWC, self.chunk)], axis=1)

    def pictures(self, z_BTHWC: Float[np.ndarray, "B T H W C"]) -> UInt8[np.ndarray, "B T h w 3"]:
        """Returns the same as levels 0..255; what is not finite is black."""
        return quantise(np.nan_to_num(self.pixels(z_BTHWC), nan=-1.0, posinf=1.0, neginf=-1.0))

    def write(self, path: Path, vae: Manifest) -> None:
        """Writes the map of an autoencoder, replacing what is there; whole or not at all."""
        data = np.ascontiguousarray(self.weights, "<f4").tobytes()
        fields = {"format": _FORMAT, "vae": digest_of(vae), "chunk": self.chunk, "shape": list(self.weights.shape)}
        header = json.dumps({**fields, "sha256": hashlib.sha256(data).hexdigest()})
        with files.whole_file(path, overwrite=True) as temporary:
            temporary.write_bytes(header.encode() + b"\n" + data)

    @classmethod
    def read(cls, path: str | os.PathLike[str], vae: Manifest) -> "PreviewMap | None":
        """Returns the map of an autoencoder; None where the file is missing, damaged or another autoencoder's."""
        path = Path(path)
        try:
            if path.stat().st_size > _MAX_BYTES:
                return None
            header, _, data = path.read_bytes().partition(b"\n")
            fields = json.loads(header)
            num_rows, num_columns = (int(length) for length in fields["shape"])
            if fields["format"] != _FORMAT or fields["vae"] != digest_of(vae) or fields["chunk"] != chunk_of(vae.config):
                return None
            if fields["sha256"] != hashlib.sha256(data).hexdigest() or (num_rows, num_columns) != shape_of(vae.config):
                return None
            return cls(weights=np.frombuffer(data, "<f4").reshape(num_rows, num_columns), chunk=fields["chunk"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None


def digest_of(vae: Manifest) -> str:
    """Returns what an autoencoder is known by: a digest of the checksums of its parameters."""
    return hashlib.sha256(vae.values_text().encode()).hexdigest()


def chunk_of(config: VAEConfig) -> int:
    """Returns the latent frames of a chunk."""
    return -(-config.micro_frame_size // config.temporal.downsampling)


def shape_of(config: VAEConfig) -> tuple[int, int]:
    """Returns the shape of an autoencoder's map."""
    return (2 * _RADIUS + 1) ** 3 * config.temporal.embed_dim + 1, 3 * config.spatial.downsampling**2


def frame_features(z_BTHWC: Float[np.ndarray, "B T H W C"], chunk: int) -> list[Float[np.ndarray, "B H W F"]]:
    """Returns for each latent frame what the map's rows stand for, but for the constant; beyond an edge the edge goes on."""
    num_frames, height, width = z_BTHWC.shape[1:4]
    edged = np.pad(np.asarray(z_BTHWC, np.float32), [(0, 0), (0, 0), *[(_RADIUS, _RADIUS)] * 2, (0, 0)], mode="edge")
    found = []
    for frame in range(num_frames):
        first = frame - frame % chunk
        last = min(first + chunk, num_frames) - 1
        near = [min(max(frame + shift, first), last) for shift in range(-_RADIUS, _RADIUS + 1)]
        shifts = [(time, row, column) for time in near for row in range(2 * _RADIUS + 1) for column in range(2 * _RADIUS + 1)]
        parts = [edged[:, time, row : row + height, column : column + width] for time, row, column in shifts]
        found.append(np.concatenate(parts, axis=-1))
    return found


def _unfolded(patches_BHWP: Float[np.ndarray, "B H W P"]) -> Float[np.ndarray, "B h w 3"]:
    batch, height, width, values = patches_BHWP.shape
    side = math.isqrt(values // 3)
    patches = patches_BHWP.reshape(batch, height, width, side, side, 3).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(batch, height * side, width * side, 3)
