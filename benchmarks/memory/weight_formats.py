"""CPU time, memory and disk of converting T5-XXL in the formats that circulate.

Command:  python -m benchmarks.memory.weight_formats --scratch SCRATCH --json benchmarks/results/weight_formats.json
Needs:    30 GB of disk at a time and a few minutes for each format; nothing is left behind.
Expect:   peak memory at most 1.6 GB from float16, less for what is stored as int8; decoding costs a few nanoseconds of CPU a
          parameter.
Rival:    the same encoder in float16, which needs no decoding.  Wall time is recorded; `benchmarks.speed.convert_speed`
          measures it against ``cp``.

The files are synthetic, with the released names and shapes (tests/golden): one file of float16, eight-bit floats without and
with scales, and GGUF of Q8_0.  Values repeat, which changes nothing that is measured.
"""

import argparse
import json
import math
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._support.machine import new_folder, write_report
from sora_jax.config import open_sora_1_2
from tests.support.formats import E4M3, gguf_name, gguf_writer, is_matrix

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "tests" / "golden" / "manifest_t5_v1_1_xxl_encoder.json"
_NOISE_VALUES = 1 << 23
_BLOCK, _BLOCK_BYTES = 32, 34  # of Q8_0
# Each format with the stored dtypes it is converted to.
FORMATS: dict[str, tuple[str, ...]] = {
    "float16": ("float32", "int8"),
    "float8_e4m3fn": ("int8",),
    "scaled float8_e4m3fn": ("int8",),
    "GGUF Q8_0": ("int8",),
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Returns the arrays of the encoder; the second name of the embedding is left out, as in most single files."""
    keys = json.loads(MANIFEST.read_text())["keys"]
    return {name: tuple(entry["shape"]) for name, entry in keys.items() if name != "encoder.embed_tokens.weight"}


def noise(dtype: np.dtype) -> np.ndarray:
    """Returns values that all arrays repeat."""
    return (0.05 * np.random.default_rng(0).standard_normal(_NOISE_VALUES, dtype=np.float32)).astype(dtype)


def repeated(values: np.ndarray, nbytes: int) -> Iterator[memoryview]:
    """Yields ``nbytes`` of an array's bytes, again and again from its beginning."""
    raw = values.reshape(-1).view(np.uint8)
    while nbytes:
        piece = raw[: min(nbytes, raw.size)]
        yield piece.data
        nbytes -= piece.size


def write_safetensors(path: Path, kind: str) -> None:
    """Writes the encoder as one safetensors file: matrices in eight bits unless ``kind`` is float16."""
    half, eight = noise(np.dtype(np.float16)), noise(E4M3)
    pieces: dict[str, tuple[str, tuple[int, ...], np.ndarray]] = {}
    for name, shape in shapes().items():
        packed = kind != "float16" and is_matrix(name)
        pieces[name] = ("F8_E4M3", shape, eight) if packed else ("F16", shape, half)
        if packed and kind.startswith("scaled"):
            pieces[name.removesuffix("weight") + "scale_weight"] = ("F32", (), np.full(1, 0.5, np.float32))
    if kind.startswith("scaled"):
        pieces["scaled_fp8"] = ("F8_E4M3", (2,), eight)
    fields, offset = {}, 0
    for name, (label, shape, values) in pieces.items():
        nbytes = math.prod(shape) * values.itemsize
        fields[name] = {"dtype": label, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(fields).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, shape, values in pieces.values():
            for piece in repeated(values, math.prod(shape) * values.itemsize):
                file.write(piece)


def write_gguf(path: Path, kind: str) -> None:
    """Writes the encoder as GGUF: matrices and embedding as Q8_0, the rest float32."""
    import gguf

    blocks = np.empty((_NOISE_VALUES // _BLOCK, _BLOCK_BYTES), np.uint8)
    blocks[:, :2] = np.full(1, 4e-4, np.float16).view(np.uint8)
    blocks[:, 2:] = np.random.default_rng(0).integers(0, 256, (len(blocks), _BLOCK), np.uint8)
    plain = noise(np.dtype(np.float32))
    writer = gguf_writer(path, open_sora_1_2.t5)
    sizes: list[tuple[np.ndarray, int]] = []
    for name, shape in shapes().items():
        packed = is_matrix(name) or name == "shared.weight"
        values, nbytes = (blocks, math.prod(shape) // _BLOCK * _BLOCK_BYTES) if packed else (plain, 4 * math.prod(shape))
        raw = gguf.GGMLQuantizationType.Q8_0 if packed else gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), nbytes, raw_dtype=raw)
        sizes.append((values, nbytes))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "ab") as file:
        for values, nbytes in sizes:
            file.write(bytes(-file.tell() % 32))
            for piece in repeated(values, nbytes):
                file.write(piece)


WRITERS: Mapping[str, Callable[[Path, str], None]] = {
    kind: write_gguf if kind.startswith("GGUF") else write_safetensors for kind in FORMATS
}


def convert(source: Path, model: Path, dtype: str) -> dict[str, Any]:
    """Returns CPU and wall seconds and VmHWM of the converter as a command."""
    program = (
        "import sys; from sora_jax.commands.convert import main; code = main(sys.argv[1:]); "
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')), end=''); sys.exit(code)"
    )
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    arguments = [str(source), str(model), "--dtype", dtype, "--quiet"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "wall_s": time.monotonic() - started,
        "peak_gb": int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) * 1024 / 1e9,  # type: ignore[index]
        "model_gb": sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) / 1e9,
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default=",".join(FORMATS), help="some of them, separated by commas")
    parser.add_argument("--scratch", type=new_folder, required=True, help="a folder that does not exist; removed afterwards")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for kind in options.formats.split(","):
        options.scratch.mkdir(parents=True)
        try:
            source = options.scratch / ("t5xxl.gguf" if kind.startswith("GGUF") else "t5xxl.safetensors")
            WRITERS[kind](source, kind)
            os.sync()
            for dtype in FORMATS[kind]:
                row = {"format": kind, "stored": dtype, "source_gb": source.stat().st_size / 1e9}
                rows.append({**row, **convert(source, options.scratch / "model", dtype)})
                print(rows[-1], flush=True)
                shutil.rmtree(options.scratch / "model")
        finally:
            shutil.rmtree(options.scratch)
    report = {"question": "converting T5-XXL in the formats that circulate", "rows": rows, "peak_limit_gb": 1.6}
    write_report(report, options.json, show=True)


if __name__ == "__main__":
    main()
