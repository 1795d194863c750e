"""The command that judges clips: ``python -m sora_jax.pocket.judge [MODEL_DIR] --captions 200 --seed 0``.

Clips are rendered (``--real``: how good the judge itself is), coded and decoded (``--codec``), made from captions
(``--captions``), from captions and a first frame (``--given-frame``), continued (``--extension``) or made again with another
seed (``--variety``); each kind has its tables, all go to one JSON file.
Invariant: for one seed all kinds are about the same scenes.  Measuring, scoring and making clips is done elsewhere.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from sora_jax import files
from sora_jax.cli import describe
from sora_jax.pocket import faithfulness
from sora_jax.pocket.faithfulness import Asked, Made, ModelPath, Sampling
from sora_jax.pocket.measure import Measurement, measure
from sora_jax.pocket.scores import (
    Attributes,
    Pair,
    Rate,
    confusions,
    confusions_text,
    continued,
    kept,
    rates_text,
    score,
    varied,
)
from sora_jax.pocket.world import ATTRIBUTES, NUM_FRAMES

__all__ = [
    "judge_captions",
    "judge_codec",
    "judge_extensions",
    "judge_given_frames",
    "judge_real",
    "judge_variety",
    "main",
    "measure",
    "score",
]

PAIRS_SHARE = 0.25  # pairs of a slow and a fast clip for each caption, unless given
_BAND = (0.05, 0.95)  # quantiles between which the band of cosines lies
_PER_CLIP = {"prompt", "caption", "seed", "references", "mask_strategy", "evaluations"}
_VERSIONS = ("sora_jax", "jax", "device")

Item = TypeVar("Item")


def judge_real(num: int, *, seed: int, shuffle: bool = False) -> dict[str, Any]:
    """Returns the tables of rendered clips, scored against all attributes of their scenes, JSON-ready."""
    asked = faithfulness.captions(num, seed=seed)
    seen = [measure(clip) for clip in _watched(faithfulness.rendered(asked), num, "real")]
    return _tables(seen, _ask(_all_attributes(asked), seed, shuffle))


def judge_codec(model: ModelPath, num: int, *, seed: int, dtype: str | None = None, shuffle: bool = False) -> dict[str, Any]:
    """Returns the tables of rendered clips that went through the codec, and its PSNR in dB (of 8-bit levels).

    ``psnr_db`` is that of the mean squared error of all clips; ``psnr_worst_clip_db`` that of the worst clip.
    """
    asked = faithfulness.captions(num, seed=seed)
    seen, errors = [], []
    for clip, coded in _watched(faithfulness.reconstructed(model, asked, dtype=dtype), num, "codec"):
        errors.append(float(np.mean((clip.astype(np.float32) - coded) ** 2)))
        seen.append(measure(coded))
    fidelity = {"psnr_db": _psnr(float(np.mean(errors))), "psnr_worst_clip_db": _psnr(max(errors))}
    return fidelity | _tables(seen, _ask(_all_attributes(asked), seed, shuffle))


def judge_captions(
    model: ModelPath,
    num: int,
    *,
    seed: int,
    sampling: Sampling = faithfulness.MODEL_DEFAULTS,
    num_pairs: int | None = None,
    cosines: bool = False,
    shuffle: bool = False,
) -> dict[str, Any]:
    """Returns the tables of clips made from captions of unseen combinations, and how they were made, JSON-ready.

    ``num_pairs`` slow and fast clips that share caption and noise (a quarter of ``num`` if None) are made besides.
    """
    began = time.perf_counter()
    made = list(_watched(faithfulness.clips(model, faithfulness.captions(num, seed=seed), sampling), num, "captions"))
    seconds = time.perf_counter() - began
    seen = [measure(one.frames_thw3) for one in made]
    pairs = _paired(model, math.ceil(num * PAIRS_SHARE) if num_pairs is None else num_pairs, seed, sampling)
    tables = _tables(seen, _ask([one.asked.attributes for one in made], seed, shuffle), pairs=pairs)
    result = _made_by(made) | {"seconds": round(seconds, 1)} | tables
    return result | ({"cosines": _cosine_band(made)} if cosines else {})


def judge_given_frames(
    model: ModelPath,
    num: int,
    *,
    seed: int,
    sampling: Sampling = faithfulness.MODEL_DEFAULTS,
    shuffle: bool = False,
) -> dict[str, Any]:
    """Returns the tables of clips made from captions and the first frame of a rendered clip each, JSON-ready."""
    asked = faithfulness.captions(num, seed=seed)
    frames = [clip[:1] for clip in faithfulness.rendered(asked)]
    made = list(_watched(faithfulness.clips(model, asked, sampling, first_frames=frames), num, "given frame"))
    seen = [measure(one.frames_thw3) for one in made]
    # What the frame shows is asked for even where the caption does not name it.
    shown = [{**one.attributes, "shading": one.scene.attributes(0)["shading"]} for one in asked]
    start_px = np.array([[float(one.scene.x_px[0]), float(one.scene.y_px[0])] for one in asked])
    order = _order(num, seed, shuffle)
    wanted = [shown[i] for i in order]
    return _made_by(made) | _tables(seen, wanted, further=kept(seen, wanted, start_px[order]))


def judge_extensions(
    model: ModelPath, num: int, *, seed: int, sampling: Sampling = faithfulness.MODEL_DEFAULTS
) -> dict[str, Any]:
    """Returns the tables of clips continued by a second one (``loop`` 2): its new frames, and what they keep, JSON-ready."""
    asked = faithfulness.captions(num, seed=seed)
    looped = dataclasses.replace(sampling, loop=2)
    made = list(_watched(faithfulness.clips(model, asked, looped), num, "extension"))
    before = [measure(one.frames_thw3[:NUM_FRAMES]) for one in made]
    after = [measure(one.frames_thw3[NUM_FRAMES:]) for one in made]
    return _made_by(made) | _tables(after, [one.attributes for one in asked], further=continued(before, after))


def judge_variety(model: ModelPath, num: int, *, seed: int, sampling: Sampling = faithfulness.MODEL_DEFAULTS) -> dict[str, Any]:
    """Returns how clips of one caption differ with the seed, and that they do not with the same seed, JSON-ready."""
    asked = faithfulness.captions(num, seed=seed)
    others = [dataclasses.replace(one, seed=one.seed + num) for one in asked]
    made, again, other = (
        list(_watched(faithfulness.clips(model, chosen, sampling), num, "variety")) for chosen in (asked, asked, others)
    )
    seen = [measure(one.frames_thw3) for one in other]
    same = [bool((one.frames_thw3 == twin.frames_thw3).all()) for one, twin in zip(made, again, strict=True)]
    rates = {
        "same seed, same clip": Rate(sum(same), num),
        "other seed, other place": varied([measure(one.frames_thw3) for one in made], seen),
    }
    return _made_by(made) | _tables(seen, [one.attributes for one in asked], further=rates)


def _paired(model: ModelPath, num: int, seed: int, sampling: Sampling) -> list[Pair]:
    if not num:
        return []
    slow, fast = faithfulness.speed_pairs(num, seed=seed)
    made = _watched(faithfulness.clips(model, [*slow, *fast], sampling), 2 * num, "pairs")
    seen = [measure(one.frames_thw3) for one in made]
    return list(zip(seen[:num], seen[num:], strict=True))


def _all_attributes(asked: Sequence[Asked]) -> list[Attributes]:
    return [one.scene.attributes(0) for one in asked]


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


def _psnr(mse: float) -> float:
    return round(10 * math.log10(255**2 / max(mse, 1e-9)), 3)


def _watched(items: Iterable[Item], total: int, name: str) -> Iterable[Item]:
    """Returns the items behind a progress bar, which a file or a pipe does not get."""
    return tqdm(items, total=total, desc=name, unit="clip", disable=None, leave=False)


def text(title: str, tables: Mapping[str, Any]) -> str:
    """Returns the tables of one kind of clips for people."""
    lines = [f"== {title}: {tables['clips']} clips"]
    if "settings" in tables:
        shown = ", ".join(f"{name} {value}" for name, value in tables["settings"].items() if value is not None)
        lines += [f"model {tables['model']}; {shown}", f"evaluations: {tables['evaluations']['mean']:.2f} a clip"]
    if "psnr_db" in tables:
        lines.append(f"PSNR {tables['psnr_db']:.2f} dB, worst clip {tables['psnr_worst_clip_db']:.2f} dB")
    rates = {name: Rate(one["count"], one["total"]) for name, one in tables["rates"].items()}
    lines += ["", rates_text(rates), "", confusions_text(tables["confusion"])]
    if "cosines" in tables:
        lines += ["", "cosine of a step's velocity and the one before: step, mean, 5 % .. 95 % of clips"]
        rows = zip(*(tables["cosines"][name] for name in ("mean", "low", "high")), strict=True)
        lines += [f"{i:4d} {row[0]:9.5f}   {row[1]:.5f} .. {row[2]:.5f}" for i, row in enumerate(rows) if row[0] is not None]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs ``python -m sora_jax.pocket.judge``; exits with 2 and one line where the arguments or the model are bad."""
    parser = _parser()
    options = parser.parse_args(arguments)
    kinds = (options.real, options.codec, options.captions, options.given_frame, options.extension, options.variety)
    if not any(kinds):
        parser.error("nothing to judge; give --captions N, --given-frame N, --extension N, --variety N, --codec N or --real N.")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"the folder of {options.json} does not exist; create it first.")
    report: dict[str, Any] = {"seed": options.seed, "shuffled": options.shuffle, "attributes": list(ATTRIBUTES)}
    try:
        for name, tables in _parts(options):
            report[name] = tables
            sys.stdout.write(text(name.replace("_", " "), tables) + "\n")
        if options.json:
            files.write_text(options.json, json.dumps(report, indent=1) + "\n", overwrite=True)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {describe(error)}\n")


def _parts(options: argparse.Namespace) -> Iterable[tuple[str, dict[str, Any]]]:
    seed, shuffle, model = options.seed, options.shuffle, options.model
    sampling = Sampling(
        num_steps=options.steps,
        guidance=options.guidance,
        leap=options.leap,
        merge_steps=options.merge_steps,
        dtype=options.dtype,
    )
    if options.real:
        yield "real", judge_real(options.real, seed=seed, shuffle=shuffle)
    if options.codec:
        yield "codec", judge_codec(model, options.codec, seed=seed, dtype=options.dtype, shuffle=shuffle)
    if options.captions:
        yield (
            "captions",
            judge_captions(
                model,
                options.captions,
                seed=seed,
                sampling=sampling,
                num_pairs=options.pairs,
                cosines=options.cosines,
                shuffle=shuffle,
            ),
        )
    if options.given_frame:
        yield "given_frame", judge_given_frames(model, options.given_frame, seed=seed, sampling=sampling, shuffle=shuffle)
    if options.extension:
        yield "extension", judge_extensions(model, options.extension, seed=seed, sampling=sampling)
    if options.variety:
        yield "variety", judge_variety(model, options.variety, seed=seed, sampling=sampling)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sora_jax.pocket.judge", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, nargs="?", help="default: the embedded model")
    what = parser.add_argument_group("what is judged (unseen combinations)")
    what.add_argument("--captions", type=_count, default=0, metavar="N", help="N clips made from captions")
    what.add_argument("--pairs", type=_count, metavar="N", help="of --captions: slow and fast clips besides (default: N / 4)")
    what.add_argument("--cosines", action="store_true", help="of --captions: cosines of consecutive velocities by step")
    what.add_argument("--given-frame", type=_count, default=0, metavar="N", help="N clips made from a caption and a frame")
    what.add_argument("--extension", type=_count, default=0, metavar="N", help="N clips continued by a second one")
    what.add_argument("--variety", type=_count, default=0, metavar="N", help="N captions with two seeds each")
    what.add_argument("--codec", type=_count, default=0, metavar="N", help="N rendered clips through the codec")
    what.add_argument("--real", type=_count, default=0, metavar="N", help="N rendered clips: the judge's own accuracy")
    what.add_argument("--seed", type=_count, default=0, metavar="S", help="of captions, scenes and noise (default 0)")
    what.add_argument("--shuffle", action="store_true", help="score every clip against another one's caption: chance level")
    what.add_argument("--json", type=Path, metavar="FILE", help="write the tables there as well, replacing the file")
    how = parser.add_argument_group("how clips are made (defaults are the model's)")
    how.add_argument("--steps", type=int, metavar="N", help="sampling steps")
    how.add_argument("--guidance", type=float, metavar="G", help="weight of the caption")
    how.add_argument("--leap", type=_leap, metavar="off|N|dynamic|released", help="linear proportional leap")
    how.add_argument("--merge-steps", type=int, metavar="K", help="first steps with merged temporal tokens")
    how.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype")
    return parser


def _count(given: str) -> int:
    number = int(given)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{given} is negative; expected 0 or more")
    return number


def _leap(given: str) -> int | str:
    return int(given) if given.isdigit() else given


if __name__ == "__main__":
    main()
