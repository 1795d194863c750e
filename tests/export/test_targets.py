"""A model exported to each target makes the pipeline's video, from the manifest and the files alone.

Core ML, whose programs are interpreted, has its own tests.
"""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from sora_jax import Pipeline
from sora_jax.commands import main
from sora_jax.export import ExportedModel, manifest, resident, weight_file
from sora_jax.export.contents import file_sha256
from sora_jax.export.size import Size
from sora_jax.networks.stdit3 import STDiT3
from sora_jax.sampling import noise
from sora_jax.storage import directory as model_directory
from sora_jax.storage.checkpoint import flatten, save_network
from tests.export.test_stablehlo import run_by_documented_lines
from tests.support.exports import EQUAL_DB, PROMPT, SMALL, export_tiny, frames_of, psnr_db
from tests.support.tiny_model import CONFIG

pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema (extra stablehlo, onnx or coreml)")

GIVEN = {"num_steps": 6, "merge_steps": 2, "leap": "dynamic"}
NEEDED = {"stablehlo": ["flatbuffers"], "onnx": ["jax2onnx", "onnx", "onnxruntime"]}


@pytest.fixture(params=["stablehlo", "onnx"])
def target(request: pytest.FixtureRequest) -> str:
    for module in NEEDED[request.param]:
        pytest.importorskip(module, reason=f"the {request.param} extra is not installed")
    return request.param


@pytest.mark.artefacts
@pytest.mark.slow
def test_artefacts_alone_make_the_pipelines_video(tiny_model, tmp_path, target, in_process, monkeypatch):
    made = export_tiny(tiny_model, tmp_path / "out", target, settings=GIVEN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert made == manifest.read(tmp_path / "out")
    pipeline = Pipeline.from_pretrained(tiny_model)
    clip = pipeline(PROMPT, seed=3, **GIVEN, num_frames=SMALL.num_frames, height=SMALL.height, width=SMALL.width)
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    model = ExportedModel(tmp_path / "elsewhere", keep=False)
    assert psnr_db(clip.frames, frames_of(model, pipeline, seed=3)) >= EQUAL_DB
    assert not model.loaded
    if target == "stablehlo":
        monkeypatch.setattr(resident, "run", run_by_documented_lines)
        for steps in ({}, {"num_steps": 5, "leap": {"mode": "static", "index": 3}}):  # the number of steps is an input
            expected = frames_of(model, pipeline, seed=3, **steps)
            assert psnr_db(expected, frames_of(model, pipeline, seed=3, loop="sampler", **steps)) >= EQUAL_DB
    command = ["run-exported", str(tmp_path / "elsewhere"), PROMPT, "--seed", "3", "--unload", "-o", str(tmp_path / "clip.npz")]
    assert main.main(command) == main.OK
    assert psnr_db(clip.frames, np.load(tmp_path / "clip.npz")["frames"][None]) >= EQUAL_DB


@pytest.mark.slow
def test_a_second_size_makes_its_own_clip(tiny_model, tmp_path, target, in_process):
    second = Size(num_frames=5, height=32, width=32)
    made = export_tiny(tiny_model, tmp_path / "out", target, settings=GIVEN, further_sizes=[second])
    assert [size["key"] for size in made["sizes"]] == [SMALL.key, second.key]
    pipeline, model = Pipeline.from_pretrained(tiny_model), ExportedModel(tmp_path / "out")
    expected = pipeline(PROMPT, seed=3, **GIVEN, **dataclasses.asdict(second)).frames
    z = np.asarray(noise.initial_noise(3, (1, *made["sizes"][1]["latents"])))
    for loop in ("stages", "sampler") if target == "stablehlo" else ("stages",):
        frames = frames_of(model, pipeline, seed=3, noise_BTHWC=z, size=second.key, loop=loop)
        assert frames.shape == (1, 5, 32, 32, 3)
        assert psnr_db(expected, frames) >= EQUAL_DB
    clip = str(tmp_path / "clip.npz")
    assert main.main(["run-exported", str(model.folder), PROMPT, "--seed", "3", "--size", second.key, "-o", clip]) == main.OK
    assert psnr_db(expected, np.load(clip)["frames"][None]) >= EQUAL_DB


def test_int8_is_a_quarter_of_the_bytes(tiny_model, tmp_path, target, in_process):
    """Of the matrices, which are nearly everything at real widths; at this width the rest is left out of the count."""
    made = {}
    for weights in ("float", "int8"):
        export_tiny(tiny_model, tmp_path / weights, target, weights=weights, stages=("t5",))
        arrays = weight_file.read(tmp_path / weights / "t5_block_00.safetensors")
        made[weights] = sum(array.nbytes for name, array in arrays.items() if name.endswith("kernel"))
    assert made["int8"] * 4 == made["float"]
    entry = manifest.read(tmp_path / "int8")["stages"][1]["functions"][0]["checks"][0]
    assert (entry["floor_db"], entry["ceiling_l2"]) == (35.0, 0.1)
    assert 35.0 <= entry["psnr_db"] < 80.0  # really rounded


def test_half_precision_survives_outlier_channels(tiny_model, tmp_path, target, in_process):
    made = export_tiny(tiny_model, tmp_path / "out", target, precision="float16", stages=("t5",))
    block = made["stages"][1]
    assert block["precision"] == "float16"
    assert {array.dtype for array in weight_file.read(tmp_path / "out" / "t5_block_00.safetensors").values()} == {
        np.dtype("f2")
    }
    assert {entry["case"] for entry in block["functions"][0]["checks"]} == {"captured", "outliers"}


@pytest.mark.slow
def test_a_pair_of_real_width(tiny_model, tmp_path, target):
    """A pair of STDiT3-XL/2's width: floors as at toy width, and int8 a quarter of the bytes of the whole file."""
    config = dataclasses.replace(CONFIG.stdit3, hidden_size=1152, num_heads=16)
    shapes = flatten(jax.eval_shape(lambda: STDiT3(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    flat = {name: rng.standard_normal(leaf.shape).astype(np.float32) * 0.02 for name, leaf in shapes.items()}
    shutil.copytree(tiny_model, tmp_path / "model")
    save_network(tmp_path / "model", "stdit3", config, flat, overwrite=True)
    sizes = {}
    for weights in ("float", "int8"):
        made = export_tiny(tmp_path / "model", tmp_path / weights, target, weights=weights, stages=("stdit3",))
        sizes[weights] = made["files"]["stdit3_pair_00.safetensors"]["bytes"]
        assert max(stage["peak_rss_bytes"] for stage in made["stages"]) <= 6e9
    assert sizes["int8"] <= 0.26 * sizes["float"]


@pytest.mark.slow
def test_pocket_makes_the_same_video_from_either_target(tmp_path, target):
    """The embedded model at its own size, one process for each group of stages, as the command does it."""
    given = {"num_steps": 4, "merge_steps": 2, "leap": "off"}
    out = tmp_path / "out"
    assert main.main(["export", "pocket", str(out), "--target", target, "--steps", "4", "--merge-steps", "2"]) == main.OK
    pipeline, model = Pipeline.from_pretrained(), ExportedModel(out)
    clip = pipeline(PROMPT, seed=1, **given)
    assert psnr_db(clip.frames, frames_of(model, pipeline, seed=1)) >= EQUAL_DB
    peak = max(stage["peak_rss_bytes"] for stage in model.manifest["stages"])
    assert peak <= 6e9
    assert model.manifest["model"]["networks"]["t5"]["sha256"] == file_sha256(
        Path(model_directory.__file__).parents[1] / "pocket" / "weights" / "t5" / "network.json"
    )
