"""The transformer cut for devices: one row of guidance at a time, captions once, several pairs, several forms of attention."""

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import Pipeline
from sora_jax.commands import main
from sora_jax.export import ExportedModel, check_vectors, consistency, cut, describe, host_program
from sora_jax.export.attention import LOGITS_LIMIT, attention_entry, pair_forms
from sora_jax.export.cut import FORMS, Cut, make_cut
from sora_jax.export.phases import phases, stage_function
from sora_jax.export.program import Stage, with_half_boundary
from sora_jax.export.request import Fields, Request
from sora_jax.export.rows import each_call
from sora_jax.export.stages import PARTS, list_stages
from sora_jax.export.targets import Options
from sora_jax.export.wiring import ContradictionError
from sora_jax.inputs import prompt
from sora_jax.sampling import noise
from sora_jax.storage.checkpoint import save_network
from tests.support.exports import (
    CHECK,
    PROMPT,
    SIZE,
    SMALL,
    complete_manifest,
    export_tiny,
    psnr_db,
    write_folder,
)
from tests.support.tiny_model import CONFIG, random_flat, write_model

pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema (extra stablehlo, onnx or coreml)")

TWO_PAIRS = dataclasses.replace(CONFIG, stdit3=dataclasses.replace(CONFIG.stdit3, depth=2))
SMALLEST = Cut(guidance_rows=1, caption_once=True, pairs_per_package=2, attention_forms=("fused", "breaker"))
Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def whole() -> list[Stage]:
    return list_stages(TWO_PAIRS, [SIZE], parts=("stdit3",))


@pytest.fixture(scope="module")
def smallest() -> list[Stage]:
    forms = pair_forms(SMALLEST, LOGITS_LIMIT, "coreml")
    return list_stages(TWO_PAIRS, [SIZE], parts=("stdit3",), cut=SMALLEST, pair_forms=forms)


def evaluate(stages: list[Stage], values: Arrays, form: str | None, rows: int) -> Any:
    """Returns the velocity of both rows, as a host of these stages computes it."""
    flat = random_flat("stdit3", TWO_PAIRS.stdit3)

    def run(stage: Stage, variant: str, values: Arrays) -> Arrays:
        function = next(one for one in stage.functions if one.variant in (variant, "main") and one.form in (form, None))
        params = {local: jnp.asarray(flat[name]) for local, name in stage.parameters.items()}
        return values | function.call(params, **{name: values[name] for name in function.inputs})

    def step(values: Arrays) -> jax.Array:
        for stage in stages:
            if stage.name == "stdit3_caption":
                values = run(stage, "main", values)
        calls = list(each_call(values, rows))
        for stage in stages:
            if stage.name != "stdit3_caption":
                calls = [run(stage, "merged", call) for call in calls]
        return jnp.concatenate([call["v_RTHWC"] for call in calls])

    return jax.jit(step)(values)


@pytest.mark.usefixtures("little_optimised")
@pytest.mark.ci
def test_every_cut_computes_the_same_velocity(whole, smallest):
    """Both rows in one call and each in its own, captions projected in the front and once: float32 rounding apart."""
    rng = np.random.default_rng(0)
    values = {
        name: rng.standard_normal(spec.shape, np.float32) if name != "mask_BL" else np.float32([[1] * 9 + [0] * 3])
        for name, spec in whole[0].functions[0].inputs.items()
    }
    values |= {
        "t_B": np.float32([700]),
        "fps_B": np.float32([8]),
        "height_px_B": np.float32([16]),
        "width_px_B": np.float32([32]),
    }
    expected = evaluate(whole, values, None, 2)
    assert expected.shape[0] == 2
    assert np.abs(expected[0] - expected[1]).max() > 1e-3  # the rows differ
    np.testing.assert_allclose(evaluate(smallest, values, "breaker", 1), expected, rtol=1e-4, atol=1e-5)


def test_names_layers_and_shapes_follow_from_the_cut(smallest):
    assert [stage.name for stage in smallest] == ["stdit3_caption", "stdit3_front", "stdit3_pairs_00", "stdit3_final"]
    caption, front, pairs, final = smallest
    assert set(caption.parameters.values()) | set(front.parameters.values()) == {
        name for name in random_flat("stdit3", TWO_PAIRS.stdit3) if name.startswith("embed.")
    }
    assert not set(caption.parameters.values()) & set(front.parameters.values())
    assert pairs.layers == ("spatial_blocks.0", "temporal_blocks.0", "spatial_blocks.1", "temporal_blocks.1")
    names = [(one.name, one.variant, one.form, one.base_name) for one in pairs.functions]
    assert names == [
        ("full", "full", "fused", "full"),
        ("merged", "merged", "fused", "merged"),
        ("full_breaker", "full", "breaker", "full"),
        ("merged_breaker", "merged", "breaker", "merged"),
    ]
    rows = {name: spec.shape[0] for stage in (front, pairs, final) for name, spec in stage.functions[0].inputs.items()}
    assert {rows[name] for name in ("x_RTSD", "caption_RLD", "mask_RL", "mod_RF6D", "t_RD")} == {1}
    assert caption.functions[0].outputs["caption_RLD"].shape[0] == 2


def test_a_breaker_splits_the_logits_of_every_attention(smallest):
    """In front of each of the eight softmaxes of two pairs; the converter fuses the other form, or does not."""
    pairs = smallest[2]

    def splits(name: str) -> int:
        function = pairs.function(name)
        traced = jax.make_jaxpr(lambda params, given: function.call(params, **given))
        return str(traced(pairs.program.abstract, function.inputs)).count("split[")

    assert splits("full_breaker") == splits("full") + 8


def test_half_boundaries_change_dtypes_and_nothing_else(whole):
    pair = whole[1].program
    halved = with_half_boundary(pair).functions[0]
    assert {spec.dtype for specs in (halved.inputs, halved.outputs) for spec in specs.values()} == {np.dtype(np.float16)}
    assert {name: spec.shape for name, spec in halved.inputs.items()} == {
        name: spec.shape for name, spec in pair.functions[0].inputs.items()
    }
    out = jax.eval_shape(lambda params, given: halved.call(params, **given), pair.abstract, halved.inputs)
    assert out["x_RTSD"].dtype == np.float16
    ids = list_stages(CONFIG, [SMALL], parts=("t5",))[0].program
    assert with_half_boundary(ids).functions[0].inputs["ids_BL"].dtype == np.int32
    with pytest.raises(ValueError, match="inputs and outputs in float16 need float16 arithmetic; add --precision float16"):
        Options(io_precision="float16")


def manifest_of(stages: list[Stage], made: Cut) -> Any:
    """Returns the tiny manifest with a transformer of these stages, whose functions are all in the file "a"."""
    manifest = complete_manifest()
    entries = [describe.stage_entry(one, Options(), {f.name: {"file": "a"} for f in one.functions}) for one in stages]
    for function in (function for entry in entries for function in entry["functions"]):
        function["checks"] = [CHECK.to_dict()]
    manifest["stages"] = [*manifest["stages"][:3], *entries, *manifest["stages"][-2:]]
    manifest["model"]["networks"]["stdit3"]["config"]["depth"] = 2
    manifest |= {"guidance_rows": made.guidance_rows, "pairs_per_package": made.pairs_per_package}
    manifest["attention"] = attention_entry(TWO_PAIRS, [SIZE], PARTS, LOGITS_LIMIT, made)
    manifest["phases"] = phases([entry["name"] for entry in manifest["stages"]])
    return manifest


def test_a_host_calls_every_stage_once_for_each_row(smallest, tmp_path, monkeypatch):
    model = ExportedModel(write_folder(tmp_path, manifest_of(smallest, SMALLEST)) and tmp_path, keep=False, attention="breaker")
    assert [phase["name"] for phase in model.manifest["phases"]][:3] == ["text", "caption", "step"]
    called: list[tuple[str, str, float]] = []

    def opened(target, contents, stage, function):
        def run(given):
            called.append((stage["name"], function["name"], float(given.get("caption_RLD", np.zeros(1)).ravel()[0])))
            made = {one["name"]: np.zeros(one["shape"], np.float32) for one in function["outputs"]}
            if stage["name"] == "stdit3_caption":
                made["caption_RLD"][1] = 5.0
            if stage["name"] == "stdit3_pairs_00":
                made["x_RTSD"] = made["x_RTSD"] + given["caption_RLD"].ravel()[0]
            if stage["name"] == "stdit3_final":
                made["v_RTHWC"] = made["v_RTHWC"] + given["x_RTSD"].ravel()[0]
            return made

        return run

    monkeypatch.setattr(host_program, "open_function", opened)
    values = model.text(np.zeros((1, 12), np.int32), np.ones((1, 12))) | {"frame_mask_BT": np.ones((1, 6), np.float32)}
    called.clear()
    v = model.velocity(np.zeros((1, 6, 2, 4, 4), np.float32), 500.0, values, guidance=3.0, merged=True)
    assert [(stage, function) for stage, function, _ in called] == [
        *[("stdit3_front", "main")] * 2, *[("stdit3_pairs_00", "merged_breaker")] * 2, *[("stdit3_final", "main")] * 2,
    ]  # fmt: skip
    assert [row for _, _, row in called[2:4]] == [0.0, 5.0]
    assert v.shape == (1, 6, 2, 4, 4)
    np.testing.assert_array_equal(v, 5.0 + 3.0 * (0.0 - 5.0))
    with pytest.raises(ValueError, match=r"has no attention form 'flash'; it has fused, breaker"):
        ExportedModel(tmp_path, attention="flash")


def test_a_manifest_that_contradicts_its_cut_is_refused(smallest):
    def refused(change: Any) -> str:
        made = manifest_of(smallest, SMALLEST)
        change(made)
        with pytest.raises(ContradictionError) as error:
            consistency.check(made)
        return str(error.value)

    consistency.check(manifest_of(smallest, SMALLEST))
    assert "a complete export has" in refused(lambda made: made.update(pairs_per_package=1))
    assert "2 pairs are not packages of 3" in refused(lambda made: made.update(pairs_per_package=3))
    assert "takes caption_RLD as (1, 12, 16), and gets (2, 12, 16)" in refused(lambda made: made.update(guidance_rows=2))
    assert "has attention 'fused'; the manifest has none" in refused(lambda made: made["attention"].pop("forms"))

    def drop_caption(made: Any) -> None:
        made["stages"].pop(3)
        made["phases"] = phases([stage["name"] for stage in made["stages"]])

    assert "one row of guidance at a time needs the stage stdit3_caption" in refused(drop_caption)


def test_the_manifest_says_why_there_is_a_form():
    entry = attention_entry(CONFIG, [SIZE], PARTS, LOGITS_LIMIT, Cut(attention_forms=FORMS["coreml"]))
    assert [form["name"] for form in entry["forms"]] == list(FORMS["coreml"])
    assert all(form["reason"].endswith(".") for form in entry["forms"])
    reports = {report for form in entry["forms"] for report in form["reports"]}
    assert all(report.startswith("https://github.com/") for report in reports)
    assert entry["forms"][-1]["logits_limit_bytes"] == cut.CHUNKED_LOGITS < LOGITS_LIMIT
    assert "forms" not in attention_entry(CONFIG, [SIZE], PARTS, LOGITS_LIMIT)


def test_a_host_takes_the_first_form_unless_another_is_asked_for(smallest):
    entry = describe.stage_entry(smallest[2], Options(), {one.name: {"file": "a"} for one in smallest[2].functions})
    assert stage_function(entry, SIZE.key, "merged")["name"] == "merged"
    assert stage_function(entry, SIZE.key, "merged", "breaker")["name"] == "merged_breaker"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs-per-package", "2"], "pairs per package is 2; the model has 1 pairs, expected one of 1."),
        (["--attention-forms", "fused,plain"], "target stablehlo has no attention form 'fused'; it has plain, chunked."),
        (["--guidance-rows", "3"], "--guidance-rows"),
        (["--io-precision", "float16"], "inputs and outputs in float16 need float16 arithmetic"),
        (["--no-fused-attention", "--attention-forms", "plain"], "fuse_attention (--no-fused-attention) is Core ML's"),
    ],
)
def test_a_cut_that_is_not_possible_is_one_line(tiny_model, tmp_path, capsys, options, message):
    command = ["export", str(tiny_model), str(tmp_path / "out"), "--target", "stablehlo", "--dry-run", *options]
    assert main.main(command) == main.BAD_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_rehearsal_shows_the_functions_of_a_cut(tiny_model, tmp_path, capsys):
    """The inputs of a pair are those of one row: tokens, caption, mask and modulation in float32."""
    cut_options = ["--guidance-rows", "1", "--attention-forms", "plain,chunked", "--pairs-per-package", "1"]
    command = ["export", str(tiny_model), str(tmp_path / "out"), "--target", "stablehlo", "--stages", "stdit3", "--dry-run"]
    assert main.main([*command, *cut_options, "--num-frames", "1"]) == main.OK
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in capsys.readouterr().out.splitlines()[1:-1]]
    inputs = {row[0]: row[3] for row in rows}
    assert list(inputs) == [
        "stdit3_caption main", "stdit3_front main", "stdit3_pair full", "stdit3_pair full_chunked", "stdit3_final main",
    ]  # fmt: skip
    tokens, length, width = 2 * 3, CONFIG.stdit3.model_max_length, CONFIG.stdit3.hidden_size
    expected = 4 * (tokens * width + length * width + length + 6 * width) / 1e3
    assert inputs["stdit3_pair full"] == f"{expected:.2f} kB"


def test_fields_and_request_say_the_same():
    hints, fields = get_type_hints(Fields), {field.name: field.type for field in dataclasses.fields(Request)}
    assert list(hints) == list(fields)
    assert {name: hint for name, hint in hints.items() if name != "target"} == {
        name: kind for name, kind in get_type_hints(Request).items() if name != "target"
    }


def test_one_row_at_a_time_has_its_captions_for_itself():
    forms = ("plain", "plain")
    made = make_cut("onnx", guidance_rows=1, caption_once=False, pairs_per_package=1, attention_forms=forms, depth=4)
    assert made == Cut(guidance_rows=1, caption_once=True, attention_forms=("plain",))
    assert made.reference == Cut(caption_once=True)


CUTS = {
    "stablehlo": {"guidance_rows": 1, "attention_forms": ("plain", "chunked"), "pairs_per_package": 2},
    "onnx": {"guidance_rows": 1, "attention_forms": ("plain", "chunked"), "precision": "float16", "io_precision": "float16"},
    "coreml": {"guidance_rows": 1, "attention_forms": FORMS["coreml"], "precision": "float16", "io_precision": "float16"},
    "coreai": {"guidance_rows": 1, "attention_forms": ("plain", "chunked"), "pairs_per_package": 2},
}
MODULES = {"stablehlo": "flatbuffers", "onnx": "jax2onnx", "coreml": "stablehlo_coreml", "coreai": "coreai_onnx"}


@pytest.mark.slow
@pytest.mark.artefacts
@pytest.mark.parametrize("target", CUTS)
def test_a_cut_export_makes_the_pipelines_clip_as_latents(tmp_path, target, in_process):
    """Every device option of a target at once: gate and vectors pass, and each form makes the pipeline's latents."""
    pytest.importorskip(MODULES[target], reason=f"the {target} extra is not installed")
    model_path = write_model(tmp_path / "model")
    save_network(model_path, "stdit3", TWO_PAIRS.stdit3, random_flat("stdit3", TWO_PAIRS.stdit3), overwrite=True)
    given: dict[str, Any] = {"num_steps": 2, "merge_steps": 1, "leap": "off"}
    options: Any = {"settings": given, "stages": PARTS[:2], "vectors": True, **CUTS[target]}
    made = export_tiny(model_path, tmp_path / "out", target, **options)
    assert made["guidance_rows"] == 1
    assert [row.name for row in check_vectors.rows(ExportedModel(tmp_path / "out", keep=False)) if not row.passed] == []
    pipeline = Pipeline.from_pretrained(model_path)
    size = {"num_frames": SMALL.num_frames, "height": SMALL.height, "width": SMALL.width}
    expected = np.asarray(pipeline(PROMPT, seed=3, **given, **size).latents)
    floor_db = 90.0 if made["precision"] == "float32" else 35.0
    for form in CUTS[target]["attention_forms"]:
        assert psnr_db(expected, latents_of(tmp_path / "out", pipeline, form)) >= floor_db
    if made["precision"] == "float16":
        pair = ExportedModel(tmp_path / "out").stages["stdit3_pair_00"]["functions"]
        assert {one["dtype"] for function in pair for one in (*function["inputs"], *function["outputs"])} == {"float16"}
        assert len({function["vectors"] for function in pair}) == 2  # forms share them


def latents_of(folder: Path, pipeline: Pipeline, form: str) -> np.ndarray:
    """Returns the latents that an export without decoder makes of `PROMPT`, with a form of attention."""
    model = ExportedModel(folder, attention=form)
    text = prompt.prepare_prompt(PROMPT, **model.manifest["tokens"]["scores"])
    ids, mask = pipeline.tokenizer.encode([text], model.manifest["tokens"]["length"])
    z = np.asarray(noise.initial_noise(3, (1, *model.size()["latents"])))
    ones = np.ones(z.shape[:2], np.float32)
    values, sampling = model.text(ids, mask) | {"frame_mask_BT": ones}, model.manifest["sampling"]

    def velocity(z: np.ndarray, time: np.float32, merged: bool) -> np.ndarray:
        return model.velocity(z, float(time), values, guidance=sampling["guidance"], merged=merged)

    return host_program.sample(velocity, z, model.times(model.size(), sampling["num_steps"]), sampling, ones)[0]
