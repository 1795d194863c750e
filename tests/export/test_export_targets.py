"""A model exported to each target makes the pipeline's video, from the manifest and the files alone.

Core ML, whose programs are interpreted, has its own tests.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from sora_jax import Pipeline
from sora_jax.commands import main
from sora_jax.export import ExportedModel, check, exporter, manifest, stablehlo, stablehlo_sampler, weight_file, worker
from sora_jax.export.exporter import export
from sora_jax.export.size import Size
from sora_jax.export.stages import PARTS, list_stages, load_parameters
from sora_jax.inputs import prompt, references
from sora_jax.networks.merging import Merge
from sora_jax.networks.stdit3 import STDiT3
from sora_jax.pipeline import video
from sora_jax.sampling import noise
from sora_jax.storage import directory as model_directory
from sora_jax.storage.checkpoint import flatten, load_network, save_network
from sora_jax.storage.directory import open_network
from tests.support.tiny_model import CONFIG

pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema (extra stablehlo, onnx or coreml)")

PROMPT = "a red circle moves right on a blue background"
SIZE = Size(num_frames=5, height=16, width=32)
GIVEN = {"num_steps": 6, "merge_steps": 2, "leap": "dynamic"}
NEEDED = {"stablehlo": ["flatbuffers"], "onnx": ["jax2onnx", "onnx", "onnxruntime"]}
EQUAL_DB = 50.0  # of 8-bit frames: fewer than one value in two hundred differs by one


def in_this_process(folder: Path, names: list[str]) -> None:
    """In place of a process for each group: what is imported and compiled serves all of them."""
    worker.run_group(folder, list(names))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "_run_process", in_this_process)
    # A compile cache inside the export would be gone for the next test, and JAX opens only one.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ.get("JAX_COMPILATION_CACHE_DIR", ""))


@pytest.fixture(params=["stablehlo", "onnx"])
def target(request: pytest.FixtureRequest) -> str:
    for module in NEEDED[request.param]:
        pytest.importorskip(module, reason=f"the {request.param} extra is not installed")
    return request.param


def export_tiny(directory: Path, out: Path, target: str, **options: Any) -> dict[str, Any]:
    return export(directory, out, target=target, num_frames=SIZE.num_frames, height=SIZE.height, width=SIZE.width, **options)


def run(
    model: ExportedModel, pipeline: Pipeline, *, seed: int, noise_BTHWC: np.ndarray | None = None, **given: Any
) -> np.ndarray:
    """Returns the 8-bit frames that the artefacts make of a prompt."""
    settings = pipeline.resolve({})
    text = prompt.prepare_prompt(PROMPT, aes=settings.aes, flow=settings.flow, camera_motion=settings.camera_motion)
    ids, mask = pipeline.tokenizer.encode([text], model.manifest["tokens"]["length"])
    z = noise_BTHWC
    if z is None:
        z = np.asarray(noise.initial_noise(seed, (1, *model.manifest["sizes"][0]["latents"])))
    return video.quantise(model(ids, mask, z, **given).frames_Bthw3)


def psnr_db(expected: np.ndarray, got: np.ndarray) -> float:
    return check.difference(expected.astype(np.float64), got.astype(np.float64))[0]


@pytest.mark.artefacts
@pytest.mark.slow
def test_artefacts_alone_make_the_pipelines_video(tiny_model, tmp_path, target, in_process, monkeypatch):
    made = export_tiny(tiny_model, tmp_path / "out", target, settings=GIVEN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert made == manifest.read(tmp_path / "out")
    pipeline = Pipeline.from_pretrained(tiny_model)
    clip = pipeline(PROMPT, seed=3, **GIVEN, num_frames=SIZE.num_frames, height=SIZE.height, width=SIZE.width)
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    model = ExportedModel(tmp_path / "elsewhere", keep=False)
    assert psnr_db(clip.frames, run(model, pipeline, seed=3)) >= EQUAL_DB
    assert not model.loaded
    if target == "stablehlo":
        monkeypatch.setattr(stablehlo_sampler, "open_sampler", run_by_documented_lines)
        for steps in ({}, {"num_steps": 5, "leap": {"mode": "static", "index": 3}}):  # the number of steps is an input
            expected = run(model, pipeline, seed=3, **steps)
            assert psnr_db(expected, run(model, pipeline, seed=3, loop="sampler", **steps)) >= EQUAL_DB
    command = ["run-exported", str(tmp_path / "elsewhere"), PROMPT, "--seed", "3", "--unload", "-o", str(tmp_path / "clip.npz")]
    assert main.main(command) == main.OK
    assert psnr_db(clip.frames, np.load(tmp_path / "clip.npz")["frames"][None]) >= EQUAL_DB


def run_by_documented_lines(folder: Path, artefact: dict[str, str]) -> Any:
    """In place of `open_sampler`: the lines of the modules' descriptions, in an interpreter that cannot import this package."""

    def run(_: Any, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        function = next(f for f in manifest.read(folder)["sampler"]["functions"] if f["artefact"] == artefact)
        dtypes = {tensor["name"]: tensor["dtype"] for tensor in function["inputs"]}
        np.savez(folder / "given.npz", **{name: np.asarray(given[name], dtype) for name, dtype in dtypes.items()})
        python_alone(
            documented(stablehlo).split("call = ")[0]
            + 'given = dict(np.load("given.npz"))\n'
            + documented(stablehlo_sampler).replace("sampler.dynamic.jaxexport", artefact["file"])
            + 'made = run(params, given)\nnp.savez("made.npz", **made)\n',
            folder,
        )
        return dict(np.load(folder / "made.npz"))

    return run


def documented(module: Any) -> str:
    """Returns the lines of code in a module's description."""
    return textwrap.dedent(module.__doc__.split("::\n\n")[1].split("\nInvariant")[0])


def python_alone(lines: str, folder: Path) -> None:
    """Runs lines in a new interpreter in a folder, where the import of anything of this package or its friends fails."""
    blocked = 'import sys\nfor name in ("sora_jax", "flax", "safetensors", "onnx"):\n    sys.modules[name] = None\n'
    done = subprocess.run([sys.executable, "-c", blocked + lines], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_int8_is_a_quarter_of_the_bytes(tiny_model, tmp_path, target, in_process):
    """Of the matrices, which are nearly everything at real widths; at this width the rest is left out of the count."""
    made = {}
    for weights in ("float", "int8"):
        export_tiny(tiny_model, tmp_path / weights, target, weights=weights, stages=("t5",))
        arrays = weight_file.read(tmp_path / weights / "t5_block_00.safetensors")
        made[weights] = sum(array.nbytes for name, array in arrays.items() if name.endswith("kernel"))
    assert made["int8"] * 4 == made["float"]
    entry = manifest.read(tmp_path / "int8")["stages"][1]["functions"][0]["checks"][0]
    assert (entry["floor_db"], entry["ceiling_l2"]) == (30.0, 0.1)
    assert 30.0 <= entry["psnr_db"] < 80.0  # really rounded


def test_half_precision_survives_outlier_channels(tiny_model, tmp_path, target, in_process):
    made = export_tiny(tiny_model, tmp_path / "out", target, precision="float16", stages=("t5",))
    block = made["stages"][1]
    assert block["precision"] == "float16"
    assert {array.dtype for array in weight_file.read(tmp_path / "out" / "t5_block_00.safetensors").values()} == {
        np.dtype("f2")
    }
    assert {entry["case"] for entry in block["functions"][0]["checks"]} == {"captured", "outliers"}


def test_a_directory_of_int8_is_multiplied_out_once_and_says_so(tiny_model, tmp_path, in_process):
    pytest.importorskip("flatbuffers", reason="the stablehlo extra is not installed")
    shutil.copytree(tiny_model, tmp_path / "model")
    config, flat = load_network(tiny_model, "t5")
    save_network(tmp_path / "model", "t5", config, flat, dtype="int8", overwrite=True)
    made = export_tiny(tmp_path / "model", tmp_path / "out", "stablehlo", stages=("t5",))
    assert made["weights"]["dequantised"]
    assert made["weights"]["stored_dtype"]["t5"] == "int8"
    stored = weight_file.read(tmp_path / "out" / "t5_block_00.safetensors")["attn.q.kernel"]
    np.testing.assert_array_equal(stored, load_network(tmp_path / "model", "t5")[1]["block.0.attn.q.kernel"])


def test_the_documented_lines_need_jax_and_numpy_only(tiny_model, tmp_path, in_process):
    pytest.importorskip("flatbuffers", reason="the stablehlo extra is not installed")
    export_tiny(tiny_model, tmp_path / "out", "stablehlo", stages=("t5",))
    (tmp_path / "out" / "manifest.json").unlink()
    lines = documented(stablehlo).split("call = ")[0]
    lines += """
x = np.linspace(-3, 3, 160, dtype=np.float32).reshape(2, 5, 16)
params = weights("t5_final.safetensors")
call = jax.export.deserialize(open("t5_final.main.jaxexport", "rb").read()).call
np.save("y.npy", call(params, {"x_BLE": x})["caption_BLE"])
"""
    python_alone(lines, tmp_path / "out")
    x = np.linspace(-3, 3, 160, dtype=np.float32).reshape(2, 5, 16)  # batch and length are symbolic: not those of the export
    scale = load_network(tiny_model, "t5")[1]["final.scale"]
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.t5.layer_norm_epsilon) * scale
    np.testing.assert_allclose(np.load(tmp_path / "out" / "y.npy"), expected, rtol=1e-5, atol=1e-6)


def test_below_the_floor_nothing_is_kept(tiny_model, tmp_path, monkeypatch, in_process):
    pytest.importorskip("flatbuffers", reason="the stablehlo extra is not installed")
    monkeypatch.setattr(check, "LIMITS", {"float32": check.Limits(check.MAX_DB + 1, 1e-3)})
    with pytest.raises(check.CheckError, match=r"t5_embed main: output \S+ \(captured inputs\) has 200\.0 dB"):
        export_tiny(tiny_model, tmp_path / "out", "stablehlo", stages=("t5",))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(tiny_model, tmp_path, monkeypatch, in_process):
    pytest.importorskip("flatbuffers", reason="the stablehlo extra is not installed")
    monkeypatch.setattr(exporter, "GROUP_BYTES", 0)
    seen = []

    def interrupt(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))
        if done == 1:
            assert len(list(tmp_path.iterdir())) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_tiny(tiny_model, tmp_path / "out", "stablehlo", stages=("t5",), progress=interrupt)
    assert seen == [("t5_embed", 0, 3), ("t5_block_00", 1, 3)]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--height", "24", "--width", "32"), "height 24 is not a multiple of 16"),
        (("--height", "32"), "width"),
        (("--size", "17x32"), "size '17x32' is not frames x height x width"),
        (("--size", "17x32x40"), "width 40 is not a multiple of 16"),
        (("--stages", "t5,decoder"), "stages decoder cannot be exported; expected some of t5, stdit3"),
        (("--weights", "int4"), "target stablehlo has no weights 'int4'"),
        (("--leap", "released"), "leap 'released' cannot be exported"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tiny_model, tmp_path, capsys, arguments, message):
    code = main.main(["export", str(tiny_model), str(tmp_path / "out"), "--target", "stablehlo", "--quiet", *arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == main.BAD_INPUT
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())


def test_what_stands_in_the_way_is_named(tiny_model, tmp_path, monkeypatch, capsys):
    def line(model: Path, *arguments: str) -> str:
        assert main.main(["export", str(model), str(tmp_path / "out"), "--target", "stablehlo", *arguments]) == main.BAD_INPUT
        return capsys.readouterr().err

    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_model, damaged)
    parameter = json.loads((damaged / "vae" / "network.json").read_text())["layers"][0]
    shutil.rmtree(damaged / "vae" / parameter)
    assert "convert vae again with --overwrite" in line(damaged)
    assert "does not exist" in line(tmp_path / "absent")
    monkeypatch.setattr(exporter.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    assert "GB free; the export needs" in line(tiny_model)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'sora_jax[stablehlo]'" in line(tiny_model)
    (tmp_path / "out").mkdir()
    assert "exists; pass --overwrite" in line(tiny_model)
    (tmp_path / "out" / "letter.txt").write_text("mine")
    assert "is not an exported folder, which --overwrite replaces" in line(tiny_model, "--overwrite")
    assert (tmp_path / "out" / "letter.txt").read_text() == "mine"


@pytest.mark.artefacts
@pytest.mark.slow
def test_a_sampler_that_merges_otherwise_is_refused(tiny_model, tmp_path, monkeypatch, in_process):
    """All stages are right, and the first step without merging too."""
    pytest.importorskip("flatbuffers", reason="the stablehlo extra is not installed")
    monkeypatch.setattr(stablehlo_sampler, "MERGE", Merge(temporal=False))
    with pytest.raises(check.CheckError, match=r"sampler static: output z_BTHWC \(two_steps inputs\)"):
        export_tiny(tiny_model, tmp_path / "out", "stablehlo", stages=("stdit3",))
    assert not list(tmp_path.iterdir())


def test_lengths_that_are_symbolic_may_be_others(tiny_model):
    """A pair of blocks, exported for one row of 2 x 4 tokens and 12 words, on three rows of 5 tokens and 7 words."""
    pytest.importorskip("flatbuffers", reason="the stablehlo extra is not installed")
    stage = next(stage for stage in list_stages(CONFIG, [SIZE], parts=("stdit3",)) if stage.name == "stdit3_pair_00")
    params = load_parameters(open_network(tiny_model, "stdit3"), stage)
    rng, lengths = np.random.default_rng(0), {"R": 3, "S": 5, "L": 7}
    for function in stage.functions:
        inputs = stablehlo.symbolic_inputs(function.inputs, stablehlo.SYMBOLIC["stdit3_pair"])
        saved = stablehlo.serialise(lambda params, given, f=function: f.call(params, **given), stage.program.abstract, inputs)
        shapes = {name: [lengths.get(str(n), n) for n in spec.shape] for name, spec in inputs.items()}
        given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        made = jax.export.deserialize(bytearray(saved)).call(params, given)["x_RTSD"]
        expected = jax.jit(function.call)(params, **given)["x_RTSD"]
        np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_an_image_alone_can_be_exported(tiny_model, tmp_path, in_process):
    """One frame of latents, of which nothing can be merged."""
    pytest.importorskip("flatbuffers", reason="the stablehlo extra is not installed")
    given = {"num_frames": 1, "height": SIZE.height, "width": SIZE.width}
    export(tiny_model, tmp_path / "out", target="stablehlo", **given)
    pipeline, model = Pipeline.from_pretrained(tiny_model), ExportedModel(tmp_path / "out")
    clip = pipeline(PROMPT, seed=3, num_steps=4, **given)
    for loop in ("stages", "sampler"):
        assert psnr_db(clip.frames, run(model, pipeline, seed=3, num_steps=4, loop=loop)) >= EQUAL_DB


@pytest.mark.slow
def test_an_image_that_is_given_stays_the_first_frame(tiny_model, tmp_path, in_process):
    pytest.importorskip("flatbuffers", reason="the stablehlo extra is not installed")
    export_tiny(tiny_model, tmp_path / "out", "stablehlo", settings=GIVEN, stages=PARTS)
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE.height, SIZE.width, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    pipeline, model = Pipeline.from_pretrained(tiny_model), ExportedModel(tmp_path / "out")
    given = {"num_frames": SIZE.num_frames, "height": SIZE.height, "width": SIZE.width}
    clip = pipeline(PROMPT, seed=3, references=str(tmp_path / "first.png"), align="off", **GIVEN, **given)
    image = references.read_reference(str(tmp_path / "first.png"), SIZE.height, SIZE.width)[None]
    z = np.array(noise.initial_noise(3, (1, *model.manifest["sizes"][0]["latents"])))
    z[:, :1] = model.encode(image)
    mask = np.ones(z.shape[:2], np.float32)
    mask[:, 0] = 0
    assert psnr_db(clip.frames, run(model, pipeline, seed=3, noise_BTHWC=z, frame_mask_BT=mask)) >= EQUAL_DB


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
    assert psnr_db(clip.frames, run(model, pipeline, seed=1)) >= EQUAL_DB
    peak = max(stage["peak_rss_bytes"] for stage in model.manifest["stages"])
    assert peak <= 6e9
    assert model.manifest["model"]["networks"]["t5"]["sha256"] == manifest.file_sha256(
        Path(model_directory.__file__).parents[1] / "pocket" / "weights" / "t5" / "network.json"
    )
