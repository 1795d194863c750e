"""The benchmark for a lent accelerator, at toy width on the CPU, where nothing but JAX and its companions is installed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks._support import accelerator_work
from benchmarks._support.accelerator_cases import GUIDANCE
from benchmarks._support.accelerator_work import peak_flop_per_s, works
from benchmarks._support.random_network import gflop
from tests.support.safetensors_file import load_file

ROOT = Path(__file__).parents[2]
MISSING = ("av", "ftfy", "tokenizers", "sentencepiece", "PIL", "safetensors", "bs4", "beartype", "torch")
# Runs a module, or imports names, as on a machine that lacks the packages.
BLOCKER = f"""
import importlib.abc, runpy, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
NETWORKS = (
    "networks.t5",
    "networks.stdit3",
    "networks.vae.codec",
    "pipeline.velocity",
    "sampling.sampler",
    "streaming.network",
)


def child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKER + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_package_and_the_networks_need_no_package_for_videos_or_texts() -> None:
    done = child("import sora_jax\n" + "\n".join(f"import sora_jax.{name}" for name in NETWORKS))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_every_case_runs_at_toy_width_with_jax_alone(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    code = "sys.argv[0] = 'accelerator'; runpy.run_module('benchmarks.speed.accelerator', run_name='__main__')"
    done = child(code, "--tiny", "--platform", "cpu", "--repeats", 1, "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(out.read_text())["results"]
    assert {name for name, found in results.items() if "failed" in found} == set(), results
    assert {name for name, found in results.items() if "left_out" in found} == {"pocket_clip"}  # its tokenizer
    candidates = results["pair_480p"]["candidates"]
    assert candidates["torch"] == {"left_out": "needs the package torch"}
    assert "needs a gpu" in candidates["cudnn"]["left_out"]
    assert candidates["chunked"]["rel_l2"] == 0.0  # fewer queries than a chunk
    assert results["fixtures"]["suites"]["stdit3"]["within_card_limit"]
    # bfloat16 rounds to 2^-8, programs of other boundaries otherwise, and guidance multiplies the difference of its two rows.
    assert results["streamed_evaluation"]["rel_l2_to_resident"] < GUIDANCE * 2**-8


def test_a_run_without_an_accelerator_needs_a_file() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.accelerator", "--platform", "cpu"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode != 0
    assert done.stderr.strip().splitlines() == ["error: no accelerator at full size; name a file with --out."]


def test_the_arithmetic_is_that_of_the_other_benchmarks() -> None:
    work = works(tiny=False)["256p"]
    whole = gflop(work.config.stdit3, rows=2, frames=15, side=32)
    ends = whole.pop("embedding and final layer")
    assert 28e-9 * work.pair_flop() == pytest.approx(sum(whole.values()))
    assert 0 < ends < 0.01 * sum(whole.values())
    assert works(tiny=False)["480p"].places == 30 * 53


def test_a_card_outside_the_table_has_no_peak() -> None:
    assert peak_flop_per_s("NVIDIA H100 80GB HBM3", "bfloat16") == pytest.approx(989.4e12)
    assert peak_flop_per_s("cpu", "bfloat16") is None
    assert peak_flop_per_s("TPU v5 lite", "float32") is None


def test_fixtures_are_read_as_the_package_reads_them() -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    path = ROOT / "tests" / "golden" / "stdit3" / "plain.safetensors"
    expected, found = safetensors.load_file(path), load_file(path)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_distances_are_relative() -> None:
    assert accelerator_work.relative_l2([3.0, 4.0], [3.0, 4.0]) == 0
    assert accelerator_work.relative_l2([0.0, 0.0], [3.0, 4.0]) == 1
