"""Prompts before tokenisation: conditions written as JSON, segments per loop, score suffixes, caption cleaning.

The order is fixed: ``extract_json``, then ``prepare_prompt`` (split, append scores, clean, merge), then ``prompt_at_loop``
for each clip.  Every function is text to text; nothing here tokenises, reads references or knows a network.
"""

import html
import itertools
import json
import os
import re
import urllib.parse
import warnings
from collections.abc import Sequence
from pathlib import Path

import bs4
import ftfy

_Substitutions = tuple[tuple[re.Pattern[str], str], ...]


def _compiled(*pairs: tuple[str, str]) -> _Substitutions:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


def _url(scheme: str) -> str:
    domains = "com|co|ru|net|org|edu|gov|it"
    return rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+\.(?:{domains})[\w/-]*\b/?(?!@))"


_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"

_BEFORE_HTML = _compiled(
    ("<person>", "person"),
    (_url("https?"), ""),
    (_url("www"), ""),
)

_AFTER_HTML = _compiled(
    (r"@\w+\b", ""),  # @nickname
    (r"[\u31c0-\u9fff]+", ""),  # CJK strokes to CJK ideographs; kana and Hangul lie outside
    (
        r"[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+",
        "-",
    ),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP address
    (r"\d:\d\d\s+$", ""),  # time of day at the very end
    (r"\\n", " "),  # a backslash and an n
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILE_TYPES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)

_DASH_OR_UNDERSCORE = re.compile("[-_]")
_MAX_JOINERS = 3  # more of them than this, and the text is taken for a this-is-my-cute-cat slug

_LAST = _compiled(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_TYPES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),  # 1920x1080, with Latin x, Cyrillic kha or the multiplication sign
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def preprocess_text(text: str, *, clean: bool = True) -> str:
    """Returns a prompt as the text encoder saw captions in training: cleaned twice, or only lower-cased and stripped.

    The second cleaning is not idle: the first one decodes ``%2B`` to ``+``, the second turns ``+`` into a space.

    Source: Open-Sora v1.2 opensora/models/text_encoder/t5.py text_preprocessing.
    """
    return clean_caption(clean_caption(text)) if clean else text.lower().strip()


def clean_caption(text: str) -> str:
    """Returns a caption in lower case without addresses, markup, file names, serial numbers and CJK ideographs.

    Source: Open-Sora v1.2 opensora/models/text_encoder/t5.py clean_caption.
    """
    text = urllib.parse.unquote_plus(text).strip().lower()
    text = _substitute(_BEFORE_HTML, text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)  # a prompt may look like a file name
        text = bs4.BeautifulSoup(text, features="html.parser").text
    text = _substitute(_AFTER_HTML, text)
    if len(_DASH_OR_UNDERSCORE.findall(text)) > _MAX_JOINERS:
        text = _DASH_OR_UNDERSCORE.sub(" ", text)
    return _substitute(_LAST, basic_clean(text)).strip()


def basic_clean(text: str) -> str:
    """Returns the text with mojibake repaired and HTML entities decoded (twice: ``&amp;lt;`` is ``<``)."""
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


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
    """Returns prompt, reference paths and mask strategy, the latter two from JSON at the end of the prompt if given there.

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
            f"The prompt opens {prompt.count('{')} braces; expected at most one JSON object, at its end: {prompt!r}."
        )
    try:
        fields = json.loads(brace + rest)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"The prompt's JSON is malformed ({error}): {brace + rest!r}; remove the braces if none is meant."
        ) from error
    unknown = sorted(fields.keys() - {"reference_path", "mask_strategy"})
    if unknown:
        raise ValueError(f"The prompt's JSON has unknown keys {unknown}; expected reference_path, mask_strategy: {prompt!r}.")
    if not all(isinstance(value, str) for value in fields.values()):
        raise ValueError(f"The prompt's JSON has values that are not strings: {fields}; write them in double quotes.")
    return text, fields.get("reference_path", reference), fields.get("mask_strategy", mask_strategy)


def split_prompt(prompt: str) -> tuple[list[str], list[int] | None]:
    """Returns the segments of ``|0| a day |2| a night`` and the loop from which each holds; plain text is one segment.

    Source: Open-Sora v1.2 opensora/utils/inference_utils.py split_prompt.

    Raises:
      ValueError: a loop number is not an integer or not larger than the one before, or a text is missing.
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
    """
    segments, starts = split_prompt(prompt)
    scored = [append_scores(text, aes=aes, flow=flow, camera_motion=camera_motion) for text in segments]
    return merge_prompt([preprocess_text(text, clean=clean) for text in scored], starts)


def prompt_at_loop(prompt: str, loop: int) -> str:
    """Returns the segment of a prepared prompt that holds in the ``loop``-th clip (0 is the first).

    Source: Open-Sora v1.2 opensora/utils/inference_utils.py extract_prompts_loop.
    """
    if not prompt.startswith("|0|"):
        return prompt
    texts, starts = _segments(prompt)
    ends = [*starts[1:], loop + 1]
    by_loop = [text for text, start, end in zip(texts, starts, ends, strict=True) for _ in range(start, end)]
    return by_loop[loop]


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


def _substitute(substitutions: _Substitutions, text: str) -> str:
    for pattern, replacement in substitutions:
        text = pattern.sub(replacement, text)
    return text


def _segments(prompt: str) -> tuple[list[str], list[int]]:
    parts = prompt.split("|")[1:]
    try:
        if len(parts) % 2:
            raise ValueError("the last one has no text")
        starts = [int(part) for part in parts[::2]]
        if any(start >= following for start, following in itertools.pairwise(starts)):
            raise ValueError("the loops do not follow each other")
        return parts[1::2], starts
    except ValueError as error:
        raise ValueError(f"Malformed prompt segments ({error}) in {prompt!r}; expected |0| text |2| text.") from error
