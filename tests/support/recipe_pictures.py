"""The pictures of docs/recipes.md: strips of frames of the clips that the page's own commands make.

Invariant: a picture is made from files that the code of the page has written, so that it shows what a reader will see;
tests/test_readme.py runs the page and compares.

    python -m tests.support.recipe_pictures        runs the page and writes docs/recipes/*.png anew
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sora_jax.metrics import psnr
from sora_jax.pipeline.clip_frames import read_frames
from tests.support.pages import ROOT

FOLDER = ROOT / "docs" / "recipes"
# Each picture, and the files that it shows, one a row; pictures are shown as they are.
PICTURES: Mapping[str, Sequence[str]] = {
    "preset.png": ["grows.mp4"],
    "several.png": ["clips/try_0000.mp4", "clips/try_0001.mp4"],
    "image.png": ["image.png"],
    "begin.png": ["moves.mp4"],
    "continue.png": ["twice.mp4"],
    "extend.png": ["goes-on.mp4"],
    "captions.png": ["turns.mp4"],
    "mask.png": ["last.mp4"],
    "preview.png": ["way.png", "shown.mp4"],
    "compare.png": ["clip.mp4", "recommended.mp4"],
}
_SHOWN, _SIDE_PX = 10, 64
_LEAST_DB = 30.0  # of a picture against the one of the page: other processors round otherwise


def strip(path: Path) -> np.ndarray:
    """Returns ten frames of a clip in a row, or a picture as it is."""
    frames = read_frames(path)
    if len(frames) == 1:
        return frames[0]
    return np.concatenate(list(frames[np.linspace(0, len(frames) - 1, _SHOWN).round().astype(int)]), axis=1)


def picture(folder: Path, files: Sequence[str]) -> np.ndarray:
    """Returns the strips of files below each other."""
    strips = [strip(folder / name) for name in files]
    width = max(one.shape[1] for one in strips)
    return np.concatenate([np.pad(one, ((0, 0), (0, width - one.shape[1]), (0, 0)), constant_values=255) for one in strips])


def check(folder: Path) -> None:
    """Asserts that the files that the page wrote into a folder look like its pictures."""
    for name, shown in PICTURES.items():
        made, kept = picture(folder, shown), np.asarray(Image.open(FOLDER / name).convert("RGB"))
        assert made.shape == kept.shape, name
        assert psnr(made[None], kept[None]) > _LEAST_DB, f"{name} shows something else; python -m tests.support.recipe_pictures"


def write(folder: Path) -> None:
    """Writes the pictures of the files in a folder."""
    FOLDER.mkdir(exist_ok=True)
    for name, shown in PICTURES.items():
        Image.fromarray(picture(folder, shown)).save(FOLDER / name)


def main() -> None:
    """Runs the code of the page in an empty folder and writes its pictures."""
    from tests.test_readme import run_page

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run_page(ROOT / "docs" / "recipes.md")
        write(Path(folder))


if __name__ == "__main__":
    main()
