"""The captured run: the named arrays that flow through the stages in one real evaluation of the model.

Text to caption, noise to velocity at the schedule's first time, the leap from there to the end, one chunk and one frame of
the decoder, and that frame back through the encoder.  It runs the stages' float32 references one after the other, so
that a model far larger than memory can be captured while it is exported.

Invariant: values depend on the model, the caption and the size, never on the target or the precision.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from sora_jax.config import ModelConfig
from sora_jax.export.host_program import guided
from sora_jax.export.program import Function, Specs, Stage
from sora_jax.export.rows import has_rows
from sora_jax.export.size import Size
from sora_jax.inputs import prompt, sizes
from sora_jax.inputs.tokenizer import Tokenizer
from sora_jax.pipeline.make_sampler import make_schedule
from sora_jax.pipeline.settings import Settings
from sora_jax.sampling import noise
from sora_jax.sampling.schedule import OPEN_SORA_TIMESTEPS

CAPTION = "a red circle moves right on a blue background"

Values = dict[str, np.ndarray]


def start(config: ModelConfig, tokenizer: Tokenizer, size: Size, settings: Settings) -> Values:
    """Returns the arrays before the first stage."""
    text = prompt.prepare_prompt(CAPTION, aes=settings.aes, flow=settings.flow, camera_motion=settings.camera_motion)
    ids, mask = tokenizer.encode([prompt.prompt_at_loop(text, 0)], config.stdit3.model_max_length)
    frames, rows, columns = size.latents(config.vae)
    schedule = make_schedule(dataclasses.replace(settings, **dataclasses.asdict(size)))
    conditions = sizes.size_conditions(1, height=size.height, width=size.width, num_frames=size.num_frames, fps=settings.fps)
    return {
        "ids_BL": np.asarray(ids, np.int32),
        "mask_BL": np.asarray(mask, np.float32),
        "z_BTHWC": np.asarray(noise.initial_noise(settings.seed, (1, frames, rows, columns, config.stdit3.in_channels))),
        "t_B": schedule.visited[:1],
        "frame_mask_BT": np.ones((1, frames), np.float32),
        **conditions,
    }


def stage_inputs(function: Function, values: Mapping[str, np.ndarray]) -> Values:
    """Returns a function's inputs: the first chunk or the first frame where it takes fewer than there are."""
    return {
        name: values[name][:, : spec.shape[1]] if len(spec.shape) > 1 else values[name]
        for name, spec in function.inputs.items()
    }


def rounded_to_half(values: Mapping[str, np.ndarray]) -> Values:
    """Returns the values that float16 has, in the dtypes that they have; whole numbers stay."""
    return {
        name: array.astype(np.float16).astype(array.dtype) if array.dtype == np.float32 else array
        for name, array in values.items()
    }


def called_with(function: Function, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> tuple[Values, Values]:
    """Returns the inputs and outputs of one call of a function: the first row alone where it takes one row of guidance."""

    def taken(arrays: Mapping[str, Any], specs: Specs) -> Values:
        return {name: array[: specs[name].shape[0]] if has_rows(name) else array for name, array in arrays.items()}

    return taken(inputs, function.inputs), taken(outputs, function.outputs)


def after_stage(stage: Stage, values: Values, outputs: Mapping[str, Any], guidance: float) -> Values:
    """Returns the values with a stage's outputs; after the final layer, with the latents of a leap to the end."""
    if stage.name.endswith("_encoder"):
        return values  # the temporal encoder gets the decoder's chunk, not the one frame that was encoded
    values = values | {name: np.asarray(value) for name, value in outputs.items()}
    if "v_RTHWC" in outputs:
        v = guided(values["v_RTHWC"], guidance)
        values["noise_BTHWC"] = values["z_BTHWC"]
        values["z_BTHWC"] = values["z_BTHWC"] + v * (values["t_B"][0] / np.float32(OPEN_SORA_TIMESTEPS))
    return values
