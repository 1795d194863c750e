"""Orbax checkpoints: restored by orbax alone, spread over devices, and turned back into the same network."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import sora_jax
from convert_weights import convert
from convert_weights.errors import SourceError
from convert_weights.orbax_checkpoint import from_orbax, to_orbax
from convert_weights.rules import ConversionError
from sora_jax.commands.convert import main
from sora_jax.storage.checkpoint import save_network
from sora_jax.storage.directory import Manifest, open_network
from tests.support import sources


def _network(folder: Path, dtype: str = "float32") -> Manifest:
    config = sources.golden_config("t5")
    return save_network(folder, "t5", config, convert("t5", sources.state_dict("t5"), config), dtype=dtype)


def _checksums(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    return {name: parameter.checksums for name, parameter in manifest.parameters.items()}


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16", "int8"])
def test_there_and_back_is_the_same_network(tmp_path: Path, dtype: str) -> None:
    manifest = _network(tmp_path / "model", dtype)
    assert main(["to-orbax", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    assert main(["from-orbax", str(tmp_path / "out" / "t5"), str(tmp_path / "again")]) == 0
    again = open_network(tmp_path / "again", "t5")
    assert (again.config, again.dtype, again.layers) == (manifest.config, dtype, manifest.layers)
    assert _checksums(again) == _checksums(manifest)


def test_orbax_restores_it_alone_and_spread_over_devices(tmp_path: Path) -> None:
    manifest = _network(tmp_path / "model")
    path = to_orbax(manifest, tmp_path / "checkpoint")
    flat = sora_jax.load_parameters(tmp_path / "model", "t5")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    target = {name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=spread) for name, array in flat.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(path.absolute(), target)
    assert restored.keys() == flat.keys() == manifest.parameters.keys()
    for name, array in flat.items():
        assert restored[name].sharding == spread
        np.testing.assert_array_equal(np.asarray(restored[name]), array)


def _saved(folder: Path, tree: Any) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree)
    return folder


def test_a_checkpoint_of_ones_own_needs_names_and_a_configuration(tmp_path: Path) -> None:
    manifest = _network(tmp_path / "model")
    path = _saved(tmp_path / "own", sora_jax.load_parameters(tmp_path / "model", "t5"))
    (tmp_path / "config.json").write_text(json.dumps(sources.upstream_config("t5")))
    with pytest.raises(SourceError, match="does not say which network it is"):
        from_orbax(path, tmp_path / "x")
    with pytest.raises(SourceError, match="has no configuration of t5"):
        from_orbax(path, tmp_path / "x", network="t5")
    again = from_orbax(path, tmp_path / "again", network="t5", config_file=tmp_path / "config.json")
    assert _checksums(again) == _checksums(manifest)


@pytest.mark.parametrize(
    ("change", "report"),
    [
        ({"embed.strange": np.ones(2, np.float32)}, r"'embed.strange': unknown array \[2\]"),
        ({"final.scale": None}, "final.scale: missing"),
        ({"final.scale": np.ones(3, np.float32)}, r"final.scale: \[3\] of float32; expected \[64\] of float32"),
        ({"final.scale": np.ones(64, np.int32)}, "final.scale: .64. of int32"),
        ({"final.scale": np.full(64, np.nan, np.float32)}, "final.scale: 64 of 64 values are NaN"),
    ],
)
def test_what_does_not_fit_is_one_report(tmp_path: Path, change: dict[str, Any], report: str) -> None:
    _network(tmp_path / "model")
    flat = {**sora_jax.load_parameters(tmp_path / "model", "t5"), **change}
    path = _saved(tmp_path / "own", {name: array for name, array in flat.items() if array is not None})
    (tmp_path / "config.json").write_text(json.dumps(sources.upstream_config("t5")))
    with pytest.raises(ConversionError, match=report):
        from_orbax(path, tmp_path / "again", network="t5", config_file=tmp_path / "config.json")
    assert not (tmp_path / "again").exists()


def test_a_flipped_bit_of_a_checkpoint_that_we_wrote_is_found(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = to_orbax(_network(tmp_path / "model"), tmp_path / "checkpoint")
    values = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    data = bytearray(values.read_bytes())
    data[len(data) // 2] ^= 1
    values.write_bytes(data)
    capfd.readouterr()
    with pytest.raises((ConversionError, SourceError), match=r"differ from the checksum|cannot be read by orbax"):
        from_orbax(path, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert capfd.readouterr().err == ""


def test_what_is_no_flat_dictionary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is no orbax checkpoint"):
        from_orbax(tmp_path, tmp_path / "x")
    nested = _saved(tmp_path / "nested", {"params": {"a": np.ones(2)}})
    with pytest.raises(SourceError, match="is no flat dictionary"):
        from_orbax(nested, tmp_path / "x")
    (nested / "_METADATA").write_text("{")
    with pytest.raises(SourceError, match=r"cannot be read by orbax|is no flat dictionary"):
        from_orbax(nested, tmp_path / "x")


def test_the_embedded_model_has_parameters() -> None:
    flat = sora_jax.load_parameters("pocket", "stdit3", dtype="bfloat16")
    assert flat["spatial_blocks.3.attn.qkv.kernel"].shape == (128, 384)
    assert {array.dtype.name for array in flat.values()} == {"bfloat16"}
