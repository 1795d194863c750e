"""A model exported to Core ML goes through one full step from its manifest: text, both rows of the transformer, the decoder."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="the coreml extra (coremltools, stablehlo-coreml) is not installed")
pytest.importorskip("stablehlo_coreml", reason="the coreml extra (coremltools, stablehlo-coreml) is not installed")
pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema (the coreml extra)")

from sora_jax import Pipeline
from sora_jax.export import ExportedModel, check, exporter
from sora_jax.export.size import Size
from sora_jax.inputs import prompt
from sora_jax.sampling import noise

PROMPT = "a red circle moves right on a blue background"
SIZE = Size(num_frames=5, height=16, width=32)
# Guidance multiplies the difference of two rows by 7, and what is rounded in it.
LATENTS_DB = {"float32": 90.0, "float16": 40.0}


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_one_step_is_the_pipelines(tiny_model: Path, tmp_path: Path, precision: Any) -> None:
    size = {"num_frames": SIZE.num_frames, "height": SIZE.height, "width": SIZE.width}
    made = exporter.export(tiny_model, tmp_path / "out", target="coreml", precision=precision, **size)
    assert any("Apple hardware" in note for note in made["notes"])
    pipeline = Pipeline.from_pretrained(tiny_model)
    model = ExportedModel(tmp_path / "out", keep=False)
    settings = pipeline.resolve({})
    text = prompt.prepare_prompt(PROMPT, aes=settings.aes, flow=settings.flow, camera_motion=settings.camera_motion)
    ids, mask = pipeline.tokenizer.encode([text], model.manifest["tokens"]["length"])
    z = np.asarray(noise.initial_noise(3, (1, *model.manifest["sizes"][0]["latents"])))
    for merge_steps in (0, 1):
        expected = pipeline(PROMPT, seed=3, num_steps=1, merge_steps=merge_steps, **size)
        result = model(ids, mask, z, num_steps=1, merge_steps=merge_steps)
        psnr_db, _ = check.difference(np.asarray(expected.latents, np.float64), result.latents_BTHWC.astype(np.float64))
        assert psnr_db >= LATENTS_DB[precision]
        assert np.isfinite(result.frames_Bthw3).all()


@pytest.mark.slow
def test_what_coremltools_logs_on_import_reaches_no_user() -> None:
    lines = """if True:
        import logging
        from sora_jax.export import coreml_open
        with coreml_open._without_notes():
            import coremltools
        assert logging.root.manager.disable == logging.NOTSET
    """
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
