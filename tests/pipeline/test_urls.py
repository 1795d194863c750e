"""A model at an address instead of in a folder: the same clips, the same commands, nothing downloaded first."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sora_jax.commands import main
from sora_jax.pipeline.model_file import POCKET
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.storage.directory import open_network
from sora_jax.storage.location import local_path
from tests.support.http_server import Site, impatient, serving

__all__ = ["impatient"]  # a fixture
pytestmark = pytest.mark.usefixtures("little_optimised", "impatient")

PROMPT = "a red circle moves right on a blue background"


@pytest.fixture
def served(tiny_model: Path, tmp_path: Path) -> Iterator[Site]:
    with serving(shutil.copytree(tiny_model, tmp_path / "model")) as found:
        yield found


def test_opening_reads_what_describes_the_model_and_downloads_nothing(served: Site, tiny_model: Path) -> None:
    pipe = Pipeline.from_pretrained(served.url)
    small = {"model.json", "tokenizer.json", "t5/network.json", "stdit3/network.json", "vae/network.json"}
    assert {request.path for request in served.requests if request.num_bytes} == small
    assert len(served.requests) < 10
    assert pipe.model_id.split()[1] == Pipeline.from_pretrained(tiny_model).model_id.split()[1]


@pytest.mark.slow
def test_a_clip_of_an_address_is_the_clip_of_the_folder(served: Site, tiny_model: Path) -> None:
    clip, expected = Pipeline.from_pretrained(served.url)(PROMPT), Pipeline.from_pretrained(tiny_model)(PROMPT)
    np.testing.assert_array_equal(clip.frames, expected.frames)
    np.testing.assert_array_equal(clip.latents, expected.latents)


@pytest.mark.parametrize("budget", [[], ["--memory-budget", "8GB"]])
def test_a_fault_is_one_line_of_generate(
    served: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], budget: list[str]
) -> None:
    local_path(open_network(served.folder, "t5").chunk_path("block.0.attn.q.kernel")).unlink()
    clip = tmp_path / "clip.npz"
    arguments = ["generate", PROMPT, "--model", served.url, "-o", str(clip), "--quiet", "--compile-cache", "off"]
    assert main.main([*arguments, "--caption-cache", "off", *budget]) == main.BAD_INPUT
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert f"t5 layer block.0: parameter file {served.url}/t5/block.0/attn.q.kernel/c/0/0 is missing; copy the network" in said
    assert not clip.exists()


def test_inspect_and_verify(served: Site, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["inspect", served.url, "--json"]) == main.OK
    assert not [request for request in served.requests if "/c/" in request.path]
    found = json.loads(capsys.readouterr().out)
    assert main.main(["inspect", str(tiny_model), "--json"]) == main.OK
    expected = json.loads(capsys.readouterr().out)
    for network, fields in expected["networks"].items():
        assert found["networks"][network].pop("state").startswith("at an address")
        assert fields.pop("state") == "complete"
    assert (found.pop("path"), expected.pop("path")) == (served.url, str(tiny_model))
    assert found == expected
    assert main.main(["inspect", served.url, "--memory-budget", "3GB"]) == main.OK
    assert main.main(["convert", "verify", served.url]) == main.OK
    assert "stdit3: 54 arrays, checksums, shapes and dtypes as recorded" in capsys.readouterr().out
    path = local_path(open_network(served.folder, "t5").chunk_path("final.scale"))
    path.write_bytes(bytes(path.stat().st_size))
    assert main.main(["convert", "verify", served.url, "--network", "t5"]) == 1
    said = capsys.readouterr().err.strip()
    assert f"{served.url}/t5/final/scale/c/0" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "URL", "out", "--target", "stablehlo"],
        ["convert", "upgrade", "URL"],
        ["convert", "t5", "nowhere", "URL"],
    ],
)
def test_what_needs_a_folder_says_so(served: Site, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main.main([served.url if word == "URL" else word for word in arguments]) == main.BAD_INPUT
    said = capsys.readouterr().err.strip()
    assert f"{served.url} lies on a network; this needs a folder on this machine" in said
    assert "\n" not in said


@pytest.mark.slow
def test_the_embedded_model_from_a_server_within_a_budget(tmp_path: Path) -> None:
    """The clip that `generate` makes of it is the folder's, within the rounding that streaming may have."""
    arguments = ["generate", PROMPT, "--steps", "4", "--memory-budget", "8GB", "-o", str(tmp_path / "clip.npz"), "--quiet"]
    with serving(POCKET) as served:
        assert main.main([*arguments, "--model", served.url, "--compile-cache", "off", "--caption-cache", "off"]) == main.OK
    frames = np.load(tmp_path / "clip.npz")["frames"]
    expected = Pipeline.from_pretrained(POCKET)(PROMPT, num_steps=4).frames
    assert np.abs(frames.astype(int) - expected.reshape(frames.shape).astype(int)).max() <= 1
