"""Core AI: one asset for every stage, for iOS and macOS 27, made from the ONNX graphs of its functions.

A pair of STDiT3 blocks is one asset with the functions ``full`` and ``merged``, and two more for every further size; they
differ in their programs and share the weights.  Names, precision and int8 weights are those of the ONNX target; an output has
the stage's name with the suffix ``_out``.  Inputs and outputs are float32 (token ids int32) whatever the precision inside,
unless float16 is asked for.

Invariant: an asset holds every function of its stage or does not exist.  The checks run it by Apple's own runtime on the CPU of
this machine (`coreai_open`); nothing here was compiled for or run on Apple hardware.
"""

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.config import DTypePolicy
from sora_jax.export import onnx as graphs
from sora_jax.export.coreai_open import STAGE, VERSIONS, require_versions
from sora_jax.export.entries import ArtefactEntry
from sora_jax.export.opening import require
from sora_jax.export.program import Stage
from sora_jax.export.targets import Options, refuse_weights

SUFFIX = ".aimodel"
OUTPUT_SUFFIX = graphs.OUTPUT_SUFFIX
PACKAGES = (*VERSIONS, "jax2onnx", "onnx")
NOTE = "Every Core AI asset was run after saving by Apple's runtime on a Linux CPU; nothing was run on Apple hardware."


def check_options(options: Options) -> None:
    """Refuses compressed weights other than int8, and other versions of Apple's packages; see `targets.Target`."""
    require("coreai", "coreai", "coreai_onnx", "jax2onnx", "onnx", "jsonschema")
    require_versions(*VERSIONS)
    if options.precision == "float16":
        require("coreai", "onnxruntime")  # converts graphs to float16
    refuse_weights("coreai", options, "float", "int8")


def policy(options: Options) -> DTypePolicy:
    """Returns the dtypes of the graphs that assets are made from."""
    return graphs.policy(options)


def save(stage: Stage, params: Mapping[str, np.ndarray], folder: Path, options: Options) -> dict[str, ArtefactEntry]:
    """Writes the asset of a stage; see `targets.Target`."""
    asset = folder / f"{stage.name}{SUFFIX}"
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{stage.name}.") as scratch:
        program = _program(stage, params, Path(scratch), options)
        program.save_asset(asset, _metadata(stage, options))
    return {
        function.name: {"file": asset.name, "function": function.name, "output_suffix": OUTPUT_SUFFIX}
        for function in stage.functions
    }


def _program(stage: Stage, params: Mapping[str, np.ndarray], scratch: Path, options: Options) -> Any:
    """Returns the program with all functions of a stage, whose equal constants are one."""
    from coreai_onnx import OnnxConverter
    from onnx import save_model

    weights = scratch / f"{stage.name}.safetensors"
    graphs.write_weights(stage, params, weights, options)
    converter = OnnxConverter()
    for function in stage.functions:
        graph = scratch / f"{function.name}.onnx"
        save_model(graphs.function_graph(stage, function, weights, options), graph)
        with warnings.catch_warnings():  # float16 may fail to load: it was loaded and run before it counts
            warnings.simplefilter("ignore")
            converter.add_onnx_model(graph, entrypoint_name=function.name)
    return converter.to_coreai()


def _metadata(stage: Stage, options: Options) -> Any:
    """Returns what an asset says of itself, where Xcode shows it."""
    from coreai.runtime import AIModelAssetMetadata

    metadata = AIModelAssetMetadata()
    functions = ", ".join(function.name for function in stage.functions)
    model = options.metadata.get("model", "a sora_jax model")
    metadata.model_description = f"{stage.name} of {model}, functions: {functions}"
    metadata.license = options.metadata.get("licence", "")
    own = {
        STAGE: stage.name,
        "sizes": ", ".join(dict.fromkeys(key for function in stage.functions for key in function.sizes)),
        "precision": options.precision_of(stage),
        "weights": options.weights_of(stage),
        "note": NOTE,
    }
    for key, text in own.items():
        metadata.set_custom(key, text)
    return metadata
