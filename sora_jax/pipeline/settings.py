"""The numbers that decide a clip besides prompt, references and weights: checked once, stored with every clip.

Invariant: a `Settings` holds only values that the pipeline accepts; every fault is a ValueError of one line.  Defaults come
from the model directory (``defaults`` in model.json) and otherwise from Open-Sora 1.2.  Nothing here computes.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from sora_jax.config import VAEConfig
from sora_jax.inputs import sizes
from sora_jax.networks.merging import Merge
from sora_jax.pipeline.presets import EXACT, preset_values
from sora_jax.process import available_bytes
from sora_jax.sampling.leap import Leap
from sora_jax.sampling.reuse import Plan
from sora_jax.sampling.solvers import check_solver

OFF = "off"  # written for a score that the model would otherwise add by default

# Source: Open-Sora v1.2 configs/opensora-v1-2/inference/sample.py.
OPEN_SORA_DEFAULTS: Mapping[str, Any] = {
    "guidance": 7.0,
    "resolution": "240p",
    "aspect_ratio": "9:16",
    "num_frames": 51,
    "fps": 24,
    "aes": 6.5,
    "condition_frame_length": 5,
    "condition_frame_edit": 0.0,
    "align": 5,
}
_REST: Mapping[str, Any] = {**EXACT, "seed": 0, "merge": Merge(), "loop": 1, "dtype": "float32"}
_SCORES = ("aes", "flow", "camera_motion")
_FLOATS = ("guidance", "shift", "fps", "save_fps", "aes", "flow", "condition_frame_edit")
_SIZE_KEYS = ("height", "width", "resolution", "aspect_ratio")
_MAX_SEED = 2**32 - 1
# Far beyond any use, but numbers that arrays, files and float32 times still hold: larger ones would end in their errors.
_MAX_STEPS, _MAX_SIDE_PX, _MAX_FRAMES, _MAX_LOOP = 100_000, 2**15, 10**6, 10_000
_MIN_FPS, _MAX_FPS = 0.01, 1000.0
_RANGES: Mapping[str, tuple[int, int]] = {
    "num_steps": (1, _MAX_STEPS),
    "seed": (0, _MAX_SEED),
    "merge_steps": (0, _MAX_STEPS),
    "height": (1, _MAX_SIDE_PX),
    "width": (1, _MAX_SIDE_PX),
    "num_frames": (1, _MAX_FRAMES),
    "loop": (1, _MAX_LOOP),
    "condition_frame_length": (1, _MAX_FRAMES),
    "align": (1, _MAX_FRAMES),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One clip's settings.

    Attributes:
      num_steps: steps of the schedule.
      guidance: weight of the caption against no caption; 1 follows the caption alone.
      seed: noise of the first sample; sample b uses ``seed + b``.
      solver: how a step is taken (see solvers).
      shift: of the times on top of the resolution's own; above 1 more steps are spent at high noise.
      leap: ``off``, or how sampling leaps to its end (see sampler).
      plan: which steps evaluate the transformer and which reuse; None: all evaluate.
      merge_steps: how many first steps merge temporal tokens.
      merge: what those steps merge.
      height: pixel rows, as the model is conditioned on; frames have ``height // 8 * 8`` of them.
      width: pixel columns, likewise.
      num_frames: pixel frames of one clip; 1 is an image.
      fps: frame rate the model is conditioned on.
      save_fps: frame rate of the file.
      aes: aesthetic score named in the caption, or None.
      flow: motion score named in the caption, or None.
      camera_motion: camera motion named in the caption, or None.
      loop: clips in a row, each continuing the one before.
      condition_frame_length: latent frames a clip takes over from the one before.
      condition_frame_edit: edit ratio of those frames (0 keeps them).
      align: latent frames that starts in mask strategies are rounded to, or None.
      dtype: compute dtype of the networks.
    """

    num_steps: int
    guidance: float
    seed: int
    solver: str
    shift: float
    leap: int | str | Leap
    plan: Plan | None
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
        for name, (least, most) in _RANGES.items():
            if name != "align" or self.align is not None:
                _whole(name, getattr(self, name), least, most)
        for name in ("fps", "save_fps"):
            if not _MIN_FPS <= _finite(name, getattr(self, name)) <= _MAX_FPS:
                value = getattr(self, name)
                raise ValueError(
                    f"{name} is {value:g}; expected a positive number of frames per second, {_MIN_FPS:g} to {_MAX_FPS:g}."
                )
        _finite("guidance", self.guidance)
        check_solver(self.solver)
        if _finite("shift", self.shift) <= 0:
            raise ValueError(f"shift is {self.shift:g}; expected a positive number, 1 for the published times.")
        for name, value, kind in (("plan", self.plan, Plan | None), ("merge", self.merge, Merge)):
            if not isinstance(value, kind):
                raise ValueError(f"{name} is {value!r}; expected a sora_jax {name.capitalize()}.")
        for name in ("aes", "flow"):
            if getattr(self, name) is not None:
                _finite(name, getattr(self, name))
        if not 0 <= _finite("condition_frame_edit", self.condition_frame_edit) <= 1:
            raise ValueError(f"condition_frame_edit is {self.condition_frame_edit}; expected 0 (keep) to 1 (generate freely).")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; expected float32 or bfloat16.")
        self._check_loop()

    @property
    def guided(self) -> bool:
        """Whether the null caption is evaluated besides the caption."""
        return self.guidance != 1

    def _check_loop(self) -> None:
        if self.loop == 1:
            return
        if self.num_frames == 1:
            raise ValueError(f"loop {self.loop} cannot extend a single image; set num_frames, or loop 1.")
        taken = sizes.frames_of_latents(self.condition_frame_length)
        if taken >= self.num_frames:
            raise ValueError(
                f"condition_frame_length {self.condition_frame_length} takes over {taken} frames, and a clip has only "
                f"{self.num_frames}; choose a longer clip or a smaller multiple of {sizes.LATENTS_PER_CHUNK}."
            )

    @classmethod
    def resolve(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Self:
        """Returns complete settings: what is given, else the model's defaults, else Open-Sora's.

        ``given`` may hold every field and ``resolution``, ``aspect_ratio``, ``preset``; None means not given.  A preset goes
        before the model's defaults; a plan brings its number of steps.  A score is switched off by ``"off"``.

        Raises:
          ValueError: a value is out of its range, or the size is given incompletely or twice.
        """
        model = {key: value for key, value in defaults.items() if value is not None}
        if "height" not in model:
            model = {key: OPEN_SORA_DEFAULTS[key] for key in ("resolution", "aspect_ratio")} | model
        chosen = {key: value for key, value in given.items() if value is not None and key != "preset"}
        if isinstance(chosen.get("plan"), Plan):
            chosen.setdefault("num_steps", len(chosen["plan"].codes))
        # A model that lists its defaults without a score was trained without it.
        base = {key: value for key, value in OPEN_SORA_DEFAULTS.items() if key not in _SIZE_KEYS}
        if defaults:
            base = {key: value for key, value in base.items() if key not in _SCORES}
        values = base | {key: model[key] for key in model if key not in _SIZE_KEYS}
        height, width = _size(chosen, model)
        num_frames = sizes.num_frames(chosen.get("num_frames", values["num_frames"]))
        values |= preset_values(given.get("preset"), height=height, width=width, num_frames=num_frames)
        values |= {key: value for key, value in chosen.items() if key not in _SIZE_KEYS}
        fields: dict[str, Any] = {**_REST, **values}
        unknown = sorted(fields.keys() - set(cls.field_names()))
        if unknown:
            raise ValueError(f"unknown settings {unknown}; expected {', '.join(cls.field_names())}.")
        for score in _SCORES:
            fields[score] = None if fields.get(score) == OFF else fields.get(score)
        fields["align"] = None if fields["align"] == OFF else fields["align"]
        fields |= {name: _as_float(fields[name]) for name in _FLOATS if name in fields}
        fields |= {"height": height, "width": width, "num_frames": num_frames}
        return cls(**({"save_fps": fields["fps"]} | fields))

    @classmethod
    def field_names(cls) -> list[str]:
        """Returns the names of all settings."""
        return [field.name for field in dataclasses.fields(cls)]

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, JSON-ready."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Returns the settings that `to_dict` wrote, whatever else the fields hold.

        Raises:
          KeyError: a setting is missing.
        """
        values = {name: fields[name] for name in cls.field_names()}
        if isinstance(values["plan"], Mapping):
            values["plan"] = Plan(**{**values["plan"], "codes": tuple(values["plan"]["codes"])})
        for name, kind in (("leap", Leap), ("merge", Merge)):
            if isinstance(values[name], Mapping):
                values[name] = kind(**values[name])
        return cls(**values)


def check_multiple(config: VAEConfig, patch: int, height: int, width: int) -> None:
    """Refuses a height or width, given as numbers, that latents and patches do not divide.

    Sizes of the resolution table are exempt: latents round down and patches are padded, as in Open-Sora.

    Raises:
      ValueError: names the nearest sizes that are valid.
    """
    step = config.spatial.downsampling * patch
    for name, value in (("height", height), ("width", width)):
        _whole(name, value, 1, _MAX_SIDE_PX)
        if value % step:
            below = value // step * step
            nearest = ", ".join(str(size) for size in (below, below + step) if size)
            reason = f"VAE {config.spatial.downsampling} x patch {patch}"
            raise ValueError(f"{name} {value} is not a multiple of {step} ({reason}); nearest valid: {nearest}.")


def check_room(settings: Settings, num_clips: int) -> None:
    """Refuses clips whose decoded frames this machine cannot hold; of larger ones XLA would end the process.

    Raises:
      ValueError: says how much there is, and how much the frames take.
    """
    num_values = 3 * num_clips * settings.loop * settings.num_frames * settings.height * settings.width
    num_bytes, available = np.dtype(np.float32).itemsize * num_values, available_bytes()
    if num_bytes > available:
        raise ValueError(
            f"the decoded frames alone take {num_bytes / 1e9:.3g} GB, but {available / 1e9:.3g} GB of memory are free; "
            "make fewer or smaller frames, or fewer clips at a time."
        )


def _size(chosen: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[int, int]:
    """Returns (height, width) from numbers or from the resolution table."""
    numbers = [key for key in ("height", "width") if key in chosen]
    names = [key for key in ("resolution", "aspect_ratio") if key in chosen]
    if numbers and names:
        raise ValueError(f"got both {' and '.join(numbers)} and {' and '.join(names)}; give height and width, or the names.")
    if len(numbers) == 1:
        raise ValueError(f"got {numbers[0]} alone; give both height and width.")
    if numbers:
        return chosen["height"], chosen["width"]
    if not names and "height" in model:
        return model["height"], model["width"]
    table = {key: value for key, value in model.items() if key in ("resolution", "aspect_ratio")} | dict(chosen)
    if "resolution" not in table or "aspect_ratio" not in table:
        raise ValueError(f"got {names[0]} alone; give both resolution and aspect_ratio, for example 240p and 9:16.")
    return sizes.image_size(table["resolution"], table["aspect_ratio"])


def _whole(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}.")
    if value > most:
        raise ValueError(f"{name} is {value}; expected at most {most}.")


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; expected a number.")
    return float(value)
