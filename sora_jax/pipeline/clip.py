"""What a pipeline returns: frames, latents, the record of their making; and the file that holds latents.

Invariant: ``parameters`` holds everything needed to make the sample again with the same weights, and nothing that differs
between two equal runs (no times, no paths of this machine).  Nothing here computes.
"""

import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from sora_jax import files
from sora_jax.pipeline import video
from sora_jax.process import Timings
from sora_jax.sampling.sampler import Trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """Generated samples.

    Attributes:
      frames: pixels.
      latents: normalised latents; the clips of a loop follow each other in time.
      fps: frame rate the frames are saved at.
      parameters: for each sample what it was made from, JSON-ready.
      trace: what each sampling step did, or None where latents were only decoded; with loops, of all clips.
      evaluations_B: velocity evaluations that went into each sample.
      timings: seconds by stage.
    """

    frames: UInt8[np.ndarray, "B t h w 3"]
    latents: Float[np.ndarray, "B T H W C"]
    fps: int | float
    parameters: Sequence[Mapping[str, Any]]
    trace: Trace | None
    evaluations_B: Float[np.ndarray, "B"] | None
    timings: Timings

    def save(self, path: str | os.PathLike[str], *, sample: int | None = None, overwrite: bool = False) -> list[Path]:
        """Writes one sample, or all of them, and returns the paths; see `video.save` for formats and errors.

        Several samples without ``sample`` become ``name-0.mp4``, ``name-1.mp4``, ...
        """
        path = Path(path)
        if sample is not None:
            targets = {sample: path}
        elif len(self.frames) == 1:
            targets = {0: path}
        else:
            targets = {i: path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(len(self.frames))}
        with self.timings.measure("write"):
            return [
                video.save(self.frames[i], target, fps=self.fps, parameters=self.parameters[i], overwrite=overwrite)
                for i, target in targets.items()
            ]


def save_latents(
    path: str | os.PathLike[str],
    latents: Float[np.ndarray, "B T H W C"],
    parameters: Sequence[Mapping[str, Any]],
    *,
    overwrite: bool = False,
) -> Path:
    """Writes latents and the parameters of their samples as npz (``latents`` float32, ``parameters`` JSON).

    Raises:
      ValueError: the suffix is another one.
      FileExistsError: the file exists and ``overwrite`` is False.
    """
    path = check_latents_target(path, overwrite=overwrite)
    with files.whole_file(path, overwrite=overwrite) as temporary, temporary.open("wb") as file:
        np.savez(file, latents=np.asarray(latents, np.float32), parameters=json.dumps({"samples": list(parameters)}))
    return path


def check_latents_target(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Returns the path, having seen that `save_latents` will take it.

    Raises:
      ValueError: the suffix is another one.
      FileExistsError: the file exists and ``overwrite`` is False.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"latents file {path} has suffix {path.suffix!r}; expected .npz.")
    files.check_target(path, overwrite=overwrite)
    return path


def load_latents(path: str | os.PathLike[str]) -> tuple[Float[np.ndarray, "B T H W C"], list[dict[str, Any]]]:
    """Returns normalised latents and each sample's parameters from a file of `save_latents`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is something else, or damaged.
    """
    files.refuse_missing(path, "latents file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a latents file (no npz, or cut short); expected one written by --save-latents.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            latents, samples = arrays["latents"], json.loads(str(arrays["parameters"]))["samples"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a latents file ({error}); expected one written by --save-latents.") from error
    if latents.dtype != np.float32 or latents.ndim != 5 or len(latents) != len(samples):
        raise ValueError(
            f"{path} holds {latents.dtype}{list(latents.shape)} for {len(samples)} samples; expected float32[B, T, H, W, C]."
        )
    return latents, samples
