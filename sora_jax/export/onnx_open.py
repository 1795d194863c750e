"""Opens ONNX artefacts as onnxruntime sessions on the CPU, compared with the manifest; the converter is not needed.

Invariant: a session's weights are a copy of verified bytes.  Left to itself onnxruntime maps the file, so that a later copy
over it would change the weights of a session that is open, and it reads whatever file a graph names.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.export import weight_file
from sora_jax.export.contents import Contents, ExportFileError
from sora_jax.export.entries import FunctionEntry, StageEntry
from sora_jax.export.opening import Runner, Tensor, refuse_other_name, refuse_other_tensors, require, rounded

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int32)": "int32"}


def graph_name(stage: str, function: str) -> str:
    """Returns the name that a graph has."""
    return f"{stage}_{function}"


def open_function(contents: Contents, stage: StageEntry, function: FunctionEntry) -> Runner:
    """Returns a saved graph as a session; see `opening.Opener`."""
    require("onnx", "onnx", "onnxruntime")
    artefact = function["artefact"]
    suffix = artefact.get("output_suffix", "")
    path = contents.path(artefact["file"])
    session = _session(path, contents, artefact.get("weights", ""), stage["name"])
    inputs, outputs = _tensors(session.get_inputs()), _tensors(session.get_outputs())
    refuse_other_name(path, "graph", session.get_modelmeta().graph_name, graph_name(stage["name"], function["name"]))
    refuse_other_tensors(path, "input", function["inputs"], inputs)
    named = {name.removesuffix(suffix): tensor for name, tensor in outputs.items()}
    refuse_other_tensors(path, "output", function["outputs"], named)
    dtypes = {name: dtype for name, (dtype, _) in inputs.items()}

    def run(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = session.run(list(outputs), rounded(given, dtypes))
        return dict(zip(named, values, strict=True))

    return run


def _session(path: Path, contents: Contents, weights: str, stage: str) -> Any:
    """Returns the session of a graph and its one file of weights.

    Raises:
      ExportFileError: the graph cannot be read, names other files, or the weights are another stage's.
    """
    import onnx
    import onnxruntime

    text = path.read_bytes()
    try:
        model = onnx.load_model_from_string(text)
    except Exception as error:  # of protobuf
        raise ExportFileError(f"{path} is no ONNX graph ({type(error).__name__}); export again.") from error
    others = sorted({entry.value for tensor in _tensors_of(model.graph) for entry in _locations(tensor)} - {weights})
    if others or model.functions:
        raise ExportFileError(f"{path} reads {', '.join(map(ascii, others)) or 'functions'} besides {weights}; export again.")
    with contents.reading(weights) as weights_path:
        found = weight_file.index(weights_path)
        refuse_other_name(weights_path, "weights of stage", found.stage, stage)
        for tensor in _tensors_of(model.graph):
            if tensor.external_data and not _is_of(tensor, found):
                raise ExportFileError(f"{path} has {tensor.name!a} where {weights} has something else; export again.")
        values = weights_path.read_bytes()
    options = onnxruntime.SessionOptions()
    options.add_external_initializers_from_files_in_memory([weights], [values], [len(values)])
    try:
        return onnxruntime.InferenceSession(text, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes, which are no public names
        reason = " ".join(str(error).split())[:200]
        raise ExportFileError(f"{path} cannot be run by onnxruntime ({reason}); export again.") from error


def _tensors_of(graph: Any) -> Iterator[Any]:
    """Yields every constant of a graph, those of its nodes and of graphs within them too."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _tensors_of(inner)


def _locations(tensor: Any) -> Iterator[Any]:
    return (entry for entry in tensor.external_data if entry.key == "location")


def _is_of(tensor: Any, found: weight_file.Index) -> bool:
    """Returns whether a constant is the array of its name, by the header of the weights: its shape, and where it lies."""
    entry = found.entries.get(tensor.name.partition("/")[2])
    if entry is None or list(tensor.dims) != entry["shape"]:
        return False
    begin, end = entry["data_offsets"]
    place = {one.key: one.value for one in tensor.external_data}
    return (place.get("offset"), place.get("length")) == (str(found.start + begin), str(end - begin))


def _tensors(values: Any) -> dict[str, Tensor]:
    """Returns dtype and shape of a session's inputs or outputs by name."""
    return {value.name: (_DTYPES.get(value.type, value.type), tuple(value.shape)) for value in values}
