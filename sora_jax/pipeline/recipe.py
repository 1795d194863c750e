"""A recipe as a JSON file: how one model is best sampled with a number of evaluations, and the measurement that says so.

Invariant: `read` returns what `write` wrote; a file that is no recipe is refused with one line, and so is a recipe of another
model, size or length unless that is forced.  What a recipe says of sampling gives way to what the caller says.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from sora_jax import files
from sora_jax.pipeline.clip_options import RECIPE_OPTIONS
from sora_jax.pipeline.settings import Settings, from_json

_FORMAT = "sora_jax recipe 1"
_KINDS: Mapping[str, type] = {
    "model": str, "height": int, "width": int, "num_frames": int, "evaluations": int, "options": dict, "measured": dict,
    "compared": list,
}  # fmt: skip
_SAME_SIZE = 1.25  # of two sizes in pixels, the larger by the smaller: one size class
MAKE_ONE = "make one with: sora-jax tune MODEL_DIR --evaluations 16 --prompts FILE -o"  # a folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to sample, and what was measured.

    Attributes:
      model: ``Pipeline.model_id`` of the model it was tuned on.
      height: rows of pixels it was tuned at.
      width: columns of pixels.
      num_frames: frames of a clip.
      evaluations: what it may cost at most.
      options: options of `clip_options.Options` that differ from Open-Sora's, JSON-ready.
      measured: errors, seconds and counts, JSON-ready.
      compared: names and errors of other methods on the same prompts, none of them better, JSON-ready.
    """

    model: str
    height: int
    width: int
    num_frames: int
    evaluations: int
    options: Mapping[str, Any]
    measured: Mapping[str, Any]
    compared: Sequence[Mapping[str, Any]]

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the file whole or not at all.

        Raises:
          FileExistsError: the file exists and ``overwrite`` is False.
        """
        text = json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1, ensure_ascii=False)
        files.write_text(path, text + "\n", overwrite=overwrite)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Returns what a file holds.

        Raises:
          FileNotFoundError: no such file.
          ValueError: the file is something else.
        """
        files.refuse_missing(path, "recipe", remedy=f"{MAKE_ONE} FOLDER")
        return cls.parse(Path(path).read_bytes(), path)

    @classmethod
    def parse(cls, text: str | bytes, path: object) -> Self:
        """Returns what the text of a file says.

        Raises:
          ValueError: the file is something else.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a recipe: no JSON ({error}); expected a file of sora-jax tune.") from error
        if not isinstance(fields, dict) or fields.pop("format", None) != _FORMAT:
            raise ValueError(f"{path} is not a recipe: expected the format {_FORMAT!r}, a file of sora-jax tune.")
        strange = sorted(fields.keys() ^ _KINDS.keys()) or [
            name for name, kind in _KINDS.items() if type(fields[name]) is not kind
        ]
        if strange:
            raise ValueError(
                f"{path}: {', '.join(strange)} missing, unknown or of a wrong kind; expected a file of sora-jax tune."
            )
        unknown = sorted(fields["options"].keys() - set(RECIPE_OPTIONS))
        if unknown:
            raise ValueError(f"{path} sets {', '.join(unknown)}; expected options of sampling, {', '.join(RECIPE_OPTIONS)}.")
        return cls(**fields)

    def said(self) -> dict[str, Any]:
        """Returns the options as a caller says them.

        Raises:
          ValueError: a plan, leap or merge in it is none.
        """
        try:
            return {name: from_json(name, value) for name, value in self.options.items()}
        except (TypeError, KeyError) as error:
            raise ValueError(f"the recipe's options are damaged ({error}); expected a file of sora-jax tune.") from error

    def check(self, model_id: str, settings: Settings, path: str | os.PathLike[str]) -> None:
        """Refuses the recipe for another model, size class or number of frames than it was tuned on.

        Raises:
          ValueError: says which, and how to use it all the same.
        """
        if strange := self.differences(model_id, settings):
            raise ValueError(f"{path} was tuned for {' and '.join(strange)}; tune again, or use it with --force-recipe.")

    def differences(self, model_id: str, settings: Settings) -> list[str]:
        """Returns what it was tuned on that is not what is asked for; nothing where it fits."""
        ours, theirs = settings.height * settings.width, self.height * self.width
        strange = []
        if self.model.split()[-1:] != model_id.split()[-1:]:
            strange.append(f"the model {self.model!r}, not {model_id!r}")
        if max(ours, theirs) > _SAME_SIZE * min(ours, theirs):
            strange.append(f"{self.height} x {self.width} pixels, not {settings.height} x {settings.width}")
        if self.num_frames != settings.num_frames:
            strange.append(f"{self.num_frames} frames, not {settings.num_frames}")
        return strange
