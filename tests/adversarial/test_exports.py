"""No mutant of an export is run: it is refused in one line that names a file, or makes the values of the export it came from.

Counted are also tracebacks, and mutants that take ten seconds or a gigabyte.  What somebody may change who can write the whole
manifest anew, and what not, is said in `exports`.
"""

import dataclasses
import random
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from sora_jax.export import ExportedModel
from sora_jax.export.contents import ExportFileError
from sora_jax.export.entries import TargetName
from sora_jax.inputs.tokenizer import Tokenizer
from sora_jax.process import resident_bytes, status_bytes
from sora_jax.shell import describe
from tests.adversarial.exports import Folder, Mutation, mutations
from tests.support.exports import PROMPT, save_export
from tests.support.tiny_model import CONFIG

pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema (extra stablehlo, onnx or coreml)")
NEEDED = {
    "stablehlo": ("flatbuffers",),
    "onnx": ("jax2onnx", "onnx", "onnxruntime"),
    "coreml": ("coremltools", "stablehlo_coreml"),
}

REFUSED, EQUAL, OTHER = "refused cleanly", "accepted, every value equal", "accepted, other values"
UNCLEAN, TRACEBACK, SLOW, LARGE = "refused, not in one line that names a file", "traceback", "over 10 CPU seconds", "over 1 GB"
CLASSES = (REFUSED, EQUAL, OTHER, UNCLEAN, TRACEBACK, SLOW, LARGE)
CPU_S, MEMORY_BYTES = 10.0, 10**9
# Two pairs, so that their weights can be swapped.
CONFIG_2 = dataclasses.replace(CONFIG, stdit3=dataclasses.replace(CONFIG.stdit3, depth=2))


def values(folder: Path) -> np.ndarray:
    """Returns what an export makes: features of a caption, and the velocity of a full and of a merged step."""
    model = ExportedModel(folder)
    (size,) = model.manifest["sizes"]
    ids, mask = Tokenizer.from_file(model.tokenizer()).encode([PROMPT], model.manifest["tokens"]["length"])
    z = np.random.default_rng(0).standard_normal((1, *size["latents"])).astype(np.float32)
    guidance, text = model.sampling()["guidance"], model.text(ids, mask)
    steps = [model.velocity(z, 700.0, text, guidance=guidance, merged=merged) for merged in (False, True)]
    return np.concatenate([array.ravel() for array in (text["caption_BLE"], *steps)])


@dataclasses.dataclass(frozen=True)
class Export:
    """An export, its kinds of mutants, and what it makes."""

    folder: Folder
    kinds: Mapping[str, Mutation]
    expected: np.ndarray


def _export(target: TargetName, path: Path) -> Export:
    for module in NEEDED[target]:
        pytest.importorskip(module, reason=f"the {target} extra is not installed")
    save_export(path, target, CONFIG_2)
    return Export(Folder(path), dict(mutations(target)), values(path))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return _export("stablehlo", tmp_path_factory.mktemp("exports") / "tiny")


def verdict(folder: Path, expected: np.ndarray) -> tuple[str, str]:
    """Returns the class of a mutant and what was seen."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of memory
    before, began = resident_bytes() or 0, time.process_time()
    try:
        made = values(folder)
        found = (EQUAL if np.array_equal(made, expected) else OTHER, "")
    except ExportFileError as error:
        line = str(error)
        clean = "\n" not in line and line.isprintable() and str(folder) in line
        found = (REFUSED if clean else UNCLEAN, line)
    except OSError as error:
        found = (REFUSED if str(folder) in describe(error) else UNCLEAN, describe(error))
    except Exception as error:
        found = (TRACEBACK, f"{type(error).__name__}: {error!s:.300}")
    if time.process_time() - began > CPU_S:
        return SLOW, found[1]
    return (LARGE, found[1]) if (status_bytes("VmHWM") or 0) - before > MEMORY_BYTES else found


def attacked(export: Export, seeds: range) -> Counter[str]:
    """Returns the counts of all classes, for every kind of mutant with each seed."""
    counts, faults = Counter(dict.fromkeys(CLASSES, 0)), []
    for kind, mutate in export.kinds.items():
        for seed in seeds:
            mutate(export.folder.path, random.Random(f"{kind} {seed}"))
            found, seen = verdict(export.folder.path, export.expected)
            export.folder.restore()
            counts[found] += 1
            if found not in (REFUSED, EQUAL):
                faults.append(f"{found}: {kind}, seed {seed}: {seen}")
    print("\n".join(f"{count:5d}  {name}" for name, count in counts.items()))  # noqa: T201  # the count is the result
    assert not faults, "\n".join(faults)
    assert counts[EQUAL] <= 0.2 * sum(counts.values()), "mutants that change nothing attack nothing"
    return counts


def test_no_mutant_is_run(export):
    assert sum(attacked(export, range(2)).values()) == 2 * len(export.kinds)


@pytest.mark.slow
def test_no_mutant_of_many_is_run(export):
    assert sum(attacked(export, range(45)).values()) >= 1080


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_no_mutant_of_another_target_is_run(target, tmp_path):
    assert sum(attacked(_export(target, tmp_path / "tiny"), range(5)).values()) >= 120


def test_what_is_restored_is_run_again(export):
    export.kinds["a file cut"](export.folder.path, random.Random(0))
    export.folder.restore()
    assert verdict(export.folder.path, export.expected) == (EQUAL, "")
