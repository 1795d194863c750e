"""PyTorch files are read without executing anything they contain, and hostile ones are refused."""

import contextlib
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert_weights.errors import SourceError
from convert_weights.readers import open_checkpoint
from convert_weights.source_file import OpenFile
from convert_weights.torch_zip import Tensor, read_tree
from tests.support.sources import torch_call, write_torch_file


def _values(path: Path, section: str | None = None) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(path, section=section)
    values = {}
    with OpenFile(path) as file:
        for name, array in checkpoint.arrays.items():
            values[name] = array.read_strided(file)
            if array.contiguous:
                rows = array.read(file, 0, array.tensor.shape[0] if array.tensor.shape else 1, np.empty(1 << 16, np.uint8))
                np.testing.assert_array_equal(rows, values[name])
    return values


def _arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    arrays = {
        "weight": draw.standard_normal((3, 5), dtype=np.float32),
        "half": draw.standard_normal((2, 3, 4)).astype(np.float16),
        "brain": draw.standard_normal(7).astype(ml_dtypes.bfloat16),
        "scalar": np.array(2.5, np.float32),
        "steps": np.arange(4),
    }
    return arrays | {"transposed": arrays["weight"].T, "column": arrays["weight"][:, 2], "tied": arrays["weight"]}


def test_values_dtypes_strides_and_shared_storages(tmp_path: Path) -> None:
    values = _values(write_torch_file(tmp_path / "a.pt", _arrays()))
    for name, array in _arrays().items():
        assert values[name].dtype == array.dtype
        np.testing.assert_array_equal(values[name], array)
    tree = read_tree(tmp_path / "a.pt")
    assert tree["tied"] == tree["weight"]


@pytest.mark.torch
def test_files_of_torch_save_are_read_bit_for_bit(tmp_path: Path) -> None:
    import torch

    layer = torch.nn.Linear(3, 5)
    tensors = {**layer.state_dict(), "parameter": layer.weight, "view": layer.weight.T[1:], "brain": torch.randn(4).bfloat16()}
    torch.save(tensors, tmp_path / "a.pt")
    values = _values(tmp_path / "a.pt")
    for name, tensor in tensors.items():
        expected = tensor.detach().float().numpy()
        np.testing.assert_array_equal(values[name].astype(np.float32), expected)
    torch.save(layer.state_dict(), tmp_path / "metadata.pt")  # an OrderedDict with attributes
    assert _values(tmp_path / "metadata.pt").keys() == {"weight", "bias"}
    torch.save(layer, tmp_path / "module.pt")
    with pytest.raises(SourceError, match=r"refers to torch\.nn\.modules\.linear\.Linear"):
        read_tree(tmp_path / "module.pt")
    torch.save(tensors, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(SourceError, match=r"before PyTorch 1\.6 must be saved again"):
        read_tree(tmp_path / "legacy.pt")


def test_sections_of_training_checkpoints(tmp_path: Path) -> None:
    model, ema = {"w": np.zeros(2, np.float32)}, {"w": np.ones(2, np.float32)}
    path = write_torch_file(
        tmp_path / "a.pt", {"model": model, "ema": ema, "opt": {"lr": 0.1, "betas": (0.9, 0.99)}, "step": 3}
    )
    np.testing.assert_array_equal(_values(path)["w"], [1, 1])
    np.testing.assert_array_equal(_values(path, "model")["w"], [0, 0])
    assert open_checkpoint(path).notes == ("a.pt: took the state dict 'ema'; not read: model, opt, step",)
    with pytest.raises(SourceError, match=r"does not hold weights; it holds the state dicts \['ema', 'model'\]"):
        open_checkpoint(path, section="weights")


class _Touch:
    """Pickles as a call that leaves a trace when it is executed."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _zip(path: Path, program: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/data/0", bytes(16))
    return path


def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    program = pickle.dumps({"weight": _Touch(trace)})
    pickle.loads(program)
    assert trace.exists(), "the pickle must be one that works"
    trace.unlink()
    with pytest.raises(SourceError, match="is refused: it refers to pathlib") as caught:
        read_tree(_zip(tmp_path / "hostile.bin", program))
    assert "nothing in it was executed" in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "builtins.getattr", "torch.load", "torch.hub.load", "numpy.load"]
)
def test_no_name_outside_the_list_is_let_in(tmp_path: Path, name: str, protocol: int) -> None:
    module, _, function = name.rpartition(".")
    text = b"\x80\x02" + f"c{module}\n{function}\n(X\x01\x00\x00\x00xtR.".encode()
    if protocol >= 4:
        packed = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, function))
        text = b"\x80\x04" + packed + b"\x93(X\x01\x00\x00\x00xtR."
    with pytest.raises(SourceError, match="refused: it refers to"):
        read_tree(_zip(tmp_path / "a.pt", text))


HARMFUL = {
    "build on a tensor": b"\x80\x02cbuiltins\nobject\n.",
    "new object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "old instance": b"\x80\x02(icollections\nOrderedDict\n.",
    "extension": b"\x80\x02\x82\x01.",
    "call of a call": b"\x80\x02ccollections\nOrderedDict\n)R)R.",
    "attributes of a function": b"\x80\x02ccollections\nOrderedDict\n}b.",
    "arguments to OrderedDict": b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
    "a storage type called": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "nothing on the stack": b"\x80\x02R.",
    "memo of nothing": b"\x80\x02h\x05.",
    "no stop": b"\x80\x02}",
    "garbage": b"\xff\xfe\xfd",
    "persistent id of another kind": b"\x80\x02X\x01\x00\x00\x00xQ.",
    "item of a number": b"\x80\x02K\x01K\x02K\x03s.",
    "unhashable name": b"\x80\x02}]K\x01s.",
    "twice": b"\x80\x02}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.",
}


@pytest.mark.parametrize("case", HARMFUL)
def test_malformed_programs_are_one_clear_line(tmp_path: Path, case: str) -> None:
    with pytest.raises(SourceError) as caught:
        read_tree(_zip(tmp_path / "a.pt", HARMFUL[case]))
    assert "\n" not in str(caught.value)


def test_deep_nesting_is_refused_and_huge_memo_indices_cost_nothing(tmp_path: Path) -> None:
    for depth, accepted in ((60, True), (100, False), (100_000, False)):
        nested = b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."
        with contextlib.nullcontext() if accepted else pytest.raises(SourceError, match="nests its values more than 64 deep"):
            assert isinstance(read_tree(_zip(tmp_path / "nested.pt", nested)), list)
    assert read_tree(_zip(tmp_path / "memo.pt", b"\x80\x02}r\xff\xff\xff\x7f.")) == {}


def _tensor(**changes: Any) -> Any:
    fields = {"storage": torch_call("collections", "OrderedDict"), "offset": 0, "shape": (2,), "strides": (1,)} | changes
    return torch_call("torch._utils", "_rebuild_tensor_v2", *fields.values(), False, None)


def test_a_tensor_needs_a_storage(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="shape or strides of a tensor are malformed"):
        read_tree(write_torch_file(tmp_path / "a.pt", {"w": _tensor()}))


def _program(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


@pytest.mark.parametrize("change", [(b"K\x04", b"K\x05"), (b"K\x04", b"J\xff\xff\xff\xff"), (b"K\x00", b"K\x01")])
def test_tensors_stay_inside_their_storage(tmp_path: Path, change: tuple[bytes, bytes]) -> None:
    program = _program(write_torch_file(tmp_path / "a.pt", {"w": np.zeros(4, np.float32)}))
    position = program.rindex(change[0])  # the shape comes after the storage's length
    with pytest.raises(SourceError, match=r"reaches beyond its storage of 4 elements|malformed"):
        read_tree(_zip(tmp_path / "b.pt", program[:position] + change[1] + program[position + len(change[0]) :]))


def test_a_storage_that_is_absent_short_or_compressed_is_an_error(tmp_path: Path) -> None:
    program = _program(write_torch_file(tmp_path / "a.pt", {"w": np.zeros(4, np.float32)}))
    for size, compression in ((12, zipfile.ZIP_STORED), (16, zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / "b.pt", "w", compression) as archive:
            archive.writestr("a/data.pkl", program)
            archive.writestr("a/data/0", bytes(size))
        with pytest.raises(SourceError, match=r"storage '0' has .* or is compressed; expected 16 raw"):
            read_tree(tmp_path / "b.pt")
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        archive.writestr("a/data.pkl", program)
    with pytest.raises(SourceError, match=r"storage '0' is missing"):
        read_tree(tmp_path / "c.pt")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = write_torch_file(tmp_path / "a.pt", _arrays())
    content = path.read_bytes()
    for length in np.random.default_rng(0).integers(0, len(content), 40):
        (tmp_path / "b.pt").write_bytes(content[:length])
        with pytest.raises(SourceError):
            read_tree(tmp_path / "b.pt")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of a changed byte, while its text is decoded
def test_every_changed_byte_of_the_program_is_refused_or_harmless(tmp_path: Path) -> None:
    """No change of the program gives anything but an error or plain values, and nothing else is ever raised."""
    program = _program(write_torch_file(tmp_path / "a.pt", {"w": np.zeros(4, np.float32)}))
    draw = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(program)
        changed[draw.integers(len(program))] = draw.integers(256)
        try:
            tree = read_tree(_zip(tmp_path / "b.pt", bytes(changed)))
        except SourceError:
            continue
        leaves = tree.values() if isinstance(tree, dict) else [tree]
        assert all(isinstance(leaf, Tensor | int | str | tuple | list | dict | float | None) for leaf in leaves)


def test_the_machine_knows_every_operation_of_a_real_file(tmp_path: Path) -> None:
    program = _program(write_torch_file(tmp_path / "a.pt", _arrays()))
    used = {opcode.name for opcode, _, _ in pickletools.genops(program)}
    assert {"GLOBAL", "REDUCE", "BINPERSID", "TUPLE", "EMPTY_DICT", "SETITEMS"} <= used
