"""What a saved Core ML package holds: its functions, their types, and constants read back from the weight files.

Invariant: values come from the files alone, in the dtype that is declared with them; integers below a byte are unpacked
into bytes.  Nothing is computed here.
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from coremltools import proto
from coremltools.libmilstoragepython import _BlobStorageReader as BlobReader
from coremltools.models.utils import load_spec

_KINDS = proto.MIL_pb2.DataType
_WEIGHTS = Path("Data/com.apple.CoreML/weights")

_NUMPY: Mapping[int, type] = {
    _KINDS.Value("BOOL"): np.bool_,
    _KINDS.Value("FLOAT16"): np.float16,
    _KINDS.Value("FLOAT32"): np.float32,
    _KINDS.Value("INT8"): np.int8,
    _KINDS.Value("INT16"): np.int16,
    _KINDS.Value("INT32"): np.int32,
    _KINDS.Value("INT64"): np.int64,
    _KINDS.Value("UINT8"): np.uint8,
    _KINDS.Value("UINT16"): np.uint16,
    _KINDS.Value("UINT32"): np.uint32,
}
# Bits of the types below a byte, and the NumPy type they are unpacked into.
_PACKED: Mapping[int, tuple[int, type]] = {
    _KINDS.Value("INT4"): (4, np.int8),
    _KINDS.Value("UINT1"): (1, np.uint8),
    _KINDS.Value("UINT2"): (2, np.uint8),
    _KINDS.Value("UINT3"): (3, np.uint8),
    _KINDS.Value("UINT4"): (4, np.uint8),
    _KINDS.Value("UINT6"): (6, np.uint8),
}


class MilError(Exception):
    """A saved program that cannot be run, or that does not do what it declares."""


class Package:
    """A saved package, opened for reading; weights are read when they are asked for."""

    def __init__(self, path: Path):
        if not path.is_dir():
            raise FileNotFoundError(2, "no Core ML package", str(path))
        self.path = path
        try:
            spec = load_spec(str(path))
        except Exception as error:  # of protobuf, of JSON, of coremltools
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise MilError(f"{path.name} cannot be read ({reason}).") from error
        self.description = spec.description
        if spec.WhichOneof("Type") != "mlProgram":
            raise MilError(f"{path.name} holds a {spec.WhichOneof('Type')}; expected an ML program.")
        self.functions: dict[str, Any] = dict(spec.mlProgram.functions)

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the exporter wrote into the package, by name."""
        return dict(self.description.metadata.userDefined)

    def block(self, function: str) -> Any:
        """Returns the operations of a function.

        Raises:
          KeyError: there is no such function.
        """
        if function not in self.functions:
            raise KeyError(f"{self.path.name} has no function {function}; it has {', '.join(self.functions)}.")
        found = self.functions[function]
        return found.block_specializations[found.opset]

    def inputs(self, function: str) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Returns dtype and shape of a function's inputs, in order."""
        self.block(function)
        return {entry.name: tensor_type(entry.type) for entry in self.functions[function].inputs}

    def outputs(self, function: str) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Returns dtype and shape of a function's outputs, in order."""
        block = self.block(function)
        made = {output.name: output.type for operation in block.operations for output in operation.outputs}
        passed = {entry.name: entry.type for entry in self.functions[function].inputs}
        types = passed | made
        if unknown := [name for name in block.outputs if name not in types]:
            raise MilError(f"{self.path.name} returns {', '.join(unknown)}, which nothing computes.")
        return {name: tensor_type(types[name]) for name in block.outputs}

    def value(self, value: Any) -> Any:
        """Returns a constant: an array, or a Python string.

        Raises:
          MilError: its weight file is missing, or does not hold what the program declares.
        """
        try:
            return self._value(value)
        except (ValueError, IndexError, RuntimeError, OverflowError) as error:  # of the reader, or of NumPy
            raise MilError(f"{self.path.name} has a constant that cannot be read ({error}); export it again.") from error

    def _value(self, value: Any) -> Any:
        kind = value.type.tensorType.dataType
        if kind == _KINDS.Value("STRING"):
            return value.immediateValue.tensor.strings.values[0]
        dtype, shape = tensor_type(value.type)
        if value.WhichOneof("value") == "blobFileValue":
            blob = value.blobFileValue
            return _from_blob(self._reader(Path(blob.fileName).name), kind, blob.offset).view(dtype).reshape(shape)
        return _from_immediate(value.immediateValue.tensor, kind, math.prod(shape)).astype(dtype).reshape(shape)

    @functools.cached_property
    def _readers(self) -> dict[str, Any]:
        return {}

    def _reader(self, file_name: str) -> Any:
        if file_name not in self._readers:
            path = self.path / _WEIGHTS / file_name
            if not path.is_file():
                raise MilError(f"{self.path.name} lacks its weight file {file_name!a}; export it again.")
            self._readers[file_name] = BlobReader(str(path))
        return self._readers[file_name]


def tensor_type(declared: Any) -> tuple[np.dtype, tuple[int, ...]]:
    """Returns NumPy dtype (of unpacked values) and shape of a declared tensor; strings are objects.

    Raises:
      MilError: the type is not a tensor of a fixed shape.
    """
    if declared.WhichOneof("type") != "tensorType":
        raise MilError(f"a value is declared as {declared.WhichOneof('type')}; only tensors are known.")
    tensor = declared.tensorType
    if any(dimension.WhichOneof("dimension") != "constant" for dimension in tensor.dimensions):
        raise MilError("a tensor has no fixed shape; only fixed shapes are known.")
    shape = tuple(int(dimension.constant.size) for dimension in tensor.dimensions)
    if tensor.dataType in _PACKED:
        return np.dtype(_PACKED[tensor.dataType][1]), shape
    if tensor.dataType == _KINDS.Value("STRING"):
        return np.dtype(object), shape
    if tensor.dataType not in _NUMPY:
        raise MilError(f"a tensor has dtype {_KINDS.Name(tensor.dataType)}, which is not known.")
    return np.dtype(_NUMPY[tensor.dataType]), shape


def _from_blob(reader: Any, kind: int, offset: int) -> np.ndarray:
    """Returns the values stored in a weight file, one dimension; float16 comes as its bits."""
    name = {"FLOAT16": "fp16", "FLOAT32": "float"}.get(_KINDS.Name(kind), _KINDS.Name(kind).lower())
    return np.asarray(getattr(reader, f"read_{name}_data")(offset))


def _from_immediate(tensor: Any, kind: int, count: int) -> np.ndarray:
    """Returns the values written into the program itself, one dimension."""
    field = tensor.WhichOneof("value")
    if field != "bytes":
        return np.asarray(getattr(tensor, field).values)
    raw = np.frombuffer(tensor.bytes.values, np.uint8)
    if kind not in _PACKED:
        return raw.view(_NUMPY[kind])
    bits, dtype = _PACKED[kind]
    digits = np.unpackbits(raw, bitorder="little")[: count * bits].reshape(count, bits)
    values = digits @ (1 << np.arange(bits))
    return np.where(values >= 1 << (bits - 1), values - (1 << bits), values) if dtype is np.int8 else values
