"""Prompts, JSON and mask strategies as the reference treats them: lists written out, slices that may run backwards.

What the reference asserts or cannot index is an exception here too.  Source: Open-Sora v1.2
opensora/utils/inference_utils.py; scripts/inference.py for the order of the steps.
"""

import json
import re
from typing import Any

import numpy as np

from tests.support import caption_oracle

_DEFAULTS = ["0", "0", "0", "0", "1", "0"]


def extract_json(prompts: list[str], references: list[str], strategies: list[str]) -> list[list[Any]]:
    texts: list[str] = []
    references, strategies = list(references), list(strategies)
    for i, prompt in enumerate(prompts):
        text, *rest = re.split(r"(?=[{])", prompt)
        assert len(rest) <= 1
        texts.append(text)
        for key, value in (json.loads(rest[0]) if rest else {}).items():
            assert key in ("reference_path", "mask_strategy")
            (references if key == "reference_path" else strategies)[i] = value
    return [texts, references, strategies]


def split(prompt: str) -> tuple[list[str], list[int] | None]:
    if not prompt.startswith("|0|"):
        return [prompt], None
    parts = prompt.split("|")[1:]
    pairs = [(int(parts[i]), parts[i + 1].strip()) for i in range(0, len(parts), 2)]
    return [text for _, text in pairs], [start for start, _ in pairs]


def merge(texts: list[str], starts: list[int] | None) -> str:
    return texts[0] if starts is None else "".join(f"|{start}|{text}" for start, text in zip(starts, texts, strict=True))


def at_loop(prompt: str, loop: int) -> str:
    if not prompt.startswith("|0|"):
        return prompt
    parts = prompt.split("|")[1:]
    texts: list[str] = []
    for i in range(0, len(parts), 2):
        end = int(parts[i + 2]) if i + 2 < len(parts) else loop + 1
        texts.extend([parts[i + 1]] * (end - int(parts[i])))
    return texts[loop]


def with_scores(prompt: str, aes: float | None, flow: float | None, camera_motion: str | None) -> str:
    scored = prompt
    if aes is not None and "aesthetic score:" not in prompt:
        scored += f" aesthetic score: {aes:.1f}."
    if flow is not None and "motion score:" not in prompt:
        scored += f" motion score: {flow:.1f}."
    if camera_motion is not None and "camera motion:" not in prompt:
        scored += f" camera motion: {camera_motion}."
    return scored


def prepare(prompt: str, aes: float | None, flow: float | None, camera_motion: str | None) -> str:
    texts, starts = split(prompt)
    scored = [with_scores(text, aes, flow, camera_motion) for text in texts]
    return merge([caption_oracle.clean_caption(caption_oracle.clean_caption(text)) for text in scored], starts)


def parse_strategy(strategy: str | None) -> list[list[Any]]:
    entries = []
    for text in (strategy or "").split(";") if strategy else []:
        fields: list[Any] = text.split(",")
        assert 1 <= len(fields) <= 6
        fields.extend(_DEFAULTS[len(fields) :])
        entries.append([int(field) for field in fields[:5]] + [float(fields[5])])
    return entries


def nearest_point(value: int, point: int, max_value: int) -> int:
    index = value // point
    if value % point > point / 2 and index < max_value // point - 1:
        index += 1
    return index * point


def put(z_THWC: np.ndarray, references: list[np.ndarray], strategy: str | None, loop: int, align: int | None) -> np.ndarray:
    """Puts references into the noise, in place, and returns the mask."""
    mask_T = np.ones(len(z_THWC), np.float32)
    for loop_id, index, source, target, length, edit in parse_strategy(strategy):
        if loop_id != loop:
            continue
        reference = references[index]
        source = len(reference) + source if source < 0 else source
        target = len(z_THWC) + target if target < 0 else target
        if align is not None:
            source, target = nearest_point(source, align, len(reference)), nearest_point(target, align, len(z_THWC))
        length = min(length, len(z_THWC) - target, len(reference) - source)
        z_THWC[target : target + length] = reference[source : source + length]
        mask_T[target : target + length] = edit
    return mask_T
