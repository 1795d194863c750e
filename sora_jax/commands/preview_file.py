"""The file that ``sora-jax generate --preview`` writes on the way: what the clips will look like, as far as a step can tell.

Invariant: the file is whole whenever somebody opens it; one preview replaces the other.  Nothing of a generation changes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sora_jax import files

SUFFIXES = (".png", ".gif")


def check(path: Path, *, overwrite: bool) -> None:
    """Proves that previews can be written to a path.

    Raises:
      ValueError: the suffix is none of `SUFFIXES`.
      FileExistsError: the file exists and ``overwrite`` is False.
      OSError: the folder cannot be created or written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--preview {path}: expected a name that ends in .png (frames in a row) or .gif (which plays).")
    files.check_target(path, overwrite=overwrite)


def writing(path: Path, every: int, seconds: float, then: Callable[[Any], Any] | None) -> Callable[[Any], None]:
    """Returns a callback of the pipeline that writes a preview after each ``every``-th step and after the last one.

    Args:
      path: the file.
      every: steps from one preview to the next.
      seconds: how long a clip plays.
      then: another callback, called first.
    """

    def watch(progress: Any) -> None:
        if then is not None:
            then(progress)
        if progress.carry is not None and (progress.step % every == 0 or progress.step == progress.num_steps):
            write(path, progress.preview(), seconds=seconds)

    return watch


def write(path: Path, pictures_BThw3: UInt8[np.ndarray, "B T h w 3"], *, seconds: float) -> None:
    """Writes previews of clips: PNG has a row for each clip; GIF plays them next to each other.

    Raises:
      OSError: the file cannot be written.
    """
    from PIL import Image

    num_frames = pictures_BThw3.shape[1]
    with files.whole_file(path, overwrite=True) as temporary:
        if path.suffix.lower() == ".png":
            rows = [np.concatenate(list(clip), axis=1) for clip in pictures_BThw3]
            Image.fromarray(np.concatenate(rows)).save(temporary, format="PNG", compress_level=1)
            return
        frames = [np.concatenate(list(frame), axis=1) for frame in pictures_BThw3.swapaxes(0, 1)]
        images = [Image.fromarray(frame).quantize(256, method=Image.Quantize.FASTOCTREE) for frame in frames]
        images[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=max(20, round(1000 * seconds / num_frames)),
            loop=0,
        )
