"""The converter killed at 50 random moments, and right before and behind each of its publications.

The network is absent or complete, never without its tokenizer, and the next attempt finishes and clears up.  A helper process
forks a converter for each trial; the kernel kills it (SIGKILL) at its n-th opening, renaming, making or removing of a file, or
after a random time.  The bytes are compared with those of an undisturbed conversion.
"""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert_weights import parameter_shapes
from convert_weights.checkpoint import convert_checkpoint
from convert_weights.to_torch import to_torch
from sora_jax import files
from sora_jax.config import T5Config
from sora_jax.storage import writer as network_writer
from sora_jax.storage.checkpoint import save_network
from sora_jax.storage.directory import open_network, read_model_file
from tests.support.killed import PUBLICATIONS, in_a_process_without_threads, in_child

TRIALS = 50

CONFIG = T5Config(
    vocab_size=16,
    d_model=8,
    d_kv=4,
    num_heads=2,
    d_ff=12,
    num_layers=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    layer_norm_epsilon=1e-6,
)


def _write_source(folder: Path) -> Path:
    matrices = {f"layer.0.SelfAttention.{x}": (8, 8) for x in "qkvo"}
    matrices |= {f"layer.1.DenseReluDense.{x}": (12, 8) for x in ("wi_0", "wi_1")} | {"layer.1.DenseReluDense.wo": (8, 12)}
    norms = {f"layer.{i}.layer_norm": (8,) for i in range(2)}
    shapes = {f"encoder.block.{i}.{name}.weight": shape for i in range(2) for name, shape in (matrices | norms).items()}
    shapes |= {"shared.weight": (16, 8), "encoder.final_layer_norm.weight": (8,)}
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (8, 2)
    folder.mkdir()
    draw = np.random.default_rng(0)
    save_file(
        {name: draw.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "feed_forward_proj": "gated-gelu", **CONFIG.to_dict()}))
    (folder / "tokenizer.json").write_text('{"model": "a tokenizer"}')
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    """Returns every file's bytes but the lock's, which may outlive a killed process and holds nothing."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".model.lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _convert(source: Path, model: Path) -> None:
    convert_checkpoint("t5", source, model, overwrite=True)


def _write_back(model: Path, out: Path) -> None:
    to_torch(open_network(model, "t5"), out)


def _save(_: Path, model: Path) -> None:
    """Replaces a network by arrays in memory, as training does."""
    shapes = parameter_shapes("t5", CONFIG)
    flat = {name: np.full(shape, number, np.float32) for number, (name, shape) in enumerate(shapes.items())}
    save_network(model, "t5", CONFIG, flat, overwrite=True)


def run_trials(folder: Path) -> dict[str, int]:
    """Kills a converter at random moments, checks what it leaves, finishes; returns how often what was seen."""
    _skip_the_disk()
    network_writer._BATCH_ARRAYS = 4  # several entries of the journal, as at full size
    source = _write_source(folder / "source")
    convert_checkpoint("t5", source, folder / "new")  # and computes the shapes, so that no child runs JAX
    convert_checkpoint("t5", source, folder / "old", dtype="bfloat16")
    new, old, whole = _contents(folder / "new" / "t5"), _contents(folder / "old" / "t5"), _contents(folder / "new")
    started = time.monotonic()
    _, operations = in_child(_convert, source, folder / "undisturbed")
    duration_s = time.monotonic() - started
    seed = int.from_bytes(os.urandom(4), "little")
    draw = np.random.default_rng(seed)
    seen = {"killed": 0, "absent": 0, "old": 0, "new": 0, "journal": 0}
    for trial in range(TRIALS):
        model = folder / "model"
        if replaces := trial % 3 == 2:
            shutil.copytree(folder / "old", model)
        moment = (
            {"delay_s": draw.uniform(0, duration_s)} if trial % 5 == 4 else {"operation": int(draw.integers(1, operations + 1))}
        )
        where = f"seed {seed}, trial {trial}, {moment}"
        seen["killed"] += in_child(_convert, source, model, **moment)[0]
        found = _contents(model / "t5")
        state = "absent" if not (model / "t5").exists() else "new" if found == new else "old"
        assert state != "old" or (replaces and found == old), where
        seen[state] += 1
        journal = model / ".t5.journal"
        seen["journal"] += journal.exists() and len(journal.read_text().splitlines()) > 1
        _expect_whole(model, where)
        files.remove_leftovers.cache_clear()  # as in the next process
        _convert(source, model)
        assert _contents(model) == whole, where
        shutil.rmtree(model)
    return seen


def _expect_whole(model: Path, where: object) -> None:
    """Checks that a network that is visible has its tokenizer, and that the index names it."""
    if (model / "t5" / "network.json").exists():
        assert (model / "tokenizer.json").read_text() == '{"model": "a tokenizer"}', where
        assert read_model_file(model)["tokenizer"] == "tokenizer.json", where


def _skip_the_disk() -> None:
    """Spares this process the waiting for the disk: a process that is killed loses nothing that the system has."""
    os.sync = os.fsync = lambda *_: None  # type: ignore[assignment]


def run_publications(folder: Path) -> dict[str, int]:
    """Kills at each publication of a conversion, of one that replaces, of a save, and of the way back; returns how many."""
    _skip_the_disk()
    source = _write_source(folder / "source")
    convert_checkpoint("t5", source, folder / "new")
    convert_checkpoint("t5", source, folder / "old", dtype="bfloat16")
    in_child(_write_back, folder / "new", folder / "back")  # tensorstore, once used here, would forbid to fork
    shutil.copytree(folder / "old", folder / "saved")
    in_child(_save, source, folder / "saved")
    new, back, counts = _contents(folder / "new"), _contents(folder / "back"), {}
    for name, act, begin, expected in (
        ("converted", _convert, None, new),
        ("replaced", _convert, folder / "old", new),
        ("saved", _save, folder / "old", _contents(folder / "saved")),
        ("written back", _write_back, None, back),
    ):
        given = folder / "new" if act is _write_back else source
        target, operation, killed = folder / "target", 0, True
        while killed:
            operation += 1
            if begin:
                shutil.copytree(begin, target)
            killed, _ = in_child(act, given, target, operation=operation, events=PUBLICATIONS)
            where = f"{name}, before publication {operation}"
            if act is not _write_back:
                whole = [_contents(folder / model / "t5") for model in ("old", "new", "saved")]
                assert _contents(target / "t5") in ({}, *whole), where
                _expect_whole(target, where)
            files.remove_leftovers.cache_clear()
            if act is not _write_back:
                act(given, target)
            elif not (target / "model.safetensors").exists():
                in_child(act, given, target)
            else:
                files.remove_leftovers(target)
            assert _contents(target) == expected, where
            shutil.rmtree(target)
        counts[name] = operation - 1
    return counts


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    seen = in_a_process_without_threads(__name__, "run_trials", tmp_path)
    assert seen["killed"] >= TRIALS * 0.8, seen
    assert min(seen["absent"], seen["old"], seen["new"], seen["journal"]) >= 1, seen


@pytest.mark.ci
def test_killed_between_any_two_publications(tmp_path: Path) -> None:
    counts = in_a_process_without_threads(__name__, "run_publications", tmp_path)
    assert counts["converted"] >= 5, counts  # journal, tokenizer, index, network, index again, and what is cleared up
    assert counts["replaced"] > counts["converted"], counts
    assert counts["saved"] >= 4, counts  # the old network goes, the new one comes, the index, and what is cleared up
    assert counts["written back"] >= 3, counts  # configuration, tokenizer, weights
