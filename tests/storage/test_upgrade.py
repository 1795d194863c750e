"""Upgrading: the same values in the present format, in one step, going on after an interruption, refusing damage."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from sora_jax.commands import main
from sora_jax.pipeline.model_file import POCKET
from sora_jax.storage import arrays
from sora_jax.storage.checkpoint import load_network, save_network
from sora_jax.storage.directory import Manifest, ModelDirectoryError, open_network
from sora_jax.storage.reader import Reader
from sora_jax.storage.upgrade import outdated, upgrade, upgraded_bytes
from tests.support.stored import as_format_1
from tests.support.tiny_model import CONFIG, random_flat, write_model

ROOT = Path(__file__).parents[2]


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("0") if path.is_file())


@pytest.fixture
def old(tmp_path: Path) -> Manifest:
    return as_format_1(save_network(tmp_path / "model", "t5", CONFIG.t5, random_flat("t5"), dtype="int8"))


def test_every_network_becomes_the_present_format_with_the_same_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # of hundreds of files; nothing loses power here
    monkeypatch.setattr(os, "sync", lambda: None)
    directory = write_model(tmp_path / "model")
    before = {network: load_network(directory, network)[1] for network in ("t5", "stdit3", "vae")}
    manifests = {network: as_format_1(open_network(directory, network)) for network in before}
    assert [manifest.network for manifest in outdated(directory)] == list(before)
    assert main.main(["convert", "upgrade", str(directory), "--quiet"]) == 0
    assert not outdated(directory)
    for network, flat in before.items():
        manifest = open_network(directory, network)
        assert manifest.format_version == 2
        assert manifest.values_text() == manifests[network].values_text()  # recipes and cached captions stay valid
        assert disk_bytes(directory / network) == upgraded_bytes(manifests[network])
        found = load_network(directory, network)[1]
        assert all(np.array_equal(found[name], array) for name, array in flat.items())
    assert not [path for path in directory.iterdir() if path.name.startswith(".")]
    capsys.readouterr()
    assert main.main(["convert", "upgrade", str(directory)]) == 0
    assert "every network has the present format" in capsys.readouterr().out


def test_the_disk_it_needs_is_said_before(old: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["convert", "upgrade", str(old.path.parent)]) == 0
    said = capsys.readouterr()
    assert f"needs {upgraded_bytes(old) / 1e9:.3f} GB of free disk space, for t5" in said.out + said.err


def test_too_little_disk_is_refused_before_anything_is_written(old: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, upgraded_bytes(old) - 1))
    with pytest.raises(ModelDirectoryError, match=r"upgrading t5 needs 0\.00 GB in .* make room and run the same command"):
        upgrade(old)
    assert open_network(old.path.parent, "t5").format_version == 1
    assert [path.name for path in old.path.parent.iterdir() if path.is_dir() and path.name != "t5"] == []


def test_damage_is_refused_and_the_old_network_stays(old: Manifest) -> None:
    path = old.chunk_path("block.0.mlp.wo.kernel")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelDirectoryError, match=rf"{path} does not have the checksum"):
        upgrade(old)
    assert open_network(old.path.parent, "t5") == old
    assert sorted(path.name for path in old.path.parent.iterdir()) == ["model.json", "t5"]


def test_an_interrupted_upgrade_goes_on(old: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, names = Reader.pieces, []

    def interrupted(self: Reader, name: str):
        names.append(name)
        if len(names) == 8:
            raise KeyboardInterrupt
        return pieces(self, name)

    monkeypatch.setattr(Reader, "pieces", interrupted)
    with pytest.raises(KeyboardInterrupt):
        upgrade(old)
    assert open_network(old.path.parent, "t5").format_version == 1
    manifest = upgrade(open_network(old.path.parent, "t5"))
    assert len(names) == len(old.parameters) + 1  # none twice but the one that was cut short
    assert {name: parameter.sha256 for name, parameter in manifest.parameters.items()} == {
        name: parameter.sha256 for name, parameter in old.parameters.items()
    }


def test_an_array_of_several_blocks_has_its_own_checksum_only_if_it_was_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 512)
    fresh = save_network(tmp_path, "t5", CONFIG.t5, random_flat("t5"))
    assert any(len(parameter.blocks) > 1 for parameter in fresh.parameters.values())
    assert all((parameter.sha256 == "") == (len(parameter.blocks) > 1) for parameter in fresh.parameters.values())
    old = as_format_1(fresh)
    assert all(parameter.sha256 for parameter in upgrade(old).parameters.values())
    again = open_network(tmp_path, "t5")
    assert again.values_text() == old.values_text() != fresh.values_text()
    assert {name: parameter.checksums for name, parameter in again.parameters.items()} == {
        name: parameter.checksums for name, parameter in fresh.parameters.items()
    }


def test_the_shipped_model_has_the_present_format_and_the_values_of_its_training() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "pocket_training.json").read_text())
    assert not outdated(POCKET)
    for network, trained in report["model"].items():
        manifest = open_network(POCKET, network)
        assert (POCKET / network / "network.json").read_text() == manifest.text()
        assert hashlib.sha256(manifest.values_text().encode()).hexdigest() == trained["manifest_sha256"]
        for name in manifest.parameters:
            Reader(manifest).verify(name)
