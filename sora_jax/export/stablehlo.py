"""StableHLO: jax.export artefacts for cpu, cuda and tpu, with their weights as arguments, in safetensors files next to them.

Stages of one program share an artefact, and lengths that its arithmetic does not depend on are symbolic: one file serves all
pairs of blocks, every batch, caption length and (for the same number of frames) resolution.  An artefact needs jax and numpy::

    import json, jax.export, numpy as np

    def weights(path):
        data = open(path, "rb").read()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        dtypes = {"F32": np.float32, "F16": np.float16, "I8": np.int8}
        return {name: np.frombuffer(data[start + at["data_offsets"][0] : start + at["data_offsets"][1]],
                dtypes[at["dtype"]]).reshape(at["shape"]) for name, at in header.items() if name != "__metadata__"}

    call = jax.export.deserialize(open("stdit3_pair.full.jaxexport", "rb").read()).call
    x = call(weights("stdit3_pair_00.safetensors"), {"x_RTSD": x, ...})["x_RTSD"]  # the manifest lists the inputs

Invariant: an artefact holds no weights and no host callback, and computes the bits that jitting the stage does on a CPU.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from sora_jax.config import FLOAT32, DTypePolicy
from sora_jax.export import weight_file
from sora_jax.export.entries import ArtefactEntry
from sora_jax.export.opening import require
from sora_jax.export.program import Function, Stage
from sora_jax.export.targets import Options, refuse_weights

PLATFORMS = ("cpu", "cuda", "tpu")
SUFFIX = ".jaxexport"
PACKAGES = ("jaxlib",)
NOTE = "Every program was run after saving on the CPU; its cuda and tpu versions were not."

# Float16 arrays, float32 sums and statistics: what the networks do with any compute dtype.
FLOAT16 = DTypePolicy(param=jnp.float16, compute=jnp.float16)

# By program, the axes whose length may be any; letters as in the names of the inputs.
SYMBOLIC: Mapping[str, str] = {
    "t5_embed": "B",
    "t5_block": "BL",
    "t5_final": "BL",
    "stdit3_pair": "RSL",
    "stdit3_pairs": "RSL",
    "vae_temporal_decoder": "HW",
    "vae_spatial_decoder": "HW",
}


def check_options(options: Options) -> None:
    """Refuses compressed weights other than int8; see `targets.Target`."""
    require("stablehlo", "flatbuffers", "jsonschema")
    refuse_weights("stablehlo", options, "float", "int8")


def policy(options: Options) -> DTypePolicy:
    """Returns the dtypes stages are built with."""
    return FLOAT32 if options.precision == "float32" else FLOAT16


def save(stage: Stage, params: Mapping[str, np.ndarray], folder: Path, options: Options) -> dict[str, ArtefactEntry]:
    """Writes the stage's weights, and its program unless a stage before did; see `targets.Target`."""
    weights = f"{stage.name}.safetensors"
    int8 = options.weights_of(stage) == "int8"
    weight_file.write(folder / weights, weight_file.stored_arrays(params, int8=int8), stage=stage.name)
    artefacts: dict[str, ArtefactEntry] = {}
    for function in stage.functions:
        file, letters = f"{stage.program.name}.{function.name}{SUFFIX}", _any_lengths(stage, function)
        if not (folder / file).exists():
            (folder / file).write_bytes(_export_function(stage, function, letters, int8=int8))
        artefacts[function.name] = {"file": file, "weights": weights, "symbolic": letters}
    return artefacts


def serialise(
    call: Callable[..., Any],
    params: Mapping[str, jax.ShapeDtypeStruct],
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    *,
    name: str,
) -> bytes:
    """Returns ``call(params, inputs)``, of two flat dictionaries, as one program for all platforms, which knows its name."""
    call.__name__ = name
    exported = jax.export.export(jax.jit(call), platforms=PLATFORMS)(dict(params), dict(inputs))
    return bytes(exported.serialize())


def _any_lengths(stage: Stage, function: Function) -> str:
    """Returns the axes that may have any length: none where attention is chunked, whose lengths say in how many chunks."""
    letters = SYMBOLIC.get(stage.program.name, "")
    if not letters:
        return ""
    traced = jax.make_jaxpr(lambda params, inputs: function.call(params, **inputs))
    return "" if "scan[" in str(traced(dict(stage.program.abstract), dict(function.inputs))) else letters


def _export_function(stage: Stage, function: Function, letters: str, *, int8: bool) -> bytes:
    abstract = stage.program.abstract

    def call(stored: Mapping[str, jax.Array], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return function.call(weight_file.restored(stored, abstract), **inputs)

    inputs = symbolic_inputs(function.inputs, letters) if letters else function.inputs
    return serialise(call, weight_file.stored_specs(abstract, int8=int8), inputs, name=f"{stage.program.name}.{function.name}")


def symbolic_inputs(inputs: Mapping[str, jax.ShapeDtypeStruct], letters: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the inputs with the axes of the given letters symbolic; an input's name ends with the letters of its axes."""
    scope = jax.export.SymbolicScope()

    def symbolic(name: str, spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = name.rpartition("_")[2]
        text = ", ".join(axis if axis in letters else str(length) for axis, length in zip(axes, spec.shape, strict=True))
        return jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"({text},)", scope=scope), spec.dtype)

    return {name: symbolic(name, spec) for name, spec in inputs.items()}
