"""Core AI assets in Apple's own runtime: the floors, shared weights, and what is refused when one is opened."""

import dataclasses
import gc
import importlib.metadata
import math
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from sora_jax import Pipeline
from sora_jax.commands import main
from sora_jax.export import ExportedModel, coreai, coreai_open
from sora_jax.export.contents import Contents, ExportFileError
from sora_jax.export.opening import MissingExtraError, open_function
from sora_jax.export.targets import Options
from sora_jax.pipeline.model_file import POCKET
from sora_jax.storage.directory import open_network
from sora_jax.storage.quantisation import SCALE_SUFFIX
from tests.support.exports import PROMPT, frames_of, psnr_db, save_export
from tests.support.tiny_model import CONFIG

pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema (extra stablehlo, onnx or coreml)")
for module in ("coreai", "coreai_onnx", "jax2onnx", "onnx"):
    pytest.importorskip(module, reason="the coreai extra is not installed")

SMALL = dataclasses.replace(CONFIG, stdit3=dataclasses.replace(CONFIG.stdit3, model_max_length=4))
IDS, MASK = np.arange(4, dtype=np.int32)[None], np.float32([[1, 1, 1, 0]])


def asset_bytes(folder: Path, stage: str) -> int:
    return sum(path.stat().st_size for path in (folder / f"{stage}.aimodel").iterdir())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coreai") / "text"
    save_export(folder, "coreai", SMALL, parts=("t5",))
    return folder


def test_what_is_opened_is_a_copy_and_a_changed_asset_is_refused(text, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(text, folder)
    model = ExportedModel(folder)
    expected = model.text(IDS, MASK)["caption_BLE"]
    path = folder / "t5_block_00.aimodel" / "main.mlirb"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    np.testing.assert_array_equal(model.text(IDS, MASK)["caption_BLE"], expected)
    with pytest.raises(ExportFileError, match=r"t5_block_00\.aimodel/main\.mlirb has other bytes than recorded"):
        ExportedModel(folder).text(IDS, MASK)


def test_an_asset_of_another_stage_function_or_shape_is_named(text):
    model = ExportedModel(text)
    embed, final = model.stages["t5_embed"], model.stages["t5_final"]
    function = final["functions"][0]

    def refused(stage, function):
        with pytest.raises(ExportFileError) as error:
            open_function("coreai", model.contents, stage, function)
        return str(error.value)

    assert "holds the stage 't5_final'; the manifest says 't5_embed'" in refused(embed, function)
    other = {**function, "name": "full", "artefact": {**function["artefact"], "function": "full"}}
    assert "has no function 'full'; it has main" in refused(final, other)
    longer = {**function, "inputs": [{**function["inputs"][0], "shape": [1, 5, 16]}]}
    assert "has the input x_BLE as float32[1, 4, 16]; the manifest says float32[1, 5, 16]" in refused(final, longer)


def test_an_asset_that_is_none_is_named(text, tmp_path):
    shutil.copytree(text / "t5_final.aimodel", tmp_path / "t5_final.aimodel")
    final = ExportedModel(text).stages["t5_final"]
    program = tmp_path / "t5_final.aimodel" / "main.mlirb"
    program.write_bytes(b"none")
    with pytest.raises(ExportFileError, match=r"main\.mlirb is not the program that its asset was saved with"):
        open_function("coreai", Contents(tmp_path, None), final, final["functions"][0])
    program.unlink()
    with pytest.raises(ExportFileError, match=r"t5_final\.aimodel lacks main\.mlirb; export again"):
        open_function("coreai", Contents(tmp_path, None), final, final["functions"][0])


def test_functions_that_are_open_together_share_one_model(text):
    gc.collect()  # what refused programs of other tests left, in the cycles of their errors
    final = ExportedModel(text).stages["t5_final"]
    first, second = (
        open_function("coreai", Contents(text, None), final, function)
        for function in (final["functions"][0], final["functions"][0])
    )
    x = np.random.default_rng(0).standard_normal((1, 4, CONFIG.t5.d_model)).astype(np.float32)
    np.testing.assert_array_equal(first({"x_BLE": x})["caption_BLE"], second({"x_BLE": x})["caption_BLE"])
    assert sum(model.path == text / "t5_final.aimodel" for model in coreai_open._models.values()) == 1
    del first, second
    assert not any(model.path == text / "t5_final.aimodel" for model in coreai_open._models.values())


def test_the_runtime_prints_nothing_and_ends_with_python(text):
    """Left to itself it writes a line for every function, and aborts a process that ends right after a call."""
    lines = (
        "import sys, numpy as np\nfrom sora_jax.export.host_program import ExportedModel\n"
        "ExportedModel(sys.argv[1]).text(np.arange(4, dtype=np.int32)[None], np.ones((1, 4), np.float32))\n"
    )
    done = subprocess.run([sys.executable, "-c", lines, str(text)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_other_versions_and_weights_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="target coreai has no weights 'lut6'; it has float, int8"):
        coreai.check_options(Options(weights="lut6"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0.0b2")
    with pytest.raises(MissingExtraError, match=r"coreai-core is 1\.0\.0b2, expected .*pip install 'sora_jax\[coreai\]'"):
        coreai.check_options(Options())


def test_the_extra_pins_the_versions():
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = dict(re.findall(r"(coreai-\w+)==(\S+)", "\n".join(extras["coreai"])))
    assert pins == coreai_open.VERSIONS


@pytest.mark.slow
@pytest.mark.artefacts
@pytest.mark.parametrize(("weights", "floor_db"), [("float", 90.0), ("int8", 40.0)])
def test_pocket_makes_its_clip_in_apples_runtime(tmp_path, weights, floor_db):
    given = {"num_steps": 4, "merge_steps": 2, "leap": "off"}
    out, clip = tmp_path / "out", tmp_path / "clip.npz"
    command = ["export", "pocket", str(out), "--target", "coreai", "--steps", "4", "--merge-steps", "2", "--weights", weights]
    assert main.main(command) == main.OK
    assert main.main(["run-exported", str(out), PROMPT, "--seed", "1", "-o", str(clip)]) == main.OK
    assert main.main(["run-exported", str(out), "--check-vectors"]) == main.OK
    pair = ExportedModel(out).stages["stdit3_pair_00"]
    checks = [check for function in pair["functions"] for check in function["checks"]]
    assert [function["name"] for function in pair["functions"]] == ["full", "merged"]
    assert {check["floor_db"] for check in checks} == {100.0 if weights == "float" else 35.0}
    assert {check["case"] for check in checks} == {"captured", "outliers"}
    assert (min(check["psnr_db"] for check in checks) < 80.0) == (weights == "int8")  # really rounded
    parameters = open_network(POCKET, "stdit3").parameters.items()
    first_pair = [one for name, one in parameters if "_blocks.0." in name and not name.endswith(SCALE_SUFFIX)]
    one_copy = sum(4 * math.prod(one.shape) for one in first_pair)
    assert asset_bytes(out, "stdit3_pair_00") <= {"float": 1.1, "int8": 0.35}[weights] * one_copy  # full and merged
    pipeline, model = Pipeline.from_pretrained(), ExportedModel(out)
    expected = pipeline(PROMPT, seed=1, **given).frames
    assert psnr_db(expected, np.load(clip)["frames"][None]) >= floor_db
    assert psnr_db(expected, frames_of(model, pipeline, seed=1)) >= floor_db
