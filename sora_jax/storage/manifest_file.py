"""The text of ``network.json`` and ``model.json``, believed only after it was checked.

Invariant: every number, name and list that comes out is of its type and within what can be true: extents and counts bounded,
names that stay inside the network's folder, layers and dtypes those of the configuration.  A fault is one short phrase; who
reads the file adds its name.  Whether shapes are those of the network's modules is not known here (`streaming.fitting`).
"""

import json
import math
import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from sora_jax.config import CONFIGS
from sora_jax.storage.arrays import FORMATS, STORED_DTYPES, Parameter, num_blocks

MAX_BYTES = 16 << 20  # of the file; Open-Sora's largest has a thirtieth

_MAX_PARAMETERS, _MAX_NAME, _MAX_RANK, _MAX_EXTENT, _MAX_ARRAY_BYTES = 100_000, 200, 8, 1 << 40, 1 << 42
_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxlong = 2, 4, 3, 60, 30


class Fault(ValueError):
    """What is wrong with a file, as a phrase that follows its name; ``remedy`` where writing it again is none."""

    def __init__(self, problem: str, remedy: str = ""):
        super().__init__(problem)
        self.remedy = remedy


def parse(text: str) -> Any:
    """Returns the JSON value of a text; strict, so that two readers cannot understand it differently.

    Raises:
      Fault: it is no JSON, repeats a key, or has numbers that JSON does not know.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise Fault("is not JSON that can be read: lists in lists too deep") from None
    except Fault:
        raise
    except ValueError as error:
        raise Fault(f"is not JSON ({error})") from None


def check_format(fields: Any) -> int:
    """Returns the format version of a file's fields.

    Raises:
      Fault: it is none that this release reads.
    """
    if not isinstance(fields, dict):
        raise Fault(f"holds {_shown(fields)}; expected an object")
    version = fields.get("format_version")
    if type(version) is not int or version < 1:
        raise Fault(f"has format version {_shown(version)}; expected one of {', '.join(map(str, FORMATS))}")
    if version not in FORMATS:
        known = " and ".join(map(str, FORMATS))
        raise Fault(f"has format version {version}; this release reads {known}", "update sora_jax.")
    return version


def checked(fields: Any, network: str) -> dict[str, Any]:
    """Returns configuration, dtype, parameters and origin of ``network.json``, as `directory.Manifest` takes them.

    Raises:
      Fault: something cannot be true.
    """
    version = check_format(fields)
    if fields.get("network") != network:
        raise Fault(f"describes network {_shown(fields.get('network'))}; expected {network!r}")
    dtype = fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in STORED_DTYPES or (network == "vae" and dtype == "int8"):
        raise Fault(f"has dtype {_shown(dtype)}; expected one of {', '.join(STORED_DTYPES)}, for the vae not int8")
    config = _config(fields.get("config"), network)
    if fields.get("layers") != list(config.layers):
        raise Fault(f"lists layers {_shown(fields.get('layers'))}, which are not the {len(config.layers)} of its configuration")
    entries, layers = _typed(fields, "parameters", dict), frozenset(config.layers)
    if len(entries) > _MAX_PARAMETERS:
        raise Fault(f"lists {len(entries)} parameters; expected at most {_MAX_PARAMETERS}")
    parameters = {name: parameter_of(name, entry, layers, version) for name, entry in entries.items()}
    for name, parameter in parameters.items():
        if parameter.dtype not in ((dtype,) if dtype != "int8" else ("int8", "float32")):
            raise Fault(f"stores {name} as {parameter.dtype}, but the network as {dtype}")
    found = {layer_of(name, layers) for name in parameters}
    if missing := [layer for layer in config.layers if layer not in found]:
        raise Fault(f"has no parameter for {len(missing)} of its layers, first {missing[0]}")
    origin = _origin(_typed(fields, "origin", dict))
    return {"config": config, "dtype": dtype, "parameters": parameters, "origin": origin, "format_version": version}


def parameter_of(name: Any, entry: Any, layers: Collection[str], version: int) -> Parameter:
    """Returns the parameter that a JSON object describes, in a manifest or a journal of a format version.

    Raises:
      Fault: it cannot be true.
    """
    if not isinstance(name, str) or len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise Fault(f"names a parameter {_shown(name)}; expected letters, digits and underscores between dots")
    if layer_of(name, layers) is None:
        raise Fault(f"has a parameter {name} that belongs to none of its {len(layers)} layers")
    if not isinstance(entry, dict):
        raise Fault(f"says of {name} {_shown(entry)}; expected an object")
    what = f"says of {name}"
    shape, dtype = _shape(entry.get("shape"), what), entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in STORED_DTYPES:
        raise Fault(f"{what} dtype {_shown(dtype)}; expected one of {', '.join(STORED_DTYPES)}")
    rows, blocks = _blocks(entry, shape, what) if version > 1 else (None, ())
    if "sha256" in entry or len(blocks) < 2:
        _check_sha256(entry.get("sha256"), what)
    whole = entry.get("sha256", "")
    if len(blocks) == 1 and blocks[0] != whole:
        raise Fault(f"{what} two checksums of the same bytes, which differ")
    parameter = Parameter(shape, dtype, whole, _source(entry.get("source"), what), rows, blocks)
    if parameter.nbytes > _MAX_ARRAY_BYTES:
        raise Fault(f"{what} shape {list(shape)}, which is {parameter.nbytes} bytes; more than there can be")
    return parameter


def layer_of(name: str, layers: Collection[str]) -> str | None:
    """Returns the layer that a flat name begins with, if any."""
    parts = name.split(".")
    prefixes = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in layers), None)


def _config(fields: Any, network: str) -> Any:
    if not isinstance(fields, dict):
        raise Fault(f"has configuration {_shown(fields)}; expected an object")
    try:
        return CONFIGS[network].from_dict(fields)
    except ValueError as error:
        raise Fault(f"has a configuration that cannot be: {str(error).rstrip('.')}") from None


def _blocks(entry: Mapping[str, Any], shape: tuple[int, ...], what: str) -> tuple[int, tuple[str, ...]]:
    rows, blocks = entry.get("rows"), entry.get("blocks")
    extent = shape[0] if shape else 1
    if type(rows) is not int or not 1 <= rows <= extent or extent % rows:
        raise Fault(f"{what} blocks of {_shown(rows)} rows; expected a divisor of {extent}")
    count = num_blocks(shape, rows)
    if not isinstance(blocks, list) or len(blocks) != count:
        raise Fault(f"{what} {len(blocks) if isinstance(blocks, list) else 'no'} checksums of blocks; expected {count}")
    for checksum in blocks:
        _check_sha256(checksum, what)
    return rows, tuple(blocks)


def _shape(shape: Any, what: str) -> tuple[int, ...]:
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(_is_extent(extent) for extent in shape):
        raise Fault(f"{what} shape {_shown(shape)}; expected up to {_MAX_RANK} extents of at least 1")
    return tuple(shape)


def _is_extent(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MAX_EXTENT


def _check_sha256(checksum: Any, what: str) -> None:
    if not isinstance(checksum, str) or not _SHA256.fullmatch(checksum):
        raise Fault(f"{what} sha256 {_shown(checksum)}; expected 64 hexadecimal digits")


def _source(source: Any, what: str) -> dict[str, Any] | None:
    """Returns the PyTorch array a parameter was made from; None for a network trained here."""
    if source is None:
        return None
    known = isinstance(source, dict) and isinstance(source.get("name"), str) and isinstance(source.get("dtype"), str)
    if not known or not isinstance(source.get("shape"), list) or not all(map(_is_extent, source["shape"])):
        raise Fault(f"{what} source {_shown(source)}; expected name, shape and dtype of an array")
    return source


def _origin(origin: dict[str, Any]) -> dict[str, Any]:
    """Returns where a network comes from, having checked what is read of it elsewhere."""
    text: Callable[[Any], bool] = lambda value: isinstance(value, str)  # noqa: E731
    kinds: dict[str, Callable[[Any], bool]] = {
        "files": lambda value: isinstance(value, list) and all(_is_file(entry) for entry in value),
        "merged": lambda value: isinstance(value, list) and all(map(_is_added, value)),
        "adapters": lambda value: isinstance(value, list) and all(map(_is_added, value)),
        "ignored_config_keys": lambda value: isinstance(value, list) and all(map(text, value)),
        "ignored_arrays": lambda value: isinstance(value, dict) and all(map(text, value.values())),
        "tied": lambda value: isinstance(value, dict) and all(map(text, value.values())),
        "constants": lambda value: isinstance(value, dict) and all(map(_is_constant, value.values())),
    }
    for name, fits in kinds.items():
        if name in origin and not fits(origin[name]):
            raise Fault(f"has an origin whose {name} are {_shown(origin[name])}, which cannot be")
    return origin


def _is_file(entry: Any) -> bool:
    texts = isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in ("name", "sha256"))
    return texts and type(entry.get("bytes", 0)) is int


def _is_added(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("files"), list) and all(map(_is_file, entry["files"]))


def _is_constant(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("hex"), str) or not isinstance(entry.get("dtype"), str):
        return False
    shape = entry.get("shape")
    return isinstance(shape, list) and all(map(_is_extent, shape)) and math.prod(shape) <= len(entry["hex"])


def _typed(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    if not isinstance(value, kind):
        raise Fault(f"has {name} {_shown(value)}; expected {'an object' if kind is dict else 'a list'}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise Fault(f"repeats the key {_shown(next(name for name in names if names.count(name) > 1))}")
    return found


def _no_constant(text: str) -> Any:
    raise Fault(f"holds {text}, which is no number of JSON")


def _shown(value: Any) -> str:
    """Returns a value as an error shows it: short, and without control characters."""
    return _SHORT.repr(value)
