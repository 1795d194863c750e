"""The whole sampling loop as one StableHLO program: noise and caption in, latents out, nothing on the host between.

One program holds the transformer, guidance, the schedule's loop, the merged and the full phase, and a leap rule; two
programs differ in the rule (``static``, which also never leaps, and ``dynamic``).  The number of steps, times, guidance,
merged steps and thresholds are inputs.  Weights are those of the transformer's stages (`weights` as in `stablehlo`)::

    from pathlib import Path

    params = {f"{path.stem}/{name}": x for path in Path().glob("stdit3_*.safetensors") for name, x in weights(path).items()}
    run = jax.export.deserialize(open("sampler.dynamic.jaxexport", "rb").read()).call
    z = run(params, given)["z_BTHWC"]  # given: noise, caption, times, num_steps, ... as the manifest lists them

Invariant: this is `sampler.Sampler` and `velocity.Velocity`, traced; nothing of either is repeated here.  `resident` opens
and runs what is saved here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.config import DTypePolicy, ModelConfig
from sora_jax.export import weight_file
from sora_jax.export.consistency import SAMPLER_WEIGHTS
from sora_jax.export.entries import ArtefactEntry
from sora_jax.export.program import Function, Stage
from sora_jax.export.resident import sampler_name
from sora_jax.export.size import Size
from sora_jax.export.stablehlo import SUFFIX, serialise
from sora_jax.export.stages import MERGE
from sora_jax.networks.forms import WHOLE, Forms
from sora_jax.networks.stdit3 import STDiT3, with_null_caption
from sora_jax.pipeline.velocity import Velocity
from sora_jax.sampling.guidance import GuidanceRule
from sora_jax.sampling.leap import LeapRule, Mode
from sora_jax.sampling.options import Sampling
from sora_jax.sampling.sampler import Sampler
from sora_jax.sampling.schedule import OPEN_SORA_TIMESTEPS, Schedule, capacity
from sora_jax.storage.checkpoint import unflatten

MODES: tuple[Mode, ...] = ("static", "dynamic")
CAPACITY = capacity(1)


def sampler_functions(
    config: ModelConfig, sizes: Sequence[Size], stages: Sequence[Stage], *, policy: DTypePolicy, forms: Forms = WHOLE
) -> list[Function]:
    """Returns the sampler of every leap mode and size, as a function of ``<stage>/<local name>`` parameters.

    ``stages`` are those of the transformer, of the same policy; the sampler takes no reference frames.
    """
    shell = jax.eval_shape(lambda: STDiT3(config.stdit3, policy=policy, forms=forms, rngs=nnx.Rngs(0)))
    flat_names = {f"{stage.name}/{local}": flat for stage in stages for local, flat in stage.parameters.items()}
    functions = []
    for size in sizes:
        for mode in MODES:
            inputs = _inputs(size, stages)

            def call(params: Mapping[str, jax.Array], mode: Mode = mode, **given: jax.Array) -> dict[str, jax.Array]:
                network = unflatten(shell, {flat_names[name]: value for name, value in params.items()})
                return _sample(network, mode, given)

            functions.append(
                Function(
                    name=mode if size is sizes[0] else f"{mode}_{size.key}",
                    variant=mode,
                    sizes=(size.key,),
                    call=call,
                    inputs=inputs,
                    outputs={
                        "z_BTHWC": inputs["z_BTHWC"],
                        "evaluations_B": jax.ShapeDtypeStruct((1,), jnp.float32),
                    },
                )
            )
    return functions


def save(functions: Sequence[Function], stages: Sequence[Stage], folder: Path, *, int8: bool) -> dict[str, ArtefactEntry]:
    """Writes the programs; the stages' weights lie there already."""
    abstract = {f"{stage.name}/{name}": spec for stage in stages for name, spec in stage.program.abstract.items()}
    artefacts: dict[str, ArtefactEntry] = {}
    for function in functions:
        file, name = f"sampler.{function.name}{SUFFIX}", sampler_name(function.name)

        def call(stored: Mapping[str, jax.Array], inputs: Mapping[str, jax.Array], f: Function = function) -> dict[str, Any]:
            return f.call(weight_file.restored(stored, abstract), **inputs)

        specs = weight_file.stored_specs(abstract, int8=int8)
        (folder / file).write_bytes(serialise(call, specs, function.inputs, name=name))
        artefacts[function.name] = {"file": file, "weights": SAMPLER_WEIGHTS}
    return artefacts


def _inputs(size: Size, stages: Sequence[Stage]) -> dict[str, jax.ShapeDtypeStruct]:
    first = [function for stage in stages[:2] for function in stage.functions if size.key in function.sizes]
    given = {name: spec for function in first for name, spec in function.inputs.items()}  # a caption may have its own stage
    scalar, whole = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    names = ("z_BTHWC", "caption_BLE", "mask_BL", "fps_B", "height_px_B", "width_px_B")
    return {name: given[name] for name in names} | {
        "times": jax.ShapeDtypeStruct((CAPACITY + 1,), jnp.float32),
        "num_steps": whole,
        "guidance": scalar,
        "merge_steps": whole,
        "leap_index": whole,
        "leap_first": whole,
        "leap_tolerance": scalar,
        "leap_patience": whole,
    }


def _sample(network: STDiT3, mode: Mode, given: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns latents and evaluations; with ``static``, leap_index num_steps - 1 never leaps."""
    velocity = Velocity(
        network=network,
        caption_RLE=with_null_caption(given["caption_BLE"], network.null_caption_LE),
        mask_BL=given["mask_BL"] > 0.5,
        fps=given["fps_B"],
        height_px=given["height_px_B"],
        width_px=given["width_px_B"],
        merge=MERGE,
    )
    sampling = Sampling(
        schedule=Schedule(times=given["times"], num_steps=given["num_steps"], num_timesteps=OPEN_SORA_TIMESTEPS),
        guidance=GuidanceRule(scale=given["guidance"]),
        merge_steps=given["merge_steps"] if given["z_BTHWC"].shape[1] > 1 else None,  # one frame: nothing to merge
        weight_BT=None,
        seed=jnp.asarray(0, jnp.uint32),
        noise_NBX=None,
        leap=LeapRule(
            index=given["leap_index"],
            first=given["leap_first"],
            tolerance=given["leap_tolerance"],
            patience=given["leap_patience"],
            mode=mode,
            extrapolate=False,
        ),
        plan=None,
    )
    sampler = Sampler.of(velocity, sampling)
    carry = sampler.run(sampler.start(given["z_BTHWC"]), given["num_steps"])
    return {"z_BTHWC": carry.z, "evaluations_B": carry.evaluations_B}
