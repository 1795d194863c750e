"""The text side against Open-Sora: cleaning, prompts, tokens, mask strategies and references.

JSON fixtures must be equal; where the reference fails (an assertion, an int() of text), ours must raise ValueError.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax import config
from sora_jax.inputs import cleaning, prompt, sizes
from sora_jax.inputs import references as conditioning
from sora_jax.inputs.tokenizer import Tokenizer
from tests.parity.fixtures import FixtureError, read_json, read_tensors

_Triples = Iterator[tuple[str, Any, Any]]  # what, got, expected

_ALIGN = 5  # append_generated fixtures are recorded with it


def cases(folder: Path) -> dict[str, Path]:
    files = {name: folder / f"{name}.json" for name in ("clean", "prompt_utils", "mask_cases", "tokens")}
    return files | {"mask_tensors": folder / "mask_tensors.safetensors"}


def check(folder: Path, case: str) -> list[str]:
    content = read_json(folder / f"{case}.json")
    triples = list(_CHECKS[case](folder, content))
    if not triples:
        return [f"{case}.json holds nothing to compare"]
    return [
        f"{what}: {_short(got)}, expected {_short(wanted)}"
        for what, got, wanted in triples
        if got != wanted and repr(got) != repr(wanted)
    ]


def compute(folder: Path, case: str) -> dict[str, np.ndarray]:
    content, tensors = read_json(folder / "mask_cases.json"), read_tensors(folder / f"{case}.safetensors")
    computed: dict[str, np.ndarray] = {}
    for entry in content["apply_mask_strategy"]:
        computed |= _masked(entry["name"], tensors, _references(entry, tensors), entry["mask_strategy"], entry)
    for entry in content["append_generated"]:
        references, strategies = _appended(entry, _channels_last(tensors[f"{entry['name']}.in.generated_latents"]))
        computed |= _masked(entry["name"], tensors, references, strategies, {"align": _ALIGN, **entry})
    for entry in content["images"]:
        image = conditioning.read_reference(folder / entry["file"], *entry["image_size"])
        computed[f"{Path(entry['file']).stem}.out"] = image.transpose(3, 0, 1, 2)
    for name in (key.removesuffix(".in") for key in tensors if key.endswith(".in")):
        frames, size = tensors[f"{name}.in"].transpose(0, 2, 3, 1), tensors[f"{name}.out"].shape[2:]
        computed[f"{name}.out"] = conditioning.resize_crop_video(frames, *size).transpose(3, 0, 1, 2)
    absent = sorted(computed.keys() - tensors.keys())
    if absent:
        raise FixtureError(f"{case}.safetensors lacks {', '.join(absent)}")
    return computed


def _masked(
    name: str,
    tensors: dict[str, np.ndarray],
    references: list[list[np.ndarray]],
    strategies: list[str],
    entry: dict[str, Any],
) -> dict[str, np.ndarray]:
    z = _channels_last(tensors[f"{name}.in.z"])
    z, mask = conditioning.apply_mask_strategy(z, references, strategies, entry["loop_i"], align=entry["align"])
    return {f"{name}.out.z": z.transpose(0, 4, 1, 2, 3), f"{name}.out.mask": mask}


def _references(entry: dict[str, Any], tensors: dict[str, np.ndarray]) -> list[list[np.ndarray]]:
    return [
        [tensors[f"{entry['name']}.in.ref.{sample}.{i}"].transpose(1, 2, 3, 0) for i in range(len(lengths))]
        for sample, lengths in enumerate(entry["ref_lens"])
    ]


def _appended(entry: dict[str, Any], latents: np.ndarray) -> tuple[list[list[np.ndarray]], list[str]]:
    """Returns references and strategies; earlier references are zeros, because no recorded case reads them."""
    before = [[np.zeros((length, *latents.shape[2:]), np.float32) for length in lengths] for lengths in entry["refs_before"]]
    return conditioning.append_generated(
        before,
        entry["mask_strategy_before"],
        latents,
        entry["loop_i"],
        length=entry["condition_frame_length"],
        edit_ratio=entry["condition_frame_edit"],
    )


def _channels_last(z: np.ndarray) -> np.ndarray:
    return z.transpose(0, 2, 3, 4, 1)


def _check_clean(folder: Path, content: dict[str, Any]) -> _Triples:
    for entry, (field, wanted) in itertools.product(content["cases"], _CLEANERS.items()):
        yield f"{field} {entry['input'][:60]!r}", wanted(entry["input"]), entry[field]


def _check_tokens(folder: Path, content: dict[str, Any]) -> _Triples:
    tokenizer = Tokenizer.from_file(_tokenizer_file(folder))
    for entry in content["cases"]:
        ids, mask = tokenizer.encode([entry["text"]], config.open_sora_1_2.stdit3.model_max_length)
        length = int(mask.sum())
        yield f"ids {entry['text'][:60]!r}", ids[0, :length].tolist(), entry["input_ids"]
        yield f"length {entry['text'][:60]!r}", length, entry["length"]
        yield f"padding {entry['text'][:60]!r}", bool(ids[0, length:].any() or mask[0, length:].any()), False


def _tokenizer_file(folder: Path) -> Path:
    """Returns the T5 tokenizer that lies beside the folder, or our own copy of that public file where only text was given."""
    beside, own = (place / "t5_tokenizer.json" for place in (folder.resolve().parent, Path(__file__).parents[1] / "golden"))
    if not beside.is_file() and not own.is_file():
        raise FixtureError(f"t5_tokenizer.json is missing beside the folder {folder.name}")
    return beside if beside.is_file() else own


def _check_mask_cases(folder: Path, content: dict[str, Any]) -> _Triples:
    for entry in content["append_generated"]:
        latents = np.zeros((len(entry["refs_before"]), content["latent_T"], 1, 1, 1), np.float32)
        references, strategies = _appended(entry, latents)
        yield f"{entry['name']} mask_strategy_after", strategies, entry["mask_strategy_after"]
        yield f"{entry['name']} refs_after", [[len(x) for x in sample] for sample in references], entry["refs_after"]
    for entry in content["images"]:
        image = conditioning.read_reference(folder / entry["file"], *entry["image_size"])
        yield f"{entry['file']} out_shape", [image.shape[i] for i in (3, 0, 1, 2)], entry["out_shape"]


def _check_prompt_utils(folder: Path, content: dict[str, Any]) -> _Triples:
    yield "missing sections", [section for section in _PROMPT_SECTIONS if not content.get(section)], []
    for section, entries in content.items():
        if section == "description":
            continue
        if section not in _PROMPT_SECTIONS:
            yield section, "unknown section", f"one of {', '.join(_PROMPT_SECTIONS)}"
            continue
        for number, entry in enumerate(entries):
            for part, got, wanted in _PROMPT_SECTIONS[section](entry):
                yield f"{section} {number} {part}".rstrip(), got, wanted


def _append_score(entry: dict[str, Any]) -> _Triples:
    conditions = {name: entry[name] for name in ("aes", "flow", "camera_motion")}
    yield "", [prompt.append_scores(text, **conditions) for text in entry["input"]], entry["output"]


def _extract_json(entry: dict[str, Any]) -> _Triples:
    """A strategy of null is none.  Other values that are no text pass here in the reference and fail in its next step."""
    given = zip(entry["input"], entry["reference"], entry["mask_strategy"], strict=True)
    wanted = entry["result"]
    if "ok" in wanted:
        texts, paths, strategies = wanted["ok"]
        wanted = {"ok": [texts, paths, ["" if strategy is None else strategy for strategy in strategies]]}
        if not all(isinstance(value, str) for value in (*paths, *wanted["ok"][2])):
            wanted = {"error": "AttributeError"}
    yield from _outcome(lambda: list(zip(*(prompt.extract_json(*fields) for fields in given), strict=True)), wanted)


def _prompt_loop(entry: dict[str, Any]) -> _Triples:
    yield from _outcome(lambda: [prompt.prompt_at_loop(text, entry["num_loop"]) for text in entry["input"]], entry["result"])


def _split_merge(entry: dict[str, Any]) -> _Triples:
    yield from _outcome(lambda: prompt.split_prompt(entry["input"]), entry["split"])
    if entry["merge"] is not None:
        yield from _outcome(lambda: prompt.merge_prompt(*prompt.split_prompt(entry["input"])), entry["merge"])


def _pipeline(entry: dict[str, Any]) -> _Triples:
    def run() -> dict[str, Any]:
        merged = prompt.prepare_prompt(entry["input"], **{name: entry[name] for name in ("aes", "flow", "camera_motion")})
        return {
            "merged": merged,
            "loops": [_or_none(functools.partial(prompt.prompt_at_loop, merged, loop)) for loop in range(4)],
        }

    wanted = entry["result"]
    if "ok" in wanted:
        wanted = {"ok": {**wanted["ok"], "loops": [text or None for text in wanted["ok"]["loops"]]}}
    yield from _outcome(run, wanted)


def _mask_strategy(entry: dict[str, Any]) -> _Triples:
    def run() -> list[list[float]]:
        entries = conditioning.parse_mask_strategy(entry["input"])
        return [[x.loop, x.reference, x.reference_start, x.target_start, x.length, x.edit_ratio] for x in entries]

    yield from _outcome(run, entry["result"])


def _nearest_point(entry: dict[str, Any]) -> _Triples:
    yield "", conditioning.nearest_point(entry["value"], entry["point"], entry["max_value"]), entry["result"]


def _frames_of_latents(entry: dict[str, Any]) -> _Triples:
    yield from _outcome(lambda: sizes.frames_of_latents(entry["num"]), entry["result"])


def _sample_path(entry: dict[str, Any]) -> _Triples:
    names = {"save_dir": "directory", "sample_idx": "index", "sample_name": "name", "num_sample": "num_samples", "k": "sample"}
    given = {names.get(name, name): value for name, value in entry["kw"].items()}
    yield "", prompt.sample_path(**given), entry["result"]


def _size_conditions(entry: dict[str, Any]) -> _Triples:
    """Compares what our networks read; the other forms hold the same numbers in other arrangements."""
    given = entry["args"]
    batch, (height, width) = given["batch_size"], given["image_size"]
    made = sizes.size_conditions(batch, height=height, width=width, num_frames=given["num_frames"], fps=given["fps"])
    rows, columns = made["height_px_B"], made["width_px_B"]
    ratio = np.float32(height / width)
    full = {
        "height": rows.tolist(),
        "width": columns.tolist(),
        "num_frames": [float(given["num_frames"])] * batch,
        "ar": [float(ratio)] * batch,
        "fps": made["fps_B"].tolist(),
    }
    forms = {
        "STDiT2": full,
        "OpenSora": full,
        "PixArtMS": {"ar": [[float(ratio)]] * batch, "hw": np.stack([rows, columns], axis=1).tolist()},
        None: {},
    }
    yield str(given["info_type"]), forms.get(given["info_type"]), entry["result"]


def _or_none(run: Callable[[], str]) -> str | None:
    """Returns one clip's prompt; the fixtures record null where it is malformed or empty."""
    try:
        return run() or None
    except ValueError:
        return None


def _outcome(run: Callable[[], Any], expected: dict[str, Any]) -> _Triples:
    try:
        got = {"ok": json.loads(json.dumps(run()))}
    except ValueError as error:
        got = {"error": str(error)}
    if "error" in expected:
        yield "raises", "error" in got, True
    else:
        yield "", got, {"ok": expected["ok"]}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


_CLEANERS: dict[str, Callable[[str], str]] = {
    "text_preprocessing": cleaning.preprocess_text,
    "clean_caption_once": cleaning.clean_caption,
    "basic_clean": cleaning.basic_clean,
    "no_preprocessing": lambda text: cleaning.preprocess_text(text, clean=False),
}

_PROMPT_SECTIONS: dict[str, Callable[[dict[str, Any]], _Triples]] = {
    "append_score_to_prompts": _append_score,
    "extract_json_from_prompts": _extract_json,
    "extract_prompts_loop": _prompt_loop,
    "split_merge": _split_merge,
    "pipeline": _pipeline,
    "parse_mask_strategy": _mask_strategy,
    "find_nearest_point": _nearest_point,
    "dframe_to_frame": _frames_of_latents,
    "get_save_path_name": _sample_path,
    "prepare_multi_resolution_info": _size_conditions,
}

_CHECKS: dict[str, Callable[[Path, dict[str, Any]], _Triples]] = {
    "clean": _check_clean,
    "tokens": _check_tokens,
    "mask_cases": _check_mask_cases,
    "prompt_utils": _check_prompt_utils,
}
