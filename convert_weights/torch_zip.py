"""Names, shapes and byte ranges of the tensors in a PyTorch ``.pt``/``.pth``/``.bin`` file, read without executing it.

A file written by ``torch.save`` (since PyTorch 1.6) is a zip archive of raw storages and one pickle that says how tensors
lie in them.  The pickle is *interpreted here*, opcode by opcode, by a machine that can build dictionaries, lists, tuples,
numbers, strings and tensor descriptions, and can call nothing: names of functions are compared with a short list and any
other refuses the file.  That is why PyTorch's own ``weights_only`` loader is not used: it needs PyTorch, it materialises
every tensor (or maps the file whole, which counts as memory), and it does call constructors.  Invariant: no function named
by the file runs, and no memory is allocated by its numbers.  Values of tensors are read elsewhere.
"""

import dataclasses
import math
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

_MAX_PICKLE_BYTES = 64 << 20  # real ones have below 1 MB; more is an attack or not a checkpoint

STORAGE_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
ITEM_BYTES = {
    "float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2,
    "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
_CALLABLES = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
}


class SourceError(ValueError):
    """A checkpoint file cannot be used: unsafe, truncated, damaged or of another format."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: ``offset`` in bytes from the start of the file, ``strides`` in elements."""

    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Global:
    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    length: int


_MARK = object()
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}


def read_tree(path: Path) -> Any:
    """Returns what was saved: nested dictionaries, lists and tuples whose leaves are numbers, strings and ``Tensor``.

    Raises:
      SourceError: the file is not a zip-format PyTorch file, is truncated, or its pickle wants anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in entries if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise SourceError(f"{path} is a zip file but not a PyTorch checkpoint ({len(pickles)} data.pkl entries).")
            if entries[pickles[0]].file_size > _MAX_PICKLE_BYTES:
                raise SourceError(
                    f"{path}: its pickle has {entries[pickles[0]].file_size} bytes; refused above {_MAX_PICKLE_BYTES}."
                )
            root = pickles[0].removesuffix("data.pkl")
            order = archive.read(root + "byteorder") if root + "byteorder" in entries else b"little"
            if order.strip() != b"little":
                raise SourceError(f"{path} was written on a big-endian machine; save it again on a little-endian one.")
            program = archive.read(pickles[0])
    except zipfile.BadZipFile:
        raise SourceError(
            f"{path} is truncated, or not in PyTorch's zip format (files from before PyTorch 1.6 must be saved again)."
        ) from None
    with open(path, "rb") as file:
        locate = _Locator(path, file, root, entries)
        return _Machine(path, locate).run(program)


class _Locator:
    """Turns storages into byte ranges of the file."""

    def __init__(self, path: Path, file: Any, root: str, entries: dict[str, zipfile.ZipInfo]):
        self._path, self._file, self._root, self._entries = path, file, root, entries
        self._starts: dict[str, int] = {}

    def start(self, storage: _Storage) -> int:
        """Returns the file offset of a storage's first byte, after checking that the zip entry is all of it.

        Raises:
          SourceError: the entry is missing, compressed, damaged or of another size.
        """
        if storage.key in self._starts:
            return self._starts[storage.key]
        info = self._entries.get(f"{self._root}data/{storage.key}")
        if info is None:
            raise SourceError(f"{self._path}: storage {storage.key!r} is missing; the file is truncated or damaged.")
        needed = storage.length * ITEM_BYTES[storage.dtype]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != needed:
            raise SourceError(
                f"{self._path}: storage {storage.key!r} has {info.file_size} bytes or is compressed; expected {needed} raw."
            )
        self._file.seek(info.header_offset)
        header = self._file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise SourceError(f"{self._path}: the zip header of storage {storage.key!r} is damaged.")
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        self._starts[storage.key] = info.header_offset + 30 + name_bytes + extra_bytes
        return self._starts[storage.key]

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
        """Returns a tensor's description, after checking that it lies inside its storage.

        Raises:
          SourceError: it does not, or its numbers are none.
        """
        numbers = (offset, *(shape if type(shape) is tuple else "?"), *(strides if type(strides) is tuple else "?"))
        if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(strides):
            raise SourceError(f"{self._path}: the shape or strides of a tensor are malformed.")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if math.prod(shape) and last >= storage.length:
            raise SourceError(
                f"{self._path}: a tensor of shape {shape} reaches beyond its storage of {storage.length} elements."
            )
        return Tensor(storage.dtype, self.start(storage) + offset * ITEM_BYTES[storage.dtype], shape, strides)


class _Machine:
    """Interprets the opcodes that ``torch.save`` writes; every other one, and every unknown name, refuses the file."""

    def __init__(self, path: Path, locate: _Locator):
        self._path, self._locate = path, locate
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """Returns the object that the pickle describes.

        Raises:
          SourceError: the pickle is malformed, or wants anything but tensors.
        """
        try:
            for opcode, argument, _ in pickletools.genops(program):
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._collect(opcode.name, argument)
        except SourceError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{self._path}: its pickle is malformed ({type(error).__name__}: {str(error)[:100]}).") from error
        raise SourceError(f"{self._path}: its pickle is truncated.")

    def _collect(self, operation: str, argument: Any) -> None:
        """Executes an operation that builds or moves plain values."""
        match operation:
            case "PROTO" | "FRAME":
                pass
            case _ if operation in _LITERALS:
                self._stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self._stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[operation])
            case "MARK":
                self._stack.append(_MARK)
            case "EMPTY_DICT":
                self._stack.append({})
            case "EMPTY_LIST":
                self._stack.append([])
            case "EMPTY_TUPLE":
                self._stack.append(())
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._stack.append(tuple(self._pop(int(operation[5:]) if operation[5:] else None)))
            case "SETITEM" | "SETITEMS":
                self._set_items(self._pop(2 if operation == "SETITEM" else None))
            case "APPEND" | "APPENDS":
                self._extend(self._pop(1 if operation == "APPEND" else None))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self._memo[len(self._memo) if argument is None else argument] = self._stack[-1]
            case "BINGET" | "LONG_BINGET":
                self._stack.append(self._memo[argument])
            case _:
                self._describe(operation, argument)

    def _describe(self, operation: str, argument: Any) -> None:
        """Executes an operation that in Python's own unpickler would import, call or change objects."""
        match operation:
            case "GLOBAL":
                self._global(*argument.split(" ", 1))
            case "STACK_GLOBAL":
                self._global(*self._pop(2))
            case "BINPERSID":
                self._storage(*self._pop(1))
            case "REDUCE":
                self._reduce(*self._pop(2))
            case "BUILD":
                self._pop(1)  # the attributes of an OrderedDict: module versions that ``state_dict`` attaches
                if type(self._stack[-1]) is not dict:
                    raise self._refusal("sets attributes of an object")
            case _:
                raise self._refusal(f"uses the pickle operation {operation}")

    def _refusal(self, what: str) -> SourceError:
        return SourceError(
            f"{self._path} is refused: it {what}, which a checkpoint of tensors does not need; nothing in it was executed. "
            "Save the plain state dict, preferably as safetensors."
        )

    def _pop(self, count: int | None) -> list[Any]:
        """Removes and returns the last ``count`` values, or all down to the last mark."""
        items: list[Any] = []
        while len(items) != count and (item := self._stack.pop()) is not _MARK:
            items.append(item)
        if count is not None and len(items) != count:
            raise ValueError("too few values on the stack")
        return items[::-1]

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or any(type(key) not in (str, int) for key in items[::2]):
            raise ValueError("items are set on something that is not a dictionary of names")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if key in target:
                raise SourceError(f"{self._path}: the name {key} occurs twice.")
            target[key] = value

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("items are appended to something that is not a list")
        self._stack[-1].extend(items)

    def _global(self, module: str, name: str) -> None:
        known = (module, name) in _CALLABLES or (module == "torch" and (name in STORAGE_DTYPES or name in ITEM_BYTES))
        if not known:
            raise self._refusal(f"refers to {str(module)[:50]}.{str(name)[:50]}")
        self._stack.append(_Global(module, name))

    def _storage(self, identity: Any) -> None:
        kind, storage_type, key, _, length = identity
        if kind != "storage" or not isinstance(storage_type, _Global) or type(key) is not str or type(length) is not int:
            raise ValueError("a persistent id that is not a storage")
        self._stack.append(_Storage(STORAGE_DTYPES[storage_type.name], key, length))

    def _reduce(self, function: Any, arguments: Any) -> None:
        if (
            not isinstance(function, _Global)
            or (function.module, function.name) not in _CALLABLES
            or type(arguments) is not tuple
        ):
            raise self._refusal("calls something that is not a function of tensors")
        if function.name == "OrderedDict":
            if arguments:
                raise self._refusal("builds a dictionary from arguments")
            self._stack.append({})
        elif function.name == "_rebuild_tensor_v2":
            self._stack.append(self._locate.tensor(*arguments[:4]))
        else:  # Parameter(data, requires_grad, hooks) and Size(numbers) stand for their first argument
            self._stack.append(arguments[0])
