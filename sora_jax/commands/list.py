"""``sora-jax list``: what can be asked for by name: presets, resolutions, the words of a model.

Invariant: a subject is one function from the arguments to fields and lines; nothing is loaded, written or computed.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from sora_jax import shell
from sora_jax.inputs import sizes
from sora_jax.inputs.tokenizer import listed_words
from sora_jax.pipeline import command_line
from sora_jax.pipeline.frame_size import frames_size
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.option import Option, declared
from sora_jax.pipeline.presets import WAYS
from sora_jax.pipeline.recipe import MAKE_ONE, Recipe
from sora_jax.pipeline.settings import Settings

# What a subject is listed as: fields for JSON, lines for people.
Listed = tuple[Mapping[str, Any], Sequence[str]]


def presets(asked: "Arguments") -> Listed:
    """Returns how each preset samples a clip of the model's own size."""
    model = ModelFile.read(asked.model)
    plain = model.resolve({"preset": "exact"})
    named = {name: model.resolve({"preset": name}) for name in model.presets()}
    fields = {name: _sampling(settings) for name, settings in named.items()}
    about = f"for {plain.num_frames} frames of {plain.height} x {plain.width} pixels, at guidance {plain.guidance:g}"
    lines = [f"{name}: {', '.join(f'{key} {_shown(value)}' for key, value in each.items())}" for name, each in fields.items()]
    return fields, [*lines, f"({about}; options given with a preset replace its values)"]


def _sampling(settings: Settings) -> Mapping[str, Any]:
    plan = {} if settings.plan is None else {"plan": settings.plan.letters}
    return {"evaluations": settings.evaluations()[0], **{name: getattr(settings, name) for name in WAYS}, **plan}


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def resolutions(asked: "Arguments") -> Listed:
    """Returns the size in pixels of every resolution and aspect ratio, and of the frames that come out."""
    fields = {
        name: {ratio: {"asked": list(size), "frames": list(frames_size(*size))} for ratio, size in listed.items()}
        for name, listed in sizes.IMAGE_SIZES.items()
    }
    columns = [name for name in sizes.RESOLUTIONS if len(sizes.IMAGE_SIZES[name]) > 1]
    rows = [["height:width", "", *columns]]
    for ratio in sizes.ASPECT_RATIOS:
        height, width = map(int, ratio.split(":"))
        kind = "square" if height == width else "landscape" if height < width else "portrait"
        listed = (sizes.IMAGE_SIZES[name].get(ratio) for name in columns)
        rows.append([ratio, kind, *("-" if size is None else f"{size[0]}x{size[1]}" for size in listed)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [
        f"{name} {ratio}: {size[0]}x{size[1]}"
        for name, listed in sizes.IMAGE_SIZES.items()
        if name not in columns
        for ratio, size in listed.items()
    ]
    return fields, [
        *lines,
        f"also {', '.join(notes)}",
        "rows x columns of pixels that the model is asked for; frames have these rounded down to multiples of 8.",
    ]


def vocabulary(asked: "Arguments") -> Listed:
    """Returns what a model's captions say, and the words that its tokenizer knows.

    A tokenizer of word pieces knows every word, and has no list.
    """
    model = ModelFile.read(asked.model)
    captions = model.trained.captions if model.trained is not None else ""
    words = listed_words(model.tokenizer_path)
    known = "any; the tokenizer splits words into pieces" if words is None else " ".join(sorted(words))
    lines = [f"captions: {captions or 'anything'}", f"words: {known}"]
    return {"captions": captions, "words": None if words is None else sorted(words)}, lines


def recipes(asked: "Arguments") -> Listed:
    """Returns the recipes in a folder: what each was tuned for, and how close it comes."""
    found = {path.name: Recipe.read(path) for path in sorted(asked.folder.glob("recipe*.json"))}
    lines = [
        f"{name}: {recipe.evaluations:g} evaluations, {recipe.measured.get('name')}, {recipe.measured.get('error_db')} dB; "
        f"{recipe.model}, {recipe.num_frames} frames of {recipe.height} x {recipe.width}"
        for name, recipe in found.items()
    ]
    fields = {name: dataclasses.asdict(recipe) for name, recipe in found.items()}
    return fields, lines or [f"no recipe in {asked.folder}; {MAKE_ONE} {asked.folder}"]


SUBJECTS: Mapping[str, Callable[["Arguments"], Listed]] = {
    "presets": presets,
    "recipes": recipes,
    "resolutions": resolutions,
    "vocabulary": vocabulary,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the command line asks for."""

    subject: Annotated[str, Option("What is listed.", metavar="|".join(SUBJECTS), choices=tuple(SUBJECTS), positional=True)]
    model: Annotated[
        str | None, Option("Model directory or its URL, or pocket: the embedded model, which is the default.", metavar="DIR")
    ] = None
    folder: Annotated[Path, Option("Folder of recipes.", metavar="FOLDER")] = Path("recipes")
    json: Annotated[bool, Option("Print JSON.")] = False


def command(arguments: Sequence[str]) -> None:
    """Reads the command line and prints the list."""
    parser = command_line.make_parser("sora-jax list", "Lists what can be asked for by name.", {"": declared(Arguments)})
    asked = command_line.read(parser, arguments, Arguments)
    fields, lines = SUBJECTS[asked.subject](asked)
    shell.result(json.dumps(fields, indent=2, ensure_ascii=False) if asked.json else "\n".join(lines))
