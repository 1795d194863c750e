"""Pictures of the pocket model for people: strips of frames, and an animation of a dozen clips.

Command:  python -m benchmarks.quality.pocket_pictures [MODEL_DIR] --seed 0 --out docs
Needs:    about a minute on two cores, for a dozen clips.
Writes:   OUT/pocket_strips.png, a row of frames for each clip; OUT/pocket_clips.gif, all clips at once.

The captions are the first dozen of a seed, of combinations unseen in training, with none left out.  With ``--real`` the
renderer draws the clips instead of the model: what a perfect model would show.
"""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from sora_jax.pocket.judging import cases
from sora_jax.pocket.world.words import FPS, SIZE_PX

MAX_BYTES = 300_000  # of each picture
FRAMES = 8  # of a film strip, the first and the last among them
COLUMNS = 3  # of clips in the animation
GAP_PX = 4
TEXT_PX = 12  # size of the letters
STRIP_TEXT_PX, CLIP_TEXT_PX = 250, 200  # widths of the captions
LETTER_PX = 5.9  # mean width of a letter of that size, to break lines by
BACKGROUND, INK = (255, 255, 255), (30, 30, 30)
PNG_COLOURS, GIF_COLOURS = (256, 128, 64, 32), 128
GIF_TOLERANCES = (0, 4, 8, 12, 16, 24)  # levels of 255
SHOWN_EVERY = 2  # frames of the clip for a picture of the animation


def strips(clips: Sequence[np.ndarray], texts: Sequence[str]) -> Image.Image:
    """Returns a row for each clip: its caption, then frames at equal distances."""
    step = SIZE_PX + GAP_PX
    sheet = Image.new("RGB", (STRIP_TEXT_PX + FRAMES * step, len(clips) * step + GAP_PX), BACKGROUND)
    for row, (clip, text) in enumerate(zip(clips, texts, strict=True)):
        top = GAP_PX + row * step
        _write(sheet, text, (GAP_PX, top), STRIP_TEXT_PX)
        for column, frame in enumerate(clip[np.linspace(0, len(clip) - 1, FRAMES).round().astype(int)]):
            sheet.paste(Image.fromarray(frame), (STRIP_TEXT_PX + column * step, top))
    return sheet


def animation(clips: Sequence[np.ndarray], texts: Sequence[str]) -> list[Image.Image]:
    """Returns the pictures of an animation that shows all clips side by side, each with its caption."""
    cell, step = SIZE_PX + GAP_PX + CLIP_TEXT_PX, SIZE_PX + GAP_PX
    rows = -(-len(clips) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * cell + GAP_PX, rows * step + GAP_PX), BACKGROUND)
    corners = [(GAP_PX + i % COLUMNS * cell, GAP_PX + i // COLUMNS * step) for i in range(len(clips))]
    for (left, top), text in zip(corners, texts, strict=True):
        _write(page, text, (left + SIZE_PX + GAP_PX, top), CLIP_TEXT_PX - 2 * GAP_PX)
    pictures = []
    for frame in range(0, len(clips[0]), SHOWN_EVERY):
        picture = page.copy()
        for corner, clip in zip(corners, clips, strict=True):
            picture.paste(Image.fromarray(clip[frame]), corner)
        pictures.append(picture)
    return pictures


def _write(picture: Image.Image, text: str, corner: tuple[int, int], width_px: int) -> None:
    lines = textwrap.wrap(text, int(width_px / LETTER_PX))
    ImageDraw.Draw(picture).multiline_text(corner, "\n".join(lines), fill=INK, font=ImageFont.load_default(TEXT_PX), spacing=2)


def save_strips(sheet: Image.Image, path: Path) -> int:
    """Writes the sheet as PNG, with as many colours as fit into ``MAX_BYTES``, and returns its bytes."""
    for colours in PNG_COLOURS:
        sheet.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            return path.stat().st_size
    raise _too_large(path)


def save_animation(pictures: Sequence[Image.Image], path: Path) -> int:
    """Writes a GIF at the clips' own speed and returns its bytes.

    A pixel is drawn anew only where it differs from what is shown already; the tolerance is the smallest of
    ``GIF_TOLERANCES`` that fits into ``MAX_BYTES``.
    """
    few = pictures[:: max(1, len(pictures) // 4)]
    palette = Image.fromarray(np.concatenate([np.asarray(picture) for picture in few])).quantize(GIF_COLOURS)
    for tolerance in GIF_TOLERANCES:
        shown = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in _steady(pictures, tolerance)]
        delay_ms = int(round(1000 * SHOWN_EVERY / FPS, -1))  # a GIF counts in 10 ms
        shown[0].save(path, save_all=True, append_images=shown[1:], duration=delay_ms, loop=0, optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            return path.stat().st_size
    raise _too_large(path)


def _steady(pictures: Sequence[Image.Image], tolerance: int) -> list[Image.Image]:
    """Returns the pictures, in which a pixel keeps its value while that is right to within a number of levels."""
    shown = [np.asarray(pictures[0]).astype(np.int16)]
    for picture in pictures[1:]:
        levels = np.asarray(picture).astype(np.int16)
        changed = abs(levels - shown[-1]).max(axis=-1, keepdims=True) > tolerance
        shown.append(np.where(changed, levels, shown[-1]))
    return [Image.fromarray(levels.astype(np.uint8)) for levels in shown]


def _too_large(path: Path) -> ValueError:
    return ValueError(f"{path} has {path.stat().st_size} bytes; expected at most {MAX_BYTES}: show fewer clips.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes both pictures and prints their sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, nargs="?", help="default: the embedded model")
    parser.add_argument("--seed", type=int, default=0, help="seed of captions and noise (default 0)")
    parser.add_argument("--num", type=int, default=12, help="number of clips, the first of the seed (default 12)")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the pictures (default docs)")
    parser.add_argument("--real", action="store_true", help="let the renderer draw the clips, not the model")
    options = parser.parse_args(arguments)
    asked = cases.captions(options.num, seed=options.seed)
    if options.real:
        clips = list(cases.rendered(asked))
    else:
        made = tqdm(cases.clips(options.model, asked), total=len(asked), unit="clip", disable=None)
        clips = [one.frames_thw3 for one in made]
    texts = [one.text for one in asked]
    options.out.mkdir(parents=True, exist_ok=True)
    sheet, clip = options.out / "pocket_strips.png", options.out / "pocket_clips.gif"
    print(f"{sheet}: {save_strips(strips(clips, texts), sheet)} bytes")
    print(f"{clip}: {save_animation(animation(clips, texts), clip)} bytes")


if __name__ == "__main__":
    main()
