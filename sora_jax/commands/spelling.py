"""The options by which the command line spells out what Python gives as an object: a `Leap` that extrapolates, a `Merge`.

Invariant: what is spelt out is what the objects of Python say; whether it may be so is for them to answer.
"""

import dataclasses
from typing import Annotated, Any

from sora_jax.networks.merge_rule import Merge
from sora_jax.pipeline.clip_options import Options
from sora_jax.pipeline.option import OFF, Option

_ATTENTIONS = ("spatial", "temporal", "cross")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spelling:
    """What the command line spells out of leap and merge."""

    forced: Annotated[
        bool,
        Option("Use a recipe that was tuned for another model, size or number of frames.", flags=("--force-recipe",)),
    ] = False
    leap_extrapolate: Annotated[bool, Option("Leap along the line through the last two velocities.")] = False
    merge_odd: Annotated[
        str | None, Option("What becomes of the last of an odd number of frames.", choices=("alone", "released"))
    ] = None
    merge_attentions: Annotated[
        str | None, Option("Some of spatial,temporal,cross: which merge (default: all, as published).", metavar="NAMES")
    ] = None
    merge_keys_values_only: Annotated[bool, Option("Keep a query for every frame.")] = False
    merge_positions: Annotated[
        str | None, Option("RoPE positions of merged frames (default: merged).", choices=("merged", "mean"))
    ] = None

    def spelt_out(self, clip: Options) -> dict[str, Any]:
        """Returns the options of the clip with these in place.

        Raises:
          ValueError: a leap is spelt out, but there is none.
        """
        forced = {"force_recipe": True} if self.forced else {}
        return {**clip, **forced, **self._leap(clip.get("leap")), **self._merge()}

    def _leap(self, leap: Any) -> dict[str, Any]:
        if not self.leap_extrapolate:
            return {}
        if leap in (None, OFF):
            raise ValueError("--leap-extrapolate says how to leap, but nothing leaps; give --leap N or --leap dynamic as well.")
        from sora_jax.pipeline.make_sampler import leap_rule

        return {"leap": dataclasses.replace(leap_rule(leap), extrapolate=True)}  # type: ignore[type-var]  # it is no "off"

    def _merge(self) -> dict[str, Any]:
        changes: dict[str, Any] = {
            "odd": self.merge_odd,
            "rope_positions": self.merge_positions,
            "keys_values_only": self.merge_keys_values_only or None,
        }
        if self.merge_attentions is not None:
            names = self.merge_attentions.split(",")
            strange = sorted(set(names) - set(_ATTENTIONS))
            if strange:
                raise ValueError(
                    f"--merge-attentions names {', '.join(map(repr, strange))}; expected some of {','.join(_ATTENTIONS)}."
                )
            changes |= {name: name in names for name in _ATTENTIONS}
        changes = {name: value for name, value in changes.items() if value is not None}
        return {"merge": Merge(**changes)} if changes else {}
