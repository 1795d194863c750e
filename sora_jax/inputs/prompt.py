"""Prompts before tokenisation: conditions written as JSON, segments per loop, score suffixes, and the order of cleaning.

The order is fixed: ``extract_json``, then ``prepare_prompt`` (split, append scores, clean, merge), then ``prompt_at_loop``
for each clip.  Every function is text to text, and accepts every text that the reference accepts, up to `MAX_CHARACTERS`;
nothing here tokenises, reads references or knows a network.
"""

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

from sora_jax.inputs.cleaning import preprocess_text

MAX_CHARACTERS = 20_000  # about 15 times what the text encoder reads of a prompt; cleaning takes a fraction of a second
_MAX_SHOWN = 200  # characters of a prompt in a message


def append_scores(
    prompt: str, *, aes: int | float | None = None, flow: int | float | None = None, camera_motion: str | None = None
) -> str:
    """Returns the prompt with the conditions it was trained with, each unless the prompt already names it.

    Args:
      prompt: text of one segment.
      aes: aesthetic score, about 4 to 7; 6.5 is usual.
      flow: motion score, about 0 to 10.
      camera_motion: such as ``pan right`` or ``static``.

    Source: Open-Sora v1.2 opensora/utils/inference_utils.py append_score_to_prompts.
    """
    suffixes = (
        ("aesthetic score:", None if aes is None else f"{aes:.1f}"),
        ("motion score:", None if flow is None else f"{flow:.1f}"),
        ("camera motion:", camera_motion),
    )
    added = [f" {label} {value}." for label, value in suffixes if value is not None and label not in prompt]
    return prompt + "".join(added)


def extract_json(prompt: str, reference: str = "", mask_strategy: str = "") -> tuple[str, str, str]:
    """Returns prompt, reference paths and mask strategy, the latter two from JSON at the end of the prompt, if it has any.

    Example: ``a car {"reference_path": "a.png;b.mp4", "mask_strategy": "0;0,1,0,-1,1"}``.

    Source: Open-Sora v1.2 opensora/utils/inference_utils.py extract_json_from_prompts.

    Raises:
      ValueError: more than one brace opens, the JSON is malformed, or a key is unknown.
    """
    text, brace, rest = prompt.partition("{")
    if not brace:
        return prompt, reference, mask_strategy
    if "{" in rest:
        raise ValueError(
            f"The prompt opens {prompt.count('{')} braces; expected at most one JSON object, at its end: {_shown(prompt)}."
        )
    try:
        fields = json.loads(brace + rest)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise ValueError(
            f"The prompt's JSON is malformed ({reason}): {_shown(brace + rest)}; remove the braces if none is meant."
        ) from error
    unknown = sorted(fields.keys() - {"reference_path", "mask_strategy"})
    if unknown:
        names = _shown(", ".join(unknown))
        raise ValueError(
            f"The prompt's JSON has the unknown keys {names}; expected reference_path, mask_strategy: {_shown(prompt)}."
        )
    strategy = fields.get("mask_strategy", mask_strategy)
    fields["mask_strategy"] = "" if strategy is None else strategy  # null: no strategy, as in the source
    strange = [name for name, value in fields.items() if not isinstance(value, str)]
    if strange:
        raise ValueError(
            f"The prompt's JSON has values that are not strings: {', '.join(strange)}; write them in double quotes."
        )
    return text, fields.get("reference_path", reference), fields["mask_strategy"]


def split_prompt(prompt: str) -> tuple[list[str], list[int] | None]:
    """Returns the segments of ``|0| a day |2| a night`` and the loop from which each holds; plain text is one segment.

    Source: Open-Sora v1.2 opensora/utils/inference_utils.py split_prompt.

    Raises:
      ValueError: a loop number is not an integer, or a text is missing.
    """
    if not prompt.startswith("|0|"):
        return [prompt], None
    texts, starts = _segments(prompt)
    return [text.strip() for text in texts], starts


def merge_prompt(segments: Sequence[str], starts: Sequence[int] | None) -> str:
    """Returns the inverse of ``split_prompt``: ``|0|a day|2|a night``, or the one segment where ``starts`` is None."""
    if starts is None:
        return segments[0]
    return "".join(f"|{start}|{text}" for start, text in zip(starts, segments, strict=True))


def prepare_prompt(
    prompt: str,
    *,
    aes: int | float | None = None,
    flow: int | float | None = None,
    camera_motion: str | None = None,
    clean: bool = True,
) -> str:
    """Returns the prompt with scores appended to every segment and every segment cleaned, scores included.

    Source: Open-Sora v1.2 scripts/inference.py, steps 0 and 2 to 4.

    Raises:
      ValueError: the prompt is longer than `MAX_CHARACTERS`, or its segments or its markup are malformed.
    """
    if len(prompt) > MAX_CHARACTERS:
        raise ValueError(
            f"the prompt has {len(prompt)} characters ({_shown(prompt)}); expected at most {MAX_CHARACTERS}: shorten it."
        )
    segments, starts = split_prompt(prompt)
    scored = [append_scores(text, aes=aes, flow=flow, camera_motion=camera_motion) for text in segments]
    return merge_prompt([preprocess_text(text, clean=clean) for text in scored], starts)


def prompt_at_loop(prompt: str, loop: int) -> str:
    """Returns the segment of a prepared prompt that holds in the ``loop``-th clip (0 is the first).

    Each segment holds for as many clips as its number is below the next one's; where it is not, it is skipped.

    Source: Open-Sora v1.2 opensora/utils/inference_utils.py extract_prompts_loop.
    """
    if not prompt.startswith("|0|"):
        return prompt
    texts, starts = _segments(prompt)
    ends = itertools.accumulate(max(end - start, 0) for start, end in zip(starts, [*starts[1:], loop + 1], strict=True))
    return next(text for text, end in zip(texts, ends, strict=True) if loop < end)


def load_prompts(path: str | Path, start: int | None = None, end: int | None = None) -> list[str]:
    """Returns the lines of a prompt file, stripped; ``start`` and ``end`` select lines as a slice does.

    Source: Open-Sora v1.2 opensora/utils/inference_utils.py load_prompts.  Differs from source: always UTF-8.
    """
    with open(path, encoding="utf-8") as lines:
        return [line.strip() for line in lines][start:end]


def sample_path(
    directory: str | Path,
    *,
    index: int | None = None,
    prompt: str | None = None,
    prompt_as_path: bool = False,
    name: str | None = None,
    num_samples: int = 1,
    sample: int | None = None,
) -> str:
    """Returns the path, without suffix, of a generated file: ``out/sample_0003-1``, or named by its prompt.

    Args:
      directory: where results go.
      index: number of the prompt in its file.
      prompt: the text, for ``prompt_as_path``.
      prompt_as_path: name the file by its prompt, so that an interrupted batch finds what is done; path separators
        become underscores, unlike in the source.
      name: prefix; ``sample`` unless given (nothing with ``prompt_as_path``).
      num_samples: samples for each prompt; with more than one, ``sample`` is appended.
      sample: number of the sample of this prompt.

    Source: Open-Sora v1.2 opensora/utils/inference_utils.py get_save_path_name.
    """
    by_prompt = "" if prompt is None else prompt.replace(os.sep, "_")
    stem = f"{name or ''}{by_prompt}" if prompt_as_path else f"{'sample' if name is None else name}_{index:04d}"
    path = os.path.join(directory, stem)
    return path if num_samples == 1 else f"{path}-{sample}"


def _segments(prompt: str) -> tuple[list[str], list[int]]:
    parts = prompt.split("|")[1:]
    try:
        if len(parts) % 2:
            raise ValueError("the last one has no text")
        return parts[1::2], [int(part) for part in parts[::2]]
    except ValueError as error:
        raise ValueError(f"Malformed prompt segments ({error}) in {_shown(prompt)}; expected |0| text |2| text.") from error


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}...")
