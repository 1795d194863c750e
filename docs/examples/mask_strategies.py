"""Mask strategies as pictures: one prompt, one picture as reference, and four ways in which it enters the clip.

Command:  python docs/examples/mask_strategies.py
Takes:    a minute on two cores; the embedded model.
Writes:   reference.png, mask_strategies.png
"""

import numpy as np
from PIL import Image, ImageDraw

import sora_jax
from sora_jax.metrics import psnr

PROMPT = "a red circle moves right on a blue background"
STRATEGIES = {
    "0": "it is the first latent frame",
    "0,0,0,-1,1": "it is the last one",
    "0;0,0,0,-1,1": "it is both",
    "0,0,0,0,1,0.5": "it is the first, and may change by half",
}
SHOWN, SCALE, MARGIN = 9, 2, 22

y, x = np.mgrid[:64, :64]
picture = np.where(((x - 32) ** 2 + (y - 32) ** 2 < 100)[..., None], (220, 30, 30), (30, 40, 200)).astype(np.uint8)
Image.fromarray(picture).save("reference.png")

pipe = sora_jax.Pipeline.from_pretrained()
# Starts are rounded to whole chunks of 5 latent frames unless align is off: -1 would be the beginning of the last chunk.
options = {"preset": "recommended", "seed": 1, "references": "reference.png", "align": "off"}
clips = {strategy: pipe(PROMPT, mask_strategies=strategy, **options).frames[0] for strategy in STRATEGIES}

side = 64 * SCALE
sheet = Image.new("RGB", (SHOWN * side, len(clips) * (side + MARGIN)), "white")
for row, (strategy, frames) in enumerate(clips.items()):
    top = row * (side + MARGIN)
    ImageDraw.Draw(sheet).text((4, top + 5), f"{strategy}     {STRATEGIES[strategy]}", fill="black")
    for column, frame in enumerate(np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)):
        sheet.paste(
            Image.fromarray(frames[frame]).resize((side, side), Image.Resampling.NEAREST), (column * side, top + MARGIN)
        )
sheet.save("mask_strategies.png")


def near(frame):
    """Returns how near a frame is to the picture, in dB."""
    return psnr(frame[None], picture[None])


first, last = ({strategy: near(frames[index]) for strategy, frames in clips.items()} for index in (0, -1))
for strategy in clips:
    print(f"{strategy}: first frame {first[strategy]:.0f} dB, last frame {last[strategy]:.0f} dB")
assert first["0"] > last["0"]
assert last["0,0,0,-1,1"] > first["0,0,0,-1,1"] + 3
