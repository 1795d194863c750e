"""Text fixtures beyond the recorded ones: random cases in their layout, with results by the reference's rules."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_jax.inputs import references
from tests.parity import text
from tests.support import prompt_oracle

RECORDED = Path(__file__).parents[1] / "golden" / "text"
PARTS = ["|", "|", "|", "0", "1", "2", "-1", "5", " ", "a", "A Cat ", "+1", "1_0", "٣", "(b)", "%7C", "｜", "www.a.com", ""]
FIELDS = ["0", "1", "-1", "2", "-5", "7", " 3 ", "+1", "1_0", "0.5", "1e3", "nan", "inf", "", "x"]
JSON = [
    '{"reference_path": "a.png;b.mp4", "mask_strategy": "0;0,1"}',
    '{"mask_strategy": null}',
    '{"reference_path": null}',
    '{"mask_strategy": 0}',
    '{"mask_strategy": "0", "mask_strategy": "1"}',
    "{}",
    '{"other": 1}',
    "{",
    '{"mask_strategy": "0"} ',
    '{"mask_strategy": "0"} b',
    '{"reference_path": "\\u0041\\n"}',
    '{"mask_strategy": "{"}',
    '{"mask_strategy": ["0"]}',
]


def recorded(run: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    try:
        return {"ok": run(*arguments)}
    except Exception as error:
        return {"error": type(error).__name__}


def prompts(draw: random.Random, number: int) -> list[str]:
    return [draw.choice(["|0|", "|0|", ""]) + "".join(draw.choices(PARTS, k=draw.randint(0, 9))) for _ in range(number)]


def at_loop(prompt: str, loop: int) -> list[str]:
    return [prompt_oracle.at_loop(prompt, loop)]


def pipeline(prompt: str, scores: dict[str, Any]) -> dict[str, Any]:
    merged = prompt_oracle.prepare(prompt, **scores)
    return {"merged": merged, "loops": [recorded(prompt_oracle.at_loop, merged, loop).get("ok") for loop in range(4)]}


def split_and_merge(prompt: str) -> dict[str, Any]:
    parts = recorded(prompt_oracle.split, prompt)
    merged = recorded(prompt_oracle.merge, *parts["ok"]) if "ok" in parts else None
    return {"input": prompt, "split": parts, "merge": merged}


def extracted(texts: list[str]) -> dict[str, Any]:
    references, strategies = [""] * len(texts), ["1"] * len(texts)
    result = recorded(prompt_oracle.extract_json, texts, references, strategies)
    return {"input": texts, "reference": references, "mask_strategy": strategies, "result": result}


def sections(draw: random.Random) -> dict[str, list[dict[str, Any]]]:
    """The sections of prompt_utils.json that take texts."""
    several = prompts(draw, 200)
    scores: list[dict[str, Any]] = [
        {"aes": None, "flow": None, "camera_motion": None},
        {"aes": 6.5, "flow": 0.05, "camera_motion": "pan right"},
    ]
    objects = [[draw.choice(["a ", "", "|0|a|1|b "]) + draw.choice(JSON) for _ in range(draw.randint(1, 2))] for _ in range(60)]
    entries = [",".join(draw.choices(FIELDS, k=draw.randint(1, 7))) for _ in range(300)]
    strategies = ["", None, *entries, *map(";".join, zip(entries[::2], entries[1::2], strict=True))]
    return {
        "extract_json_from_prompts": [extracted(texts) for texts in objects],
        "extract_prompts_loop": [
            {"input": [one], "num_loop": loop, "result": recorded(at_loop, one, loop)} for one in several for loop in range(4)
        ],
        "split_merge": [split_and_merge(prompt) for prompt in several],
        "pipeline": [
            {"input": one, **score, "result": recorded(pipeline, one, score)} for one in several[:60] for score in scores
        ],
        "parse_mask_strategy": [{"input": one, "result": recorded(prompt_oracle.parse_strategy, one)} for one in strategies],
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_texts_that_the_reference_accepts_are_treated_alike_and_others_refused(tmp_path: Path, seed: int) -> None:
    folder = Path(shutil.copytree(RECORDED, tmp_path / "text"))
    content = json.loads((folder / "prompt_utils.json").read_text("utf-8"))
    added = sections(random.Random(seed))
    for name, entries in added.items():
        results: list[dict[str, Any]] = [entry["result" if "result" in entry else "split"] for entry in entries]
        assert sum("ok" in result for result in results) > 10, name
        assert sum("error" in result for result in results) > 10 or name == "pipeline", name
    (folder / "prompt_utils.json").write_text(json.dumps({**content, **added}), "utf-8")
    assert text.check(folder, "prompt_utils") == []


def test_a_wrong_record_of_repeated_starts_is_noticed(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(RECORDED, tmp_path / "text"))
    content = json.loads((folder / "prompt_utils.json").read_text("utf-8"))
    content["extract_prompts_loop"] = [{"input": ["|0|a|0|b|1|c"], "num_loop": 0, "result": {"ok": ["a"]}}]
    (folder / "prompt_utils.json").write_text(json.dumps(content), "utf-8")
    assert text.check(folder, "prompt_utils") == ["extract_prompts_loop 0: {'ok': ['b']}, expected {'ok': ['a']}"]


def test_mask_strategies_that_the_reference_accepts_are_applied_alike() -> None:
    """Starts inside the clip and the reference; others are refused here, and wrap around or fail in the reference."""
    draw = random.Random(2)
    accepted = 0
    for _ in range(600):
        frames, lengths = draw.choice([5, 9, 15]), [draw.choice([1, 2, 5, 15]) for _ in range(2)]
        entries = []
        for _ in range(draw.randint(0, 3)):
            index = draw.randint(-2, 1)
            start, target = draw.randint(-lengths[index], lengths[index] - 1), draw.randint(-frames, frames - 1)
            entries.append(
                f"{draw.randint(0, 1)},{index},{start},{target},{draw.randint(-1, 8)},{draw.choice(['0', '0.25', '1'])}"
            )
        strategy, align = ";".join(entries), draw.choice([None, None, 5, 3])
        values = np.random.default_rng(0).standard_normal((frames + sum(lengths), 1, 2, 4), dtype=np.float32)
        z, first, second = np.split(values, [frames, frames + lengths[0]])
        expected = z.copy()
        try:
            mask = prompt_oracle.put(expected, [first, second], strategy, 0, align)
        except ValueError:  # numbers of frames that do not fit each other
            with pytest.raises(ValueError, match="the mask strategy puts"):
                references.apply_mask_strategy(z[None], [[first, second]], [strategy], 0, align=align)
            continue
        out, mask_BT = references.apply_mask_strategy(z[None], [[first, second]], [strategy], 0, align=align)
        np.testing.assert_array_equal(out[0], expected)
        np.testing.assert_array_equal(mask_BT[0], mask)
        accepted += 1
    assert accepted > 400
