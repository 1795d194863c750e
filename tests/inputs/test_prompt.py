"""Prompts: properties that the recorded cases (tests/parity/text.py) cannot show, and what bad input says."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.inputs import prompt

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="|{}"), max_size=30)


@given(text=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_cleaned_text_is_lower_case_on_one_line_without_ideographs_or_markup(text: str) -> None:
    cleaned = prompt.preprocess_text(f"<b>{text}</b> A www.Example.com Dog")
    assert cleaned == cleaned.strip()
    assert not any("\u31c0" <= letter <= "\u9fff" for letter in cleaned)
    assert "example.com" not in cleaned
    assert all(line == cleaned for line in cleaned.split("\n"))
    assert "  " not in cleaned


def test_words_that_need_no_cleaning_are_untouched() -> None:
    text = "a drone shot over rugged cliffs. turquoise waves crash, 4k; it's dawn"
    assert prompt.preprocess_text(text) == text


def test_the_second_cleaning_matters() -> None:
    assert prompt.clean_caption("a%2Bb") == "a+b"
    assert prompt.preprocess_text("a%2Bb") == "a b"
    assert prompt.preprocess_text("  A%2BB ", clean=False) == "a%2bb"


@given(texts=st.lists(TEXT.map(str.strip), min_size=1, max_size=5), steps=st.lists(st.integers(1, 3), min_size=4, max_size=4))
@settings(max_examples=200, deadline=None)
def test_segments_survive_merging_and_each_loop_finds_its_own(texts: list[str], steps: list[int]) -> None:
    starts = [sum(steps[:i]) for i in range(len(texts))]
    merged = prompt.merge_prompt(texts, starts)
    assert prompt.split_prompt(merged) == (texts, starts)
    for loop in range(starts[-1] + 3):
        latest = max(i for i, start in enumerate(starts) if start <= loop)
        assert prompt.prompt_at_loop(merged, loop) == texts[latest]


def test_plain_prompts_hold_for_every_loop() -> None:
    assert prompt.split_prompt("|1|not from the first clip|2|b") == (["|1|not from the first clip|2|b"], None)
    assert prompt.prompt_at_loop("a cat", 7) == "a cat"


def test_scores_are_added_to_every_segment_before_cleaning() -> None:
    prepared = prompt.prepare_prompt("|0| A CAT |1| a Dog, motion score: 2.0", aes=6.5, flow=5, camera_motion="Pan Left")
    conditions = "aesthetic score: 6.5. motion score: 5.0. camera motion: pan left."
    assert prompt.prompt_at_loop(prepared, 0) == f"a cat {conditions}"
    assert prompt.prompt_at_loop(prepared, 1) == "a dog, motion score: 2.0 aesthetic score: 6.5. camera motion: pan left."


def test_json_overrides_only_what_it_names() -> None:
    assert prompt.extract_json('a {"mask_strategy": "0"}', "a.png", "1") == ("a ", "a.png", "0")
    assert prompt.extract_json("a", "a.png", "1") == ("a", "a.png", "1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a {curly} cat", "JSON is malformed .* remove the braces"),
        ('a {"mask_strategy": "0"', "JSON is malformed"),
        ('a {"b": 1} {"c": 2}', "opens 2 braces; expected at most one"),
        ('a {"refrence_path": "x.png"}', r"unknown keys \['refrence_path'\]; expected reference_path, mask_strategy"),
        ('a {"mask_strategy": 0}', "values that are not strings"),
    ],
)
def test_bad_json_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt.extract_json(text)


@pytest.mark.parametrize("text", ["|0|a||b", "|0|a|1", "|0|a|one|b", "|0|a|"])
def test_bad_segments_say_the_form(text: str) -> None:
    for parse in (prompt.split_prompt, lambda text: prompt.prompt_at_loop(text, 0)):
        with pytest.raises(ValueError, match=r"expected \|0\| text \|2\| text"):
            parse(text)


def test_prompt_files_are_sliced_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("  first \nsecond\u2028still second\n\nfourth", encoding="utf-8")
    assert prompt.load_prompts(path) == ["first", "second\u2028still second", "", "fourth"]
    assert prompt.load_prompts(path, 1, 3) == ["second\u2028still second", ""]
    assert prompt.load_prompts(path, -1) == ["fourth"]


def test_a_prompt_as_path_stays_in_its_directory(tmp_path: Path) -> None:
    for text in ("/etc/passwd", "../../up", "a/b"):
        path = Path(prompt.sample_path(tmp_path, prompt=text, prompt_as_path=True))
        assert path.resolve().parent == tmp_path.resolve()
