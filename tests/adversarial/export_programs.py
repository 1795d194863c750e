"""What programs of ONNX and Core ML can say that contradicts the rest of an export: files elsewhere, bytes beyond, other names.

Each function takes the bytes of a file and returns others, which are then listed with their right checksum.  A program that
says nothing wrong, and computes something else, is another export.
"""

import random
from collections.abc import Callable

Change = Callable[[bytes, random.Random], bytes]

ELSEWHERE = ("../x", "/etc/passwd", "manifest.json", "", "t5_embed.safetensors/../t5_final.safetensors", "a\0b", "\x1b[2J")
NUMBERS = ("-1", "9223372036854775807", "18446744073709551616", "x", "")


def of_onnx() -> dict[str, Change]:
    """Returns the changes of ONNX graphs by name."""
    return {
        "a program that reads elsewhere": _onnx_location,
        "a program that reads beyond its weights": _onnx_range,
        "a program with constants of another size": _onnx_size,
        "a program of another name": _onnx_name,
        "a program of unknown operations": _onnx_operation,
    }


def of_coreml() -> dict[str, Change]:
    """Returns the changes of Core ML programs and their weights by name."""
    return {
        "a program that reads elsewhere": _mil_location,
        "a program that reads beyond its weights": _mil_offset,
        "a program with constants of another size": _mil_size,
        "a program of another name": _mil_name,
        "a program of unknown operations": _mil_operation,
        "weights whose header lies": _blob_header,
    }


def _onnx_location(data: bytes, rng: random.Random) -> bytes:
    return _onnx_external(data, rng, "location", ELSEWHERE)


def _onnx_range(data: bytes, rng: random.Random) -> bytes:
    return _onnx_external(data, rng, rng.choice(("offset", "length")), NUMBERS)


def _onnx_external(data: bytes, rng: random.Random, key: str, values: tuple[str, ...]) -> bytes:
    import onnx

    model = onnx.load_model_from_string(data)
    constants = [tensor for tensor in model.graph.initializer if tensor.external_data]
    if not constants:  # a stage without weights
        return b""
    for entry in rng.choice(constants).external_data:
        if entry.key == key:
            entry.value = rng.choice(values)
    return model.SerializeToString()


def _onnx_size(data: bytes, rng: random.Random) -> bytes:
    import onnx

    model = onnx.load_model_from_string(data)
    constants = [tensor for tensor in model.graph.initializer if tensor.external_data]
    if not constants:
        return b""
    tensor = rng.choice(constants)
    axis = rng.randrange(len(tensor.dims))
    tensor.dims[axis] = rng.choice((tensor.dims[axis] + 1, 2**40, -1))
    return model.SerializeToString()


def _onnx_name(data: bytes, rng: random.Random) -> bytes:
    import onnx

    model = onnx.load_model_from_string(data)
    value = rng.choice((model.graph, rng.choice(model.graph.input), rng.choice(model.graph.output)))
    value.name = rng.choice(("x", "", value.name + "x"))
    return model.SerializeToString()


def _onnx_operation(data: bytes, rng: random.Random) -> bytes:
    import onnx

    model = onnx.load_model_from_string(data)
    node = rng.choice(model.graph.node)
    match rng.randrange(3):
        case 0:
            node.op_type = "Explode"
        case 1:
            node.domain = "org.example"
        case _:
            node.input[0] = "nothing"
    return model.SerializeToString()


def _mil(data: bytes) -> object:
    from coremltools import proto

    spec = proto.Model_pb2.Model()
    spec.ParseFromString(data)
    return spec


def _mil_constants(spec: object) -> list[object]:
    """Returns the constants of a program that lie in a file."""
    found = []
    for function in spec.mlProgram.functions.values():  # type: ignore[attr-defined]
        for block in function.block_specializations.values():
            for operation in block.operations:
                found += [value for value in operation.attributes.values() if value.WhichOneof("value") == "blobFileValue"]
    return found


def _mil_location(data: bytes, rng: random.Random) -> bytes:
    spec = _mil(data)
    constants = _mil_constants(spec)
    if not constants:
        return b""
    rng.choice(constants).blobFileValue.fileName = rng.choice(ELSEWHERE)  # type: ignore[attr-defined]
    return spec.SerializeToString()  # type: ignore[attr-defined]


def _mil_offset(data: bytes, rng: random.Random) -> bytes:
    spec = _mil(data)
    constants = _mil_constants(spec)
    if not constants:
        return b""
    rng.choice(constants).blobFileValue.offset = rng.choice((1, 2**40, 2**63, 2**64 - 64))  # type: ignore[attr-defined]
    return spec.SerializeToString()  # type: ignore[attr-defined]


def _mil_size(data: bytes, rng: random.Random) -> bytes:
    spec = _mil(data)
    constants = [value for value in _mil_constants(spec) if value.type.tensorType.dimensions]  # type: ignore[attr-defined]
    if not constants:
        return b""
    dimension = rng.choice(rng.choice(constants).type.tensorType.dimensions)  # type: ignore[attr-defined]
    dimension.constant.size = rng.choice((dimension.constant.size + 1, 2**40, 0))
    return spec.SerializeToString()  # type: ignore[attr-defined]


def _mil_name(data: bytes, rng: random.Random) -> bytes:
    spec = _mil(data)
    functions = spec.mlProgram.functions  # type: ignore[attr-defined]
    name = rng.choice(sorted(functions))
    match rng.randrange(3):
        case 0:
            spec.description.metadata.userDefined["stage"] = rng.choice(("x", "", "t5_block_07"))  # type: ignore[attr-defined]
        case 1:
            functions["another"].CopyFrom(functions[name])
            del functions[name]
        case _:
            function = functions[name]
            function.block_specializations[function.opset].outputs[0] = "nothing"
    return spec.SerializeToString()  # type: ignore[attr-defined]


def _mil_operation(data: bytes, rng: random.Random) -> bytes:
    spec = _mil(data)
    functions = spec.mlProgram.functions  # type: ignore[attr-defined]
    function = functions[rng.choice(sorted(functions))]
    block = function.block_specializations[function.opset]
    operation = rng.choice([operation for operation in block.operations if operation.type != "const"])
    match rng.randrange(3):
        case 0:
            operation.type = "explode"
        case 1:
            operation.inputs[rng.choice(sorted(operation.inputs))].arguments[0].name = "nothing"
        case _:
            function.opset = "CoreML99"
    return spec.SerializeToString()  # type: ignore[attr-defined]


def _blob_header(data: bytes, rng: random.Random) -> bytes:
    """Changes the count of a file's blobs, or the size or the place that the first blob says of itself."""
    changed = bytearray(data)
    start = rng.choice((0, 4, 64, 72, 80))
    changed[start : start + 4] = rng.choice((0, 1, 2**31, 2**32 - 1)).to_bytes(4, "little")
    return bytes(changed)
