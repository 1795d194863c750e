"""Image to video: a picture becomes the first frame, and a clip goes on from it.

Command:  python docs/examples/image_to_video.py
Takes:    half a minute on two cores; the embedded model.
Writes:   start.png, clip.mp4
"""

import numpy as np
from PIL import Image

import sora_jax
from sora_jax.metrics import psnr

pipe = sora_jax.Pipeline.from_pretrained()

y, x = np.mgrid[:64, :64]  # any picture will do; this one is what the embedded model can draw: a red circle on blue
picture = np.where(((x - 20) ** 2 + (y - 32) ** 2 < 100)[..., None], (220, 30, 30), (30, 40, 200)).astype(np.uint8)
Image.fromarray(picture).save("start.png")

clip = pipe("a red circle moves right on a blue background", references="start.png", preset="recommended", seed=1)
clip.save("clip.mp4", overwrite=True)
print(clip)
print(f"the first frame has {psnr(clip.frames[0, :1], picture[None]):.0f} dB against the picture")
assert psnr(clip.frames[0, :1], picture[None]) > 20
