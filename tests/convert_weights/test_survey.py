"""What a source is, said without reading its values; conversion without the name of a network; and rehearsals."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert_weights.identify import taken
from convert_weights.readers import is_source
from convert_weights.source_file import OpenFile
from convert_weights.survey import survey
from sora_jax.commands.convert import main
from sora_jax.commands.inspect import inspect
from sora_jax.shell import BAD_INPUT
from sora_jax.storage.directory import open_network, present_networks
from tests.support import formats, sources


def _run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def _everything(folder: Path) -> Path:
    for network in sources.NETWORKS:
        fields = sources.write_source(folder / network, network) / "config.json"
        if network == "vae":
            fields.write_text(json.dumps({**json.loads(fields.read_text()), "architectures": ["VideoAutoencoderPipeline"]}))
    return folder


def test_a_survey_reads_no_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    read = OpenFile._read_some

    def counting(self: OpenFile, view: memoryview, offset: int) -> int:
        count = read(self, view, offset)
        seen.append((self.path.name, offset, offset + count))
        return count

    source = sources.write_source(tmp_path / "source", "t5") / "model.safetensors"
    monkeypatch.setattr(OpenFile, "_read_some", counting)
    fields = survey(source)
    (length,) = struct.unpack("<Q", source.read_bytes()[:8])
    assert max(stop for name, _, stop in seen if name == source.name) == 8 + length
    assert (fields["network"], fields["format"], fields["arrays"]) == ("t5", "safetensors", 30 + 1)
    assert fields["bytes"] == source.stat().st_size
    assert fields["model_bytes"]["float32"] == sum(a.nbytes for a in sources.state_dict("t5").values()) - 400 * 64 * 4
    assert fields["tokenizer"].startswith("missing")
    assert fields["convert"] == f"sora-jax convert {source} MODEL_DIR"


def test_a_survey_of_gguf_reads_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    source = tmp_path / "t5.gguf"
    formats.write_gguf(source, formats.BLOCKS, formats.t5_arrays(formats.BLOCKS), "Q8_0")
    counts: list[int] = []
    read = OpenFile._read_some
    monkeypatch.setattr(OpenFile, "_read_some", lambda *a: counts.append(read(*a)) or counts[-1])
    fields = survey(source)
    assert sum(counts) < 20_000 < source.stat().st_size / 20
    assert fields["dtypes"] == {
        "Q8_0": f"8 arrays, {(7 * 256 * 256 + 16 * 256) // 32 * 34} bytes",
        "float32": "4 arrays, 3200 bytes",
    }


def test_what_is_missing_and_wrong_is_said(tmp_path: Path) -> None:
    arrays = sources.state_dict("stdit3")
    del arrays["final_layer.linear.bias"]
    arrays["strange"] = np.zeros(3, np.float32)
    fields = inspect(sources.write_source(tmp_path / "source", "stdit3", arrays))
    assert fields["missing"] == "final.linear.bias"
    assert fields["faults"] == ["strange: unknown array [3]; no rule of this network takes it"]
    assert fields["convert"].startswith("not possible")


def test_parts_of_networks_are_described(tmp_path: Path) -> None:
    arrays = sources.state_dict("vae")
    temporal = {name: array for name, array in arrays.items() if not name.startswith("spatial_vae.")}
    fields = inspect(sources.write_source(tmp_path / "temporal", "vae", temporal))
    assert fields["missing"].startswith("spatial_")
    assert fields["convert"] == f"sora-jax convert vae {tmp_path / 'temporal'} MODEL_DIR --spatial AUTOENCODER"
    save_file(formats.original_names(arrays, 4), tmp_path / "sdxl_vae.safetensors")
    fields = inspect(tmp_path / "sdxl_vae.safetensors")
    assert (fields["network"], fields["missing"]) == ("vae, its spatial part alone", "the temporal part")
    _adapter(tmp_path / "temporal" / "..")
    fields = inspect(tmp_path / "a.safetensors")
    assert fields["convert"] == f"sora-jax convert NETWORK SOURCE MODEL_DIR --lora {tmp_path / 'a.safetensors'}"


def test_a_folder_of_networks_is_described_and_rehearsed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _everything(tmp_path / "downloads")
    fields = inspect(folder)
    assert list(fields["networks"]) == ["t5", "stdit3", "vae"]
    assert fields["convert"] == f"sora-jax convert {folder} MODEL_DIR"
    before = sorted(tmp_path.rglob("*"))
    assert _run(folder, tmp_path / "model", "--dry-run", "--dtype", "t5=int8") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r".*/(\w+): .* as (\w+).*", r"\1 \2", line) for line in lines] == [
        "t5 int8",
        "stdit3 float32",
        "vae float32",
    ]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("network", ["t5", "stdit3"])
def test_a_network_is_recognised_by_its_arrays(tmp_path: Path, network: str, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {f"module.{name}": array for name, array in sources.state_dict(network).items()}
    source = sources.write_source(tmp_path / "source", network, arrays)
    assert _run(source, tmp_path / "model", "--dry-run") == 0
    assert not (tmp_path / "model").exists()
    assert _run(source / "model.safetensors", tmp_path / "model") == 0
    assert present_networks(tmp_path / "model") == (network,) or list(present_networks(tmp_path / "model")) == [network]
    assert f"holds {network}" in capsys.readouterr().err
    rehearsed = _run(source, tmp_path / "model", "--dry-run")
    assert rehearsed == BAD_INPUT
    assert "exists; pass --overwrite" in capsys.readouterr().err


def test_every_table_takes_its_own_names_only() -> None:
    for network in sources.NETWORKS:
        assert list(taken(list(sources.state_dict(network)))) == [network]
    spatial = formats.original_names(sources.state_dict("vae"), 4, "first_stage_model.")
    assert taken(list(spatial)) == {"spatial": len(spatial)}


def _both(folder: Path) -> Any:
    save_file({**sources.state_dict("t5"), **sources.state_dict("stdit3")}, folder / "a.safetensors")


def _spatial(folder: Path) -> Any:
    save_file(formats.original_names(sources.state_dict("vae"), 4), folder / "a.safetensors")


def _adapter(folder: Path) -> Any:
    save_file({"base_model.model.spatial_blocks.0.attn.qkv.lora_A.weight": np.ones((1, 1))}, folder / "a.safetensors")


def _foreign(folder: Path) -> Any:
    save_file({"text_model.embeddings.weight": np.ones((1, 1))}, folder / "a.safetensors")


@pytest.mark.parametrize(
    ("write", "report"),
    [
        (_both, r"holds \d+ arrays of t5, \d+ arrays of stdit3; say which one is meant: sora-jax convert t5"),
        (_spatial, "is the spatial part of a VAE alone; name it next to the temporal part"),
        (_adapter, "is an adapter of low rank; add it while its network is converted: --lora"),
        (_foreign, "holds 1 arrays that belong to none of t5, stdit3, vae: text_model.embeddings.weight"),
        (lambda folder: [save_file({"a": np.ones(1)}, folder / f"{x}.safetensors") for x in "ab"], "several checkpoints"),
        (lambda folder: None, "holds no weight file"),
    ],
)
def test_what_is_not_one_network_is_refused_with_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Callable[[Path], Any], report: str
) -> None:
    (tmp_path / "source").mkdir()
    write(tmp_path / "source")
    assert _run(tmp_path / "source", tmp_path / "model") == BAD_INPUT
    error = capsys.readouterr().err
    assert re.search(report, error), error
    assert error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_a_first_word_is_a_verb_or_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sources.write_source(Path("t5"), "t5")
    assert _run("t5", "t5", "--dry-run") == BAD_INPUT  # the network t5, and a source without a target
    assert "MODEL_DIR" in capsys.readouterr().err
    assert _run("./t5", "model", "--quiet") == 0
    assert open_network("model", "t5").network == "t5"
    capsys.readouterr()
    assert _run("verfy", "model") == BAD_INPUT
    assert "verfy does not exist; expected a source of weights, or one of t5, stdit3, vae" in capsys.readouterr().err
    assert _run("verfy") == BAD_INPUT
    assert "'verfy' is neither a network nor a verb" in capsys.readouterr().err


def test_model_directories_and_clips_are_no_sources(tiny_model: Path, tmp_path: Path) -> None:
    assert not is_source(tiny_model)
    assert not is_source(tmp_path)
    assert is_source(Path("x.gguf"))
    assert not is_source(Path("x.mp4"))
