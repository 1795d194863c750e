"""One mesh over several processes of this machine, connected by its loopback interface.

Two of them decide and read in the default run; whole clips, with two and four, are slow.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_jax.devices.mesh import is_spread
from sora_jax.pipeline.latents_file import load_latents
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.storage import arrays
from sora_jax.storage.arrays import Parameter
from sora_jax.storage.checkpoint import load_network
from sora_jax.storage.directory import open_network
from sora_jax.storage.reader import Reader
from tests.devices.processes import OPTIONS, PROMPT, together
from tests.support.tiny_model import write_model

MOST_ERROR = 1e-5  # float32, another order of sums


@pytest.fixture(scope="module")
def model_in_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in blocks of at most 256 bytes, so that parts of its matrices can be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "BLOCK_BYTES", 256)
        return write_model(tmp_path_factory.mktemp("blocks"))


@pytest.mark.ci
def test_two_processes_decide_alike_and_read_only_their_rows(model_in_blocks: Path) -> None:
    """A process reads its rows of every spread matrix, and what stays whole."""
    first, second = together(2, "decisions", model_in_blocks, "guidance=2")
    assert first["decided"] == second["decided"] == ["process", 0]
    assert first["refused"] == ["FileExistsError", "it exists"]
    assert second["refused"] == ["RefusedElsewhereError", "process 0: it exists"]
    assert first["failed"] == ["ElsewhereError", "process 1: nothing"]
    assert second["failed"] == ["KeyError", "'nothing'"]
    assert first["unfailed"] is second["unfailed"] is None
    assert first["bytes"] == second["bytes"] == [5000, 0]
    assert (first["whole"], second["whole"]) == (True, True)
    stored = open_network(model_in_blocks, "stdit3").parameters
    spread = [entry for entry in stored.values() if is_spread(entry.shape, 2)]
    whole = sum(entry.nbytes for entry in stored.values() if not is_spread(entry.shape, 2))
    assert first["held"] == second["held"] == whole + sum(entry.nbytes for entry in spread) // 2
    for process, seen in enumerate((first, second)):
        assert seen["read"] == whole + sum(block_bytes(entry, process) for entry in spread)
    assert first["read"] < 0.7 * sum(entry.nbytes for entry in stored.values())
    _, flat = load_network(model_in_blocks, "stdit3")
    sums = {name: float(np.abs(x).sum(dtype=np.float64)) for name, x in flat.items() if x.ndim > 1}
    assert first["sums"] == second["sums"] == pytest.approx(sums, rel=1e-12)


def block_bytes(entry: Parameter, process: int) -> int:
    """Returns the bytes of the blocks that hold the first or the second half of a matrix."""
    half, rows = entry.shape[0] // 2, entry.rows or 1
    return (-(-(process + 1) * half // rows) - process * half // rows) * entry.block_bytes


def test_rows_of_a_matrix_are_its_slice(model_in_blocks: Path) -> None:
    manifest = open_network(model_in_blocks, "stdit3")
    _, flat = load_network(model_in_blocks, "stdit3")
    name = next(name for name, entry in manifest.parameters.items() if len(entry.blocks) > 3)
    num_rows = len(flat[name])
    for start, stop in ((0, num_rows), (1, num_rows - 1), (3, 4)):
        np.testing.assert_array_equal(Reader(manifest).slice(name, start, stop), flat[name][start:stop])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "axes", "weights"),
    [
        (2, 1, "sequence=2", "replicated"),
        (2, 1, "guidance=2", "spread"),
        (2, 2, "guidance=2,sequence=2", "spread"),
        (4, 1, "guidance=2,sequence=2", "replicated"),
        (4, 1, "sequence=4", "replicated"),
    ],
)
def test_a_clip_over_processes_is_that_of_one(
    tiny_model: Path, tmp_path: Path, count: int, devices: int, axes: str, weights: str
) -> None:
    """An error of one process's callback ends all at the same step; then one file of latents, and one cache, are written."""
    seen = together(count, "sample", tiny_model, axes, weights, tmp_path / "out", tmp_path / "cache", devices=devices)
    assert seen[1]["stopped"] == ["ValueError", "enough of this"]
    others = [one["stopped"] for process, one in enumerate(seen) if process != 1]
    assert others == [["RefusedElsewhereError", "process 1: enough of this"]] * (count - 1)
    assert [one["cached"] for one in seen] == [1, *[0] * (count - 1)]
    assert len({one["latents"] for one in seen}) == 1
    alone = Pipeline.from_pretrained(tiny_model)(PROMPT, **OPTIONS)
    saved, parameters = load_latents(tmp_path / "out.npz")
    assert parameters[0]["mesh"] == axes
    with np.load(tmp_path / "out-frames.npz") as made:
        frames, latents = made["frames"], made["latents"]
    np.testing.assert_array_equal(saved, latents)
    assert error(latents, alone.latents) <= MOST_ERROR
    assert np.abs(frames.astype(int) - alone.frames).max() <= 1  # rounding to 256 values


def error(got: np.ndarray, expected: Any) -> float:
    return float(np.linalg.norm(got - np.asarray(expected, np.float64)) / np.linalg.norm(expected))
