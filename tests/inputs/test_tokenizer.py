"""Token ids: both file kinds alike, truncation and padding, and what a damaged file says."""

import base64
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


@given(words=st.lists(st.sampled_from(WORDS), max_size=12), separator=st.sampled_from(["", " ", "  "]))
@settings(max_examples=200, deadline=None)
def test_both_files_give_the_same_ids(
    from_json: Tokenizer, from_sentencepiece: Tokenizer, words: list[str], separator: str
) -> None:
    text = separator.join(words)
    np.testing.assert_array_equal(from_json.encode([text], 80)[0], from_sentencepiece.encode([text], 80)[0])


@given(text=st.text(alphabet=st.characters(codec="latin-1"), max_size=40))
@settings(max_examples=200, deadline=None)
def test_both_files_give_the_same_ids_for_western_text(from_json: Tokenizer, from_sentencepiece: Tokenizer, text: str) -> None:
    np.testing.assert_array_equal(from_json.encode([text], 80)[0], from_sentencepiece.encode([text], 80)[0])


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
