"""The converter killed at 50 random moments: the network is absent or complete, and the next attempt finishes.

A helper process forks a converter for each trial; the kernel kills it (SIGKILL) at its n-th opening, renaming, making or
removing of a file, or after a random time.  The bytes are compared with those of an undisturbed conversion.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from convert_weights.checkpoint import convert_checkpoint
from sora_jax.config import T5Config
from sora_jax.storage import writer as network_writer

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
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _convert_and_die(source: Path, model: Path, operation: int, delay_s: float) -> int:
    """Converts and returns the number of audited operations, unless the process is killed at one of them or by the time."""
    count = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, _: object) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            count += 1
            if count == operation:
                die()

    timer = threading.Timer(delay_s, die)
    timer.daemon = True
    timer.start()
    sys.addaudithook(audit)
    convert_checkpoint("t5", source, model, overwrite=True)
    return count


def _in_child(source: Path, model: Path, operation: int = 0, delay_s: float = 600.0) -> tuple[bool, int]:
    """Returns whether a forked converter was killed, and its operations if it was not."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, str(_convert_and_die(source, model, operation, delay_s)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    if not killed and not text:
        raise RuntimeError("the converter failed before it was killed")
    return killed, int(text or 0)


def run_trials(folder: Path) -> dict[str, int]:
    """Kills a converter at random moments, checks what it leaves, finishes; returns how often what was seen."""
    network_writer._BATCH_ARRAYS = 4  # several entries of the journal, as at full size
    source = _write_source(folder / "source")
    convert_checkpoint("t5", source, folder / "new")  # and computes the shapes, so that no child runs JAX
    convert_checkpoint("t5", source, folder / "old", dtype="bfloat16")
    new, old = _contents(folder / "new" / "t5"), _contents(folder / "old" / "t5")
    started = time.monotonic()
    _, operations = _in_child(source, folder / "undisturbed")
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
        seen["killed"] += _in_child(source, model, **moment)[0]
        found = _contents(model / "t5")
        state = "absent" if not (model / "t5").exists() else "new" if found == new else "old"
        assert state != "old" or (replaces and found == old), where
        seen[state] += 1
        journal = model / ".t5.journal"
        seen["journal"] += journal.exists() and len(journal.read_text().splitlines()) > 1
        convert_checkpoint("t5", source, model, overwrite=True)
        assert _contents(model / "t5") == new, where
        left = {path.name for path in model.iterdir()} - {"t5", "model.json"}
        assert left <= {".model.lock"}, (where, left)
        shutil.rmtree(model)
    return seen


def test_killed_at_random_moments(tmp_path: Path) -> None:
    program = "import json, pathlib, sys; from tests.convert_weights.test_convert_killed import run_trials"
    program += "; print(json.dumps(run_trials(pathlib.Path(sys.argv[1]))))"
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert seen["killed"] >= TRIALS * 0.8, seen
    assert min(seen["absent"], seen["old"], seen["new"], seen["journal"]) >= 1, seen
