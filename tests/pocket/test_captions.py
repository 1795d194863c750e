import numpy as np
import pytest

from sora_jax.config import pocket
from sora_jax.inputs.tokenizer import Tokenizer
from sora_jax.pocket.world import captions, vocabulary
from sora_jax.pocket.world.scenes import sample_scenes
from sora_jax.pocket.world.words import ATTRIBUTES

NUM = 2000


@pytest.fixture(scope="module")
def examples():
    """(attributes of the scene, caption, attributes that it names)."""
    rng = np.random.default_rng(0)
    scenes = sample_scenes(rng, NUM, split="all")
    return [(scenes.attributes(i), *captions.caption(scenes.attributes(i), rng)) for i in range(NUM)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("pocket") / "tokenizer.json"
    vocabulary.write_tokenizer(path)
    return Tokenizer.from_file(path)


def test_a_caption_reads_back_as_what_it_names(examples):
    for _, text, named in examples:
        assert captions.parse(text) == captions.Reading(named, ""), text


def test_a_caption_names_only_what_is_there(examples):
    for attributes, text, named in examples:
        assert named.items() <= attributes.items(), text
        assert {"shape", "colour", "background", "motion"} <= named.keys()


def test_optional_attributes_are_named_in_60_percent(examples):
    for name in ("speed", "size", "shading"):
        possible = [name in named for attributes, _, named in examples if name in attributes]
        sigma = (0.6 * 0.4 / len(possible)) ** 0.5
        assert abs(np.mean(possible) - 0.6) < 4 * sigma


def test_captions_paraphrase(examples):
    assert len({text for _, text, _ in examples}) > 0.95 * NUM


def test_same_seed_same_caption(examples):
    attributes = examples[0][0]
    texts = [captions.caption(attributes, np.random.default_rng(seed))[0] for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_caption_of_an_image_names_neither_motion_nor_speed():
    rng = np.random.default_rng(1)
    scenes = sample_scenes(rng, 100, num_frames=1)
    for i in range(100):
        still = {name: word for name, word in scenes.attributes(i).items() if name != "motion"}
        text, named = captions.caption(still, rng)
        assert not {"motion", "speed"} & named.keys()
        assert captions.parse(text).attributes == named


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red circle moves right on a blue background", {"colour": "red", "background": "blue", "motion": "right"}),
        ("A large YELLOW square, slowly drifting left over a plain cyan background!", {"size": "large", "speed": "slow"}),
        (
            "the green triangle grows fast, white gradient background",
            {"motion": "grow", "speed": "fast", "shading": "gradient"},
        ),
        ("a red disc climbs up and to the right on a blue backdrop", {"motion": "up-right", "shape": "circle"}),
        ("purple ball, blue background", {"colour": "magenta", "shape": "circle"}),
        ("a white box rests, the backdrop is solid black", {"background": "black", "shading": "plain", "motion": "still"}),
        ("", {}),
    ],
)
def test_captions_by_hand(text, expected):
    reading = captions.parse(text)
    assert reading.attributes is not None
    assert expected.items() <= reading.attributes.items()
    assert reading.hint == ""


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("a dog runs on a beach", "does not know dog, runs, beach"),
        ("a red circle and a blue square", "more than one colour and shape"),
        ("a red circle moves up and to the left and to the right", "more than one motion"),
        ("a red circle with a red circle", "more than one object"),
        ("a red blue circle on a white background", "more than one colour"),
        ("a red circle moves left to the right", "more than one motion"),
        ("moves", "does not name the shape and colour and background"),
    ],
)
def test_outside_the_grammar_is_a_hint_and_no_attributes(text, hint):
    reading = captions.parse(text)
    assert reading.attributes is None
    assert hint in reading.hint
    assert "a large red circle moves right" in reading.hint


def test_incomplete_caption_keeps_what_it_names_and_hints():
    reading = captions.parse("a circle moves left")
    assert reading.attributes == {"shape": "circle", "motion": "left"}
    assert "does not name the colour and background" in reading.hint


def test_the_example_in_the_hint_is_in_the_grammar():
    example = captions.parse("zebra").hint.split('"')[1]
    assert captions.parse(example).hint == ""


def test_every_value_has_its_own_words():
    tables = {
        "shape": captions.SHAPE_WORDS,
        "size": captions.SIZE_WORDS,
        "speed": captions.SPEED_WORDS,
        "shading": captions.SHADING_WORDS,
    }
    assert all(set(table) == set(ATTRIBUTES[name]) for name, table in tables.items())
    said = [word for table in (*tables.values(), captions.COLOUR_WORDS) for synonyms in table.values() for word in synonyms]
    assert len(said) == len(set(said))


def test_tokenizer_knows_every_word_and_fits_the_networks(examples, tokenizer):
    ids, mask = tokenizer.encode([text for _, text, _ in examples], pocket.stdit3.model_max_length)
    assert tokenizer.vocab_size == len(captions.words()) + 3 <= pocket.t5.vocab_size == vocabulary.MAX_SIZE
    assert not (ids[mask] == 2).any()  # no unknown word
    assert mask.sum(1).max() < pocket.stdit3.model_max_length  # nothing cut off
    assert set(ids[mask]) == set(range(1, tokenizer.vocab_size)) - {2}  # every word is used


def test_tokenizer_ignores_case_accents_and_punctuation(tokenizer):
    ids, mask = tokenizer.encode(["a red circle moves right", "A rèd,  CIRCLE -- moves/right!", "a red zebra moves right"], 8)
    np.testing.assert_array_equal(ids[0], ids[1])
    np.testing.assert_array_equal(ids[0] != ids[2], [False, False, True, False, False, False, False, False])
    assert ids[2, 2] == 2
    assert list(mask[0]) == [True] * 6 + [False] * 2
    assert list(ids[0, 5:]) == [1, 0, 0]


def test_too_many_words_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(vocabulary, "MAX_SIZE", 50)
    with pytest.raises(ValueError, match="needs 104 tokens; expected at most 50"):
        vocabulary.write_tokenizer(tmp_path / "tokenizer.json")
