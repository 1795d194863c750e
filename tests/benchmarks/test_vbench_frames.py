"""The protocol command: which videos VBench wants, their names, and going on after a stop."""

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks.quality import vbench_frames
from sora_jax.pipeline import clip_info

pytestmark = pytest.mark.usefixtures("little_optimised")

ENTRIES = [
    {"prompt_en": "a person, still", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a red bus", "dimension": ["color", "overall_consistency"]},
    {"prompt_en": "a red bus", "dimension": ["object_class"]},
]


def run(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vbench_frames", *map(str, arguments)])
        vbench_frames.main()


def test_every_prompt_has_the_videos_its_dimensions_want() -> None:
    wanted = list(vbench_frames.videos(ENTRIES, None, None))
    assert wanted == [("a person, still", n) for n in range(25)] + [("a red bus", n) for n in range(5)]
    assert list(vbench_frames.videos(ENTRIES, ["color"], 2)) == [("a red bus", 0), ("a red bus", 1)]
    with pytest.raises(ValueError, match=r"dimension 'speed' is not in the list; expected of color, object_class"):
        list(vbench_frames.videos(ENTRIES, ["speed"], None))
    with pytest.raises(ValueError, match="cannot be a file name"):
        list(vbench_frames.videos([{"prompt_en": "this/that", "dimension": ["color"]}], None, None))


def test_videos_lie_where_vbench_looks_for_them(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(ENTRIES))
    arguments = (tmp_path / "list.json", tmp_path / "out", "--model", tiny_model, "--samples", 2, "--dimension", "color")
    run(*arguments, "--dry-run")
    assert not (tmp_path / "out").exists()
    run(*arguments, "--num-steps", 1)
    made = sorted(name for name in os.listdir(tmp_path / "out") if name.endswith(".mp4"))
    assert made == ["a red bus-0.mp4", "a red bus-1.mp4"]
    assert [clip_info.inspect(tmp_path / "out" / name).parameters["seed"] for name in made] == [0, 1]
    before = (tmp_path / "out" / made[0]).stat().st_mtime_ns
    for name in (made[1], f"{made[1]}.json"):
        (tmp_path / "out" / name).unlink()
    run(*arguments, "--num-steps", 1)
    assert clip_info.inspect(tmp_path / "out" / made[1]).parameters["seed"] == 1
    assert (tmp_path / "out" / made[0]).stat().st_mtime_ns == before


def test_another_file_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('[{"prompt": "a"}]')
    with pytest.raises(SystemExit, match=r"list.json is not VBench's list of prompts \('prompt_en'\)"):
        run(tmp_path / "list.json", tmp_path / "out")
