"""Token ids: both file kinds alike, truncation and padding, and what a damaged file says."""

import base64
import copy
import json
import os
import random
import struct
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.inputs import tokenizer as tokenizer_module
from sora_jax.inputs.tokenizer import Tokenizer

VOCABULARY = Path(__file__).parents[1] / "golden" / "t5_tokenizer.json"
WORDS = ["a", "Sunny", "day", "over", "café", "\ufb01elds", "naïve", "½", "東京", "привет", "…", "emoji😀", "don't", "3:45"]
WORDS += ["<extra_id_0>", "</s>", "<pad>", "\u3000", "\t", "\n", "\x85", "\u200b", "\U0001d54f-ray"]


def varint(value: int) -> bytes:
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def field(number: int, value: bytes | int | float) -> bytes:
    """One field of a protocol buffer message: bytes, a float, or a non-negative integer."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


@pytest.fixture(scope="module")
def from_json() -> Tokenizer:
    return Tokenizer.from_file(VOCABULARY)


@pytest.fixture(scope="module")
def from_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same vocabulary as the SentencePiece file T5 was published with: 32,000 pieces, no sentinels."""
    content = json.loads(VOCABULARY.read_text(encoding="utf-8"))
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    pieces = [
        field(1, field(1, piece.encode()) + field(2, float(score)) + field(3, kinds.get(piece, 1)))
        for piece, score in content["model"]["vocab"]
        if not piece.startswith("<extra_id_")
    ]
    absent = (1 << 64) - 1  # -1
    trainer = field(3, 1) + field(40, 2) + field(41, absent) + field(42, 1) + field(43, 0)
    charsmap = base64.b64decode(content["normalizer"]["precompiled_charsmap"])
    normalizer = field(1, b"nmt_nfkc") + field(2, charsmap) + field(3, 1) + field(4, 1) + field(5, 1)
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    path.write_bytes(b"".join(pieces) + field(2, trainer) + field(3, normalizer))
    return Tokenizer.from_file(path)


def test_both_files_hold_the_same_vocabulary(from_json: Tokenizer, from_sentencepiece: Tokenizer) -> None:
    assert from_json.vocab_size == from_sentencepiece.vocab_size == 32100
    assert (from_json.pad_id, from_json.eos_id) == (from_sentencepiece.pad_id, from_sentencepiece.eos_id) == (0, 1)


def assert_same_ids(one: Tokenizer, other: Tokenizer, text: str) -> None:
    """Asserts equal ids; in a row of dots, pieces of equal sum may stand in another order: the libraries break such ties."""
    first, second = (tokenizer.encode([text], 80)[0] for tokenizer in (one, other))
    if "...." in unicodedata.normalize("NFKC", text):
        first, second = np.sort(first), np.sort(second)
    np.testing.assert_array_equal(first, second)


@given(words=st.lists(st.sampled_from(WORDS), max_size=12), separator=st.sampled_from(["", " ", "  "]))
@settings(max_examples=200, deadline=None)
def test_both_files_give_the_same_ids(
    from_json: Tokenizer, from_sentencepiece: Tokenizer, words: list[str], separator: str
) -> None:
    assert_same_ids(from_json, from_sentencepiece, separator.join(words))


@given(text=st.text(alphabet=st.characters(codec="latin-1"), max_size=40))
@settings(max_examples=200, deadline=None)
def test_both_files_give_the_same_ids_for_western_text(from_json: Tokenizer, from_sentencepiece: Tokenizer, text: str) -> None:
    assert_same_ids(from_json, from_sentencepiece, text)


def test_sentinels_count_down_from_the_end(from_json: Tokenizer, from_sentencepiece: Tokenizer) -> None:
    for tokenizer in (from_json, from_sentencepiece):
        ids, _ = tokenizer.encode(["<extra_id_0> <extra_id_99>"], 3)
        assert ids.tolist() == [[32099, 32000, 1]]


@pytest.mark.parametrize("max_length", [1, 2, 5, 6, 7, 20])
def test_truncation_keeps_the_end_token_and_padding_is_masked(from_json: Tokenizer, max_length: int) -> None:
    whole, _ = from_json.encode(["a beautiful waterfall at dawn"], 50)
    content = whole[0, : int(np.argmax(whole[0] == 1))]
    ids, mask = from_json.encode(["a beautiful waterfall at dawn", ""], max_length)
    kept = [*content[: max_length - 1], 1]
    assert ids[0].tolist() == kept + [0] * (max_length - len(kept))
    assert ids[1].tolist() == [1] + [0] * (max_length - 1)
    np.testing.assert_array_equal(mask.sum(axis=1), [len(kept), 1])
    np.testing.assert_array_equal(mask, ids != 0)
    assert ids.dtype == np.int32


def test_padding_and_truncation_stored_in_the_file_do_not_apply(tmp_path: Path, from_json: Tokenizer) -> None:
    content = json.loads(VOCABULARY.read_text(encoding="utf-8"))
    content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_id": 5, "pad_type_id": 0, "pad_token": "<pad>"}
    content["padding"]["pad_to_multiple_of"] = None
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    text = ["a beautiful waterfall at dawn"]
    np.testing.assert_array_equal(Tokenizer.from_file(path).encode(text, 12)[0], from_json.encode(text, 12)[0])


def test_a_single_string_is_not_a_batch(from_json: Tokenizer) -> None:
    with pytest.raises(TypeError, match=r"pass \[text\]"):
        from_json.encode("a cat", 5)
    with pytest.raises(ValueError, match="max_length is 0"):
        from_json.encode(["a cat"], 0)


def test_unusable_files_say_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.json does not exist"):
        Tokenizer.from_file(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match=r"got suffix '\.txt', expected tokenizer\.json or spiece\.model"):
        Tokenizer.from_file(tmp_path / "vocabulary.txt")
    for name in ("tokenizer.json", "spiece.model"):
        (tmp_path / name).write_bytes(b"damaged")
        with pytest.raises(ValueError, match=f"{name} is not a readable"):
            Tokenizer.from_file(tmp_path / name)
    words = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None}
    words |= {"truncation": None, "padding": None, "decoder": None}
    words |= {"model": {"type": "WordLevel", "vocab": {"<pad>": 0, "a": 1}, "unk_token": "a"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match="no </s> token"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """The same tokenizer with few pieces, so that it is read quickly."""
    content = json.loads(VOCABULARY.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = vocabulary[:200] + [entry for entry in vocabulary if entry[0].startswith("<extra_id_")]
    place = {piece: index for index, (piece, _) in enumerate(content["model"]["vocab"])}
    content["added_tokens"] = [{**token, "id": place[token["content"]]} for token in content["added_tokens"]]
    return content


def places(content: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = content.items() if isinstance(content, dict) else enumerate(content[:3]) if isinstance(content, list) else ()
    return [place, *(deeper for key, child in children for deeper in places(child, (*place, key)))]


def damaged(content: Any, draw: random.Random) -> bytes:
    """Returns the file with one thing in it replaced by another, or cut, or with letters of its table of characters changed."""
    content = copy.deepcopy(content)
    *way, last = draw.choice(places(content)[1:])
    values = [None, 0, -1, 10**9, 10**12, 1.5, "", "x", "\0", [], {}, [[]], True, "A" * 1000, float("nan"), "AAAAAAAAAAAA"]
    holder = content
    for key in way:
        holder = holder[key]
    holder[last] = draw.choice(values)
    if draw.random() < 0.2:
        table = bytearray(base64.b64decode(json.loads(VOCABULARY.read_text("utf-8"))["normalizer"]["precompiled_charsmap"]))
        table[draw.randrange(len(table))] ^= 255
        content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    text = json.dumps(content).encode()
    return text[: draw.randrange(len(text))] if draw.random() < 0.1 else text


def test_a_damaged_file_is_one_error_in_one_line_and_nothing_else(
    tmp_path: Path, small: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """The library panics at some of these, and prints pages."""
    draw, path, refused = random.Random(0), tmp_path / "tokenizer.json", 0
    for _ in range(90):
        path.write_bytes(damaged(small, draw))
        message = None
        try:
            tokenizer = Tokenizer.from_file(path)
            ids, _ = tokenizer.encode(["a cat", "</s> <extra_id_3>"], 20)
            assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
        except ValueError as error:
            message, refused = str(error), refused + 1
        assert message is None or (message.startswith(str(path)) and "\n" not in message)
    assert 40 < refused < 90
    panic = {**small, "normalizer": {"type": "Precompiled"}}
    path.write_text(json.dumps(panic))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable tokenizer\.json: Precompiled"):
        Tokenizer.from_file(path)
    assert capfd.readouterr().err == ""


def test_what_others_write_while_a_tokenizer_is_opened_is_not_lost(
    tmp_path: Path, small: dict[str, Any], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = tokenizer_module.tokenizers.Tokenizer

    class Talkative:
        @staticmethod
        def from_file(path: str) -> Any:
            os.write(2, b"a warning")
            return opened.from_file(path)

    monkeypatch.setattr(tokenizer_module.tokenizers, "Tokenizer", Talkative)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(small))
    Tokenizer.from_file(path)
    assert capfd.readouterr().err == "a warning"


def test_ids_beyond_the_number_of_pieces_count(tmp_path: Path) -> None:
    """A vocabulary of four words with an id of a million: the network that has fewer rows must refuse it."""
    model = {"type": "WordLevel", "vocab": {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 10**6}, "unk_token": "<unk>"}
    parts = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "truncation", "padding", "decoder"))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], **parts, "model": model}))
    assert Tokenizer.from_file(path).vocab_size == 10**6 + 1


def test_an_enormous_file_and_a_pipe_are_refused_unread(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "spiece.model"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(tokenizer_module.MAX_BYTES + 1)
        with pytest.raises(ValueError, match=f"{name} has 67108865 bytes; expected a tokenizer of at most 67108864"):
            Tokenizer.from_file(tmp_path / name)
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(FileNotFoundError, match=f"{name} is no regular file"):
            Tokenizer.from_file(tmp_path / name)
