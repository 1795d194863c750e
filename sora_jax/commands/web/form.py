"""From what a person fills in to the options of a clip.

Invariant: every value goes through the declarations of the command line (`Declared.parse`, `Declared.check`), whose errors are
one line; an empty field says nothing, so that the model's default holds.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sora_jax.pipeline.clip_options import OPTIONS, SamplingOptions
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.option import declared

# Fields of the form in addition to prompt, size, length, seed and preset; most are folded away.
USUAL = ("num_steps", "guidance")
_ELSEWHERE = {"height", "width", "resolution", "aspect_ratio", "num_frames", "seed", "preset"}
_FILES = {"plan", "recipe"}  # of this machine, whose names no visitor may write
_LISTED = [name for name, each in OPTIONS.items() if each.option.on_command_line and name not in {*_ELSEWHERE, *_FILES}]
RARE = tuple(name for name in _LISTED if name not in USUAL)
SAMPLING = ("num_steps", *(name for name in declared(SamplingOptions) if name in RARE))  # what ways of sampling differ in
TEXT, BEGIN, CONTINUE = "text alone", "begin with the reference", "continue the reference"
MODES = (TEXT, BEGIN, CONTINUE)
_TAKEN_OVER = 5  # latent frames of a reference that is continued, as `--condition-frame-length` has it
_STRATEGIES = {TEXT: "", BEGIN: "0", CONTINUE: f"0,0,-{_TAKEN_OVER},0,{_TAKEN_OVER}"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be made: a prompt, options of `Options`, and a reference with its mask strategy, or none."""

    prompt: str
    options: Mapping[str, Any]
    reference: str = ""
    strategy: str = ""


def read(
    *,
    prompt: str | None,
    size: str | None,
    fields: Mapping[str, str | None],
    mode: str = TEXT,
    reference: str | None = None,
    strategy: str | None = None,
) -> Request:
    """Returns the request that the fields of the form mean.

    Raises:
      ValueError: a field cannot be read, or a reference is missing or has no use; the message is one line.
    """
    options = {
        **read_size(size),
        **{name: value for name, text in fields.items() if (value := read_option(name, text)) is not None},
    }
    if mode not in MODES:
        raise ValueError(f"the use of the reference is {mode!r}; expected one of {', '.join(MODES)}.")
    if (mode == TEXT) != (not reference):
        raise ValueError(
            "a reference was uploaded, but the clip is made from text alone; choose how it is used, or remove it."
            if reference
            else f"to {mode}, upload an image or a video."
        )
    if strategy and not reference:
        raise ValueError("a mask strategy says where references go, but none was uploaded.")
    return Request(prompt=prompt or "", options=options, reference=reference or "", strategy=strategy or _STRATEGIES[mode])


def read_recipe(name: str | None, known: Mapping[str, Path]) -> str | None:
    """Returns the file of a recipe that the page offers by name; None where none is chosen.

    Raises:
      ValueError: the page offers no such recipe; no other file of this machine is read.
    """
    if not name:
        return None
    if name not in known:
        raise ValueError(f"recipe is {name[:40]!r}; expected one of {', '.join(known) or 'none: this page has no recipes'}.")
    return str(known[name])


def read_option(name: str, text: str | int | float | None) -> Any:
    """Returns the value of an option of a clip, None where the field is empty.

    Raises:
      ValueError: it cannot have this value.
    """
    written = "" if text is None else str(text).strip()
    if not written:
        return None
    option = OPTIONS[name]
    try:
        value = option.parse(written)
    except ValueError as error:
        raise ValueError(f"{name}: {error}.") from None
    option.check(value)
    return value


def read_size(text: str | None) -> dict[str, Any]:
    """Returns the options of a size such as ``64 x 64`` (height first) or ``240p 9:16``; none of an empty field.

    Raises:
      ValueError: it is neither.
    """
    written = (text or "").strip()
    if not written:
        return {}
    if match := re.fullmatch(r"(\d{1,6})\s*x\s*(\d{1,6})", written):
        return {"height": read_option("height", match[1]), "width": read_option("width", match[2])}
    if match := re.fullmatch(r"(\w+)\s+(\d+:\d+)", written):
        return {"resolution": read_option("resolution", match[1]), "aspect_ratio": read_option("aspect_ratio", match[2])}
    raise ValueError(f"size is {written[:40]!r}; expected height x width, as 64 x 64, or a name with its ratio, as 240p 9:16.")


def sizes_of(model: ModelFile) -> list[str]:
    """Returns sizes to choose from: those that the model was trained on, else a few of Open-Sora's."""
    if model.trained is not None:
        return [f"{height} x {width}" for height, width in model.trained.sizes]
    return [f"{name} {ratio}" for name in ("144p", "240p", "360p", "480p", "720p") for ratio in ("9:16", "1:1", "16:9")]


def lengths_of(model: ModelFile) -> list[str]:
    """Returns lengths to choose from, in frames or by name."""
    return [str(length) for length in model.trained.num_frames] if model.trained is not None else ["1", "17", "34", "2s", "4s"]


def mode_of(request: Request) -> str:
    """Returns how a request uses its reference."""
    if not request.reference:
        return TEXT
    return CONTINUE if request.strategy == _STRATEGIES[CONTINUE] else BEGIN


def own_strategy(request: Request) -> str:
    """Returns the mask strategy that a person wrote; empty where it is that of a choice."""
    return "" if request.strategy in _STRATEGIES.values() else request.strategy
