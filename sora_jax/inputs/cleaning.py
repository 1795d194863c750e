"""Caption cleaning, as the text encoder's captions were cleaned in training.

Invariant: the result is the reference's, character by character, and the time is linear in the length of the text.  The
reference's expressions for addresses, file names, sizes and a few more try every beginning against the whole rest; here
they are written so that every run of letters is read a few times at most.  Text in, text out: segments, scores and the
limit of a prompt's length are the business of ``sora_jax.inputs.prompt``.
"""

import html
import re
import urllib.parse

import ftfy

from sora_jax.inputs import markup

_Substitutions = tuple[tuple[re.Pattern[str], str], ...]


def _compiled(*pairs: tuple[str, str]) -> _Substitutions:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_SECURE_OR_NOT, _WORLD_WIDE = (re.compile(rf"\b{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])") for scheme in ("https?", "www"))
_BEHIND_HOST = 4  # of a scheme, what lies behind the letters of a host: a colon and up to three slashes
_HOST = re.compile(r"[a-zA-Z0-9.\-]+")
_DOMAIN = re.compile(r"\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)")
_WORD_BOUNDARY = re.compile(r"\b")

_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_RUN = re.compile(r"\S+")
_FILE_NAME = re.compile(rf"\S+\.(?:{_FILE_TYPES})")

_BEFORE_FILE_NAMES = _compiled(
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
)

_AFTER_FILE_NAMES = _compiled(
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\[\]{}|\\/*]+", " "),
    (r"(?<!\s)\s+\.\s+", " "),  # a dot by itself; the look behind tries a run of spaces once, not at each of them
)

_DASH_OR_UNDERSCORE = re.compile("[-_]")
_MAX_JOINERS = 3  # more of them than this, and the text is taken for a this-is-my-cute-cat slug

# Possessive repetitions (++, *+) where giving back could not help: a letter or digit is always followed by another one, or
# by what the expression asks for next.
_LAST = _compiled(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_TYPES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*+[a-zA-Z]++\d++[a-zA-Z]++\d[a-zA-Z\d]*+\b", " "),  # j2d1a2a
    # 1920x1080, with Latin x, Cyrillic kha or the multiplication sign; "2x3.4m" loses "2x3."
    (r"\b\d++(?:\.\d*+)?+[x\u0445\u00d7]\d++(?:\.\d++\b|\.\b|\b)", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def _either_width(text: str) -> str:
    return "".join(f"[{letter}{chr(ord(letter) + 0xFEE0)}]" for letter in text)


# ftfy reads the whole text again for each level of "&amp;amp;amp;"; one level leads to the same end.
_NESTED = re.compile(
    "(?<=[&\uff06])(?:{0}|{1})+(?={0}|{1})".format(
        _either_width("amp;"), _either_width("#") + "[0\uff10]*" + _either_width("38;")
    )
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

    Raises:
      ValueError: the text holds markup that the reference cannot read either.
    """
    text = urllib.parse.unquote_plus(text).strip().lower()
    text = text.replace("<person>", "person")
    text = _without_addresses(_without_addresses(text, _SECURE_OR_NOT), _WORLD_WIDE)
    text = _substitute(_BEFORE_FILE_NAMES, markup.text_of(text))
    text = _substitute(_AFTER_FILE_NAMES, _without_file_names(text))
    if len(_DASH_OR_UNDERSCORE.findall(text)) > _MAX_JOINERS:
        text = _DASH_OR_UNDERSCORE.sub(" ", text)
    return _substitute(_LAST, basic_clean(text)).strip()


def basic_clean(text: str) -> str:
    """Returns the text with mojibake repaired and HTML entities decoded (twice: ``&amp;lt;`` is ``<``).

    Raises:
      ValueError: an entity is a number of thousands of digits.
    """
    if "<" not in text:  # else ftfy decodes no entities
        text = _NESTED.sub("", text)
    try:
        return html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    except ValueError as error:
        raise ValueError(markup.TOO_LARGE) from error


def _without_addresses(text: str, scheme: re.Pattern[str]) -> str:
    r"""Returns the text without ``\b(?:SCHEME|HOST DOMAIN)``, the reference's expression for addresses.

    Whether a dot begins a domain, and where that ends, does not depend on where the address begins, and an address reaches
    to the last domain in its run of host letters.  So a run loses at most one address with a domain and, behind it, one
    scheme, whose colon ends the run.
    """
    kept, place = [], 0
    for host in _HOST.finditer(text):
        start = max(place, host.start())
        domain = _last_domain(text, start + 1, host.end())
        boundary = _WORD_BOUNDARY.search(text, start) if domain else None
        if domain and boundary and boundary.start() < domain.start():
            kept.append(text[place : boundary.start()])
            start = place = domain.end()
        address = scheme.search(text, start, host.end() + _BEHIND_HOST)
        if address:
            kept.append(text[place : address.start()])
            place = address.end()
    return "".join([*kept, text[place:]])


def _last_domain(text: str, start: int, end: int) -> re.Match[str] | None:
    dot = text.rfind(".", start, end)
    while dot >= 0:
        domain = _DOMAIN.match(text, dot)
        if domain:
            return domain
        dot = text.rfind(".", start, dot)
    return None


def _without_file_names(text: str) -> str:
    r"""Returns the text without ``\S+\.(?:png|...)``: in a run without spaces, all up to the last such ending."""

    def rest(run: re.Match[str]) -> str:
        name = _FILE_NAME.match(run[0])
        return run[0][name.end() :] if name else run[0]

    return _RUN.sub(rest, text)


def _substitute(substitutions: _Substitutions, text: str) -> str:
    for pattern, replacement in substitutions:
        text = pattern.sub(replacement, text)
    return text
