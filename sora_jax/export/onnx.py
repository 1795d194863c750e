"""ONNX: one graph for each function of a stage, its weights in one safetensors file that all graphs of the stage refer to.

The conversion sees weights as inputs, so that it neither copies nor folds them; here they become initialisers whose external
data lie in the safetensors file (ONNX needs no more than an offset and a length).  int8 is weight-only: matrices are stored
int8 with a scale for each output and multiplied out by DequantizeLinear, activations stay float.

Invariant: a graph's weights are the bytes of the file next to it; a model of any size is converted without being in memory.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.config import FLOAT32, DTypePolicy
from sora_jax.export import weight_file
from sora_jax.export.entries import ArtefactEntry
from sora_jax.export.onnx_open import graph_name
from sora_jax.export.opening import require
from sora_jax.export.program import Function, Stage
from sora_jax.export.targets import Options, refuse_weights
from sora_jax.storage.quantisation import SCALE_SUFFIX, scale_axis

PACKAGES = ("jax2onnx", "onnx", "onnxruntime")
NOTE = "Every graph was run after saving by onnxruntime on the CPU, which computes some float16 operations in float32."
OUTPUT_SUFFIX = "_out"  # ONNX has no output with the name of an input
_WEIGHT = "weight/"  # prefix of initialisers: a parameter's name may be that of an input
_STORED = "stored/"  # and of their int8 form


def check_options(options: Options) -> None:
    """Refuses compressed weights other than int8; see `targets.Target`."""
    require("onnx", "jax2onnx", "onnx", "onnxruntime", "jsonschema")
    refuse_weights("onnx", options, "float", "int8")


def policy(options: Options) -> DTypePolicy:
    """Returns float32: a float16 graph is converted afterwards, and traced so that it stays in float16's range."""
    return dataclasses.replace(FLOAT32, half_range=options.precision == "float16")


def save(stage: Stage, params: Mapping[str, np.ndarray], folder: Path, options: Options) -> dict[str, ArtefactEntry]:
    """Writes the stage's weights and a graph for each function; see `targets.Target`."""
    import onnx

    weights = folder / f"{stage.name}.safetensors"
    write_weights(stage, params, weights, options)
    artefacts: dict[str, ArtefactEntry] = {}
    for function in stage.functions:
        model = function_graph(stage, function, weights, options)
        file = f"{stage.name}.{function.name}.onnx"
        onnx.save_model(model, folder / file)
        onnx.checker.check_model(str(folder / file))
        artefacts[function.name] = {"file": file, "weights": weights.name, "output_suffix": OUTPUT_SUFFIX}
    return artefacts


def write_weights(stage: Stage, params: Mapping[str, np.ndarray], path: Path, options: Options) -> None:
    """Writes the stage's weights as its graphs read them."""
    dtype = np.float16 if options.precision_of(stage) == "float16" else np.float32
    stored = weight_file.stored_arrays(params, int8=options.weights_of(stage) == "int8")
    weight_file.write(path, {name: _narrowed(array, dtype) for name, array in stored.items()}, stage=stage.name)


def function_graph(stage: Stage, function: Function, weights: Path, options: Options) -> Any:
    """Returns the graph of a function, which reads its weights from a file that `write_weights` wrote."""
    model = _graph(stage, function)
    if options.precision_of(stage) == "float16":
        model = _to_float16(model, keep_boundary=options.boundary_of(stage) == "float32")
    _attach(model, weights)
    for key, text in options.metadata.items():
        model.metadata_props.add(key=key, value=text)
    return model


def _graph(stage: Stage, function: Function) -> Any:
    """Returns the graph of a function, with weights as inputs that follow its own."""
    import jax2onnx

    names, weights = list(function.inputs), list(stage.program.abstract)

    def call(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        params = dict(zip(weights, arrays[len(names) :], strict=True))
        made = function.call(params, **dict(zip(names, arrays, strict=False)))
        # An output that is an input, such as the mask of one row of guidance, needs a value with a name of its own.
        return tuple(
            jnp.copy(made[name]) if any(made[name] is each for each in arrays) else made[name] for name in function.outputs
        )

    model = jax2onnx.to_onnx(
        call,
        [*function.inputs.values(), *stage.program.abstract.values()],
        model_name=graph_name(stage.name, function.name),
        input_names=[*names, *(_WEIGHT + name for name in weights)],
        output_names=[name + OUTPUT_SUFFIX for name in function.outputs],
    )
    del model.graph.value_info[:]
    # The conversion leaves constants behind that it folded away, about which onnxruntime would warn; stages have no subgraphs.
    read = {name for node in model.graph.node for name in node.input}
    kept = [constant for constant in model.graph.initializer if constant.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def _to_float16(model: Any, *, keep_boundary: bool) -> Any:
    """Returns the graph with float16 arithmetic and weights, and inputs and outputs as they are or in float16."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    boundary = (*model.graph.input, *model.graph.output) if keep_boundary else ()
    names = [value.name for value in boundary if not value.name.startswith(_WEIGHT)]
    model = convert_float_to_float16(model, keep_io_types=names, disable_shape_infer=True, op_block_list=[])
    # The casts of inputs were appended; nodes must follow what they read.
    nodes = sorted(model.graph.node, key=lambda node: not node.name.startswith("graph_input_cast"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _attach(model: Any, weights: Path) -> None:
    """Makes initialisers of the weights that the graph takes as inputs, with their data in the file."""
    import onnx

    found = weight_file.index(weights)
    entries, start = found.entries, found.start
    own = [value for value in model.graph.input if not value.name.startswith(_WEIGHT)]
    taken = [value for value in model.graph.input if value.name.startswith(_WEIGHT)]
    del model.graph.input[:]
    model.graph.input.extend(own)
    nodes = []
    for value in taken:
        name = value.name.removeprefix(_WEIGHT)
        if name + SCALE_SUFFIX in entries:
            stored, scale = _STORED + name, _STORED + name + SCALE_SUFFIX
            model.graph.initializer.append(_external(stored, entries[name], weights, start))
            model.graph.initializer.append(_external(scale, entries[name + SCALE_SUFFIX], weights, start))
            axis = scale_axis(name)
            nodes.append(onnx.helper.make_node("DequantizeLinear", [stored, scale], [value.name], axis=axis))
        else:
            model.graph.initializer.append(_external(value.name, entries[name], weights, start))
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


def _external(name: str, entry: Mapping[str, Any], weights: Path, start: int) -> Any:
    import onnx

    kinds = {"F32": onnx.TensorProto.FLOAT, "F16": onnx.TensorProto.FLOAT16, "I8": onnx.TensorProto.INT8}
    tensor = onnx.TensorProto(name=name, dims=entry["shape"], data_type=kinds[entry["dtype"]])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    begin, end = entry["data_offsets"]
    for key, value in (("location", weights.name), ("offset", start + begin), ("length", end - begin)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _narrowed(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns the array in the graph's float dtype; int8 stays, its scales follow."""
    return array if array.dtype == np.int8 else array.astype(dtype, copy=False)
