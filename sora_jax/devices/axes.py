"""The axes of a mesh as a user writes them: ``guidance=2,sequence=4``.

Invariant: nothing here imports JAX, so that a command line can refuse a mesh at once; how many devices there are is ``mesh``'s
business.
"""

import re
from collections.abc import Mapping

AXES = ("data", "guidance", "sequence")  # clips, rows with and without caption, tokens
WEIGHTS = ("replicated", "spread")
_MOST = 2**20  # devices of an axis


def parse_axes(text: str) -> dict[str, int]:
    """Returns how many devices each axis has, in the order of `AXES`, 1 where the text names none.

    Raises:
      ValueError: an axis is unknown or written twice, or its number is none.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if name not in AXES:
            raise ValueError(f"mesh {text!r} names the axis {name!r}; expected {', '.join(AXES)}, as guidance=2,sequence=4.")
        if name in found:
            raise ValueError(f"mesh {text!r} names the axis {name} twice; expected each axis once.")
        if not re.fullmatch(r"[1-9]\d{0,6}", number) or int(number) > _MOST:
            raise ValueError(f"mesh {text!r} has {number!r} devices in axis {name}; expected a whole number from 1.")
        found[name] = int(number)
    check_axes(found)
    return {name: found.get(name, 1) for name in AXES}


def check_axes(sizes: Mapping[str, int]) -> None:
    """Refuses more rows of guidance than there are.

    Raises:
      ValueError: says so.
    """
    if sizes.get("guidance", 1) > 2:
        raise ValueError(f"mesh has guidance={sizes['guidance']}; expected 1 or 2: there are rows with and without caption.")


def check_weights(weights: str, mesh: object | None) -> None:
    """Refuses what is no way of placing weights, or has no effect.

    Raises:
      ValueError: says what is expected.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights are {weights!r}; expected one of {', '.join(WEIGHTS)}.")
    if weights != WEIGHTS[0] and mesh is None:
        raise ValueError(f"weights={weights} has no effect on one device; name a mesh, or leave it out.")


def written(sizes: Mapping[str, int]) -> str:
    """Returns the axes with more than one device as a user writes them."""
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "data=1"


def check_mesh_request(sizes: Mapping[str, int], *, guided: bool, num_clips: int) -> None:
    """Refuses a generation that the mesh does not divide.

    Args:
      sizes: devices of every axis.
      guided: whether there are rows without caption.
      num_clips: clips of a batch.

    Raises:
      ValueError: says which axis, and what would fit.
    """
    if sizes["guidance"] > 1 and not guided:
        raise ValueError(
            f"mesh {written(sizes)} spreads the rows of guidance, but with guidance 1 there is one row; leave guidance=2 out."
        )
    if num_clips % sizes["data"]:
        raise ValueError(
            f"a batch of {num_clips} cannot be divided over data={sizes['data']}; expected a multiple of {sizes['data']} clips."
        )
