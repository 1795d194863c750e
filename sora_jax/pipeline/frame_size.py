"""Height and width of a clip: given as numbers, by name, or by the model.

Invariant: a size of the table of resolutions is taken as Open-Sora takes it, by name or by its numbers: latents round down
and patches are padded.  Other numbers must be multiples of latents and patches.  Nothing here reads a file.
"""

from collections.abc import Mapping
from typing import Any

from sora_jax.config import VAEConfig
from sora_jax.inputs import sizes

MAX_SIDE_PX, MAX_FRAMES = 2**15, 10**6
NUMBERS, NAMES = ("height", "width"), ("resolution", "aspect_ratio")


def frame_size(asked: Mapping[str, Any], model: Mapping[str, Any], default: Mapping[str, Any]) -> tuple[int, int]:
    """Returns height and width in pixels.

    Args:
      asked: what the caller says, of ``height``, ``width``, ``resolution`` and ``aspect_ratio``.
      model: what the model says, likewise.
      default: resolution and aspect ratio where neither says anything.

    Raises:
      ValueError: the size is given incompletely or twice, or a name is unknown.
    """
    numbers, names = ([name for name in one if name in asked] for one in (NUMBERS, NAMES))
    if numbers and names:
        raise ValueError(f"got both {' and '.join(numbers)} and {' and '.join(names)}; give height and width, or the names.")
    if len(numbers) == 1:
        raise ValueError(f"got {numbers[0]} alone; give both height and width.")
    if numbers:
        return asked["height"], asked["width"]
    if "height" in model and not names:
        return model["height"], model["width"]
    said = {**({} if "height" in model else default), **model, **asked}
    if "resolution" not in said or "aspect_ratio" not in said:
        raise ValueError(f"got {names[0]} alone; give both resolution and aspect_ratio, for example 240p and 9:16.")
    return sizes.image_size(said["resolution"], said["aspect_ratio"])


def frames_size(height: int, width: int, downsampling: int = 8) -> tuple[int, int]:
    """Returns rows and columns of the frames that a clip of this size has: whole latents of ``downsampling`` pixels."""
    return height // downsampling * downsampling, width // downsampling * downsampling


def check_multiple(config: VAEConfig, patch: int, height: int, width: int) -> None:
    """Refuses a height or width that latents and patches do not divide, unless the two are a size of the table.

    Raises:
      ValueError: names the nearest sizes that are valid.
    """
    if sizes.is_listed(height, width):
        return
    step = config.spatial.downsampling * patch
    for name, value in (("height", height), ("width", width)):
        if value % step:
            below = value // step * step
            nearest = ", ".join(str(size) for size in (below, below + step) if size)
            reason = f"VAE {config.spatial.downsampling} x patch {patch}"
            raise ValueError(f"{name} {value} is not a multiple of {step} ({reason}); nearest valid: {nearest}.")
