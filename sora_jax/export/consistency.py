"""What must be true of a manifest in addition to its schema: numbers that follow from others, and shapes that fit together.

A host takes memory and time on a manifest's word before any program is opened, so it is checked that stages are complete and
in order, that every size has one function for whatever runs, and that arrays fit together (`wiring`).

Invariant: reads nothing but the manifest; that programs and weights are what it says is seen when they are opened, and times
are compared with their rule by the host that has it.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

from sora_jax.export.contents import ExportFileError, checked_name
from sora_jax.export.entries import ExportManifest, FunctionEntry, SizeEntry
from sora_jax.export.phases import CAPTION, base_name, network_name, phases, program_name, stage_names
from sora_jax.export.wiring import CONDITIONS, ContradictionError, check_wiring, fixed_shape

SAMPLER_WEIGHTS = "stdit3_*.safetensors"  # those of all the transformer's stages
_DEPTHS = {"t5": "num_layers", "stdit3": "depth"}
_MAX_VALUES = 2**34  # of one array; the video tokens of a minute of 720p are half as many


def check(manifest: ExportManifest) -> None:
    """Refuses a manifest that fits the schema and still cannot be true.

    Raises:
      ContradictionError: says which parts exclude each other.
    """
    _check_files(manifest)
    _check_stages(manifest)
    _check_sizes(manifest)
    for stage in manifest["stages"]:
        _check_functions(manifest, stage["functions"], f"stage {stage['name']}")
    if manifest["sampler"] is not None:
        _check_functions(manifest, manifest["sampler"]["functions"], "sampler")
    for size in manifest["sizes"]:
        check_wiring(manifest, size)


def _check_files(manifest: ExportManifest) -> None:
    try:
        for name in manifest["files"]:
            checked_name(name)
    except ExportFileError as error:
        raise ContradictionError(str(error)) from None
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    _refuse(total != manifest["total_bytes"], f"total_bytes is {manifest['total_bytes']}, its files have {total}.")
    vectors = manifest.get("vectors")
    for proof in (vectors["host"], vectors["clip"], vectors.get("given")) if vectors else ():
        _refuse(proof is not None and proof not in manifest["files"], f"the vectors {proof!r} are not in files.")
    tokenizer = manifest["tokens"]["file"]
    _refuse(tokenizer is not None and tokenizer not in manifest["files"], f"the tokenizer {tokenizer!r} is not in files.")


def _check_stages(manifest: ExportManifest) -> None:
    names = [stage["name"] for stage in manifest["stages"]]
    depths, together = _depths(manifest, names), manifest.get("pairs_per_package", 1)
    _refuse(depths["stdit3"] % together > 0, f"{depths['stdit3']} pairs are not packages of {together}.")
    expected = stage_names(depths, names, together)
    _refuse(names != expected, f"stages are {_listed(names)}; a complete export has {_listed(expected)}.")
    _refuse(manifest["phases"] != phases(names), "phases are not those of its stages.")
    alone = any(name.startswith("stdit3_") for name in names) and CAPTION not in names
    _refuse(alone and manifest.get("guidance_rows", 2) == 1, f"one row of guidance at a time needs the stage {CAPTION}.")
    for stage in manifest["stages"]:
        told = (stage["program"], stage["network"])
        made = (program_name(stage["name"]), network_name(stage["name"]))
        _refuse(told != made, f"stage {stage['name']} has program and network {told}; expected {made}.")


def _depths(manifest: ExportManifest, names: Sequence[str]) -> dict[str, int]:
    """Returns the number of blocks of the networks; one that is not exported has none."""
    depths = dict.fromkeys(_DEPTHS, 0)
    for network, field in _DEPTHS.items():
        if any(name.startswith(network) for name in names):
            entry = manifest["model"]["networks"].get(network)
            depth = entry["config"].get(field) if entry else None
            _refuse(type(depth) is not int or not 0 <= depth <= len(names), f"{network} has {field} {depth!r}.")
            depths[network] = int(depth)  # type: ignore[arg-type]  # seen above
    return depths


def _check_sizes(manifest: ExportManifest) -> None:
    sampling = manifest["sampling"]
    leap = sampling["leap"]
    wrong = leap["mode"] == "static" and (leap["index"] is None or leap["index"] >= sampling["num_steps"])
    _refuse(wrong, f"the leap of step {leap['index']} is not one of {sampling['num_steps']} steps.")
    keys = [size["key"] for size in manifest["sizes"]]
    _refuse(len(set(keys)) != len(keys), f"sizes are {_listed(keys)}, one of them twice.")
    for size in manifest["sizes"]:
        _check_size(manifest, size)


def _check_size(manifest: ExportManifest, size: SizeEntry) -> None:
    name, num_steps = f"size {size['key']}", manifest["sampling"]["num_steps"]
    key = f"{size['num_frames']}x{size['height']}x{size['width']}"
    _refuse(size["key"] != key, f"{name} is {key}.")
    frames = sum(chunk["frames"] for chunk in size["chunks"])
    latents = sum(chunk["latents"] for chunk in size["chunks"])
    _refuse(frames != size["num_frames"], f"{name} has chunks of {frames} frames.")
    _refuse(latents != size["latents"][0], f"{name} has chunks of {latents} latent frames, expected {size['latents'][0]}.")
    variants = [chunk["variant"] for chunk in size["chunks"]]
    _refuse(variants != [f"frames_{chunk['frames']}" for chunk in size["chunks"]], f"{name} has chunks {_listed(variants)}.")
    conditions = size["conditions"]
    _refuse(set(conditions) != set(CONDITIONS), f"{name} has the conditions {_listed(conditions)}.")
    pixels = (conditions["height_px_B"], conditions["width_px_B"])
    _refuse(pixels != (size["height"], size["width"]), f"{name} is conditioned on {pixels} pixels.")
    times = size["times"]
    _refuse(len(times) != num_steps, f"{name} has {len(times)} times for {num_steps} steps.")
    most = manifest["sampling"]["num_timesteps"]
    falling = times[0] <= most and all(later < time for time, later in itertools.pairwise([*times, 0.0]))
    _refuse(not falling, f"{name} has times that do not fall from {most:g} to 0.")


def _check_functions(manifest: ExportManifest, functions: Sequence[FunctionEntry], where: str) -> None:
    keys = [size["key"] for size in manifest["sizes"]]
    names = [function["name"] for function in functions]
    _refuse(len(set(names)) != len(names), f"{where} has functions {_listed(names)}, one of them twice.")
    served = [(function["variant"], key, function.get("attention")) for function in functions for key in function["sizes"]]
    _refuse(len(set(served)) != len(served), f"{where} has two functions for one variant and size.")
    forms = [form["name"] for form in manifest.get("attention", {}).get("forms", [])]
    for function in functions:
        at = f"{where} {function['name']}"
        expected = [function["variant"], *(f"{function['variant']}_{key}" for key in function["sizes"])]
        form = function.get("attention")
        _refuse(form is not None and form not in forms, f"{at} has attention {form!r}; the manifest has {_listed(forms)}.")
        _refuse(base_name(function["name"], form) not in expected, f"{at} is said to be the variant {function['variant']}.")
        unknown = sorted(set(function["sizes"]) - set(keys))
        _refuse(bool(unknown), f"{at} serves sizes {_listed(unknown)}, which there are not.")
        for one in function["checks"]:
            passed = one["psnr_db"] >= one["floor_db"] and one["relative_l2"] <= one["ceiling_l2"]
            _refuse(not passed, f"{at} did not pass its check of {one['output']}.")
        _check_artefact(manifest, function, at)
        for tensor in (*function["inputs"], *function["outputs"]):
            too_large = math.prod(fixed_shape(tensor)) > _MAX_VALUES
            _refuse(too_large, f"{at} has {tensor['name']} with shape {tensor['shape']}.")


def _check_artefact(manifest: ExportManifest, function: FunctionEntry, at: str) -> None:
    files, file, weights = manifest["files"], function["artefact"]["file"], function["artefact"].get("weights")
    proof = function.get("vectors")
    _refuse(proof is not None and proof not in files, f"{at} has vectors {proof!r}, which are not in files.")
    listed = file in files or any(name.startswith(file + "/") for name in files)
    _refuse(not listed, f"{at} is in {file!r}, which is not in files.")
    if at.startswith("sampler "):
        _refuse(weights != SAMPLER_WEIGHTS, f"{at} has weights {weights!r}, expected {SAMPLER_WEIGHTS!r}.")
    else:
        _refuse(weights is not None and weights not in files, f"{at} has weights {weights!r}, which are not in files.")


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]]) or "none"


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise ContradictionError(message)
