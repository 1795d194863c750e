"""Manifests that lie: one line that names the file, no foreign error, no number believed before it was checked."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sora_jax.config import CONFIGS, NETWORKS, open_sora_1_2, pocket
from sora_jax.storage.checkpoint import save_network
from sora_jax.storage.directory import Manifest, ModelDirectoryError, open_network, read_model_file
from tests.support.tiny_model import CONFIG, random_flat

NAME = "block.0.attn.q.kernel"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return save_network(tmp_path_factory.mktemp("original"), "t5", CONFIG.t5, random_flat("t5"))


def opened(folder: Path, text: str | bytes) -> ModelDirectoryError:
    """Returns the error of opening a network whose manifest is this text."""
    (folder / "t5").mkdir(exist_ok=True)
    (folder / "t5" / "network.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.process_time()
    with pytest.raises(ModelDirectoryError) as raised:
        open_network(folder, "t5")
    assert time.process_time() - began < 10
    message = str(raised.value)
    assert message.startswith(str(folder / "t5" / "network.json"))
    assert "\n" not in message
    assert len(message) < 500 + len(str(folder)), message
    assert all(character.isprintable() for character in message)
    return raised.value


TEXTS = {
    "nothing": "",
    "an empty object": "{}",
    "a list": "[]",
    "a number": "17",
    "null": "null",
    "half a file": '{"format_version": 2',
    "deep lists": "[" * 200_000,
    "another encoding": b'{"format_version": "\xff"}',
    "a key twice": '{"format_version": 2, "format_version": 1}',
    "not a number": '{"format_version": NaN}',
    "a number of 5000 digits": f'{{"format_version": {"1" * 5000}}}',
    "a page": "<!DOCTYPE html><html></html>",
    "a pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_text_that_is_no_manifest(tmp_path: Path, text: str | bytes) -> None:
    assert "is damaged: it " in str(opened(tmp_path, text))
    assert "convert t5 again with --overwrite." in str(opened(tmp_path, text))


@pytest.mark.parametrize("version", [3, 10**9])
def test_a_newer_format_is_refused_by_name(tmp_path: Path, original: Manifest, version: int) -> None:
    error = opened(tmp_path, json.dumps(original.to_dict() | {"format_version": version}))
    assert str(error).endswith(f"has format version {version}; this release reads 1 and 2; update sora_jax.")


def parameter(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest["parameters"][NAME].update(fields)


def config(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest["config"].update(fields)


def top(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest.update(fields)


def renamed(name: str) -> Callable[[dict[str, Any]], Any]:
    def rename(manifest: dict[str, Any]) -> None:
        manifest["parameters"][name] = manifest["parameters"].pop(NAME)

    return rename


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest.pop(name)


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version 0": (top(format_version=0), "format version 0"),
    "version true": (top(format_version=True), "format version True"),
    "version 2.0": (top(format_version=2.0), "format version 2.0"),
    "another network": (top(network="vae"), "describes network 'vae'; expected 't5'"),
    "no network": (without("network"), "describes network None"),
    "dtype": (top(dtype="float64"), "has dtype 'float64'"),
    "dtype list": (top(dtype=["float32"]), "has dtype"),
    "another dtype": (top(dtype="bfloat16"), "stores .* as float32, but the network as bfloat16"),
    "layers": (top(layers=["embed", "final"]), "lists layers .* which are not the 3 of its configuration"),
    "layers turned": (top(layers=["final", "block.0", "embed"]), "lists layers"),
    "layers text": (top(layers="embed"), "lists layers"),
    "no layers": (without("layers"), "lists layers None"),
    "config": (top(config=[]), "has configuration"),
    "no config": (without("config"), "has configuration None"),
    "depth": (config(num_layers=10**7), "num_layers is 10000000; expected a whole number from 1 to 1024"),
    "more layers": (config(num_layers=2), "lists layers"),
    "zero heads": (config(num_heads=0), "num_heads is 0"),
    "text": (config(d_model="16"), "d_model is '16'"),
    "true": (config(d_model=True), "d_model is True"),
    "epsilon": (config(layer_norm_epsilon=1e30), "layer_norm_epsilon is 1e"),
    "infinite": (config(layer_norm_epsilon="1e999"), "layer_norm_epsilon"),
    "distance": (config(relative_attention_max_distance=0), "relative_attention_max_distance is 0"),
    "unknown field": (config(strange=1), r"unknown fields \['strange'\]"),
    "parameters": (top(parameters=[]), "has parameters"),
    "no parameters": (top(parameters={}), "has no parameter for 3 of its layers, first embed"),
    "origin": (top(origin=None), "has origin None"),
    "origin files": (top(origin={"files": [5]}), "origin whose files"),
    "origin constants": (top(origin={"constants": {"x": {"shape": [10**12], "dtype": "float32", "hex": ""}}}), "constants"),
    "upwards": (renamed("block.0.../../x"), "names a parameter"),
    "slash": (renamed("block.0.a/b"), "names a parameter"),
    "absolute": (renamed("/etc/passwd"), "names a parameter"),
    "control": (renamed("block.0.\x1b[31m"), "names a parameter"),
    "empty part": (renamed("block.0..q"), "names a parameter"),
    "long name": (renamed("block.0." + "x" * 300), "names a parameter"),
    "no layer": (renamed("block.7.q"), "belongs to none of its 3 layers"),
    "a layer": (renamed("block.0"), "belongs to none"),
    "entry": (lambda manifest: manifest["parameters"].update({NAME: 5}), "says of block.0.attn.q.kernel 5"),
    "shape": (parameter(shape=[-1, 4]), "expected up to 8 extents"),
    "shape zero": (parameter(shape=[16, 0]), "expected up to 8 extents"),
    "shape true": (parameter(shape=[True, 16]), "expected up to 8 extents"),
    "shape text": (parameter(shape="16"), "expected up to 8 extents"),
    "shape fraction": (parameter(shape=[16.0, 16]), "expected up to 8 extents"),
    "shape huge": (parameter(shape=[10**18]), "expected up to 8 extents"),
    "shape product": (
        parameter(shape=[2**30, 2**30], rows=2**30, blocks=["0" * 64], sha256="0" * 64),
        "more than there can be",
    ),
    "rank": (parameter(shape=[1] * 9), "expected up to 8 extents"),
    "array dtype": (parameter(dtype="int8"), "stores .* as int8, but the network as float32"),
    "object dtype": (parameter(dtype={}), "dtype"),
    "sha256": (parameter(sha256="x"), "expected 64 hexadecimal digits"),
    "sha256 number": (parameter(sha256=5), "expected 64 hexadecimal digits"),
    "sha256 missing": (lambda manifest: manifest["parameters"][NAME].pop("sha256"), "sha256 None; expected 64"),
    "sha256 empty": (parameter(sha256=""), "sha256 ''; expected 64 hexadecimal digits"),
    "rows": (parameter(rows=3), "blocks of 3 rows; expected a divisor of 16"),
    "rows zero": (parameter(rows=0), "blocks of 0 rows"),
    "rows none": (parameter(rows=None), "blocks of None rows"),
    "blocks": (parameter(blocks=[]), "0 checksums of blocks; expected 1"),
    "blocks text": (parameter(blocks="x"), "no checksums of blocks; expected 1"),
    "blocks differ": (parameter(blocks=["0" * 64]), "two checksums of the same bytes, which differ"),
    "blocks of numbers": (parameter(blocks=[5]), "expected 64 hexadecimal digits"),
    "source": (parameter(source={"name": 5}), "expected name, shape and dtype of an array"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_line_that_says_what_cannot_be(tmp_path: Path, original: Manifest, lie: str) -> None:
    change, message = LIES[lie]
    fields = json.loads(json.dumps(original.to_dict()))
    change(fields)
    assert opened(tmp_path, json.dumps(fields)).args[0] is not None
    with pytest.raises(ModelDirectoryError, match=message):
        open_network(tmp_path, "t5")


def test_many_lies_are_refused_without_a_hang(tmp_path: Path, original: Manifest) -> None:
    entries = {f"block.0.{'a.' * 90}x{number}": original.parameters[NAME].to_dict() for number in range(1_000)}
    opened(tmp_path, json.dumps(original.to_dict() | {"parameters": entries}))
    opened(tmp_path, json.dumps(original.to_dict() | {"parameters": dict.fromkeys(map(str, range(100_001)), 1)}))


def test_a_file_that_is_none_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "t5").mkdir()
    path = tmp_path / "t5" / "network.json"
    os.mkfifo(path)
    with pytest.raises(ModelDirectoryError, match=rf"{path} is of another kind; convert t5 again"):
        open_network(tmp_path, "t5")
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ModelDirectoryError, match="is a symbolic link, which is not followed"):
        open_network(tmp_path, "t5")
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelDirectoryError, match="has more than 16777216 bytes"):
        open_network(tmp_path, "t5")


INDEX: dict[str, tuple[Any, str]] = {
    "a list": ([], "holds"),
    "no version": ({}, "has format version None"),
    "newer": ({"format_version": 9}, "has format version 9; this release reads 1 and 2; update sora_jax"),
    "tokenizer number": ({"format_version": 1, "tokenizer": 5}, "tokenizer is 5; expected the name of a file"),
    "tokenizer elsewhere": ({"format_version": 1, "tokenizer": "../secret.json"}, "expected the name of a file next to it"),
    "tokenizer absolute": ({"format_version": 2, "tokenizer": "/etc/passwd"}, "expected the name of a file next to it"),
    "tokenizer zero": ({"format_version": 2, "tokenizer": "a\0b"}, "expected the name of a file next to it"),
    "defaults": ({"format_version": 2, "defaults": []}, "expected an object of settings"),
}


@pytest.mark.parametrize("case", INDEX)
def test_an_index_that_lies(tmp_path: Path, case: str) -> None:
    fields, message = INDEX[case]
    (tmp_path / "model.json").write_text(json.dumps(fields))
    with pytest.raises(ModelDirectoryError, match=message) as raised:
        read_model_file(tmp_path)
    assert str(raised.value).startswith(str(tmp_path / "model.json"))
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("preset", [open_sora_1_2, pocket, CONFIG])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_configuration_comes_back_from_json(preset: Any, network: str) -> None:
    config = getattr(preset, network)
    assert CONFIGS[network].from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("value", [None, "x", [], {}, True, -1, 0, 10**9, 1e30, math.nan, math.inf])
def test_no_field_of_a_configuration_takes_what_cannot_be(network: str, value: Any) -> None:
    """Every field refuses every value of the wrong type or size; what is left is a truth value where one is expected."""
    refused(getattr(pocket, network), value)


def refused(config: Any, value: Any) -> None:
    message = r"expected|not a multiple|unknown fields"
    for name, present in config.to_dict().items():
        of_truth = isinstance(value, bool) and isinstance(present[0] if isinstance(present, tuple) else present, bool)
        if not of_truth:
            wrong = [value] * len(present) if isinstance(present, tuple) else value
            with pytest.raises(ValueError, match=message):
                type(config).from_dict({**config.to_dict(), name: wrong})
        if isinstance(present, tuple):
            with pytest.raises(ValueError, match=message):
                type(config).from_dict({**config.to_dict(), name: value})
        if isinstance(present, dict):
            refused(getattr(config, name), value)
