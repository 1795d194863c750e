"""An opened model directory: what it refuses before any work, and several threads that use it at once."""

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.open_model import Networks
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.process import Timings
from sora_jax.storage.directory import ModelDirectoryError, open_network

pytestmark = pytest.mark.usefixtures("little_optimised")

PROMPT = "a red circle moves right on a blue background"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit(model: Path, network: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = model / network / "network.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def forget_half(fields: dict[str, Any]) -> None:
    for name in [name for name in fields["parameters"] if name.startswith("spatial_decoder.up")]:
        del fields["parameters"][name]


@pytest.mark.parametrize(
    ("network", "change", "message"),
    [
        ("vae", forget_half, r"vae does not fit its configuration \(\d+ faults\): missing .*; and \d+ more; convert vae again"),
        ("t5", lambda fields: fields["config"].update(d_ff=25), r"t5 does not fit its configuration .* expected float32 \["),
        ("stdit3", lambda fields: fields["config"].update(caption_channels=24), "T5 width 16 differs from STDiT3 caption"),
        ("stdit3", lambda fields: fields["config"].update(in_channels=8), "VAE embed_dim 4 differs from STDiT3 in_channels 8"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_opened(model: Path, network: str, change: Any, message: str) -> None:
    edit(model, network, change)
    with pytest.raises(ModelDirectoryError, match=message) as raised:
        Pipeline.from_pretrained(model)
    assert str(model) in str(raised.value)
    assert len(str(raised.value)) < 700
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named_when_it_is_opened(model: Path) -> None:
    path = open_network(model, "vae").chunk_path("stats.scale")
    path.unlink()
    with pytest.raises(ModelDirectoryError, match=rf"vae layer stats: parameter file {path} is missing; convert vae again"):
        Pipeline.from_pretrained(model)


@pytest.mark.parametrize("network", ["t5", "stdit3", "vae"])
def test_a_flipped_bit_makes_no_clip(model: Path, network: str) -> None:
    manifest = open_network(model, network)
    name = max(manifest.parameters, key=lambda name: manifest.parameters[name].nbytes)
    path = manifest.chunk_path(name)
    data = bytearray(path.read_bytes())
    data[1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelDirectoryError, match=r"does not have the checksum that network\.json records"):
        Pipeline.from_pretrained(model)(PROMPT)


def test_writing_over_the_files_of_a_loaded_model_changes_nothing(model: Path) -> None:
    pipe = Pipeline.from_pretrained(model, keep=True)
    before = pipe(PROMPT)
    for path in model.rglob("c/**/*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(pipe(PROMPT).frames, before.frames)


@pytest.mark.parametrize("keep", [False, True])
def test_threads_share_a_pipeline_and_get_what_one_gets(tiny_model: Path, keep: bool) -> None:
    pipe = Pipeline.from_pretrained(tiny_model, keep=keep)
    alone = [pipe(PROMPT, seed=seed).frames for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: pipe(PROMPT, seed=seed).frames, range(4)))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(pipe.networks._loaded) == (3 if keep else 0)


def test_a_network_is_loaded_once_for_all_who_use_it_and_freed_after_the_last(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks, loads, load = Networks.open(ModelFile.read(tiny_model).manifests, keep=False), [], Networks._load
    met = threading.Barrier(3)

    def counted(self: Networks, network: str, dtype: str) -> Any:
        loads.append(network)
        return load(self, network, dtype)

    monkeypatch.setattr(Networks, "_load", counted)

    def use(_: int) -> int:
        with networks.use("t5", "float32", Timings()) as network:
            met.wait(60)  # all three are inside at once
            return id(network)

    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(use, range(3)))) == 1
    assert loads == ["t5"]
    assert not networks._loaded


def test_a_load_that_failed_is_tried_again(model: Path) -> None:
    networks = Networks.open(ModelFile.read(model).manifests, keep=True)
    path = open_network(model, "t5").chunk_path("final.scale")
    data = path.read_bytes()
    path.write_bytes(bytes(len(data)))
    for _ in range(2):
        with pytest.raises(ModelDirectoryError, match=r"cannot be read|does not have the checksum"):
            with networks.use("t5", "float32", Timings()):
                pass
    path.write_bytes(data)
    with networks.use("t5", "float32", Timings()) as network:
        assert network is not None


@pytest.mark.ci
def test_a_budget_is_for_one_generation_at_a_time(tiny_model: Path) -> None:
    """Either the clip that one thread alone gets, or one clear refusal."""
    pipe = Pipeline.from_pretrained(tiny_model, memory_budget="8GB")
    expected = pipe(PROMPT).latents

    def generate(_: int) -> np.ndarray | RuntimeError:
        try:
            return pipe(PROMPT).latents
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(generate, range(3)))
    refusals = [result for result in found if isinstance(result, RuntimeError)]
    assert len(refusals) < 3
    for refusal in refusals:
        assert "is in use by another run; open the model directory a second time" in str(refusal)
    for result in found:
        if not isinstance(result, RuntimeError):
            np.testing.assert_array_equal(result, expected)
