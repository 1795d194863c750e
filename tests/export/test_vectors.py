"""Test vectors of an export: they pass on what they were made with, and find what is not so."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from sora_jax.commands import main
from sora_jax.export import ExportedModel, check_vectors, host_vectors, vectors, worker
from sora_jax.export.contents import ExportFileError
from sora_jax.export.stages import PARTS
from sora_jax.inputs import cleaning
from tests.support.exports import complete_manifest, export_tiny, write_folder

pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema (extra stablehlo, onnx or coreml)")
for module in ("jax2onnx", "onnx", "onnxruntime"):
    pytest.importorskip(module, reason="the onnx extra is not installed")


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text encoder with its vectors, exported once, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sora_jax.export.exporter._run_process",
            lambda folder, names, meter: worker.run_group(folder, names, meter.advance),
        )
        patch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ.get("JAX_COMPILATION_CACHE_DIR", ""))
        folder = tmp_path_factory.mktemp("vectors") / "out"
        export_tiny(tiny_model, folder, "onnx", stages=("t5",), vectors=True)
    return folder


def test_every_function_and_step_has_a_vector_that_passes(exported, capsys):
    assert main.main(["run-exported", str(exported), "--check-vectors"]) == main.OK
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert all(line.startswith("pass  ") for line in lines)
    for name in ("t5_embed main", "t5_block_00 main", "t5_final main", "cleaned captions", "token ids", "noise of seed 0"):
        assert any(line[6:].startswith(name) for line in lines), name
    for name in (
        "times",
        "guidance",
        "dynamic leap with 9 merged steps, step",
        "static leap",
        "scores",
        "loop that leaps",
        "pixels",
    ):
        assert any(line[6:].startswith(name) for line in lines), name
    assert f"all {len(lines)} test vectors passed" in printed.err


def test_the_end_of_merging_delays_the_leap_of_the_same_velocities(exported):
    """The directions turn slowest in step 9, and the third comparison after that leaps; merging ends there and starts anew."""
    leaps = json.loads((exported / vectors.HOST_FILE).read_text())["leap"]
    assert [one["leaps_at"] for one in leaps] == [12, 13, 5, 12]
    assert [sum(cosine is not None for cosine in one["cosines"]) for one in leaps] == [13, 12, 12, 13]
    assert leaps[3]["cosines"][8] == 0
    assert leaps[3]["cosines"][10] == pytest.approx(0.0980067, abs=1e-6)  # the product of the norms is 1e-9


LISTS = ("_BEFORE_FILE_NAMES", "_AFTER_FILE_NAMES", "_LAST")


@pytest.mark.parametrize("name", LISTS)
def test_every_substitution_has_a_caption_that_needs_it(name, monkeypatch):
    """A host that forgets one, and does all others, fails a vector."""
    expected = [cleaning.preprocess_text(text) for text in host_vectors.PROMPTS]
    every = getattr(cleaning, name)
    for left_out in range(len(every)):
        monkeypatch.setattr(cleaning, name, every[:left_out] + every[left_out + 1 :])
        assert [cleaning.preprocess_text(text) for text in host_vectors.PROMPTS] != expected, every[left_out]


def test_a_host_that_does_otherwise_fails_its_row(exported, monkeypatch, capsys):
    monkeypatch.setattr(check_vectors, "schedule_times", lambda steps, shift, unit: np.linspace(unit, 1, steps))
    assert main.main(["run-exported", str(exported), "--check-vectors"]) == main.BAD_INPUT
    printed = capsys.readouterr()
    assert [line[6:11] for line in printed.out.splitlines() if line.startswith("FAIL")] == ["times"]
    assert "1 test vector of " in printed.err
    assert len(printed.err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", [vectors.HOST_FILE, "vectors/t5_final.main.safetensors", "t5_final.safetensors"])
def test_a_flipped_bit_is_refused(exported, name):
    path = exported / name
    data = path.read_bytes()
    changed = bytearray(data)
    changed[-3] ^= 1
    try:
        path.write_bytes(changed)
        with pytest.raises(ExportFileError, match=r"has other bytes than recorded \(sha256\)"):
            list(check_vectors.rows(ExportedModel(exported)))
    finally:
        path.write_bytes(data)


def test_vectors_of_another_function_are_refused(exported):
    model = ExportedModel(exported)
    embed, final = model.stages["t5_embed"]["functions"][0], model.stages["t5_final"]["functions"][0]
    with pytest.raises(ExportFileError, match=r"holds the vectors of 't5_embed main'; the manifest says 't5_final main'"):
        vectors.read_function(model.contents, "t5_final", {**final, "vectors": embed["vectors"]})
    with pytest.raises(ExportFileError, match=r"has arrays .*; the manifest says"):
        vectors.read_function(model.contents, "t5_embed", {**final, "name": "main", "vectors": embed["vectors"]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check-vectors"], "has no test vectors; export it with --vectors on"),
        (["a red circle", "--check-vectors"], "--check-vectors takes no prompt"),
        ([], "no prompt; give a text to make a clip of, or --check-vectors"),
    ],
)
def test_what_cannot_be_checked_says_why(tmp_path, capsys, arguments, message):
    write_folder(tmp_path, complete_manifest())
    assert main.main(["run-exported", str(tmp_path), *arguments]) == main.BAD_INPUT
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.artefacts
@pytest.mark.slow
def test_a_whole_model_has_a_clip_that_its_artefacts_make(tiny_model, tmp_path, in_process):
    made = export_tiny(tiny_model, tmp_path / "out", "onnx", vectors=True, stages=PARTS)
    assert made["vectors"] == {"host": vectors.HOST_FILE, "clip": vectors.CLIP_FILE, "given": vectors.GIVEN_FILE}
    rows = {row.name: row for row in check_vectors.rows(ExportedModel(tmp_path / "out"))}
    assert all(row.passed for row in rows.values())
    assert {"the clip's velocity of step 0", "the clip's velocity of step 1", "the clip's final latents"} <= set(rows)
    assert {"a given frame's latents", "the clip with a given frame, final latents"} <= set(rows)
    functions = sum(len(stage["functions"]) for stage in made["stages"])
    assert sum("vectors" in function for stage in made["stages"] for function in stage["functions"]) == functions
