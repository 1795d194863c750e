"""Clips and models as HTML, for notebooks.

Invariant: what is shown lies in the text itself: no script, no address, no file; every text of a user is escaped.
"""

import base64
import html
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sora_jax.pipeline import video
from sora_jax.pipeline.model_file import ModelFile

_MAX_SHOWN = 8  # samples of a clip
_LEAST_PX = 256  # that a clip is shown with


def clip_html(frames: UInt8[np.ndarray, "B t h w 3"], fps: float, parameters: Sequence[Mapping[str, Any]]) -> str:
    """Returns samples side by side, each playing in a loop, with its prompt and seed."""
    shown = [_figure(sample, fps, made_from) for sample, made_from in zip(frames[:_MAX_SHOWN], parameters, strict=False)]
    left = len(frames) - len(shown)
    more = f"<p>and {left} more</p>" if left > 0 else ""
    return f'<div style="display:flex;flex-wrap:wrap;gap:12px">{"".join(shown)}</div>{more}'


def _figure(frames: np.ndarray, fps: float, made_from: Mapping[str, Any]) -> str:
    height, width = frames.shape[1:3]
    enlarged = max(1, math.ceil(_LEAST_PX / max(height, width)))
    size = f'width="{enlarged * width}" height="{enlarged * height}" style="image-rendering:pixelated"'
    kind = "png" if len(frames) == 1 else "gif" if height % 2 or width % 2 else "mp4"
    with tempfile.TemporaryDirectory() as folder:
        path = video.save(frames, Path(folder) / f"clip.{kind}", fps=fps)
        data = base64.b64encode(path.read_bytes()).decode()
    if kind == "mp4":
        picture = f'<video controls loop autoplay muted playsinline {size} src="data:video/mp4;base64,{data}"></video>'
    else:
        picture = f'<img {size} src="data:image/{kind};base64,{data}">'
    text = html.escape(f"{made_from.get('prompt', '')} (seed {made_from.get('seed', '?')})")
    return f'<figure style="margin:0">{picture}<figcaption style="max-width:{enlarged * width}px">{text}</figcaption></figure>'


def model_html(model: ModelFile) -> str:
    """Returns a table of a model: its identity, networks, defaults and what it was trained for."""
    rows = {"model": model.model_id}
    for network, manifest in model.manifests.items():
        nbytes = sum(parameter.nbytes for parameter in manifest.parameters.values())
        rows[network] = f"{len(manifest.parameters)} arrays of {manifest.dtype}, {nbytes / 1e6:,.1f} MB"
    if model.defaults:
        rows["defaults"] = ", ".join(f"{name} {value}" for name, value in model.defaults.items())
    if model.trained is not None and model.trained.captions:
        rows["captions"] = model.trained.captions
    cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows.items())
    return f"<table>{''.join(cells)}</table>"
