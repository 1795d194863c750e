"""Caption cleaning as the reference writes it: one expression after another, over the whole text.

Some of these expressions take quadratic time.  Tests compare the product, which takes linear time, with them.
Source: Open-Sora v1.2 opensora/models/text_encoder/t5.py clean_caption, in a table.
"""

import re
import urllib.parse
import warnings

import bs4

from sora_jax.inputs.cleaning import basic_clean

_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)


def _url(scheme: str) -> str:
    return rf"\b((?:{scheme}:(?:\/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:{_DOMAINS})[\w/-]*\b\/?(?!@)))"


_BEFORE_MARKUP = [("<person>", "person"), (_url("https?"), ""), (_url("www"), "")]

_AFTER_MARKUP = [
    (r"@[\w\d]+\b", ""),
    (r"[\u31c0-\u31ef]+", ""),
    (r"[\u31f0-\u31ff]+", ""),
    (r"[\u3200-\u32ff]+", ""),
    (r"[\u3300-\u33ff]+", ""),
    (r"[\u3400-\u4dbf]+", ""),
    (r"[\u4dc0-\u4dff]+", ""),
    (r"[\u4e00-\u9fff]+", ""),
    (f"[{_DASHES}]+", "-"),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILE_TYPES})", ""),
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    ("[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~\\)\\(\\]\\[\\}\\{\\|\\\\/\\*]{1,}", " "),
    (r"\s+\.\s+", " "),
]

_LAST = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_TYPES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
]


def clean_caption(text: str) -> str:
    """Returns what the reference makes of a caption in one cleaning."""
    text = urllib.parse.unquote_plus(text).strip().lower()
    text = substitute(_BEFORE_MARKUP, text)
    text = text_of_markup(text)
    text = substitute(_AFTER_MARKUP, text)
    if len(re.findall(r"(?:\-|\_)", text)) > 3:
        text = re.sub(r"(?:\-|\_)", " ", text)
    return substitute(_LAST, basic_clean(text)).strip()


def text_of_markup(text: str) -> str:
    """Returns the text that Beautiful Soup finds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)
        return bs4.BeautifulSoup(text, features="html.parser").text


def substitute(table: list[tuple[str, str]], text: str) -> str:
    for pattern, replacement in table:
        text = re.sub(pattern, replacement, text)
    return text
