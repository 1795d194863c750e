"""StableHLO: programs that need JAX and NumPy only, serve other lengths than those exported, and hold the whole loop."""

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from sora_jax import Pipeline
from sora_jax.commands import main
from sora_jax.export import ExportedModel, check, exporter, stablehlo, stablehlo_sampler, weight_file
from sora_jax.export.contents import Contents
from sora_jax.export.entries import FunctionEntry, StageEntry
from sora_jax.export.program import Function, load_parameters
from sora_jax.export.stages import PARTS, list_stages
from sora_jax.inputs import references
from sora_jax.networks.merging import Merge
from sora_jax.sampling import noise
from sora_jax.storage.checkpoint import load_network, save_network
from sora_jax.storage.directory import open_network
from tests.support.exports import EQUAL_DB, PROMPT, SMALL, export_tiny, frames_of, psnr_db
from tests.support.tiny_model import CONFIG

pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema (extra stablehlo, onnx or coreml)")
pytest.importorskip("flatbuffers", reason="the stablehlo extra is not installed")

GIVEN = {"num_steps": 6, "merge_steps": 2, "leap": "dynamic"}


def run_by_documented_lines(
    contents: Contents, function: FunctionEntry, stages: Sequence[StageEntry], values: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """In place of `resident.run`: the lines of the modules' descriptions, in an interpreter that cannot import this package."""
    folder, dtypes = contents.folder, {tensor["name"]: tensor["dtype"] for tensor in function["inputs"]}
    np.savez(folder / "given.npz", **{name: np.asarray(values[name], dtype) for name, dtype in dtypes.items()})
    python_alone(
        documented(stablehlo).split("call = ")[0]
        + 'given = dict(np.load("given.npz"))\n'
        + documented(stablehlo_sampler).replace("sampler.dynamic.jaxexport", function["artefact"]["file"])
        + 'made = run(params, given)\nnp.savez("made.npz", **made)\n',
        folder,
    )
    return dict(np.load(folder / "made.npz"))


def documented(module: Any) -> str:
    """Returns the lines of code in a module's description."""
    return textwrap.dedent(module.__doc__.split("::\n\n")[1].split("\nInvariant")[0])


def python_alone(lines: str, folder: Path) -> None:
    """Runs lines in a new interpreter in a folder, where the import of anything of this package or its friends fails."""
    blocked = 'import sys\nfor name in ("sora_jax", "flax", "safetensors", "onnx"):\n    sys.modules[name] = None\n'
    done = subprocess.run([sys.executable, "-c", blocked + lines], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_documented_lines_need_jax_and_numpy_only(tiny_model, tmp_path, in_process):
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


def test_a_directory_of_int8_is_multiplied_out_once_and_says_so(tiny_model, tmp_path, in_process):
    shutil.copytree(tiny_model, tmp_path / "model")
    config, flat = load_network(tiny_model, "t5")
    save_network(tmp_path / "model", "t5", config, flat, dtype="int8", overwrite=True)
    made = export_tiny(tmp_path / "model", tmp_path / "out", "stablehlo", stages=("t5",))
    assert made["weights"]["dequantised"]
    assert made["weights"]["stored_dtype"]["t5"] == "int8"
    stored = weight_file.read(tmp_path / "out" / "t5_block_00.safetensors")["attn.q.kernel"]
    np.testing.assert_array_equal(stored, load_network(tmp_path / "model", "t5")[1]["block.0.attn.q.kernel"])


def positional(function: Function) -> Callable[..., Any]:
    def call(params: Any, given: Any) -> Any:
        return function.call(params, **given)

    return call


@pytest.mark.slow
@pytest.mark.artefacts
def test_lengths_that_are_symbolic_may_be_others(tiny_model):
    """A pair of blocks, exported for one row of 2 x 4 tokens and 12 words, on three rows of 5 tokens and 7 words."""
    stage = next(stage for stage in list_stages(CONFIG, [SMALL], parts=("stdit3",)) if stage.name == "stdit3_pair_00")
    params = load_parameters(open_network(tiny_model, "stdit3"), stage)
    rng, lengths = np.random.default_rng(0), {"R": 3, "S": 5, "L": 7}
    for function in stage.functions:
        inputs = stablehlo.symbolic_inputs(function.inputs, stablehlo.SYMBOLIC["stdit3_pair"])
        saved = stablehlo.serialise(positional(function), stage.program.abstract, inputs, name="pair")
        shapes = {name: [lengths.get(str(n), n) for n in spec.shape] for name, spec in inputs.items()}
        given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        made = jax.export.deserialize(bytearray(saved)).call(params, given)["x_RTSD"]
        expected = jax.jit(function.call)(params, **given)["x_RTSD"]
        np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.artefacts
@pytest.mark.slow
def test_a_sampler_that_merges_otherwise_is_refused(tiny_model, tmp_path, monkeypatch, in_process):
    """All stages are right, and the first step without merging too."""
    monkeypatch.setattr(stablehlo_sampler, "MERGE", Merge(temporal=False))
    with pytest.raises(check.CheckError, match=r"sampler static: output z_BTHWC \(two_steps inputs\)"):
        export_tiny(tiny_model, tmp_path / "out", "stablehlo", stages=("stdit3",))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_image_alone_can_be_exported(tiny_model, tmp_path, in_process):
    """One frame of latents, of which nothing can be merged."""
    given = {"num_frames": 1, "height": SMALL.height, "width": SMALL.width}
    exporter.export(tiny_model, tmp_path / "out", target="stablehlo", **given)
    pipeline, model = Pipeline.from_pretrained(tiny_model), ExportedModel(tmp_path / "out")
    clip = pipeline(PROMPT, seed=3, num_steps=4, **given)
    for loop in ("stages", "sampler"):
        assert psnr_db(clip.frames, frames_of(model, pipeline, seed=3, num_steps=4, loop=loop)) >= EQUAL_DB


@pytest.mark.slow
def test_an_image_that_is_given_stays_the_first_frame(tiny_model, tmp_path, in_process):
    export_tiny(tiny_model, tmp_path / "out", "stablehlo", settings=GIVEN, stages=PARTS)
    pixels = np.random.default_rng(0).integers(0, 256, (SMALL.height, SMALL.width, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    pipeline, model = Pipeline.from_pretrained(tiny_model), ExportedModel(tmp_path / "out")
    given = {"num_frames": SMALL.num_frames, "height": SMALL.height, "width": SMALL.width}
    clip = pipeline(PROMPT, seed=3, references=str(tmp_path / "first.png"), align="off", **GIVEN, **given)
    image = references.read_reference(str(tmp_path / "first.png"), SMALL.height, SMALL.width)[None]
    z = np.array(noise.initial_noise(3, (1, *model.manifest["sizes"][0]["latents"])))
    z[:, :1] = model.encode(image)
    mask = np.ones(z.shape[:2], np.float32)
    mask[:, 0] = 0
    assert psnr_db(clip.frames, frames_of(model, pipeline, seed=3, noise_BTHWC=z, frame_mask_BT=mask)) >= EQUAL_DB
    command = ["run-exported", str(tmp_path / "out"), PROMPT, "--seed", "3", "--reference-path", str(tmp_path / "first.png")]
    assert main.main([*command, "-o", str(tmp_path / "clip.npz")]) == main.OK
    assert psnr_db(clip.frames, np.load(tmp_path / "clip.npz")["frames"][None]) >= EQUAL_DB
