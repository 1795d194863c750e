"""The settings of a clip: what follows from its options for one model, resolved once, stored with every clip.

Invariant: a `Settings` holds only values that the pipeline accepts; every fault is a ValueError of one line.  This module
imports no JAX before a sampler or a schedule is asked for, and computes nothing.
"""

import dataclasses
from collections import ChainMap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Union, no_type_check

import numpy as np

from sora_jax.inputs import sizes
from sora_jax.networks.merge_rule import Merge
from sora_jax.pipeline import consistency
from sora_jax.pipeline.clip_options import DEFAULTS, MAX_SEED, OPTIONS, RECIPE_OPTIONS
from sora_jax.pipeline.frame_size import frame_size
from sora_jax.pipeline.option import OFF, said
from sora_jax.pipeline.presets import preset_values
from sora_jax.process import available_bytes

if TYPE_CHECKING:
    from sora_jax.sampling.leap import Leap
    from sora_jax.sampling.reuse import Plan

_EXACT = {name: DEFAULTS[name] for name in RECIPE_OPTIONS}
_GUIDANCE_RULE = ("guidance_low", "guidance_high", "guidance_rule", "guidance_zero_steps", "guidance_rescale")
_LATER = (*_GUIDANCE_RULE, "reuse", "reuse_threshold", "reuse_first", "reuse_last", "reuse_order")  # not in files of 0.1.0
_SCORES = ("aes", "flow", "camera_motion")


@no_type_check  # a wrong value is answered by __post_init__
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One clip's settings: every option of `clip_options.Options` but those that name others (size by name, preset), decided.

    What is off is None.  ``dtype`` is ``auto`` until the device is known (`Networks.decide`).  ``height`` and ``width`` are
    the pixels that the model is conditioned on; frames have ``height // 8 * 8`` rows and ``width // 8 * 8`` columns.  Sample b
    of a batch uses ``seed + b``.
    """

    num_steps: int
    guidance: float
    seed: int
    solver: str
    shift: float
    guidance_low: float
    guidance_high: float
    guidance_rule: str
    guidance_zero_steps: int
    guidance_rescale: float | None
    leap: Union[int, str, "Leap"]
    plan: Union["Plan", None]
    reuse: str | None
    reuse_threshold: float
    reuse_first: int
    reuse_last: int
    reuse_order: int
    merge_steps: int
    merge: Merge
    height: int
    width: int
    num_frames: int
    fps: float
    save_fps: float
    aes: float | None
    flow: float | None
    camera_motion: str | None
    loop: int
    condition_frame_length: int
    condition_frame_edit: float
    align: int | None
    dtype: str

    def __post_init__(self) -> None:
        for name in self.field_names():
            value, option = getattr(self, name), OPTIONS[name]
            if value is not None or not (option.option.off or name == "plan"):
                option.check(value)
        changed = [name for name in _GUIDANCE_RULE if getattr(self, name) != DEFAULTS[name]]
        if changed and not self.guided:
            raise ValueError(
                f"{changed[0]} says how guidance works, but guidance is 1, which is none; leave it out, or set guidance."
            )
        consistency.check(self)

    @property
    def guided(self) -> bool:
        """Whether the null caption is evaluated as well as the caption."""
        return self.guidance != 1

    @property
    def is_published_loop(self) -> bool:
        """Whether steps are Euler's, guided and merged as published, and all evaluate: the loop of exported models."""
        return (
            self.plan is None
            and self.reuse is None
            and all(getattr(self, name) == DEFAULTS[name] for name in ("solver", "merge", *_GUIDANCE_RULE))
        )

    @property
    def steps_in_words(self) -> str:
        """How many steps of which solver."""
        return f"{self.num_steps} step{'' if self.num_steps == 1 else 's'} of {self.solver}"

    def evaluations(self) -> tuple[float, bool]:
        """Returns how often a clip's sampling evaluates the transformer at most, and whether it may do so less often."""
        may_be_less = self.reuse is not None or (self.guidance_low, self.guidance_high, self.guidance_zero_steps) != (0, 1, 0)
        if self.plan is not None:
            return self.plan.evaluations, may_be_less or self.leap != OFF
        steps, may_leap = (self.leap + 1, False) if isinstance(self.leap, int) else (self.num_steps, self.leap != OFF)
        return float(2 * steps - 1 if self.solver == "heun" else steps), may_be_less or may_leap

    def with_seed(self, seed: int) -> "Settings":
        """Returns the same settings with another seed, taken modulo 2^32."""
        return dataclasses.replace(self, seed=seed % (MAX_SEED + 1))

    def check_room(self, num_clips: int) -> None:
        """Refuses clips whose decoded frames this machine cannot hold; XLA would end the process.

        Raises:
          ValueError: says how much memory is free, and how much the frames take.
        """
        num_values = 3 * num_clips * self.loop * self.num_frames * self.height * self.width
        num_bytes, available = np.dtype(np.float32).itemsize * num_values, available_bytes()
        if num_bytes > available:
            raise ValueError(
                f"the decoded frames alone take {num_bytes / 1e9:.3g} GB, but {available / 1e9:.3g} GB of memory are free; "
                "make fewer or smaller frames, or fewer clips at a time."
            )

    def check_calibration(self, evaluations: int, half_from: int | None) -> None:
        """Refuses a reuse plan that no calibration with these settings can find; raises what `consistency` raises."""
        consistency.check_calibration(self, evaluations, half_from)

    @classmethod
    def resolve(cls, defaults: Mapping[str, Any], options: Mapping[str, Any]) -> "Settings":
        """Returns complete settings: what the caller says, else the preset, the model's defaults, Open-Sora's.

        Args:
          defaults: the model's, under any name of `OPTIONS`.
          options: any of `OPTIONS`, ``plan`` as a `Plan`; None says nothing.

        Raises:
          ValueError: a value is out of its range or has no effect, or the size is given incompletely or twice.
        """
        asked, model = said(options, OPTIONS), said(defaults, OPTIONS)
        height, width = frame_size(asked, model, DEFAULTS)
        num_frames = sizes.num_frames(asked.get("num_frames", model.get("num_frames", DEFAULTS["num_frames"])))
        preset = preset_values(asked.get("preset"), _EXACT, height=height, width=width, num_frames=num_frames)
        of_plan = {"num_steps": len(_codes(asked["plan"]))} if "plan" in asked else {}
        # A model that lists its defaults without a score was trained without it.
        open_sora = {**DEFAULTS, **(dict.fromkeys(_SCORES) if model else {})}
        sources = ChainMap(asked, of_plan, dict(preset), model, open_sora)  # the first that has a name decides
        fields = {name: _decided(name, sources[name]) for name in cls.field_names()}
        fields |= {"height": height, "width": width, "num_frames": num_frames}
        settings = cls(**{**fields, "save_fps": fields["fps"] if fields["save_fps"] is None else fields["save_fps"]})
        consistency.check_effect(asked, settings)
        return settings

    @classmethod
    def field_names(cls) -> list[str]:
        """Returns the names of all settings."""
        return [field.name for field in dataclasses.fields(cls)]

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, JSON-ready."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Settings":
        """Returns the settings that `to_dict` wrote, whatever else the fields hold; a file of an older version lacks new ones.

        Raises:
          KeyError: a setting is missing.
          ValueError: a setting has a value that it cannot have.
        """
        older = {name: DEFAULTS[name] for name in _LATER}
        values = {name: fields.get(name, older[name]) if name in older else fields[name] for name in cls.field_names()}
        return cls(**{name: _decided(name, from_json(name, value)) for name, value in values.items()})


def _decided(name: str, value: Any) -> Any:
    """Returns the value that a setting has: whole numbers as floats where it is one, off as None."""
    option = OPTIONS[name]
    if name == "num_frames":
        return sizes.num_frames(value)
    if isinstance(value, str) and value == OFF and option.option.off and option.option.default != OFF:
        return None
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and "float" in option.kinds and abs(value) < 2**53 else value


def _codes(plan: Any) -> tuple[int, ...]:
    """Returns what the steps of a plan do.

    Raises:
      ValueError: it is no plan.
    """
    from sora_jax.sampling.reuse import Plan

    if not isinstance(plan, Plan):
        raise ValueError(f"plan is {plan!r}; expected a sora_jax.Plan, or a file of sora-jax calibrate.")
    return plan.codes


def from_json(name: str, value: Any) -> Any:
    """Returns the object that a setting's JSON stands for."""
    if not isinstance(value, Mapping):
        return value
    if name == "merge":
        return Merge(**value)
    if name == "leap":
        from sora_jax.sampling.leap import Leap

        return Leap(**value)
    from sora_jax.sampling.reuse import Plan

    return Plan(**{**value, "codes": tuple(value["codes"])})
