"""What is opened: weights are copies, and nothing of the networks or the sampler is needed to run an export."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sora_jax.export import ExportedModel
from sora_jax.export.contents import ExportFileError
from tests.support.exports import save_export
from tests.support.tiny_model import CONFIG

pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema (extra stablehlo, onnx or coreml)")
NEEDED = {"stablehlo": ["flatbuffers"], "onnx": ["jax2onnx", "onnx", "onnxruntime"]}
SMALL = dataclasses.replace(CONFIG, stdit3=dataclasses.replace(CONFIG.stdit3, model_max_length=4))
IDS, MASK = np.arange(4, dtype=np.int32)[None], np.float32([[1, 1, 1, 0]])


@pytest.fixture(params=["stablehlo", "onnx"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for module in NEEDED[request.param]:
        pytest.importorskip(module, reason=f"the {request.param} extra is not installed")
    save_export(tmp_path / "out", request.param, SMALL, parts=("t5",))
    return tmp_path / "out"


def test_a_copy_over_an_open_export_changes_nothing_and_is_refused_by_the_next(folder):
    """Left to itself onnxruntime maps the file of weights, and a write into it would show at once."""
    model = ExportedModel(folder)
    expected = model.text(IDS, MASK)["caption_BLE"]
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        with path.open("r+b") as file:
            file.seek(start)
            file.write(bytes(len(data) - start))
    np.testing.assert_array_equal(model.text(IDS, MASK)["caption_BLE"], expected)
    with pytest.raises(ExportFileError, match=r"t5_embed\.safetensors has other bytes than recorded"):
        ExportedModel(folder).text(IDS, MASK)


def test_an_export_runs_without_networks_sampler_and_pipeline(tmp_path):
    pytest.importorskip("flatbuffers", reason="the stablehlo extra is not installed")
    save_export(tmp_path / "out", "stablehlo", SMALL, parts=("t5",))
    lines = (
        "import sys, numpy as np\nfrom sora_jax.export.host_program import ExportedModel\n"
        "model = ExportedModel(sys.argv[1])\n"
        "model.text(np.arange(4, dtype=np.int32)[None], np.ones((1, 4), np.float32))\nprint(*sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", lines, str(tmp_path / "out")], capture_output=True, text=True, check=True)
    rooms = {name.split(".")[1] for name in done.stdout.split() if name.startswith("sora_jax.")}
    assert not rooms & {"networks", "sampling", "pipeline", "streaming", "pocket", "commands"}
