"""The options of a clip, next to prompt, references and weights: declared once, each with its help, range and spelling.

`Options` is what a caller may say.  The command line, the checks and the table of the documentation are made from its fields;
what follows from them for one model is `settings.Settings`.

Invariant: the defaults sample as Open-Sora does.  This module imports no JAX, and decides nothing.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, Union

from sora_jax.devices.names import AUTO, DTYPES
from sora_jax.inputs import sizes
from sora_jax.networks.merge_rule import Merge
from sora_jax.pipeline.frame_size import MAX_FRAMES, MAX_SIDE_PX
from sora_jax.pipeline.option import OFF, Declared, Option, declared
from sora_jax.pipeline.presets import PRESETS

if TYPE_CHECKING:
    from sora_jax.sampling.leap import Leap
    from sora_jax.sampling.reuse import Plan

# Far beyond any use, but numbers that arrays, files and float32 times still hold: larger ones would end in their errors.
MAX_STEPS, MAX_SEED, _MAX_LOOP, _MAX_GUIDANCE, _MAX_SCORE = 100_000, 2**32 - 1, 10_000, 10_000, 1000
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
        int | None, Option("Noise of the first clip; the next one has seed + 1.", metavar="N", within=(0, MAX_SEED), default=0)
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
DEFAULTS: Mapping[str, Any] = {name: each.option.default for name, each in OPTIONS.items()}
_OTHERS = ("preset", "recipe", "force_recipe")  # they decide other settings
RECIPE_OPTIONS = ("num_steps", *(name for name in declared(SamplingOptions) if name not in _OTHERS))
