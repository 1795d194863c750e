"""Tables of each kind of clips: rendered, coded, made from captions, from reference frames, continued, or without a caption.

Invariant: for one seed and length all kinds are about the same scenes.  Measuring, scoring and making clips is done elsewhere.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from sora_jax.inputs.sizes import FRAMES_PER_CHUNK
from sora_jax.metrics import decibels
from sora_jax.pipeline.clip_options import Options
from sora_jax.pocket.judging import cases
from sora_jax.pocket.judging.cases import Made, ModelPath
from sora_jax.pocket.judging.cleanliness import clean, cleanliness, extremes
from sora_jax.pocket.judging.measure import Measurement, measure
from sora_jax.pocket.judging.scores import Attributes, Pair, Rate, confusions, continued, has_room, kept, score, varied
from sora_jax.pocket.world.words import NUM_FRAMES

PAIRS_SHARE = 0.25  # pairs of a slow and a fast clip for each caption, by default
_BAND = (0.05, 0.95)  # quantiles between which the band of cosines lies
_PER_CLIP = {"prompt", "caption", "seed", "references", "mask_strategy", "evaluations"}
_VERSIONS = ("sora_jax", "jax", "device")

Item = TypeVar("Item")


def judge_real(num: int, *, seed: int, shuffle: bool = False, num_frames: int = NUM_FRAMES) -> dict[str, Any]:
    """Returns the tables of rendered clips, scored against all attributes of their scenes, JSON-ready."""
    asked = cases.captions(num, seed=seed, num_frames=num_frames)
    seen = [measure(clip) for clip in _watched(cases.rendered(asked), num, "real")]
    return _tables(seen, _ask([one.shown for one in asked], seed, shuffle))


def judge_codec(
    model: ModelPath,
    num: int,
    *,
    seed: int,
    dtype: str | None = None,
    shuffle: bool = False,
    num_frames: int = NUM_FRAMES,
) -> dict[str, Any]:
    """Returns the tables of rendered clips that went through the codec, and its PSNR in dB (of 8-bit levels).

    ``psnr_db`` is that of the mean squared error of all clips; ``psnr_worst_clip_db`` that of the worst clip.
    """
    asked = cases.captions(num, seed=seed, num_frames=num_frames)
    seen, errors = [], []
    for clip, coded in _watched(cases.reconstructed(model, asked, dtype=dtype), num, "codec"):
        errors.append(float(np.mean((clip.astype(np.float32) - coded) ** 2)))
        seen.append(measure(coded))
    fidelity = {"psnr_db": round(decibels(float(np.mean(errors))), 3), "psnr_worst_clip_db": round(decibels(max(errors)), 3)}
    return fidelity | _tables(seen, _ask([one.shown for one in asked], seed, shuffle))


def judge_captions(
    model: ModelPath,
    num: int,
    *,
    seed: int,
    sampling: Options = cases.MODEL_DEFAULTS,
    num_pairs: int | None = None,
    cosines: bool = False,
    shuffle: bool = False,
    num_frames: int = NUM_FRAMES,
) -> dict[str, Any]:
    """Returns the tables of clips made from captions of unseen combinations, and how they were made, JSON-ready.

    ``num_pairs`` slow and fast clips that share caption and noise (a quarter of ``num`` if None) are generated as well; single
    images have none.
    """
    began = time.perf_counter()
    asked = cases.captions(num, seed=seed, num_frames=num_frames)
    made = list(_watched(cases.clips(model, asked, sampling), num, "captions"))
    seconds = time.perf_counter() - began
    seen = [measure(one.frames_thw3) for one in made]
    if num_pairs is None:
        num_pairs = 0 if num_frames == 1 else math.ceil(num * PAIRS_SHARE)
    pairs = _paired(model, num_pairs, seed, sampling, num_frames)
    tables = _tables(seen, _ask([one.asked.attributes for one in made], seed, shuffle), pairs=pairs)
    result = _made_by(made) | {"seconds": round(seconds, 1)} | tables
    return result | ({"cosines": _cosine_band(made)} if cosines else {})


def judge_given_frames(
    model: ModelPath,
    num: int,
    *,
    seed: int,
    sampling: Options = cases.MODEL_DEFAULTS,
    shuffle: bool = False,
) -> dict[str, Any]:
    """Returns the tables of clips made from captions and the first frame of a rendered clip each, JSON-ready."""
    asked = cases.captions(num, seed=seed)
    frames = [clip[:1] for clip in cases.rendered(asked)]
    made = list(_watched(cases.clips(model, asked, sampling, first_frames=frames), num, "given frame"))
    seen = [measure(one.frames_thw3) for one in made]
    # What the frame shows is expected even if the caption does not name it.
    shown = [{**one.attributes, "shading": one.scene.attributes(0)["shading"]} for one in asked]
    start_px = np.array([[float(one.scene.x_px[0]), float(one.scene.y_px[0])] for one in asked])
    order = _order(num, seed, shuffle)
    wanted = [shown[i] for i in order]
    return _made_by(made) | _tables(seen, wanted, further=kept(seen, wanted, start_px[order]))


def judge_given_clips(model: ModelPath, num: int, *, seed: int, sampling: Options = cases.MODEL_DEFAULTS) -> dict[str, Any]:
    """Returns the tables of the frames with which the model continues rendered clips, and what they keep, JSON-ready.

    The first 17 frames (a chunk of the codec) are rendered; the scene leaves room for what follows.
    """
    asked = cases.captions(num, seed=seed)
    given = [clip[:FRAMES_PER_CHUNK] for clip in cases.rendered(asked)]
    made = list(_watched(cases.clips(model, asked, sampling, first_frames=given), num, "given clip"))
    before = [measure(clip) for clip in given]
    after = [measure(one.frames_thw3[FRAMES_PER_CHUNK:]) for one in made]
    return _made_by(made) | _tables(after, [one.shown for one in asked], further=continued(before, after))


def judge_extensions(model: ModelPath, num: int, *, seed: int, sampling: Options = cases.MODEL_DEFAULTS) -> dict[str, Any]:
    """Returns the tables of the model's own clips continued by a second one (``loop`` 2), JSON-ready.

    The new frames are scored, and what they keep.  ``with_room`` has the tables of those whose object, going on as it
    moved, stays inside the frame and of a size that the world has.
    """
    asked = cases.captions(num, seed=seed)
    looped: Options = {**sampling, "loop": 2}
    made = list(_watched(cases.clips(model, asked, looped), num, "extension"))
    before = [measure(one.frames_thw3[:NUM_FRAMES]) for one in made]
    after = [measure(one.frames_thw3[NUM_FRAMES:]) for one in made]
    wanted = [one.attributes for one in asked]
    room = [i for i, one in enumerate(before) if has_room(one, len(after[0].centre_px))]
    chosen, seen = [before[i] for i in room], [after[i] for i in room]
    with_room = _tables(seen, [wanted[i] for i in room], further=continued(chosen, seen))
    return _made_by(made) | _tables(after, wanted, further=continued(before, after)) | {"with_room": with_room}


def judge_empty(model: ModelPath, num: int, *, seed: int, sampling: Options = cases.MODEL_DEFAULTS) -> dict[str, Any]:
    """Returns how many clips of the empty caption are clean, JSON-ready; compared with as many coded rendered clips.

    A clip without a caption has no attributes that could be right.
    """
    asked = cases.empty_captions(num, seed=seed)
    made = list(_watched(cases.clips(model, asked, sampling), num, "empty caption"))
    coded = [clip for _, clip in _watched(cases.reconstructed(model, asked, dtype=sampling.get("dtype")), num, "codec")]
    seen, real = [cleanliness(one.frames_thw3) for one in made], [cleanliness(clip) for clip in coded]
    rates = {name: rate.to_dict() for name, rate in clean(seen, real).items()}
    levels = {"made": extremes(seen), "rendered and coded": extremes(real)}
    return _made_by(made) | {"clips": num, "rates": rates, "confusion": {}, "cleanliness": levels}


def judge_variety(model: ModelPath, num: int, *, seed: int, sampling: Options = cases.MODEL_DEFAULTS) -> dict[str, Any]:
    """Returns whether clips of one caption differ between seeds and agree for the same seed, JSON-ready."""
    asked = cases.captions(num, seed=seed)
    others = [dataclasses.replace(one, seed=one.seed + num) for one in asked]
    made, again, other = (
        list(_watched(cases.clips(model, chosen, sampling), num, "variety")) for chosen in (asked, asked, others)
    )
    seen = [measure(one.frames_thw3) for one in other]
    same = [bool((one.frames_thw3 == twin.frames_thw3).all()) for one, twin in zip(made, again, strict=True)]
    rates = {
        "same seed, same clip": Rate(sum(same), num),
        "other seed, other place": varied([measure(one.frames_thw3) for one in made], seen),
    }
    return _made_by(made) | _tables(seen, [one.attributes for one in asked], further=rates)


def _paired(model: ModelPath, num: int, seed: int, sampling: Options, num_frames: int) -> list[Pair]:
    if not num:
        return []
    slow, fast = cases.speed_pairs(num, seed=seed, num_frames=num_frames)
    made = _watched(cases.clips(model, [*slow, *fast], sampling), 2 * num, "pairs")
    seen = [measure(one.frames_thw3) for one in made]
    return list(zip(seen[:num], seen[num:], strict=True))


def _ask(attributes: Sequence[Attributes], seed: int, shuffle: bool) -> list[Attributes]:
    return [attributes[i] for i in _order(len(attributes), seed, shuffle)]


def _order(num: int, seed: int, shuffle: bool) -> list[int]:
    return np.random.default_rng([seed, 11]).permutation(num).tolist() if shuffle else list(range(num))


def _tables(
    seen: Sequence[Measurement],
    asked: Sequence[Attributes],
    *,
    pairs: Sequence[Pair] | None = None,
    further: Mapping[str, Rate] | None = None,
) -> dict[str, Any]:
    rates = score(seen, asked, pairs=pairs) | dict(further or {})
    return {
        "clips": len(seen),
        "rates": {name: rate.to_dict() for name, rate in rates.items()},
        "confusion": confusions(seen, asked),
    }


def _made_by(made: Sequence[Made]) -> dict[str, Any]:
    """Returns model, settings and versions, which all clips share, and the velocity evaluations of a clip."""
    parameters = {name: value for name, value in made[0].parameters.items() if name not in _PER_CLIP}
    evaluations = [one.evaluations for one in made]
    return {
        "model": parameters.pop("model"),
        "versions": {name: parameters.pop(name) for name in _VERSIONS},
        "settings": parameters,
        "evaluations": {"mean": float(np.mean(evaluations)), "min": min(evaluations), "max": max(evaluations)},
    }


def _cosine_band(made: Sequence[Made]) -> dict[str, list[float | None]]:
    """Returns mean and band of the cosine of each step's velocity and the one before; None where no clip has one."""
    steps = max(len(one.cosine_N) for one in made)
    cosine_BN = np.full((len(made), steps), np.nan, np.float32)
    for row, one in zip(cosine_BN, made, strict=True):
        row[: len(one.cosine_N)] = one.cosine_N
    columns = [column[np.isfinite(column)] for column in cosine_BN.T]
    return {
        "mean": [_number(column, np.mean) for column in columns],
        "low": [_number(column, lambda values: np.quantile(values, _BAND[0])) for column in columns],
        "high": [_number(column, lambda values: np.quantile(values, _BAND[1])) for column in columns],
    }


def _number(values: Float[np.ndarray, " n"], statistic: Callable[[np.ndarray], Any]) -> float | None:
    return round(float(statistic(values)), 6) if len(values) else None


def _watched(items: Iterable[Item], total: int, name: str) -> Iterable[Item]:
    """Returns the items with a progress bar, which only a terminal shows."""
    return tqdm(items, total=total, desc=name, unit="clip", disable=None, leave=False)
