"""The time and memory of converting a checkpoint of real size, against copying the same bytes.

Command:  python -m benchmarks.speed.convert_speed stdit3 --scratch SCRATCH --json benchmarks/results/convert_stdit3.json
Needs:    two to three times the checkpoint in disk space and a few minutes; nothing is left behind.
Expect:   at most twice the rival's time; peak memory below 0.5 GB for STDiT3 and 1.5 GB for T5.
Rival:    ``cp`` of the same files followed by ``sync``, alternating with the converter in the same run, both from a cold
          source (the page cache of the files is dropped) and after a pause.

The checkpoints are synthetic, with the names, shapes, dtypes and shard layout of the published ones (their manifests are in
tests/golden): T5-v1.1-XXL as two PyTorch zip shards (19 GB), STDiT3-XL/2 and the VAE as safetensors (4.8 and 1.6 GB).
``start_s`` is the part of the converter's time that does
not depend on the number of bytes: interpreter, imports and the shapes of the network's parameters.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._support.machine import new_folder, write_report
from convert_weights.rules import numpy_dtype
from convert_weights.safetensors_header import SAFETENSORS_DTYPES
from convert_weights.source_config import to_upstream
from sora_jax.config import open_sora_1_2
from tests.support.sources import torch_program

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
MANIFESTS = {"t5": "t5_v1_1_xxl_encoder", "stdit3": "stdit3_xl2", "vae": "opensora_vae_v1_2"}
PEAK_GB = {"t5": 1.5, "stdit3": 0.5, "vae": 0.5}
# A virtual machine hands freed pages back to its host within seconds, and new ones cost more than the disk: without a pause
# only the rival, which writes at once, would find the pages that clearing up has just freed.
PAUSE_S = 6.0


def write_checkpoint(folder: Path, network: str, dtype: str) -> None:
    """Writes a synthetic checkpoint as published; values are drawn once and repeated, which changes no time measured."""
    folder.mkdir(parents=True)
    keys = json.loads((GOLDEN / f"manifest_{MANIFESTS[network]}.json").read_text())["keys"]
    shapes = {name: tuple(entry["shape"]) for name, entry in keys.items()}
    (folder / "config.json").write_text(json.dumps(to_upstream(network, getattr(open_sora_1_2, network))))
    if network == "t5":
        _write_torch_shards(folder, shapes, dtype)
    else:
        _write_safetensors(folder / "model.safetensors", shapes, dtype)


def _values(name: str, shape: tuple[int, ...], dtype: str, noise: np.ndarray) -> Iterator[memoryview]:
    """Yields the bytes of an array: slices of ``noise`` from a start that depends on the name."""
    if name == "rope.freqs":
        freqs = (10000.0 ** -(np.arange(0, 2 * shape[0], 2) / (2 * shape[0]))).astype(np.float32).astype(numpy_dtype(dtype))
        yield freqs.view(np.uint8).data
        return
    left = math.prod(shape)
    start = zlib.crc32(name.removeprefix("encoder.embed_tokens").removeprefix("shared").encode()) % (noise.size // 2)
    while left:
        piece = noise[start : start + min(left, noise.size // 2)]
        yield piece.view(np.uint8).data
        left -= piece.size


def _noise(dtype: str) -> np.ndarray:
    return (0.05 * np.random.default_rng(0).standard_normal(1 << 23, dtype=np.float32)).astype(numpy_dtype(dtype))


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    label = next(label for label, known in SAFETENSORS_DTYPES.items() if known == dtype)
    fields: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * numpy_dtype(dtype).itemsize
        fields[name] = {"dtype": label, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(fields).encode()
    noise = _noise(dtype)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            for piece in _values(name, shape, dtype, noise):
                file.write(piece)


def _write_torch_shards(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    names = list(shapes)
    total = sum(math.prod(shape) for shape in shapes.values())
    first, count = [], 0
    for name in names:
        if count < total / 2:
            first.append(name)
        count += math.prod(shapes[name])
    weight_map = {}
    noise = _noise(dtype)
    for shard, group in enumerate((first, [name for name in names if name not in first]), 1):
        path = folder / f"pytorch_model-{shard:05d}-of-00002.bin"
        weight_map.update(dict.fromkeys(group, path.name))
        tied = {"encoder.embed_tokens.weight": "shared.weight"}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            keys = {name: str(i) for i, name in enumerate(group)}
            keys |= {name: keys[other] for name, other in tied.items() if name in keys and other in keys}
            archive.writestr(f"{path.stem}/data.pkl", torch_program({n: (keys[n], dtype, shapes[n]) for n in group}))
            for name in group:
                if keys[name] != str(group.index(name)):
                    continue
                with archive.open(f"{path.stem}/data/{keys[name]}", "w", force_zip64=True) as entry:
                    for piece in _values(name, shapes[name], dtype, noise):
                        entry.write(piece)
            archive.writestr(f"{path.stem}/version", "3\n")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def drop_caches(folder: Path) -> None:
    """Drops the files of a folder from the page cache, without privileges and without touching other files; then pauses."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    time.sleep(PAUSE_S)


def copy(source: Path, scratch: Path) -> float:
    """Returns the seconds of the rival: ``cp -r`` and ``sync``."""
    drop_caches(source)
    started = time.monotonic()
    subprocess.run(["cp", "-r", source, scratch / "copy"], check=True)
    subprocess.run(["sync"], check=True)
    seconds = time.monotonic() - started
    shutil.rmtree(scratch / "copy")
    return seconds


def convert(network: str, source: Path, scratch: Path, dtype: str) -> tuple[float, float]:
    """Returns the seconds and the peak memory in GB of the converter as a command, interpreter start and ``sync`` included."""
    drop_caches(source)
    return _command([network, str(source), str(scratch / "model"), "--dtype", dtype, "--quiet"])


def verify(scratch: Path) -> tuple[float, float]:
    """Returns the same for comparing every stored value with its checksum, from cold files."""
    drop_caches(scratch / "model")
    return _command(["verify", str(scratch / "model")])


def _command(arguments: list[str]) -> tuple[float, float]:
    """Returns the seconds of ``convert_weights`` in a process of its own, and its VmHWM in GB."""
    program = (
        "import sys; from sora_jax.commands.convert import main; code = main(sys.argv[1:]); "
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')), end=''); sys.exit(code)"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True, cwd=ROOT)
    subprocess.run(["sync"], check=True)
    seconds = time.monotonic() - started
    peak_kib = int(re.search(r"VmHWM:\s+(\d+) kB", result.stdout)[1])  # type: ignore[index]
    return seconds, peak_kib * 1024 / 1e9


def start(network: str) -> float:
    """Returns the seconds until a converter without a checkpoint would be ready to read one."""
    program = (
        "import sys, sora_jax.commands.convert; from sora_jax.config import open_sora_1_2; "
        "from sora_jax.streaming import fitting; fitting.parameter_shapes(sys.argv[1], getattr(open_sora_1_2, sys.argv[1]))"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", program, network], check=True, cwd=ROOT)
    return time.monotonic() - started


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=MANIFESTS)
    parser.add_argument("--source-dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "int8"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=new_folder, required=True, help="a folder that does not exist; removed afterwards")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.scratch.mkdir(parents=True)
    try:
        result = measure(options)
    finally:
        shutil.rmtree(options.scratch)
    write_report(result, options.json, show=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns times, ratio and peak memory, with what they were measured on."""
    source = options.scratch / "source"
    write_checkpoint(source, options.network, options.source_dtype)
    copies, conversions, peaks = [], [], []
    for _ in range(options.repeats):
        copies.append(copy(source, options.scratch))
        seconds, peak_gb = convert(options.network, source, options.scratch, options.dtype)
        conversions.append(seconds)
        peaks.append(peak_gb)
        verified, verify_gb = verify(options.scratch)
        shutil.rmtree(options.scratch / "model")
    return {
        "question": "converting a checkpoint beside copying it",
        "network": options.network,
        "source_dtype": options.source_dtype,
        "stored_dtype": options.dtype,
        "source_gb": sum(path.stat().st_size for path in source.iterdir()) / 1e9,
        "convert_s": {"min": min(conversions), "median": statistics.median(conversions), "all": conversions},
        "cp_and_sync_s": {"min": min(copies), "median": statistics.median(copies), "all": copies},
        "start_s": min(start(options.network) for _ in range(3)),
        "ratio_of_medians": statistics.median(conversions) / statistics.median(copies),
        "verify_s": verified,
        "verify_peak_gb": verify_gb,
        "peak_gb": max(peaks),
        "peak_limit_gb": PEAK_GB[options.network],
    }


if __name__ == "__main__":
    main()
