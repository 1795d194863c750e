"""The test vectors of an export against its artefacts and the reference host, row by row.

Programs run as `run-exported` runs them: Core ML in our interpreter, Core AI in Apple's runtime, ONNX in ONNX Runtime.

Invariant: a row passes or fails by limits that stand in the manifest or here; nothing that is listed is left out.  Files are
compared with their checksums as always, so that a changed bit is an error before any row is computed from it.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from sora_jax.export import check, vectors
from sora_jax.export.contents import ExportFileError
from sora_jax.export.entries import FunctionEntry, SamplingEntry, StageEntry
from sora_jax.export.host_program import ExportedModel, LeapState, cosine_of, guided, sample, schedule_times
from sora_jax.export.opening import open_function
from sora_jax.inputs import prompt
from sora_jax.inputs.tokenizer import Tokenizer
from sora_jax.pipeline import video
from sora_jax.sampling import noise

# Rounding of one float32 operation more or less; noise is made by functions whose last bit differs between machines.
_RTOL, _NOISE_ATOL, _COSINE_ATOL = 1e-6, 1e-5, 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: its name, what was measured, what was expected, and whether it passed."""

    name: str
    measured: str
    expected: str
    passed: bool


def rows(model: ExportedModel) -> Iterator[Row]:
    """Yields a comparison for every function, every step of the host, and the clip.

    Raises:
      ValueError: the export has no vectors.
      ExportFileError: a file is damaged, or not what the manifest says.
    """
    entry = model.manifest.get("vectors")
    if entry is None:
        raise ValueError(f"{model.folder} has no test vectors; export it with --vectors on.")
    for stage in model.manifest["stages"]:
        for function in stage["functions"]:
            yield _function_row(model, stage, function)
    content = _host_content(model, entry["host"])
    for step in _STEPS:
        yield from step(model, content)
    if entry["clip"] is not None:
        yield from _clip_rows(model, content["clip"], vectors.read(model.contents, entry["clip"], vectors.CLIP))
    given = entry.get("given")
    if given is not None:
        yield from _given_rows(model, content["clip"], vectors.read(model.contents, given, vectors.GIVEN))


def _function_row(model: ExportedModel, stage: StageEntry, function: FunctionEntry) -> Row:
    inputs, expected = vectors.read_function(model.contents, stage["name"], function)
    outputs = open_function(model.manifest["target"], model.contents, stage, function)(inputs)
    limits = check.limits(stage["precision"], _weights(model, stage))
    checks = check.compare("captured", inputs, expected, outputs, limits)
    worst = min(checks, key=lambda one: one.psnr_db)
    return Row(
        name=f"{stage['name']} {function['name']}",
        measured=f"{worst.psnr_db:.1f} dB, {max(one.relative_l2 for one in checks):.2g}",
        expected=f"{limits.floor_db:g} dB, {limits.ceiling_l2:g}",
        passed=all(one.passed for one in checks),
    )


def _weights(model: ExportedModel, stage: StageEntry) -> str:
    return "float" if stage["network"] == "vae" else model.manifest["weights"]["dtype"]


def _host_content(model: ExportedModel, name: str) -> Any:
    with model.contents.reading(name) as path:
        try:
            return json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ExportFileError(f"{path} is no JSON ({error}); export again.") from None


def _scores(_: ExportedModel, content: Any) -> Iterator[Row]:
    asked = content.get("scores", [])  # older exports have none
    found = [prompt.append_scores(one["prompt"], **one["scores"]) for one in asked]
    yield _equal("scores", found, [one["scored"] for one in asked])


def _captions(model: ExportedModel, content: Any) -> Iterator[Row]:
    scores = model.manifest["tokens"]["scores"]
    found = [prompt.prompt_at_loop(prompt.prepare_prompt(one["prompt"], **scores), 0) for one in content["captions"]]
    yield _equal("cleaned captions", found, [one["caption"] for one in content["captions"]])


def _tokens(model: ExportedModel, content: Any) -> Iterator[Row]:
    if model.manifest["tokens"]["file"] is None:
        return  # an export without the text encoder has no tokenizer
    tokenizer, length = Tokenizer.from_file(model.tokenizer()), model.manifest["tokens"]["length"]
    ids, mask = tokenizer.encode([one["caption"] for one in content["tokens"]], length)
    yield _equal("token ids", ids.tolist(), [one["ids"] for one in content["tokens"]])
    yield _equal("token masks", mask.astype(int).tolist(), [one["mask"] for one in content["tokens"]])


def _noise(_: ExportedModel, content: Any) -> Iterator[Row]:
    for one in content["noise"]:
        values = np.asarray(noise.initial_noise(one["seed"], tuple(one["shape"]))).ravel()
        ends = np.concatenate([values[: len(one["first"])], values[-len(one["last"]) :]])
        yield _near(f"noise of seed {one['seed']}", ends, one["first"] + one["last"], atol=_NOISE_ATOL)


def _times(model: ExportedModel, content: Any) -> Iterator[Row]:
    unit = model.manifest["sampling"]["num_timesteps"]
    found = [schedule_times(one["num_steps"], one["shift"], unit) for one in content["times"]]
    yield _near("times", np.concatenate(found), [time for one in content["times"] for time in one["times"]])


def _guidance(_: ExportedModel, content: Any) -> Iterator[Row]:
    found = [
        guided(np.asarray([one["conditional"], one["unconditional"]], np.float32), one["guidance"])[0]
        for one in content["guidance"]
    ]
    yield _near("guidance", np.concatenate(found), [value for one in content["guidance"] for value in one["guided"]])


def _leap(_: ExportedModel, content: Any) -> Iterator[Row]:
    for one in content["leap"]:
        velocities = np.asarray(one["velocities"], np.float32)
        leaps_at, state, before = None, LeapState(one["leap"], one["num_steps"]), None
        for step, v in enumerate(velocities):
            if step == one["merge_steps"]:
                state, before = LeapState(one["leap"], one["num_steps"]), None
            if state.leaps(step, v, before) and leaps_at is None:
                leaps_at = step
            before = v
        cosines = [cosine_of(v, before) for v, before in zip(velocities[1:], velocities, strict=False)]
        pairs = [(mine, told) for mine, told in zip([None, *cosines], one["cosines"], strict=True) if told is not None]
        name = f"{one['leap']['mode']} leap with {one['merge_steps']} merged steps"
        yield _near(f"{name}, cosines", [a for a, _ in pairs], [b for _, b in pairs], atol=_COSINE_ATOL)
        yield _equal(f"{name}, step", leaps_at, one["leaps_at"])
        merged = [step < one["merge_steps"] for step in range(one["num_steps"])]
        yield _equal(f"{name}, merge switch", merged, one["merged"])


def _loop(model: ExportedModel, content: Any) -> Iterator[Row]:
    if (one := content.get("loop")) is None:  # an older export
        return
    told = content["leap"][0]
    velocities = iter(np.asarray(told["velocities"], np.float32).reshape(told["num_steps"], 1, 1, 1, 1, 2))
    sampling: SamplingEntry = {**model.manifest["sampling"], "leap": told["leap"], "merge_steps": told["merge_steps"]}
    start, times = np.asarray(one["start"], np.float32).reshape(1, 1, 1, 1, 2), np.asarray(one["times"], np.float32)
    end, _ = sample(lambda *_: next(velocities), start, times, sampling, np.ones((1, 1), np.float32))
    yield _near("loop that leaps, latents at its end", end.ravel(), one["end"], atol=_RTOL)


def _pixels(_: ExportedModel, content: Any) -> Iterator[Row]:
    one = content["pixels"]
    yield _equal("pixels", video.quantise(np.asarray(one["values"], np.float32)).tolist(), one["pixels"])


_STEPS: tuple[Callable[[ExportedModel, Any], Iterator[Row]], ...] = (
    _scores,
    _captions,
    _tokens,
    _noise,
    _times,
    _guidance,
    _leap,
    _loop,
    _pixels,
)


def _clip_rows(model: ExportedModel, clip: Mapping[str, Any], expected: vectors.Arrays) -> Iterator[Row]:
    """Yields the comparisons of a clip that the artefacts make from its prompt."""
    size = model.size(clip["size"])
    numbers = {name: clip[name] for name in ("num_steps", "guidance", "merge_steps")}
    sampling: SamplingEntry = model.sampling(leap={"mode": clip["leap"], "index": None}, **numbers)
    times = model.times(size, sampling["num_steps"])
    yield _near("the clip's times", times, clip["times"])
    ids, mask = _clip_tokens(model, clip)
    z = expected["noise_BTHWC"]
    ones = np.ones(z.shape[:2], np.float32)
    values, seen, switched = model.text(ids, mask, size["key"]) | {"frame_mask_BT": ones}, list[np.ndarray](), list[bool]()

    def velocity(z: np.ndarray, time: np.float32, merged: bool) -> np.ndarray:
        guidance = sampling["guidance"]
        seen.append(model.velocity(z, float(time), values, guidance=guidance, merged=merged, size=size["key"]))
        switched.append(merged)
        return seen[-1]

    latents, _ = sample(velocity, z, times, sampling, ones)
    frames = video.quantise(model.decode(latents, size["key"]))
    yield _equal("the clip's merge switch", switched, clip["merged"])
    compared = (
        ("velocity of step 0", seen[0], expected["v_0_BTHWC"]),
        ("velocity of step 1", seen[1], expected["v_1_BTHWC"]),
        ("final latents", latents, expected["z_BTHWC"]),
        ("pixels", frames.astype(np.float64), expected["frames_Bthw3"].astype(np.float64)),
    )
    for name, made, wanted in compared:
        yield _above_floor(model, f"the clip's {name}", made, wanted)


def _given_rows(model: ExportedModel, clip: Mapping[str, Any], expected: vectors.Arrays) -> Iterator[Row]:
    """Yields the comparisons of the clip whose first frame is given."""
    size = model.size(clip["size"])
    encoded = model.encode(expected["image_Bthw3"], size["key"])
    yield _above_floor(model, "a given frame's latents", encoded, expected["encoded_BTHWC"])
    z = np.array(expected["noise_BTHWC"])
    z[:, : encoded.shape[1]] = encoded
    numbers = {name: clip[name] for name in ("num_steps", "guidance", "merge_steps")}
    leap, ids_and_mask = {"mode": clip["leap"], "index": None}, _clip_tokens(model, clip)
    made = model(*ids_and_mask, z, size=size["key"], leap=leap, frame_mask_BT=expected["frame_mask_BT"], **numbers)
    yield _above_floor(model, "the clip with a given frame, final latents", made.latents_BTHWC, expected["z_BTHWC"])


def _clip_tokens(model: ExportedModel, clip: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    text = prompt.prompt_at_loop(prompt.prepare_prompt(clip["prompt"], **model.manifest["tokens"]["scores"]), 0)
    return Tokenizer.from_file(model.tokenizer()).encode([text], model.manifest["tokens"]["length"])


def _above_floor(model: ExportedModel, name: str, found: np.ndarray, expected: np.ndarray) -> Row:
    """Returns whether arrays are as near as whole networks of the export have to be."""
    precision, dtype = model.manifest["precision"], model.manifest["weights"]["dtype"]
    floor_db = check.limits(precision, dtype).floor_db - check.WHOLE_NETWORK_DB
    psnr_db, _ = check.difference(np.asarray(expected, np.float64), np.asarray(found, np.float64))
    return Row(name=name, measured=f"{psnr_db:.1f} dB", expected=f"{floor_db:g} dB", passed=psnr_db >= floor_db)


def _equal(name: str, found: object, expected: object) -> Row:
    return Row(name=name, measured="equal" if found == expected else "different", expected="equal", passed=found == expected)


def _near(name: str, found: Any, expected: Any, *, atol: float = 0.0) -> Row:
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    near = a.shape == b.shape and bool(np.allclose(a, b, rtol=_RTOL, atol=atol))
    worst = float(np.max(np.abs(a - b), initial=0.0)) if a.shape == b.shape else np.inf
    return Row(name=name, measured=f"off by {worst:.2g}", expected=f"{_RTOL:g} of it + {atol:g}", passed=near)
