"""What a format costs in clips: the embedded model through every format and back, against itself.

Command:  python -m benchmarks.quality.format_round_trips --json benchmarks/results/format_round_trips.json
Needs:    the extra gguf; two samplings for each format, minutes in all.
Expect:   formats that hold the embedded model's numbers give the same clip bit for bit (PSNR null); eight bits of T5 stay
          above 40 dB, four bits lose visibly.
Rival:    the embedded model as it comes, in the same run: the same prompts, the same noise.
"""

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks._support.machine import write_report
from convert_weights.checkpoint import convert_checkpoint
from convert_weights.opening import Options
from convert_weights.orbax_checkpoint import from_orbax, to_orbax
from convert_weights.to_torch import to_torch
from sora_jax.config import pocket
from sora_jax.metrics import psnr
from sora_jax.pipeline.model_file import POCKET
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.storage.checkpoint import load_network
from sora_jax.storage.directory import open_network
from tests.support import formats, sources

PROMPTS = ("a red circle moves right on a blue background", "a green square moves up on a black background")
Arrays = Mapping[str, np.ndarray]


def _t5(pack: Callable[[Arrays], Arrays]) -> Callable[[Path, Path], None]:
    def write(torch: Path, model: Path) -> None:
        path = torch / "t5" / "single" / "t5xxl.safetensors"
        arrays = pack(load_file(torch / "t5" / "model.safetensors"))
        formats.write_t5(path, arrays, json.loads((torch / "t5" / "config.json").read_text()))
        convert_checkpoint("t5", path, model, options=Options(tokenizer=torch / "t5"))

    return write


def _gguf(kind: str) -> Callable[[Path, Path], None]:
    def write(torch: Path, model: Path) -> None:
        arrays = {n: a.astype(np.float32) for n, a in load_file(torch / "t5" / "model.safetensors").items()}
        formats.write_gguf(torch / "gguf" / "t5.gguf", pocket.t5, arrays, kind)
        convert_checkpoint("t5", torch / "gguf" / "t5.gguf", model, options=Options(tokenizer=torch / "t5"))

    return write


def _averages(torch: Path, model: Path) -> None:
    arrays = load_file(torch / "stdit3" / "model.safetensors")
    tree = {"model": {n: a if n == "rope.freqs" else 0 * a for n, a in arrays.items()}, "ema": arrays, "step": 1}
    sources.write_torch_file(torch / "stdit3" / "step.pt", tree)
    convert_checkpoint("stdit3", torch / "stdit3" / "step.pt", model)


def _half(dtype: Any) -> Callable[[Path, Path], None]:
    def write(torch: Path, model: Path) -> None:
        folder = torch / "half"
        folder.mkdir()
        shutil.copyfile(torch / "stdit3" / "config.json", folder / "config.json")
        arrays = load_file(torch / "stdit3" / "model.safetensors")
        save_file({name: array.astype(dtype) for name, array in arrays.items()}, folder / "model.safetensors")
        convert_checkpoint("stdit3", folder, model)

    return write


def _original_vae(torch: Path, model: Path) -> None:
    arrays = load_file(torch / "vae" / "model.safetensors")
    spatial = formats.original_names(arrays, len(pocket.vae.spatial.block_out_channels), "first_stage_model.")
    (torch / "spatial").mkdir()
    save_file(spatial, torch / "spatial" / "sdxl_vae.safetensors")
    folder = torch / "temporal"
    folder.mkdir()
    shutil.copyfile(torch / "vae" / "config.json", folder / "config.json")
    save_file({n: a for n, a in arrays.items() if not n.startswith("spatial_vae.")}, folder / "model.safetensors")
    convert_checkpoint("vae", folder, model, options=Options(spatial=torch / "spatial" / "sdxl_vae.safetensors"))


def _orbax(network: str) -> Callable[[Path, Path], None]:
    def write(torch: Path, model: Path) -> None:
        from_orbax(to_orbax(open_network(POCKET, network), torch / "orbax" / network), model)

    return write


def _plain(network: str) -> Callable[[Path, Path], None]:
    return lambda torch, model: convert_checkpoint(network, torch / network, model)  # type: ignore[return-value]


# Network and format, and the function that writes the format and converts it into a model directory.
FORMATS: dict[tuple[str, str], Callable[[Path, Path], Any]] = {
    ("t5", "to-torch and back"): _plain("t5"),
    ("t5", "single file, float16"): _t5(lambda arrays: {n: a.astype(np.float16) for n, a in arrays.items()}),
    ("t5", "single file, bfloat16"): _t5(lambda arrays: {n: a.astype(ml_dtypes.bfloat16) for n, a in arrays.items()}),
    ("t5", "float8_e4m3fn"): _t5(formats.float8),
    ("t5", "scaled float8_e4m3fn"): _t5(formats.scaled_float8),
    ("t5", "GGUF F16"): _gguf("F16"),
    ("t5", "GGUF BF16"): _gguf("BF16"),
    ("t5", "GGUF Q8_0"): _gguf("Q8_0"),
    ("t5", "GGUF Q5_1"): _gguf("Q5_1"),
    ("t5", "GGUF Q4_0"): _gguf("Q4_0"),
    ("t5", "orbax"): _orbax("t5"),
    ("stdit3", "to-torch and back"): _plain("stdit3"),
    ("stdit3", "training checkpoint, averages"): _averages,
    ("stdit3", "float16"): _half(np.float16),
    ("stdit3", "bfloat16"): _half(ml_dtypes.bfloat16),
    ("stdit3", "orbax"): _orbax("stdit3"),
    ("vae", "to-torch and back"): _plain("vae"),
    ("vae", "original names"): _original_vae,
    ("vae", "orbax"): _orbax("vae"),
}


def clips(model: Path) -> list[np.ndarray]:
    """Returns the frames of a clip for each prompt."""
    pipe = Pipeline.from_pretrained(model)
    return [np.asarray(pipe(prompt, seed=i).frames) for i, prompt in enumerate(PROMPTS)]


def through(network: str, convert: Callable[[Path, Path], Any], folder: Path) -> Path:
    """Returns the embedded model with one network that went through a format."""
    torch, model = folder / "torch", folder / "model"
    for each in ("t5", "stdit3", "vae"):
        to_torch(open_network(POCKET, each), torch / each)
    shutil.copytree(POCKET, model)
    shutil.rmtree(model / network)
    convert(torch, model)
    return model


def equal(model: Path, network: str) -> bool:
    """Returns whether every parameter of a network has the embedded model's numbers."""
    _, ours = load_network(model, network, dtype="float32")
    _, theirs = load_network(POCKET, network, dtype="float32")
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def decibels(ours: Any, theirs: Any) -> float | None:
    """Returns the PSNR of two clips; None, for which JSON has a word, where they are equal."""
    value = float(psnr(ours, theirs))
    return round(value, 1) if math.isfinite(value) else None


def main() -> None:
    """Measures, prints and writes; what was measured is written after every format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as compiled:
        jax.config.update("jax_compilation_cache_dir", compiled)  # every model runs the same programs
        reference = clips(POCKET)
        for (network, name), convert in FORMATS.items():
            with tempfile.TemporaryDirectory() as folder:
                model = through(network, convert, Path(folder))
                values = [decibels(ours, theirs) for ours, theirs in zip(clips(model), reference, strict=True)]
                rows.append({"network": network, "format": name, "numbers_equal": equal(model, network), "psnr_db": values})
            print(rows[-1], flush=True)
            report = {"question": "what a format costs in clips", "prompts": PROMPTS, "rows": rows}
            write_report(report, options.json)


if __name__ == "__main__":
    main()
