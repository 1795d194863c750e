"""A run killed right before each publication of what it writes: latents, the JSON of a clip, the clip.

Nothing is half-written, whatever is there is the old or the new one, and the same run finishes and clears up.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sora_jax import files
from sora_jax.pipeline import latents_file, video
from tests.support.killed import PUBLICATIONS, in_a_process_without_threads, in_child

MADE_FROM = {"prompt": "a red circle", "seed": 1, "sora_jax": "0.2.0"}
CLIPS = ("clip.mp4", "clip.gif", "clip.npz", "clip.png", "clip")  # the last is a folder of PNGs


def _write(name: str, *, level: int, overwrite: bool) -> Callable[[Path, Path], None]:
    """Returns what a run does after sampling: it publishes latents, then a clip that it has claimed."""
    frames = np.full((1 if name == "clip.png" else 2, 32, 32, 3), level, np.uint8)

    def act(_: Path, folder: Path) -> None:
        files.refuse_unwritable(folder)
        with files.claimed(folder / name):
            if overwrite or not (folder / "latents.npz").exists():  # `generate --from-latents` goes on from them
                latents = np.full((1, 1, 4, 4, 4), level, np.float32)
                latents_file.save_latents(folder / "latents.npz", latents, [MADE_FROM], overwrite=overwrite)
            if overwrite or not (folder / name).exists():  # as with --prompt-as-path
                video.save(frames, folder / name, fps=8, parameters={**MADE_FROM, "seed": level}, overwrite=overwrite)

    return act


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_saves(folder: Path) -> dict[str, int]:
    """Kills at each publication of new clips and of those that replace others; returns how many there were of each."""
    import av  # noqa: F401  # once, not in every process

    counts = {}
    for name in CLIPS:
        for overwrite in (False, True):
            before, after, target = folder / "before", folder / "after", folder / "target"
            before.mkdir()
            if overwrite:
                in_child(_write(name, level=10, overwrite=False), folder, before)
            shutil.copytree(before, after)
            act = _write(name, level=200, overwrite=overwrite)
            in_child(act, folder, after)
            old, new = _contents(before), _contents(after)
            operation, killed = 0, True
            while killed:
                operation += 1
                shutil.copytree(before, target)
                killed, _ = in_child(act, folder, target, operation=operation, events=PUBLICATIONS)
                where = f"{name}, {overwrite=}, before publication {operation}"
                for path, content in _contents(target).items():
                    hidden = path.split("/")[0].endswith(".partial")
                    assert hidden or content in (old.get(path), new.get(path)), f"{path}: {where}"
                files.remove_leftovers.cache_clear()  # as in the next process
                act(folder, target)
                assert _contents(target) == new, where
                assert {path.name for path in target.iterdir()} == {path.name for path in after.iterdir()}, where
                shutil.rmtree(target)
            counts[f"{name} {overwrite}"] = operation - 1
            shutil.rmtree(before)
            shutil.rmtree(after)
    return counts


@pytest.mark.ci
def test_killed_between_any_two_publications_of_a_clip(tmp_path: Path) -> None:
    counts = in_a_process_without_threads(__name__, "run_saves", tmp_path)
    assert set(counts) == {f"{name} {overwrite}" for name in CLIPS for overwrite in (False, True)}
    assert min(counts.values()) >= 6, counts  # latents, JSON and clip, each with its temporary folder
