"""The parity runner itself: it must fail on everything that is wrong, and say so without a traceback."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.parity import limits, runner
from tests.parity.__main__ import main
from tests.parity.fixtures import FixtureError, find_suites, is_input, missing_tensors, read_json, read_tensors

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A suite whose reference computes ``out = 2 x`` and ``mid.count``, in place of t5; returns its folder."""
    folder = tmp_path / "t5"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"cases": {"one": {}, "two": {}}}))
    for number, name in enumerate(("one", "two")):
        x = np.random.default_rng(number).standard_normal((3, 4), dtype=np.float32)
        save_file({"in.x": x, "out": 2 * x, "mid.count": np.arange(3)}, folder / f"{name}.safetensors")

    def compute(folder: Path, case: str) -> dict[str, np.ndarray]:
        x = read_tensors(folder / f"{case}.safetensors")["in.x"]
        return {"out": 2 * x, "mid.count": np.arange(len(x), dtype=np.int32)}

    def cases(folder: Path) -> dict[str, Path]:
        return {name: folder / f"{name}.safetensors" for name in read_json(folder / "config.json")["cases"]}

    module = SimpleNamespace(cases=cases, compute=compute)
    monkeypatch.setattr(runner, "load_suite", lambda name: module)
    return SimpleNamespace(folder=folder, module=module)


def alter(path: Path, **changes: np.ndarray | None) -> None:
    """Rewrites a safetensors file with some tensors replaced, or dropped where None."""
    tensors = {**load_file(path), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def test_an_intact_folder_passes(suite, capsys):
    assert main([str(suite.folder)]) == 0
    assert main([str(suite.folder.parent)]) == 0
    assert "2 cases: 2 pass, 0 fail, 0 pending; 4 rows" in capsys.readouterr().out


CORRUPTIONS = {
    "altered value": lambda folder: alter(
        folder / "one.safetensors", out=2.001 * load_file(folder / "one.safetensors")["in.x"]
    ),
    "altered input": lambda folder: alter(folder / "one.safetensors", **{"in.x": np.ones((3, 4), np.float32)}),
    "altered integer": lambda folder: alter(folder / "one.safetensors", **{"mid.count": np.asarray([0, 1, 3])}),
    "NaN": lambda folder: alter(folder / "one.safetensors", out=np.full((3, 4), np.nan, np.float32)),
    "NaN in the input": lambda folder: alter(folder / "one.safetensors", **{"in.x": np.full((3, 4), np.nan, np.float32)}),
    "infinity": lambda folder: alter(folder / "one.safetensors", out=np.full((3, 4), np.inf, np.float32)),
    "shape": lambda folder: alter(folder / "one.safetensors", out=load_file(folder / "one.safetensors")["out"].reshape(4, 3)),
    "size one": lambda folder: alter(folder / "one.safetensors", out=np.zeros(1, np.float32)),
    "output missing": lambda folder: alter(folder / "one.safetensors", out=None),
    "all outputs missing": lambda folder: alter(folder / "one.safetensors", out=None, **{"mid.count": None}),
    "input missing": lambda folder: alter(folder / "one.safetensors", **{"in.x": None}),
    "unknown tensor": lambda folder: alter(folder / "one.safetensors", **{"mid.other": np.zeros(2, np.float32)}),
    "truncated": lambda folder: (folder / "one.safetensors").write_bytes((folder / "one.safetensors").read_bytes()[:-20]),
    "empty file": lambda folder: (folder / "one.safetensors").write_bytes(b""),
    "case without file": lambda folder: (folder / "one.safetensors").unlink(),
    "file without case": lambda folder: shutil.copy(folder / "one.safetensors", folder / "three.safetensors"),
    "case dropped from config": lambda folder: (folder / "config.json").write_text('{"cases": {"two": {}}}'),
    "case added to config": lambda folder: (folder / "config.json").write_text('{"cases": {"one": {}, "two": {}, "x": {}}}'),
    "damaged config": lambda folder: (folder / "config.json").write_text('{"cases": {"two"'),
    "config of another kind": lambda folder: (folder / "config.json").write_text("[]"),
    "no config": lambda folder: (folder / "config.json").unlink(),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corrupted_folder_fails(suite, capsys, corruption):
    CORRUPTIONS[corruption](suite.folder)
    assert main([str(suite.folder)]) == 1
    captured = capsys.readouterr()
    assert "fail" in captured.out
    assert "Traceback" not in captured.out + captured.err


def test_an_exception_in_the_code_under_test_is_a_failure(suite):
    suite.module.compute = lambda folder, case: 1 / 0
    assert [row.note for row in runner.run_folder(suite.folder)] == 2 * ["ZeroDivisionError: division by zero"]


REAL_CORRUPTIONS = {
    "weights truncated": lambda t5: (t5 / "state_dict.safetensors").write_bytes(
        (t5 / "state_dict.safetensors").read_bytes()[:999]
    ),
    "weights missing": lambda t5: (t5 / "state_dict.safetensors").unlink(),
    "a weight missing": lambda t5: alter(t5 / "state_dict.safetensors", **{"encoder.final_layer_norm.weight": None}),
    "a weight too many": lambda t5: alter(t5 / "state_dict.safetensors", other=np.zeros(3, np.float32)),
    "a weight NaN": lambda t5: alter(t5 / "state_dict.safetensors", **{"encoder.final_layer_norm.weight": np.full(64, np.nan)}),
    "ids missing": lambda t5: alter(t5 / "nomask.safetensors", **{"in.input_ids": None}),
    "config entry missing": lambda t5: (t5 / "config.json").write_text('{"cases": {"nomask": {}}, "config": {"d_model": 64}}'),
}


@pytest.mark.parametrize("corruption", REAL_CORRUPTIONS)
def test_a_real_suite_fails_on_corrupted_files(tmp_path, corruption):
    shutil.copytree(GOLDEN / "t5", tmp_path / "t5")
    REAL_CORRUPTIONS[corruption](tmp_path / "t5")
    case = next(case for case in runner.list_cases("t5", tmp_path / "t5") if case.name == "nomask")
    assert {row.verdict for row in runner.run_case(case)} == {runner.FAIL}


@pytest.mark.parametrize("change", [{"num_frames": {}}, {"num_frames": {"2s": 52}}, {"image_size": {"144p": {"3:8": None}}}])
def test_json_fixtures_fail_where_a_value_or_a_section_is_wrong(tmp_path, change):
    (tmp_path / "shapes").mkdir()
    content = json.loads((GOLDEN / "shapes" / "shapes.json").read_text())
    (tmp_path / "shapes" / "shapes.json").write_text(json.dumps(content))
    assert main([str(tmp_path / "shapes")]) == 0
    (tmp_path / "shapes" / "shapes.json").write_text(json.dumps({**content, **change}))
    assert main([str(tmp_path / "shapes")]) == 1


def test_pending_fails_unless_allowed(suite, capsys):
    compute = suite.module.compute

    def partly(folder: Path, case: str) -> dict[str, np.ndarray]:
        if case == "two":
            raise runner.NotYet("leap")
        return compute(folder, case)

    suite.module.compute = partly
    assert main([str(suite.folder)]) == 1
    assert main([str(suite.folder), "--allow-pending"]) == 0
    assert "two" in capsys.readouterr().out


def test_nothing_run_is_unusable(suite, tmp_path, capsys):
    def pending(folder: Path, case: str) -> dict[str, np.ndarray]:
        raise runner.NotYet("nothing here")

    suite.module.compute = pending
    assert main([str(suite.folder), "--allow-pending"]) == 2
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert main([str(tmp_path / "absent")]) == 2
    shutil.copytree(suite.folder, tmp_path / "t5x")
    assert main([str(tmp_path)]) == 2
    assert "t5x; the known suites are" in capsys.readouterr().err


def test_json_report_holds_every_number(suite, tmp_path):
    assert main([str(suite.folder), "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["exit_status"] == 0
    assert report["counts"] == {"pass": 4}
    row = next(row for row in report["rows"] if row["case"] == "one" and row["tensor"] == "out")
    assert row["limit_rel_l2"] == 1e-5
    assert row["max_abs"] == row["rel_l2"] == 0.0
    assert main([str(suite.folder), "--json", str(tmp_path / "no" / "folder.json")]) == 2


def test_dump_holds_computed_values_under_the_fixtures_keys(suite, tmp_path):
    compute = suite.module.compute

    def transposed(folder: Path, case: str) -> dict[str, np.ndarray]:
        computed = compute(folder, case)
        return {**computed, "out": np.asfortranarray(computed["out"])}

    suite.module.compute = transposed
    assert main([str(suite.folder), "--dump", str(tmp_path / "dump")]) == 0
    dumped = load_file(tmp_path / "dump" / "t5" / "one.safetensors")
    reference = load_file(suite.folder / "one.safetensors")
    np.testing.assert_array_equal(dumped["out"], reference["out"])
    assert dumped.keys() == {"out", "mid.count"}


def test_max_abs_limit_grows_with_the_reference_but_never_shrinks():
    limit = limits.Limit(max_abs=1e-3, rel_l2=1.0, rms=2.0)
    assert [limit.max_abs_at(rms) for rms in (0.1, 2.0, 6.0)] == [1e-3, 1e-3, 3e-3]
    assert limits.Limit(max_abs=1e-3, rel_l2=1.0).max_abs_at(50.0) == 1e-3
    reference = np.full(10, 6.0)
    assert limits.compare(reference + 2.9e-3, reference, limit).passed
    assert not limits.compare(reference + 3.1e-3, reference, limit).passed


def test_relative_l2_decides_where_max_abs_would_pass():
    limit = limits.Limit(max_abs=1.0, rel_l2=1e-3)
    reference = np.zeros(100)
    reference[0] = 1.0
    assert limits.compare(reference + 0.9e-4, reference, limit).passed
    assert not limits.compare(reference + 1.1e-4, reference, limit).passed
    assert not limits.compare(np.full(3, 1e-9), np.zeros(3), limit).passed, "no error is small against zero"
    assert limits.compare(np.zeros(3), np.zeros(3), limit).passed


def test_every_output_of_every_fixture_has_a_limit():
    for suite, folder in find_suites(GOLDEN).items():
        for path in folder.glob("*.safetensors"):
            if path.name != "state_dict.safetensors":
                for key in filter(lambda key: not is_input(key), load_file(path)):
                    limits.limit_for(suite, path.stem, key)
    with pytest.raises(KeyError, match=r"no limit for other/case/out"):
        limits.limit_for("other", "case", "out")


def test_no_tensor_is_missing_from_the_golden_fixtures():
    for suite, folder in find_suites(GOLDEN).items():
        for case in runner.list_cases(suite, folder):
            if case.path.suffix == ".safetensors":
                assert missing_tensors(suite, case.name, runner.config_entry(case), load_file(case.path)) == []


def test_units_and_masked_samplings_need_each_of_their_outputs():
    assert missing_tensors("vae", "units", {}, ["a.in", "a.out", "b.in"]) == ["b.out"]
    assert missing_tensors("tdtm", "merge_fn", {}, ["T4.in", "T4.merged"]) == ["T4.unmerged"]
    masked = {"frame_mask": [[0]], "leap_index": None}
    inputs = ["in.z", "in.y", "in.mask", "in.arg.ar", "in.arg.fps", "in.arg.height", "in.arg.num_frames", "in.arg.width"]
    assert missing_tensors("rflow", "m", masked, [*inputs, "out.final", "out.v", "out.z_in"]) == [
        "out.noise",
        "out.timesteps",
        "out.x_mask",
        "out.z_after",
    ]
    assert missing_tensors("vae", "d", {"mids": {"temporal_out": []}}, ["in.x", "out"]) == ["mid.temporal_out"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "t5").write_text("")
    with pytest.raises(FixtureError, match="is not a folder"):
        find_suites(tmp_path / "t5")
