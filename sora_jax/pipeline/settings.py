"""The options of a clip, next to prompt, references and weights: declared once, resolved once, stored with every clip.

`Options` is what a caller may say; its fields carry help, range and spelling, from which the command line, the checks and the
table of the documentation are made.  `Settings` is what follows from it for one model.

Invariant: a `Settings` holds only values that the pipeline accepts; every fault is a ValueError of one line.  This module
imports no JAX before a sampler or a schedule is asked for, and computes nothing.
"""

import dataclasses
import os
from collections import ChainMap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, Union, no_type_check

import numpy as np

from sora_jax.devices.names import AUTO, DTYPES
from sora_jax.inputs import sizes
from sora_jax.networks.merge_rule import Merge
from sora_jax.pipeline import consistency
from sora_jax.pipeline.frame_size import MAX_FRAMES, MAX_SIDE_PX, frame_size
from sora_jax.pipeline.option import OFF, Declared, Option, declared, said
from sora_jax.pipeline.presets import PRESETS, preset_values
from sora_jax.process import available_bytes

if TYPE_CHECKING:
    from sora_jax.sampling.leap import Leap
    from sora_jax.sampling.reuse import Plan

# Far beyond any use, but numbers that arrays, files and float32 times still hold: larger ones would end in their errors.
MAX_STEPS, _MAX_SEED, _MAX_LOOP, _MAX_GUIDANCE, _MAX_SCORE = 100_000, 2**32 - 1, 10_000, 10_000, 1000
_FPS = "a positive number of frames per second, 0.01 to 1000"


class ClipOptions(TypedDict, total=False):
    """What a clip shows, and how large and long it is."""

    num_steps: Annotated[
        int | None,
        Option("Sampling steps.", flags=("--steps", "--num-sampling-steps"), metavar="N", within=(1, MAX_STEPS), default=30),
    ]
    guidance: Annotated[
        float | None,
        Option(
            "Weight of the caption; 1 evaluates without the null caption, at half the cost.",
            flags=("--guidance", "--cfg-scale"),
            metavar="G",
            within=(-_MAX_GUIDANCE, _MAX_GUIDANCE),
            default=7.0,
        ),
    ]
    seed: Annotated[
        int | None, Option("Noise of the first clip; the next one has seed + 1.", metavar="N", within=(0, _MAX_SEED), default=0)
    ]
    height: Annotated[
        int | None,
        Option(
            "Rows of pixels, together with the columns: multiples of 16, or a size of the table of resolutions.",
            metavar="PX",
            within=(1, MAX_SIDE_PX),
        ),
    ]
    width: Annotated[int | None, Option("Columns of pixels.", metavar="PX", within=(1, MAX_SIDE_PX))]
    resolution: Annotated[
        str | None,
        Option("Size by name, in place of rows and columns.", metavar="NAME", choices=sizes.RESOLUTIONS, default="240p"),
    ]
    aspect_ratio: Annotated[
        str | None,
        Option(
            "Height to width, not width to height: 9:16 is landscape. Goes with a resolution.",
            metavar="H:W",
            choices=sizes.ASPECT_RATIOS,
            expected=f"height:width, one of {', '.join(sizes.ASPECT_RATIOS)}",
            default="9:16",
        ),
    ]
    num_frames: Annotated[
        int | str | None,
        Option(
            "Frames of a clip, or its nominal duration; 1 makes an image.",
            metavar="N|2s",
            within=(1, MAX_FRAMES),
            choices=tuple(sizes.DURATIONS),
            expected=f"a whole number from 1 to {MAX_FRAMES}, or one of {', '.join(sizes.DURATIONS)}",
            default=51,
        ),
    ]
    fps: Annotated[
        float | None,
        Option("Frame rate that the model is conditioned on.", metavar="F", within=(0.01, 1000), expected=_FPS, default=24.0),
    ]
    save_fps: Annotated[
        float | None,
        Option(
            "Frame rate of the file (default: the one the model is asked for).", metavar="F", within=(0.01, 1000), expected=_FPS
        ),
    ]
    aes: Annotated[
        float | str | None,
        Option(
            "Aesthetic score added to the caption, usually 4 to 7.",
            metavar="SCORE|off",
            within=(0, _MAX_SCORE),
            off=True,
            default=6.5,
        ),
    ]
    flow: Annotated[
        float | str | None,
        Option("Motion score added to the caption, usually 0 to 10.", metavar="SCORE|off", within=(0, _MAX_SCORE), off=True),
    ]
    camera_motion: Annotated[
        str | None, Option("Camera motion added to the caption, such as pan right.", metavar="TEXT|off", off=True)
    ]
    loop: Annotated[
        int | None, Option("Clips in a row, each continuing the one before.", metavar="N", within=(1, _MAX_LOOP), default=1)
    ]
    condition_frame_length: Annotated[
        int | None,
        Option("Latent frames that a clip takes over from the one before.", metavar="N", within=(1, MAX_FRAMES), default=5),
    ]
    condition_frame_edit: Annotated[
        float | None,
        Option(
            "Edit ratio of those frames.", metavar="R", within=(0, 1), expected="0 (keep) to 1 (generate freely)", default=0.0
        ),
    ]
    align: Annotated[
        int | str | None,
        Option(
            "Latent frames that starts in mask strategies are rounded to.",
            metavar="N|off",
            within=(1, MAX_FRAMES),
            off=True,
            default=5,
        ),
    ]
    dtype: Annotated[
        str | None,
        Option("Compute dtype; auto: bfloat16 on a GPU or TPU, float32 on a CPU.", choices=DTYPES, default=AUTO),
    ]


class SamplingOptions(TypedDict, total=False):
    """How the path from noise to clip is walked."""

    preset: Annotated[
        str | None,
        Option(
            "exact samples as Open-Sora does, recommended as the studies advise, tuned-N by the model's own recipe of N "
            "evaluations; other options replace its values.",
            metavar="|".join(PRESETS),
            choices=PRESETS,
        ),
    ]
    recipe: Annotated[
        Union[str, "os.PathLike[str]", None],
        Option(
            "Sample as a recipe of sora-jax tune says; other options replace its values.",
            metavar="JSON",
            expected="a file of sora-jax tune",
        ),
    ]
    force_recipe: Annotated[
        bool | None,
        Option(
            "Use a recipe that was tuned for another model, size or number of frames.",
            expected="True or False",
            on_command_line=False,
        ),
    ]
    solver: Annotated[
        str | None,
        Option(
            "How a step is taken; heun takes two evaluations a step, the others one.",
            choices=("euler", "ab2", "ab3", "dpmpp", "unipc", "heun"),
            default="euler",
        ),
    ]
    shift: Annotated[
        float | None,
        Option(
            "Extra time shift, multiplied with the one from the resolution (1: none); above 1, more steps at high noise.",
            metavar="S",
            above=0,
            expected="a positive number, 1 for the published times",
            default=1.0,
        ),
    ]
    guidance_low: Annotated[
        float | None,
        Option(
            "Lowest flow time (0 is data) that is guided; at others the caption alone is evaluated, at half the cost.",
            metavar="T",
            within=(0, 1),
            default=0.0,
        ),
    ]
    guidance_high: Annotated[
        float | None,
        Option("Highest flow time (1 is noise) that is guided.", metavar="T", within=(0, 1), default=1.0),
    ]
    guidance_rule: Annotated[
        str | None,
        Option(
            "How the two velocities are combined; zero-star (CFG-Zero*) scales the one without caption to fit the other.",
            choices=("plain", "zero-star"),
            default="plain",
        ),
    ]
    guidance_zero_steps: Annotated[
        int | None,
        Option(
            "First steps that stand still and cost nothing; 1 is CFG-Zero*'s, and goes with its rule.",
            metavar="N",
            within=(0, MAX_STEPS),
            default=0,
        ),
    ]
    guidance_rescale: Annotated[
        float | str | None,
        Option(
            "Share of the captioned velocity's spread that the guided one gets (published: 0.7).",
            metavar="SHARE|off",
            within=(0, 1),
            off=True,
        ),
    ]
    leap: Annotated[
        Union[int, str, "Leap", None],
        Option(
            "Linear proportional leap: the step that leaps to the end, or the rule that decides.",
            metavar="off|N|dynamic|released",
            within=(0, MAX_STEPS),
            choices=("dynamic", "released"),
            off=True,
            expected="off, dynamic, released, or the number of the step that leaps",
            default=OFF,
        ),
    ]
    plan: Annotated[
        Union["Plan", str, "os.PathLike[str]", None],
        Option(
            "Which steps evaluate the transformer and which reuse what it computed; a plan brings its number of steps.",
            metavar="JSON",
            expected="a file of sora-jax calibrate, or a sora_jax.Plan",
        ),
    ]
    reuse: Annotated[
        str | None,
        Option(
            "Reuse what the blocks added before while little changes: their input (TeaCache), or what the first one adds "
            "(first-block cache). Makes one clip at a time.",
            metavar="off|input|first-block",
            choices=("input", "first-block"),
            off=True,
        ),
    ]
    reuse_threshold: Annotated[
        float | None,
        Option(
            "Relative change from which on a step evaluates; of the input it is summed up. Thresholds do not carry over "
            "from model to model.",
            metavar="X",
            within=(0, 1000),
            default=0.1,
        ),
    ]
    reuse_first: Annotated[
        int | None, Option("First steps that evaluate in any case.", metavar="N", within=(1, MAX_STEPS), default=1)
    ]
    reuse_last: Annotated[
        int | None, Option("Last steps that evaluate in any case.", metavar="N", within=(0, MAX_STEPS), default=1)
    ]
    reuse_order: Annotated[
        int | None,
        Option(
            "What a reused step takes, with reuse or with a plan: 0 the last residual, 1 the line through the last two "
            "(TaylorSeer, first order).",
            metavar="0|1",
            within=(0, 1),
            default=0,
        ),
    ]
    merge_steps: Annotated[
        int | None,
        Option(
            "Number of first steps that merge temporal tokens; the number of steps merges in all of them.",
            metavar="K",
            within=(0, MAX_STEPS),
            default=0,
        ),
    ]
    merge: Annotated[
        Merge | None,
        Option("What those steps merge.", expected="a sora_jax.Merge", default=Merge(), on_command_line=False),
    ]


class Options(ClipOptions, SamplingOptions, total=False):
    """What a caller may say of a clip; what is None or left out is the model's default, else Open-Sora's.

    Source of the defaults: Open-Sora v1.2 configs/opensora-v1-2/inference/sample.py.
    """


OPTIONS: Mapping[str, Declared] = declared(Options)
_DEFAULTS: Mapping[str, Any] = {name: each.option.default for name, each in OPTIONS.items()}
_OTHERS = ("preset", "recipe", "force_recipe")  # they decide other settings
_EXACT = {name: _DEFAULTS[name] for name in ("num_steps", *declared(SamplingOptions)) if name not in _OTHERS}
RECIPE_OPTIONS = tuple(_EXACT)
_GUIDANCE_RULE = ("guidance_low", "guidance_high", "guidance_rule", "guidance_zero_steps", "guidance_rescale")
_LATER = (*_GUIDANCE_RULE, "reuse", "reuse_threshold", "reuse_first", "reuse_last", "reuse_order")  # not in files of 0.1.0
_SCORES = ("aes", "flow", "camera_motion")


@no_type_check  # a wrong value is answered by __post_init__
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One clip's settings: every option of `Options` but those that name others (size by name, preset), decided.

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
        changed = [name for name in _GUIDANCE_RULE if getattr(self, name) != _DEFAULTS[name]]
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
            and all(getattr(self, name) == _DEFAULTS[name] for name in ("solver", "merge", *_GUIDANCE_RULE))
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
        return dataclasses.replace(self, seed=seed % (_MAX_SEED + 1))

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
          defaults: the model's, under any name of `Options`.
          options: any of `Options`, ``plan`` as a `Plan`; None says nothing.

        Raises:
          ValueError: a value is out of its range or has no effect, or the size is given incompletely or twice.
        """
        asked, model = said(options, OPTIONS), said(defaults, OPTIONS)
        height, width = frame_size(asked, model, _DEFAULTS)
        num_frames = sizes.num_frames(asked.get("num_frames", model.get("num_frames", _DEFAULTS["num_frames"])))
        preset = preset_values(asked.get("preset"), _EXACT, height=height, width=width, num_frames=num_frames)
        of_plan = {"num_steps": len(_codes(asked["plan"]))} if "plan" in asked else {}
        # A model that lists its defaults without a score was trained without it.
        open_sora = {**_DEFAULTS, **(dict.fromkeys(_SCORES) if model else {})}
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
        older = {name: _DEFAULTS[name] for name in _LATER}
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
