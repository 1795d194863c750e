"""The file that holds latents and what they were made from, so that only decoding is left to do.

Invariant: `load_latents` returns what `save_latents` wrote, or refuses the file in one line.  Nothing here computes.
"""

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sora_jax import files


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
    """Returns the path if `save_latents` will take it.

    Raises:
      ValueError: the suffix is another one, or no file can have that name.
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
    samples = read_parameters(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            latents = arrays["latents"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    if latents.dtype != np.float32 or latents.ndim != 5 or len(latents) != len(samples):
        raise ValueError(
            f"{path} holds {latents.dtype}{list(latents.shape)} for {len(samples)} samples; expected float32[B, T, H, W, C]."
        )
    return latents, samples


def read_parameters(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns each sample's parameters from a file of `save_latents`; its latents are not read.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is something else, or damaged.
    """
    files.refuse_missing(path, "latents file")
    if not zipfile.is_zipfile(path):
        raise _damaged(path, "no npz, or cut short")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            samples = json.loads(str(arrays["parameters"]))["samples"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    except RecursionError as error:
        raise _damaged(path, "its parameters are nested too deeply") from error
    if not isinstance(samples, list) or not samples or not all(isinstance(sample, dict) for sample in samples):
        raise _damaged(path, "its samples are no list of objects")
    return samples


def _damaged(path: str | os.PathLike[str], why: object) -> ValueError:
    return ValueError(f"{path} is not a latents file ({why}); expected one written by --save-latents.")
