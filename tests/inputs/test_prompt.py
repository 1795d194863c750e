"""Prompts: properties that the recorded cases (tests/parity/text.py) cannot show, and what bad input says."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.inputs import prompt

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="|{}"), max_size=30)


@given(texts=st.lists(TEXT.map(str.strip), min_size=1, max_size=5), steps=st.lists(st.integers(1, 3), min_size=4, max_size=4))
@settings(max_examples=200, deadline=None)
def test_segments_survive_merging_and_each_loop_finds_its_own(texts: list[str], steps: list[int]) -> None:
    starts = [sum(steps[:i]) for i in range(len(texts))]
    merged = prompt.merge_prompt(texts, starts)
    assert prompt.split_prompt(merged) == (texts, starts)
    for loop in range(starts[-1] + 3):
        latest = max(i for i, start in enumerate(starts) if start <= loop)
        assert prompt.prompt_at_loop(merged, loop) == texts[latest]


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("|0|a|0|b|1|c", "bccc"),  # a segment of no length is skipped
        ("|0|a|2|b|1|c", "aacc"),  # so is one that ends before it begins
        ("|0|a|-1|b", "bbbb"),
        ("|0|a| 1 |b|1|c|+2|d", "acdd"),
        ("|0||1|b", " bbb"),
    ],
)
def test_starts_may_repeat_or_fall(text: str, loops: str) -> None:
    assert [prompt.prompt_at_loop(text, loop) for loop in range(4)] == [letter.strip() for letter in loops]


def test_a_segment_for_a_billion_clips_costs_nothing() -> None:
    began = time.process_time()
    assert prompt.prompt_at_loop("|0|a|1000000000|b", 10**9) == "b"
    assert time.process_time() - began < 1  # a second of the processor; the reference writes out a list of 8 GB


def test_a_prompt_beyond_the_limit_is_refused_and_one_at_the_limit_is_not_cut() -> None:
    whole = "a cat. " * 2856 + "the end."
    assert len(whole) == prompt.MAX_CHARACTERS
    assert prompt.prepare_prompt(whole) == whole
    with pytest.raises(
        ValueError, match=r"^the prompt has 20001 characters \('a cat\..{,220}'\); expected at most 20000: shorten it\.$"
    ):
        prompt.prepare_prompt(whole + ".")


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
    assert prompt.extract_json('a {"mask_strategy": null}', "a.png", "1") == ("a ", "a.png", "")
    assert prompt.extract_json('{"mask_strategy": "0", "mask_strategy": "1"}') == ("", "", "1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a {curly} cat", "JSON is malformed .* remove the braces"),
        ('a {"mask_strategy": "0"', "JSON is malformed"),
        ('a {"b": 1} {"c": 2}', "opens 2 braces; expected at most one"),
        ('a {"refrence_path": "x.png"}', r"the unknown keys 'refrence_path'; expected reference_path, mask_strategy"),
        ('a {"mask_strategy": 0}', "values that are not strings: mask_strategy"),
        ('a {"reference_path": null}', "values that are not strings: reference_path"),
        ('a {"mask_strategy": ' + "[" * 100_000, "JSON is malformed .it is nested too deep."),
        ('a {"mask_strategy": ' + "1" * 5000 + "}", "JSON is malformed"),
    ],
)
def test_bad_json_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt.extract_json(text)
    with pytest.raises(ValueError, match=r"^.{,600}$"):  # one line that can be read
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
