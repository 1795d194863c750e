"""Captions of scenes: a small grammar with paraphrases, and the way back from words to attributes.

Invariant: ``parse`` of a caption returns exactly the attributes that ``caption`` says it named; an attribute that no word
names is free.  Nothing here draws or measures.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from sora_jax.pocket.world.words import ATTRIBUTES, BACKGROUNDS

Option = TypeVar("Option")
Table = Mapping[str, Sequence[str]]  # words by what they mean

NAMED_SHARE = 0.6  # how often a caption names each of speed, size and shading

COLOUR_WORDS = {name: (name,) for name in BACKGROUNDS} | {"magenta": ("magenta", "purple")}
SHAPE_WORDS = {"circle": ("circle", "disc", "ball"), "square": ("square", "box"), "triangle": ("triangle",)}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SPEED_WORDS = {"slow": ("slowly", "gently"), "fast": ("fast", "quickly", "rapidly")}
SHADING_WORDS = {"plain": ("plain", "solid", "uniform"), "gradient": ("gradient", "shaded")}
PLACE_WORDS = ("background", "backdrop")
PREPOSITIONS = ("on", "over", "against", "in front of")
OPENINGS = ("a video of", "a clip of")

# Verbs as (finite, participle): those that need a direction, and phrases that name a motion by themselves.
TRAVEL_VERBS = (
    ("moves", "moving"),
    ("slides", "sliding"),
    ("glides", "gliding"),
    ("drifts", "drifting"),
    ("goes", "going"),
    ("travels", "travelling"),
)
DIRECTIONS = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
}
# Both directions, with the vertical one first, as in the motion's name.
DIAGONALS = {
    f"{upright}-{level}": (f"{upright} and to the {level}", f"{upright} and {level}", f"{upright}wards to the {level}")
    for upright in ("up", "down")
    for level in ("left", "right")
}
MOTION_VERBS = {
    "up": (("rises", "rising"), ("climbs", "climbing")),
    "down": (("falls", "falling"), ("sinks", "sinking")),
    "still": (
        ("stays still", "staying still"),
        ("stays in place", "staying in place"),
        ("does not move", "not moving"),
        ("rests", "resting"),
    ),
    "grow": (
        ("grows", "growing"),
        ("expands", "expanding"),
        ("gets bigger", "getting bigger"),
        ("becomes larger", "becoming larger"),
    ),
    "shrink": (
        ("shrinks", "shrinking"),
        ("contracts", "contracting"),
        ("gets smaller", "getting smaller"),
        ("becomes smaller", "becoming smaller"),
    ),
}

# Single words that name a motion.
_MOTION_KEYS = {
    "left": ("left", "leftwards"),
    "right": ("right", "rightwards"),
    "up": ("up", "upwards", "rises", "rising", "climbs", "climbing"),
    "down": ("down", "downwards", "falls", "falling", "sinks", "sinking"),
    "still": ("still", "not", "rests", "resting", "place"),
    "grow": ("grows", "growing", "bigger", "expands", "expanding", "larger"),
    "shrink": ("shrinks", "shrinking", "smaller", "contracts", "contracting"),
}


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a caption says: the attributes it names, or None where it is outside the grammar; the hint says what to change."""

    attributes: dict[str, str] | None
    hint: str


def caption(attributes: Mapping[str, str], rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """Returns a caption of the scene and the attributes it names.

    Shape, colour and background are always named, the motion wherever ``attributes`` has one (leave it out for a single
    image); speed, size and shading each in 60 % of captions.
    """
    free = {name for name in ("speed", "size", "shading") if rng.random() >= NAMED_SHARE}
    if "motion" not in attributes:
        free.add("speed")
    named = {name: attributes[name] for name in ATTRIBUTES if name in attributes and name not in free}
    return re.sub(r"\s+", " ", _sentence(named, rng)).replace(" ,", ",").strip(), named


def _sentence(named: Mapping[str, str], rng: np.random.Generator) -> str:
    thing, place = _thing(named, rng), _place(named, rng)
    where = f"{_pick(rng, PREPOSITIONS)} {_article(place, rng)} {place}"
    form = rng.random()
    if form < 0.25 or "motion" not in named:
        opening = _pick(rng, OPENINGS) if rng.random() < 0.3 else ""
        doing = _motion(named, rng, participle=True) if "motion" in named else ""
        return f"{opening} {thing} {doing} {where}"
    if form < 0.35:
        return f"{_article(place, rng)} {place} with {thing} {_motion(named, rng, participle=True)}"
    does = _motion(named, rng, participle=False) if rng.random() < 0.7 else f"is {_motion(named, rng, participle=True)}"
    if form < 0.65:
        return f"{thing} {does} {where}"
    if form < 0.75:
        return f"{thing} {where} {does}"
    if form < 0.85:
        return f"{thing} {does}, {place}"
    if form < 0.9:
        return f"{thing} {does}, the {PLACE_WORDS[0]} is {place.rsplit(' ', 1)[0]}"
    return f"{where if rng.random() < 0.6 else place}, {thing} {does}"


def _thing(named: Mapping[str, str], rng: np.random.Generator) -> str:
    size = _pick(rng, SIZE_WORDS[named["size"]]) if "size" in named else ""
    noun = f"{size} {_pick(rng, COLOUR_WORDS[named['colour']])} {_pick(rng, SHAPE_WORDS[named['shape']])}".strip()
    return f"{_article(noun, rng)} {noun}"


def _place(named: Mapping[str, str], rng: np.random.Generator) -> str:
    colour, noun = _pick(rng, COLOUR_WORDS[named["background"]]), _pick(rng, PLACE_WORDS)
    if "shading" not in named:
        return f"{colour} {noun}"
    shading = _pick(rng, SHADING_WORDS[named["shading"]])
    return f"{shading} {colour} {noun}" if rng.random() < 0.5 else f"{colour} {shading} {noun}"


def _motion(named: Mapping[str, str], rng: np.random.Generator, *, participle: bool) -> str:
    """Returns the verb with its direction and speed."""
    motion = named["motion"]
    directions = {**DIRECTIONS, **DIAGONALS}
    if motion in directions and (motion not in MOTION_VERBS or rng.random() < 0.6):
        does = f"{_pick(rng, TRAVEL_VERBS)[participle]} {_pick(rng, directions[motion])}"
    else:
        does = _pick(rng, MOTION_VERBS[motion])[participle]
    if "speed" not in named:
        return does
    how = _pick(rng, SPEED_WORDS[named["speed"]])
    return f"{how} {does}" if how != "fast" and rng.random() < 0.4 else f"{does} {how}"


def _article(noun: str, rng: np.random.Generator) -> str:
    article = _pick(rng, ("a", "a", "the", ""))
    return "an" if article == "a" and noun[0] in "aeiou" and not noun.startswith("uni") else article


def _pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(rng.random() * len(options))]


def words() -> list[str]:
    """Returns every word of the grammar once, in a fixed order."""
    tables: tuple[Iterable[tuple[str, ...]], ...] = (
        *(table.values() for table in (COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, SPEED_WORDS, SHADING_WORDS, DIRECTIONS)),
        (PLACE_WORDS, PREPOSITIONS, OPENINGS, ("a", "an", "the", "is", "with")),
        TRAVEL_VERBS,
        *MOTION_VERBS.values(),
        DIAGONALS.values(),  # last, so that words which were there before keep their ids
    )
    phrases = (phrase for table in tables for row in table for phrase in row)
    return list(dict.fromkeys(word for phrase in phrases for word in phrase.split()))


def parse(text: str) -> Reading:
    """Returns the attributes that a caption names; never raises.

    An empty caption names nothing, which is allowed.  A caption with words from outside the grammar, with a
    contradiction, or without any attribute reads as None.
    """
    tokens = re.findall(r"[^\W\d_]+", text.lower())
    unknown = [token for token in dict.fromkeys(tokens) if token not in _WORDS]
    if unknown:
        return Reading(None, f"The pocket model does not know {', '.join(unknown)}. {_VOCABULARY_HINT}")
    found = [(name, value) for token in tokens for name, table in _FREE_WORDS.items() for value in _value(table, token)]
    found += _adjectives(tokens, SHAPE_WORDS, {"colour": COLOUR_WORDS, "size": SIZE_WORDS})
    found += _adjectives(tokens, {"place": PLACE_WORDS}, {"background": COLOUR_WORDS, "shading": SHADING_WORDS})
    found = _joined(found)
    attributes = dict(found)
    contradictory = sorted({name for name, value in found if attributes[name] != value})
    if contradictory or [name for name, _ in found].count("shape") > 1:
        return Reading(None, f"The caption names more than one {' and '.join(contradictory or ['object'])}. {_VOCABULARY_HINT}")
    missing = [name for name in ("shape", "colour", "background") if name not in attributes]
    if tokens and missing:
        return Reading(attributes or None, f"The caption does not name the {' and '.join(missing)}. {_VOCABULARY_HINT}")
    return Reading(attributes, "")


def _adjectives(tokens: Sequence[str], nouns: Table, adjectives: Mapping[str, Table]) -> list[tuple[str, str]]:
    """Returns (attribute, value) of the adjectives straight before each such noun, and behind "noun is"."""
    found: list[tuple[str, str]] = []
    for at, token in enumerate(tokens):
        if not _value(nouns, token):
            continue
        behind = tokens[at + 2 :] if tokens[at + 1 : at + 2] == ["is"] else []
        for side in (tokens[:at][::-1], behind):
            for word in side:
                said = [(name, value) for name, table in adjectives.items() for value in _value(table, word)]
                if not said:
                    break
                found += said
    return found


def _joined(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns the motions, with a vertical and a horizontal direction combined into a diagonal one."""
    motions = {value for name, value in found if name == "motion"}
    diagonal = [one for one in DIAGONALS if set(one.split("-")) == motions]
    return [(name, diagonal[0] if name == "motion" and diagonal else value) for name, value in found]


def _value(table: Table, word: str) -> list[str]:
    return [value for value, synonyms in table.items() if word in synonyms]


_WORDS = frozenset(words())
_FREE_WORDS: dict[str, Table] = {"shape": SHAPE_WORDS, "motion": _MOTION_KEYS, "speed": SPEED_WORDS}  # wherever they stand
KNOWN = (
    f"one {' or '.join(SHAPE_WORDS)} in {', '.join(ATTRIBUTES['colour'])} on a plain or gradient "
    "background of those colours or black, which moves left, right, up, down or diagonally, stays still, grows or shrinks, "
    "slowly or fast: "
    '"a large red circle moves right slowly on a blue background"'
)
_VOCABULARY_HINT = f"It knows {KNOWN}."
