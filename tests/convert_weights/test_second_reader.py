"""``convert verify --source`` reads the source through a second reader, takes a whole pipeline, and misses no changed value."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from convert_weights import readers, second_reader
from convert_weights.all_networks import convert_pipeline
from convert_weights.checkpoint import convert_checkpoint
from convert_weights.readers import open_checkpoint
from convert_weights.verify import verify
from sora_jax.commands.convert import main
from sora_jax.storage.directory import open_network, read_model_file
from sora_jax.storage.writer import update_model_file
from tests.support import sources

DTYPES = {"t5": "float32", "stdit3": "float32", "vae": "float32"}


def _torch_file(folder: Path, arrays: dict[str, Any]) -> Path:
    source = sources.write_source(folder, "t5")
    (source / "model.safetensors").unlink()
    return sources.write_torch_file(source / "pytorch_model.bin", arrays)


def _compared(source: Path) -> tuple[list[str], list[str]]:
    """Returns differences and notes of a second reading of a whole source."""
    checkpoint, notes = open_checkpoint(source), list[str]()
    return second_reader.differences(checkpoint, checkpoint.arrays, note=notes.append), notes


@pytest.mark.parametrize("network", sources.NETWORKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_safetensors_is_read_by_the_package_of_that_name(tmp_path: Path, network: str, dtype: str) -> None:
    source = sources.write_source(tmp_path / "source", network, sources.halved(sources.state_dict(network), dtype))
    faults, notes = _compared(source)
    assert faults == []
    assert notes == [f"model.safetensors: read again by safetensors {safetensors.__version__}"]


def test_a_fault_that_our_reader_has_does_not_hide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that swaps rows converts and verifies alike; only the second reading shows it."""
    source = sources.write_source(tmp_path / "source", "t5")
    real = readers.Array.read

    def swapped(self: readers.Array, *arguments: Any) -> np.ndarray:
        rows = real(self, *arguments)
        return rows[::-1] if self.key.endswith("q.weight") else rows

    monkeypatch.setattr(readers.Array, "read", swapped)
    convert_checkpoint("t5", source, tmp_path / "model")
    faults = verify(tmp_path / "model", source=source)["t5"]
    assert len(faults) == sources.golden_config("t5").num_layers
    assert all("SelfAttention.q.weight is read differently by safetensors" in fault for fault in faults)


def _transpose(arrays: dict[str, np.ndarray]) -> str:
    name = next(name for name, array in arrays.items() if array.ndim == 2 and len(set(array.shape)) == 1)
    arrays[name] = np.ascontiguousarray(arrays[name].T)
    return name


def _exchange(arrays: dict[str, np.ndarray]) -> str:
    first, second = (f"encoder.block.0.layer.0.SelfAttention.{x}.weight" for x in "qk")
    arrays[first], arrays[second] = arrays[second], arrays[first]
    return first


def _flip(arrays: dict[str, np.ndarray]) -> str:
    name = next(name for name in arrays if name.endswith("SelfAttention.v.weight"))
    arrays[name].view(np.uint32).reshape(-1)[3] ^= 1
    return name


@pytest.mark.parametrize(
    ("network", "change"),
    [("stdit3", _transpose), ("t5", _exchange), ("t5", _flip)],
    ids=["a square matrix transposed", "two matrices exchanged", "a bit flipped"],
)
def test_values_that_no_shape_can_betray_are_found_with_the_source(
    tmp_path: Path, capsys: Any, network: str, change: Any
) -> None:
    original = sources.write_source(tmp_path / "original", network)
    arrays = sources.state_dict(network)
    name = change(arrays)
    changed = sources.write_source(tmp_path / "changed", network, arrays)
    convert_checkpoint(network, changed, tmp_path / "model")
    assert main(["verify", str(tmp_path / "model")]) == 0
    assert main(["verify", str(tmp_path / "model"), "--source", str(original)]) == 1
    entries = open_network(tmp_path / "model", network).parameters.items()
    parameter = next(target for target, entry in entries if entry.source and entry.source["name"] == name)
    assert f"{parameter}: differs from the source's value" in capsys.readouterr().err


@pytest.mark.torch
def test_pytorch_files_are_read_by_pytorch_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = sources.state_dict("t5")
    path = _torch_file(tmp_path / "flat", arrays)
    section = path.with_name("ema.pt")
    sources.write_torch_file(section, {"ema": arrays, "model": {"x": np.zeros(2, np.float32)}, "step": 3})
    assert _compared(section) == ([], ["ema.pt: read again by PyTorch"])
    real = readers.Array.read
    monkeypatch.setattr(readers.Array, "read", lambda self, *arguments: real(self, *arguments)[::-1])
    faults, _ = _compared(path)
    assert any(fault.endswith("shared.weight is read differently by PyTorch") for fault in faults)


@pytest.mark.torch
def test_views_and_halves_are_read_alike(tmp_path: Path) -> None:
    import torch

    whole = torch.randn(6, 8)
    tensors = {
        "whole": whole, "transposed": whole.T, "part": whole[1:4, ::2], "scalar": torch.tensor(2.5),
        "brain": torch.randn(5).bfloat16(), "half": torch.randn(3, 2).half(), "expanded": torch.randn(1, 3).expand(4, 3),
        "none": torch.zeros(0, 3), "parameter": torch.nn.Parameter(torch.randn(2)),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "a.pt")
    assert _compared(tmp_path / "a.pt") == ([], ["a.pt: read again by PyTorch"])


def test_without_pytorch_its_files_are_said_to_be_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_reader.importlib.util, "find_spec", lambda name: None)
    path = _torch_file(tmp_path / "source", sources.state_dict("t5"))
    assert _compared(path) == ([], ["pytorch_model.bin: not read again, PyTorch is not installed"])


def test_what_the_second_reader_refuses_is_a_fault(tmp_path: Path) -> None:
    path = _torch_file(tmp_path / "source", sources.state_dict("t5"))
    checkpoint = open_checkpoint(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            second_reader.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "a\nb: broken\n")
        )
        patch.setattr(second_reader.importlib.util, "find_spec", lambda name: True)
        (fault,) = second_reader.differences(checkpoint, checkpoint.arrays)
    assert "cannot be read by a second reader (PyTorch: b: broken)" in fault


def test_no_process_of_the_package_imports_pytorch() -> None:
    program = "import sys, convert_weights.verify, sora_jax.commands.convert; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False).returncode == 0


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("downloads")
    for network in sources.NETWORKS:
        sources.write_source(folder / f"{network}-v1", network)
    (folder / "t5-v1" / "spiece.model").write_bytes(b"a tokenizer")
    return folder


def test_verify_takes_the_folder_that_pipeline_took(tmp_path: Path, downloads: Path, capsys: Any) -> None:
    model = tmp_path / "model"
    convert_pipeline(downloads, model, dtypes=DTYPES)
    assert main(["verify", str(model), "--source", str(downloads)]) == 0
    assert f"equal to {downloads}, bit for bit" in capsys.readouterr().out
    assert main(["verify", str(model), "--source", str(downloads), "--network", "vae"]) == 0
    arrays = sources.state_dict("stdit3")
    arrays["final_layer.linear.bias"][0] += 1
    other = tmp_path / "other"
    for network in sources.NETWORKS:
        sources.write_source(other / network, network, arrays if network == "stdit3" else None)
    assert main(["verify", str(model), "--source", str(other), "--network", "t5"]) == 0
    assert main(["verify", str(model), "--source", str(other)]) == 1
    assert "final.linear.bias: differs from the source's value" in capsys.readouterr().err


@pytest.mark.slow
def test_to_torch_and_back_keeps_tokenizer_and_defaults(tmp_path: Path, downloads: Path) -> None:
    model, back, again = tmp_path / "model", tmp_path / "back", tmp_path / "again"
    convert_pipeline(downloads, model, dtypes=DTYPES)
    defaults = {"height": 64, "num_frames": 17, "guidance": 3.5}
    update_model_file(model, defaults=defaults)
    assert main(["to-torch", str(model), str(back)]) == 0
    convert_pipeline(back, again, dtypes=DTYPES)
    index = read_model_file(again)
    assert (index["tokenizer"], index["defaults"]) == ("spiece.model", defaults)
    assert (again / "spiece.model").read_bytes() == b"a tokenizer"
    for network in sources.NETWORKS:
        before, after = open_network(model, network), open_network(again, network)
        assert before.config == after.config
        assert {name: entry.checksums for name, entry in before.parameters.items()} == {
            name: entry.checksums for name, entry in after.parameters.items()
        }
    assert verify(again, source=back) == {network: [] for network in sources.NETWORKS}


def test_to_torch_that_was_interrupted_can_be_repeated(
    tmp_path: Path, downloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are published one by one, the weights last: at any point the same command goes on."""
    from sora_jax import files

    model = tmp_path / "model"
    convert_checkpoint("t5", downloads / "t5-v1", model)
    for point in range(3):
        back, count, real = tmp_path / f"back{point}", 0, files.write_durably

        def torn(path: Path, content: bytes, real: Any = real, point: int = point) -> None:
            nonlocal count
            if count == point:
                raise KeyboardInterrupt
            count += 1
            real(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(files, "write_durably", torn)
            main(["to-torch", str(model), str(back)])
        assert main(["to-torch", str(model), str(back)]) == (2 if point == 2 else 0)
        assert sorted(path.name for path in (back / "t5").iterdir()) == ["config.json", "model.safetensors", "spiece.model"]
    (back / "t5" / "model.safetensors").unlink()
    (back / "t5" / "config.json").write_text("{}")
    assert main(["to-torch", str(model), str(back)]) == 2
    assert json.loads((back / "t5" / "config.json").read_text()) == {}


@pytest.mark.parametrize("text", ["[]", "{", '{"defaults": 5}', "[" * 60_000, '{"a": 1}'])
def test_defaults_that_are_none_are_refused_before_the_work(tmp_path: Path, text: str) -> None:
    source = sources.write_source(tmp_path / "source", "stdit3")
    (source / "generation_defaults.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_defaults.json is not an object of defaults"):
        convert_checkpoint("stdit3", source, tmp_path / "model")
    assert not (tmp_path / "model").exists()
