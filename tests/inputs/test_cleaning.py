"""Caption cleaning: the reference's result, character by character, in linear time."""

import gc
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.inputs import cleaning, markup
from tests.support import caption_oracle

RECORDED = Path(__file__).parents[1] / "golden" / "text" / "clean.json"

# What the expressions look for, and what stops them.
WORDS = [
    *"http: https: www: www. http / // . .. com co ru .com .org .it @ a b ab - _ é 1 12 123 12345 1234567 %".split(),
    *"+ %2B %41 %C3%A9 x х × 5x x7 1.5 2x3.4 # png .png .jpg .jpeg mp4 image images free shipping worldwide".split(),
    *"download click on for page : 1:23 \" ' '' &quot; &amp &#38; & \\n \\ ( ] * , ; ! ? = ~ person".split(),
    *"<person> 文 ー — – ` “ ‘ ß İ Ã© ＆ ： jc6640 7a8 Z9z9".split(),
    *(" ", "  ", "\n", "\t", "\xa0", "\u2028", "\u0301", "\x00"),
]
MARKUP = [
    *"< <a </ </a> <! <!-- --> -- > <? ?> a b = ' \" / & &amp; &# &#38; &#x41 &lt ; <![ <![cdata[ ]]> ] <![if <script>".split(),
    *"</script> <style <br> </br> <p> <!doctype <!a é == '' \"\" <a b= /> <title> x=' y=\" 1 <pre> <textarea>".split(),
    *(" ", "\n", "\x00", "\x0b", "\xa0"),
]


def texts(tokens: Sequence[str], seed: int, number: int) -> list[str]:
    """Random texts, each of a few tokens, so that every expression meets what nearly fits it."""
    draw = random.Random(seed)
    chosen = []
    for _ in range(number):
        some = draw.sample(tokens, draw.randint(2, min(12, len(tokens))))
        chosen.append("".join(draw.choices(some, k=draw.choice([3, 6, 12, 25, 60]))))
    return chosen


def outcome(function: Callable[[str], str], text: str) -> str | None:
    """What a function returns; None where it refuses the text, of which Beautiful Soup has a class of its own."""
    try:
        return function(text)
    except Exception:
        return None


@pytest.mark.parametrize(("tokens", "seed"), [(WORDS, 1), ([*WORDS, *MARKUP], 2)])
def test_cleaning_is_that_of_the_reference(tokens: list[str], seed: int) -> None:
    for text in texts(tokens, seed, 700):
        assert outcome(cleaning.clean_caption, text) == outcome(caption_oracle.clean_caption, text), text


def test_text_of_markup_is_that_of_beautiful_soup() -> None:
    refused = 0
    for text in texts(MARKUP, 3, 1000) + texts([*" \t\n\f\r\x0b\xa0a\u2028"], 4, 100):
        expected = outcome(caption_oracle.text_of_markup, text)
        assert outcome(markup.text_of, text) == expected, text
        refused += expected is None
    assert 0 < refused < 500


@given(text=st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_any_text_is_cleaned_as_by_the_reference(text: str) -> None:
    assert cleaning.clean_caption(text) == caption_oracle.clean_caption(text)
    assert cleaning.basic_clean(text) == caption_oracle.basic_clean(text)


def test_recorded_captions_are_cleaned_as_by_the_oracle() -> None:
    cases = json.loads(RECORDED.read_text("utf-8"))["cases"]
    assert len(cases) > 50
    for case in cases:
        assert (
            cleaning.clean_caption(case["input"]) == caption_oracle.clean_caption(case["input"]) == case["clean_caption_once"]
        )


def test_nested_entities_are_decoded_as_level_by_level() -> None:
    for text in texts(
        ["&", "＆", "amp;", "amp", "#38;", "＃", "38", "；", ";", "ａｍｐ；", "lt;", "<", "＜", "\n", "00", "x"], 5, 500
    ):
        assert cleaning.basic_clean(text) == caption_oracle.basic_clean(text), text


# For every expression of the reference a text that its beginnings never end in, or end in only far behind.
LONG = [
    "a",
    "a.",
    "http://a.",
    "-.",
    "a.com@",
    "a.com/",
    "http:",
    "www:",
    "@",
    "文",
    "–",
    "1.",
    "1:23 ",
    "#1",
    "1",
    "1a",
    "a1",
    "a1a1",
    "é1a1a1",
    "1.1x",
    "1x1",
    "1x",
    ".png",
    "a.pn",
    "'",
    ". ",
    " ",
    "(",
    "-a",
    "worldwide ",
    "free ",
    "free shipping",
    "click on ",
    "page ",
    "a :",
    "a,",
    "&amp;",
    "\uff06amp;",
    "%2B",
]
LONG_MARKUP = [
    "<",
    "</",
    "<!",
    "<!--",
    "<!-- >",
    "<?",
    "<a ",
    "<a/",
    "<a",
    "<a b='",
    "<a/x=",
    '<a"\0',
    '<a b= "',
    "<a>",
    "<br></i>",
    "<![if ",
]


@pytest.mark.parametrize("pattern", [*LONG, *LONG_MARKUP])
def test_twice_the_text_takes_about_twice_the_time(pattern: str) -> None:
    """In seconds of the processor, of which other work on the machine takes none.  A quadratic step makes it four times."""
    head, tail = ("a1a", "_") if pattern == "1" else ("a", "_" if pattern.strip() else "b")

    def ratio(size: int = 6_000) -> float:
        once, twice = (head + (pattern * size)[:length] + tail for length in (size, 2 * size))
        return seconds(twice) / max(seconds(once), 1e-3)

    assert any(ratio() < 3 for _ in range(4))


def seconds(text: str) -> float:
    gc.disable()
    try:
        began = time.process_time()
        cleaning.clean_caption(text)
        return time.process_time() - began
    finally:
        gc.enable()


def test_the_test_of_time_sees_a_quadratic_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "clean_caption", lambda text: caption_oracle.substitute([(r"[\S]+\.(?:png|jpg)", "")], text))
    assert seconds("a" * 16_000) > 8 * seconds("a" * 4_000)


@given(text=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_cleaned_text_is_lower_case_on_one_line_without_ideographs_or_markup(text: str) -> None:
    cleaned = cleaning.preprocess_text(f"<b>{text}</b> A www.Example.com Dog")
    assert cleaned == cleaned.strip()
    assert not any("\u31c0" <= letter <= "\u9fff" for letter in cleaned)
    assert "example.com" not in cleaned
    assert all(line == cleaned for line in cleaned.split("\n"))
    assert "  " not in cleaned


def test_words_that_need_no_cleaning_are_untouched() -> None:
    text = "a drone shot over rugged cliffs. turquoise waves crash, 4k; it's dawn"
    assert cleaning.preprocess_text(text) == text


def test_the_second_cleaning_matters() -> None:
    assert cleaning.clean_caption("a%2Bb") == "a+b"
    assert cleaning.preprocess_text("a%2Bb") == "a b"
    assert cleaning.preprocess_text("  A%2BB ", clean=False) == "a%2bb"


@pytest.mark.parametrize("text", ["a <![x] cat", "&#" + "1" * 5000 + ";", "\uff06\uff03" + "1" * 5000 + "_"])
def test_markup_that_the_reference_cannot_read_is_refused_in_one_line(text: str) -> None:
    assert outcome(caption_oracle.clean_caption, text) is None
    with pytest.raises(ValueError, match=r"^the prompt's markup cannot be read \(.*\); remove") as caught:
        cleaning.clean_caption(text)
    assert "\n" not in str(caught.value)
