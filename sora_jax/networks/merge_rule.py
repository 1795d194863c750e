"""What temporal token merging merges, as a setting: read, compared and checked without JAX.

Invariant: a `Merge` is a rule that `merging` can follow, whatever the number of frames; `check_frames` says which numbers of
frames its rule for odd ones takes.  Nothing here merges.

Source: arXiv 2502.04363 section 3.3; On-device-Sora opensora/models/stdit/merge.py.
"""

import dataclasses
from typing import Literal, get_args, no_type_check

Odd = Literal["alone", "released"]
RopePositions = Literal["merged", "mean"]


@no_type_check  # a wrong name is answered by __post_init__
@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """What is merged, and how; hashable, so that it is a static argument.

    ``odd`` says what becomes of the last frame of an odd number of frames: ``"alone"`` makes it a token of its own,
    ``"released"`` is the published code: the frame is dropped, and gets the attention output of the pair before it.
    ``rope_positions`` are the temporal attention's: the index of the token (as published), or the mean frame index.
    ``keys_values_only`` keeps a query for every frame; the cross attention's keys are captions, so nothing of it is merged.
    """

    odd: Odd = "alone"
    spatial: bool = True
    temporal: bool = True
    cross: bool = True
    keys_values_only: bool = False
    rope_positions: RopePositions = "merged"

    def __post_init__(self) -> None:
        for field, allowed in (("odd", get_args(Odd)), ("rope_positions", get_args(RopePositions))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"Merge.{field} is {getattr(self, field)!r}; expected one of {', '.join(map(repr, allowed))}.")
        if not (self.spatial or self.temporal or self.cross):
            raise ValueError(
                "Merge selects no attention: got spatial, temporal and cross all False; set one, or pass merge=None."
            )
        if self.keys_values_only and not (self.spatial or self.temporal):
            raise ValueError("Merge(keys_values_only=True) merges self attentions only; set spatial or temporal.")


def check_frames(num_frames: int, odd: Odd) -> None:
    """Refuses a number of latent frames that cannot be merged.

    The published code restores the number of frames only where ``num_frames % 4`` is 0 or 3 (31 excepted); its exported
    variant repairs every even number, and that is what both rules do here.

    Raises:
      ValueError: one frame, or an odd number for which the published rule returns the wrong number of frames.
    """
    if num_frames < 2:
        raise ValueError(f"merging needs at least 2 latent frames, got {num_frames}; use merge_steps=0.")
    if odd == "released" and (num_frames % 4 == 1 or num_frames == 31):
        raise ValueError(
            f'odd="released" does not restore {num_frames} latent frames; '
            'of odd numbers it takes 3, 7, 11, ... except 31; use odd="alone".'
        )
