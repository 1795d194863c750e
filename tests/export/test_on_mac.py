"""What lies beside the artefacts for a Mac, as far as Linux can see it: syntax, what it says of itself, and its arithmetic."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from sora_jax.export import check, on_mac, vectors, verify_on_mac


@pytest.mark.parametrize("target", ["coreml", "coreai"])
def test_both_files_are_written_and_say_that_they_were_never_run(tmp_path, target):
    on_mac.write(tmp_path, target)
    script, verify = tmp_path / on_mac.COMPILE_FILE, tmp_path / on_mac.VERIFY_FILE
    assert script.read_text().splitlines()[1].startswith("# NEVER RUN SO FAR.")
    assert verify.read_text().startswith('"""NEVER RUN SO FAR.')
    subprocess.run(["sh", "-n", str(script)], check=True)
    compile(verify.read_text(), str(verify), "exec")


def test_the_shell_passes_every_program_to_the_compiler(tmp_path):
    on_mac.write(tmp_path, "coreai")
    for name in ("t5_final.aimodel", "with space.aimodel"):
        (tmp_path / name).mkdir()
    xcrun = tmp_path / "bin" / "xcrun"
    xcrun.parent.mkdir()
    xcrun.write_text('#!/bin/sh\necho "$3"\n')
    xcrun.chmod(0o755)
    environment = {"PATH": f"{xcrun.parent}:/usr/bin:/bin"}
    done = subprocess.run([str(tmp_path / on_mac.COMPILE_FILE)], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["t5_final.aimodel", "with space.aimodel"]


@pytest.mark.parametrize("target", ["stablehlo", "onnx"])
def test_other_targets_have_neither(tmp_path, target):
    on_mac.write(tmp_path, target)
    assert not list(tmp_path.iterdir())


def test_its_errors_are_those_of_the_check():
    rng = np.random.default_rng(0)
    given = {"x": rng.standard_normal((2, 3))}
    expected = {"x": given["x"] + rng.standard_normal((2, 3)), "y": rng.standard_normal(4)}
    outputs = {name: array + 1e-3 * rng.standard_normal(array.shape) for name, array in expected.items()}
    checks = check.compare("captured", given, expected, outputs, check.LIMITS["float32"])
    worst_db, worst_l2 = verify_on_mac.errors(given, expected, outputs)
    assert worst_db == pytest.approx(min(one.psnr_db for one in checks), abs=1e-9)
    assert worst_l2 == pytest.approx(max(one.relative_l2 for one in checks), abs=1e-12)
    assert verify_on_mac.errors(given, expected, {**outputs, "y": np.full(4, np.nan)}) == (-200.0, np.inf)


def test_the_table_passes_fails_and_goes_on(tmp_path, monkeypatch, capsys):
    """With a stand-in for the framework: one function is right, one is wrong, one does not run."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3)).astype(np.float32)
    functions: list[dict[str, Any]] = [
        {
            "name": name,
            "artefact": {"file": "a.aimodel", "function": name, "output_suffix": "_out"},
            "inputs": [{"name": "x", "shape": [3], "dtype": "float32"}],
            "vectors": vectors.write_function(tmp_path, "pair", name, {"x": x}, {"y": y}),
            "checks": [{"floor_db": 35.0, "ceiling_l2": 0.1}],
        }
        for name in ("right", "wrong", "missing")
    ]
    content = {"target": "coreai", "stages": [{"name": "pair", "functions": functions}]}
    (tmp_path / "manifest.json").write_text(json.dumps(content))

    def run(path, function, given):
        np.testing.assert_array_equal(given["x"], x)
        if function["name"] == "missing":
            raise RuntimeError("no such function")
        return {"y_out": y if function["name"] == "right" else 0 * y}, 0.002, ""

    monkeypatch.setattr(verify_on_mac, "in_core_ai", run)
    assert verify_on_mac.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines] == ["pass", "FAIL", "FAIL"]
    assert "RuntimeError: no such function" in lines[2]


def test_it_needs_nothing_of_this_package(tmp_path):
    on_mac.write(tmp_path, "coreai")
    lines = "import sys, runpy; runpy.run_path(sys.argv[1]); sys.exit(any(name.startswith('sora_jax') for name in sys.modules))"
    path = str(tmp_path / on_mac.VERIFY_FILE)
    subprocess.run([sys.executable, "-I", "-c", lines, path], check=True, cwd=tmp_path)
