"""The check that no artefact escapes, and the manifest that fits its schema."""

import copy
import math

import numpy as np
import pytest

from sora_jax.export import check, manifest
from sora_jax.export.host_program import LeapState, schedule_times
from sora_jax.export.job import groups, parameter_bytes
from sora_jax.export.size import Size
from sora_jax.export.stages import list_stages
from sora_jax.pipeline.settings import Settings
from sora_jax.sampling.leap import Leap
from sora_jax.sampling.schedule import Schedule
from tests.support.tiny_model import CONFIG

pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema (extra stablehlo, onnx or coreml)")

SIZE = Size(num_frames=20, height=16, width=32)
SETTINGS = Settings.resolve({"fps": 8, "height": 16, "width": 32, "num_frames": 20, "num_steps": 4, "guidance": 3.0}, {})


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_psnr_is_the_peak_over_the_root_mean_square_error():
    expected = np.float64([0.0, -4.0])
    psnr_db, relative = check.difference(expected, expected + np.float64([0.04, -0.04]))
    assert psnr_db == pytest.approx(20 * math.log10(4 / 0.04))
    assert relative == pytest.approx(0.04 * math.sqrt(2) / 4)
    assert check.difference(expected, expected) == (check.MAX_DB, 0.0)


@pytest.mark.parametrize("got", [[0.0, np.nan], [np.inf, -4.0]])
def test_nan_and_infinity_never_pass(got):
    (one,) = check.compare("captured", {}, {"v": np.float64([0.0, -4.0])}, {"v": np.asarray(got)}, check.Limits(-1000.0, 1e9))
    assert not math.isfinite(one.relative_l2)
    assert one.psnr_db == -check.MAX_DB


def test_what_passes_through_hides_no_error():
    """Tokens of size 100 to which a block adds 1: a block that adds nothing is far from right."""
    x = 100 * random(1, 3, 4, 12)
    update = random(1, 3, 4, 12)
    (one,) = check.compare("captured", {"x_RTSD": x}, {"x_RTSD": x + update}, {"x_RTSD": x}, check.Limits(30.0, 0.1))
    assert one.measured == "update"
    assert one.relative_l2 == pytest.approx(1, rel=1e-4)
    assert not one.passed
    with pytest.raises(
        check.CheckError, match=r"stage full: output x_RTSD .* error of 1 .* at least 30 dB and at most 0\.1; nothing was kept"
    ):
        check.require_passed("stage full", [one])


def test_outliers_are_in_two_channels_and_left_out_of_the_comparison():
    x, mask = random(1, 3, 4, 12), np.ones((1, 5), np.float32)
    moved = check.with_outliers({"x_RTSD": x, "mask_RL": mask})
    assert check.with_outliers({"mask_RL": mask}) is None
    where = np.flatnonzero((moved["x_RTSD"] != x).any(axis=(0, 1, 2)))
    assert tuple(where) == check.outlier_channels(12)
    out = moved["x_RTSD"] + 1
    wrong = out.copy()
    wrong[..., where] += 5
    (one,) = check.compare("outliers", moved, {"x_RTSD": out}, {"x_RTSD": wrong}, check.Limits(100.0, 1e-3))
    assert one.passed


def test_an_output_of_another_shape_is_an_error():
    with pytest.raises(check.CheckError, match=r"output v has shape \(3,\); expected \(2,\)"):
        check.compare("captured", {}, {"v": np.zeros(2)}, {"v": np.zeros(3)}, check.Limits(0.0, 1.0))


def complete_manifest() -> dict:
    stages = list_stages(CONFIG, [SIZE])
    one = check.Check(
        case="captured", output="x", measured="output", psnr_db=120.0, relative_l2=0.0, floor_db=100.0, ceiling_l2=1e-3
    )
    entries = [
        manifest.stage_entry(
            stage,
            "float32",
            [manifest.function_entry(f, {"file": "a"}, [one.to_dict()]) for f in stage.functions],
            1,
        )
        for stage in stages
    ]
    return {
        "format_version": 1,
        "target": "onnx",
        "precision": "float32",
        "weights": {"dtype": "float", "stored_dtype": {"t5": "int8"}, "dequantised": True},
        "made_by": manifest.versions(["numpy"]),
        "model": {"name": "tiny", "licence": None, "networks": {"t5": {"config": CONFIG.t5.to_dict(), "sha256": "0" * 64}}},
        "tokens": {"length": 12, "file": None, "scores": {"aes": 6.5, "flow": None, "camera_motion": None}},
        "sizes": [manifest.size_entry(CONFIG, SIZE, SETTINGS)],
        "sampling": manifest.sampling_entry(SETTINGS),
        "phases": manifest.phases([entry["name"] for entry in entries]),
        "stages": entries,
        "sampler": None,
        "files": {"a": {"bytes": 1, "sha256": "0" * 64}},
        "total_bytes": 1,
        "notes": ["not run anywhere"],
    }


def test_a_manifest_is_read_back_and_its_faults_are_named(tmp_path):
    made = complete_manifest()
    manifest.write(tmp_path, made)
    with pytest.raises(manifest.ManifestError, match="a is missing; copy the whole folder"):
        manifest.read(tmp_path)
    (tmp_path / "a").write_bytes(b"x")
    assert manifest.read(tmp_path) == made
    assert [phase["name"] for phase in made["phases"]] == ["text", "step", "decode_chunk", "decode_frame"]
    assert [chunk["variant"] for chunk in made["sizes"][0]["chunks"]] == ["frames_17", "frames_3"]
    for change, place in (("sampling", r"\$.sampling"), ("stages", r"\$.stages\[0\]")):
        broken = copy.deepcopy(made)
        (broken[change] if change == "sampling" else broken[change][0])["extra"] = 1
        with pytest.raises(manifest.ManifestError, match=place):
            manifest.validate(broken)
    with pytest.raises(manifest.ManifestError, match=r"has no manifest\.json"):
        manifest.read(tmp_path / "elsewhere")


def test_times_follow_the_rule_of_the_manifest():
    made = {"sampling": manifest.sampling_entry(SETTINGS)}
    size = manifest.size_entry(CONFIG, SIZE, SETTINGS)
    for num_steps in (4, 7):
        expected = Schedule.open_sora(num_steps, height_px=16, width_px=32, num_frames=20).visited
        # The rule multiplies what the schedule rounds once more: two float32 roundings.
        np.testing.assert_allclose(schedule_times(made, size, num_steps), expected, rtol=3e-7)


@pytest.mark.parametrize("given", [{"leap": "released"}, {"solver": "ab2"}])
def test_a_loop_that_is_not_exported_is_refused(given):
    with pytest.raises(ValueError, match="export"):
        manifest.sampling_entry(Settings.resolve({"fps": 8}, given))


def test_the_host_leaps_where_the_sampler_does():
    """Cosines rise, then stop: the fourth comparison in a row without a better one would be too late."""
    leap = {"mode": "dynamic", "index": None, "tolerance": 1e-4, "min_share": 0.5, "patience": 3}
    cosines = [0.5, 0.6, 0.6, 0.6, 0.6, 0.6]
    state, rule, carry = LeapState(leap, 12), Leap.dynamic().rule(12), Leap.dynamic().rule(12).start(1)
    assert state.first == int(rule.first) == 5
    for step, cosine in enumerate([0.0] * 5 + cosines):
        before, v = np.float32([1, 0]), np.float32([cosine, math.sqrt(1 - cosine**2)])
        compared = np.asarray([step >= 5])
        flags = {"comparable_B": compared, "may_leap_B": compared, "restart": np.bool_(False)}
        carry, leaps_B = rule.decide(carry, np.float32([cosine]), step=np.int32(step), **flags)
        assert state.leaps(step, v, before) == bool(leaps_B[0])
        if leaps_B[0]:
            break
    assert step == 9


def test_a_process_gets_stages_until_its_bytes_are_used():
    stages = list_stages(CONFIG, [SIZE])
    names = [stage.name for stage in stages]
    assert groups(stages, 0) == [[name] for name in names]
    assert groups(stages, 10**9) == [names]
    made = groups(stages, parameter_bytes(stages[0]))
    assert [name for group in made for name in group] == names
