"""What int8 weights and bfloat16 cost: in caption features, in velocities, and in finished videos.

Command:  python -m benchmarks.quality.int8_error --clips 40 --json benchmarks/results/int8_error.json
Needs:    8 GB of memory (--skip-wide does without); six samplings of each caption, and six passes at real width.
Expect:   caption features of an int8 text encoder within 2 % of float32 (cosine 0.9998) and captions followed as before;
          int8 in STDiT3 no worse: arXiv 2502.04363 quantises the text encoder alone, as the less sensitive network.
Rival:    float32 in the same run: the same prompts, the same noise, the same program.

Measured on the embedded model (or --model DIR), and on networks of the released widths with the weights of tests/golden/wide.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

import convert_weights
from benchmarks._support.machine import write_report
from sora_jax.metrics import psnr
from sora_jax.networks import registry
from sora_jax.pipeline.model_file import POCKET
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pocket.judging import cases, scores
from sora_jax.pocket.judging.measure import measure
from sora_jax.storage.checkpoint import load_network, save_network, stored_arrays, unflatten
from sora_jax.storage.directory import read_model_file
from sora_jax.storage.quantisation import SCALE_SUFFIX, dequantise
from sora_jax.storage.writer import update_model_file
from tests.parity import wide

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "wide"
# Stored dtypes of networks (the others: float32), and the compute dtype of all.  The embedded model's weights are bfloat16
# numbers, so that what bfloat16 costs is the rounding of activations.
VARIANTS: dict[str, tuple[dict[str, str], str]] = {
    "t5 int8": ({"t5": "int8"}, "float32"),
    "stdit3 int8": ({"stdit3": "int8"}, "float32"),
    "t5 and stdit3 int8": ({"t5": "int8", "stdit3": "int8"}, "float32"),
    "computed in bfloat16": ({}, "bfloat16"),
    "computed in bfloat16, t5 and stdit3 int8": ({"t5": "int8", "stdit3": "int8"}, "bfloat16"),
}


def distance(values: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Returns cosine and relative L2 distance, in float64."""
    a, b = (x.astype(np.float64).ravel() for x in (values, reference))
    norm = float(np.linalg.norm(b))
    return {"cosine": float(a @ b / (np.linalg.norm(a) * norm)), "rel_l2": float(np.linalg.norm(a - b) / norm)}


def stored_as(source: Path, folder: Path, dtypes: Mapping[str, str]) -> Path:
    """Returns a copy of a model directory with some networks stored in another dtype and the others in float32."""
    index = read_model_file(source)
    for network in registry.CLASSES:
        config, flat = load_network(source, network, dtype="float32")
        save_network(folder, network, config, flat, dtype=dtypes.get(network, "float32"))
    shutil.copyfile(source / index["tokenizer"], folder / index["tokenizer"])
    update_model_file(folder, tokenizer=index["tokenizer"], defaults=index.get("defaults", {}))
    return folder


def caption_features(model: Path, texts: list[str]) -> Iterator[np.ndarray]:
    """Yields the features of the real tokens of each caption, computed in float32."""
    config, flat = load_network(model, "t5", dtype="float32")
    encoder = unflatten(registry.abstract("t5", config), flat)
    pipeline = Pipeline.from_pretrained(model)
    ids_BL, mask_BL = pipeline.tokenizer.encode(texts, pipeline.config.stdit3.model_max_length)
    features_BLE = np.asarray(jax.jit(lambda encoder, ids, mask: encoder(ids, mask))(encoder, ids_BL, mask_BL))
    for features_LE, mask_L in zip(features_BLE, mask_BL, strict=True):
        yield features_LE[mask_L]


def embedded(model: Path, num_clips: int, seed: int, folder: Path) -> dict[str, Any]:
    """Returns for each variant the distance of caption features, and PSNR and faithfulness of the clips."""
    asked = cases.captions(num_clips, seed=seed)
    texts = [one.text for one in asked]
    exact = stored_as(model, folder / "float32", {})
    features = np.concatenate(list(caption_features(exact, texts)))
    clips = [one.frames_thw3 for one in cases.clips(exact, asked)]
    attributes = [one.attributes for one in asked]
    table: dict[str, Any] = {"float32": {"faithfulness": rates(clips, attributes)}}
    for name, (dtypes, compute) in VARIANTS.items():
        variant = stored_as(model, folder / f"variant{len(table)}", dtypes) if dtypes else exact
        sampling = {"dtype": compute}
        made = [one.frames_thw3 for one in cases.clips(variant, asked, sampling)]
        noise = [psnr(a, b) for a, b in zip(made, clips, strict=True)]
        table[name] = {
            "psnr_db": {"median": float(np.median(noise)), "min": float(np.min(noise))},
            "faithfulness": rates(made, attributes),
        }
        if "t5" in dtypes:
            table[name]["features"] = distance(np.concatenate(list(caption_features(variant, texts))), features)
    return table


def rates(clips: list[np.ndarray], attributes: list[Any]) -> dict[str, Any]:
    """Returns the shares of clips that show what their captions ask for, with intervals."""
    found = scores.score([measure(clip) for clip in clips], attributes)
    return {name: found[name].to_dict() for name in ("colour and motion", "all four")}


def real_widths() -> dict[str, Any]:
    """Returns the distance of the outputs of T5-XXL and STDiT3-XL layers (two each, random weights) from float32."""
    table: dict[str, Any] = {}
    for case in ("t5_wide", "stdit3_wide"):
        exact = _wide(case, "float32")
        for dtype in ("bfloat16", "int8"):
            rounded = _wide(case, dtype)
            table[f"{case} {dtype}"] = {name: distance(rounded[name], exact[name]) for name in exact}
    return table


def _wide(case: str, dtype: str) -> dict[str, np.ndarray]:
    def build(network: str, config: Any, arrays: Mapping[str, np.ndarray]) -> Any:
        flat = convert_weights.convert(network, arrays, config)
        for name in list(flat):
            flat[name] = _rounded(name, flat[name], dtype)
        return unflatten(registry.abstract(network, config), flat)

    with mock.patch.object(wide, "build", build):
        return wide.compute(GOLDEN, case)


def _rounded(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    stored = stored_arrays(name, array, dtype)
    if name + SCALE_SUFFIX in stored:
        return dequantise(name, stored[name], stored[name + SCALE_SUFFIX])
    return stored[name].astype(np.float32)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=POCKET)
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-wide", action="store_true")
    parser.add_argument("--skip-embedded", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"question": "what stored bfloat16 and int8 cost", "clips": options.clips, "seed": options.seed}
    if not options.skip_embedded:
        with tempfile.TemporaryDirectory() as folder:
            result["embedded"] = embedded(options.model, options.clips, options.seed, Path(folder))
    if not options.skip_wide:
        result["real_widths"] = real_widths()
    write_report(result, options.json, show=True)


if __name__ == "__main__":
    main()
