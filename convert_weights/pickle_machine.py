"""The pickle of a PyTorch file, interpreted opcode by opcode without executing anything in it.

The machine can build dictionaries, lists, tuples, numbers, strings and descriptions of tensors, and can call nothing: names of
functions are compared with a short list and any other refuses the file.  Invariant: no function named by the file runs, no
memory is allocated by its numbers, and the work is bounded by limits that real checkpoints do not come near.  Where bytes lie
is known by the ``Locator``; what the tree means is decided by the readers.
"""

import dataclasses
import pickletools
from pathlib import Path
from typing import Any, Protocol

from convert_weights.errors import SourceError, printable

MAX_PICKLE_BYTES = 64 << 20  # real ones have below 1 MB; more is an attack or not a checkpoint
_MAX_OPERATIONS = 10**6
_MAX_INTEGER_BITS = 127  # 16 bytes
_MAX_NESTING = 64

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
_MARK = object()
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}


@dataclasses.dataclass(frozen=True)
class Storage:
    """A storage as the pickle declares it: ``length`` in elements."""

    dtype: str
    key: str
    length: int


class Locator(Protocol):
    """Knows where storages lie."""

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> Any:
        """Returns the description of a tensor, after checking all numbers."""


@dataclasses.dataclass(frozen=True)
class _Global:
    module: str
    name: str


class Machine:
    """Interprets the opcodes that ``torch.save`` writes; every other one, and every unknown name, refuses the file."""

    def __init__(self, path: Path, locate: Locator):
        self._path, self._locate = path, locate
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """Returns the object that the pickle describes.

        Raises:
          SourceError: the pickle is malformed, wants anything but tensors, or goes beyond a limit.
        """
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
                if count == _MAX_OPERATIONS:
                    raise self._refusal(f"has more than {_MAX_OPERATIONS} pickle operations")
                if opcode.name == "STOP":
                    tree = self._stack.pop()
                    self._check_nesting(tree)
                    return tree
                self._collect(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, SourceError):
                raise
            reason = f"{type(error).__name__}: {printable(error, 100)}"
            raise SourceError(f"{self._path}: its pickle is malformed ({reason}).") from error
        raise SourceError(f"{self._path}: its pickle is truncated.")

    def _collect(self, operation: str, argument: Any) -> None:
        """Executes an operation that builds or moves plain values."""
        match operation:
            case "PROTO" | "FRAME":
                pass
            case _ if operation in _LITERALS:
                self._stack.append(self._literal(argument))
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

    def _literal(self, value: Any) -> Any:
        if type(value) is int and value.bit_length() > _MAX_INTEGER_BITS:
            raise self._refusal(f"holds an integer of {value.bit_length()} bits")
        return value

    def _check_nesting(self, tree: Any) -> None:
        """Refuses a tree that is deeper than readers, which walk it by recursion, could be asked to go."""
        level, depth = [tree], 0
        seen: set[int] = set()  # a value may lie in several containers; it is looked at once
        while level:
            if depth > _MAX_NESTING:
                raise self._refusal(f"nests its values more than {_MAX_NESTING} deep")
            new = {id(value): value for value in level if type(value) in (dict, list, tuple) and id(value) not in seen}
            seen.update(new)
            level = [item for value in new.values() for item in (value.values() if type(value) is dict else value)]
            depth += 1

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
                raise SourceError(f"{self._path}: the name {printable(key)} occurs twice.")
            target[key] = value

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("items are appended to something that is not a list")
        self._stack[-1].extend(items)

    def _global(self, module: Any, name: Any) -> None:
        # Types first: nested tuples in place of the names would be hashed, and printed, by recursion.
        if type(module) is not str or type(name) is not str:
            raise ValueError("the name of a function is not a string")
        known = (module, name) in _CALLABLES or (module == "torch" and (name in STORAGE_DTYPES or name in ITEM_BYTES))
        if not known:
            raise self._refusal(f"refers to {printable(module[:50])}.{printable(name[:50])}")
        self._stack.append(_Global(module, name))

    def _storage(self, identity: Any) -> None:
        if type(identity) is not tuple or len(identity) != 5:
            raise ValueError("a persistent id that is not a storage")
        kind, storage_type, key, _, length = identity
        if kind != "storage" or not isinstance(storage_type, _Global) or type(key) is not str or type(length) is not int:
            raise ValueError("a persistent id that is not a storage")
        if storage_type.name not in STORAGE_DTYPES or length < 0:
            raise ValueError("a storage of unknown type or negative length")
        self._stack.append(Storage(STORAGE_DTYPES[storage_type.name], key, length))

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
