"""What a model directory says before a network is opened: defaults, what it was trained for, its tokenizer and its identity.

Invariant: only JSON is read, and no JAX imported, so that a command refuses what the model cannot make at once.  Defaults are
checked as a caller's options are.  Networks are opened by `open_model`.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from sora_jax.config import NETWORKS
from sora_jax.pipeline import frame_size
from sora_jax.pipeline.clip_options import OPTIONS, RECIPE_OPTIONS
from sora_jax.pipeline.option import said
from sora_jax.pipeline.presets import PRESETS, RECOMMENDED, RECOMMENDED_EVALUATIONS, tuned_evaluations
from sora_jax.pipeline.recipe import Recipe
from sora_jax.pipeline.recipe_file import PlanFile
from sora_jax.pipeline.settings import Settings
from sora_jax.storage import directory as model_directory
from sora_jax.storage import manifest_file
from sora_jax.storage.directory import Manifest, ModelDirectoryError
from sora_jax.storage.location import Location, Named, absolute, location_of
from sora_jax.storage.site import place_of

POCKET_NAME = "pocket"  # how every command and `Pipeline.from_pretrained` name the embedded model
POCKET = Path(__file__).parents[1] / "pocket" / "weights"
RECIPES = "recipes"  # the folder of a model directory with what its tuning found
_NO_DEFAULTS = {"preset", "plan", "merge", "recipe", "force_recipe"}
_TOKENIZERS = ("tokenizer.json", "spiece.model")


def model_path(name: Named | None) -> Location:
    """Returns where a model lies; None and ``"pocket"`` are the embedded one, a folder of that name is ``./pocket``.

    Raises:
      ValueError: it is a URL that no model is read from.
    """
    return POCKET if name is None or name == POCKET_NAME else location_of(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What a model was trained and judged on.

    Attributes:
      sizes: height and width in pixels.
      num_frames: lengths of clips.
      fps: frame rates that videos were said to have.
      guidance: smallest and largest scale at which its clips were judged.
      captions: what its captions say, for people; empty where anything goes.
    """

    sizes: Sequence[tuple[int, int]]
    num_frames: Sequence[int]
    fps: Sequence[float]
    guidance: tuple[float, float]
    captions: str = ""

    @classmethod
    def from_json(cls, fields: Any) -> Self:
        """Returns what model.json says.

        Raises:
          ValueError: it says something else.
        """
        try:
            least, most = map(float, fields["guidance"])
            return cls(
                sizes=[(int(height), int(width)) for height, width in fields["sizes"]],
                num_frames=[int(length) for length in fields["num_frames"]],
                fps=[float(rate) for rate in fields["fps"]],
                guidance=(least, most),
                captions=str(fields.get("captions", "")),
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ValueError(
                f"trained is {str(fields)[:80]}; expected sizes [[height, width], ...], num_frames [...], fps [...] and "
                "guidance [least, most]."
            ) from error

    def outside(self, settings: Settings) -> str:
        """Returns one line about what of the settings lies outside, or the empty text."""
        strange = []
        if (settings.height, settings.width) not in self.sizes:
            strange.append(f"{settings.height} x {settings.width} pixels")
        if settings.num_frames not in self.num_frames:
            strange.append(f"{settings.num_frames} frames")
        if settings.num_frames > 1 and settings.fps not in self.fps:
            strange.append(f"{settings.fps:g} frames per second")
        if not self.guidance[0] <= settings.guidance <= self.guidance[1]:
            strange.append(f"guidance {settings.guidance:g}")
        if not strange:
            return ""
        verb = "lies" if len(strange) == 1 else "lie"
        return f"{_listed(strange, 'and')} {verb} outside what this model was made for, and may show debris: {self._said()}."

    def _said(self) -> str:
        sizes = _listed([f"{height} x {width}" for height, width in self.sizes], "or")
        lengths, rates = (_listed([f"{one:g}" for one in many], "or") for many in (self.num_frames, self.fps))
        return (
            f"trained on {sizes} pixels, {lengths} frames at {rates} frames per second, judged at guidance "
            f"{self.guidance[0]:g} to {self.guidance[1]:g}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFile:
    """The JSON files of a complete model directory.

    Attributes:
      directory: where the model lies, a folder or an address.
      defaults: options that its clips have unless the caller says otherwise.
      tokenizer: name of the tokenizer's file, or None where model.json does not say.
      trained: what it was trained for, or None where model.json does not say.
      manifests: what each network holds.
    """

    directory: Location
    defaults: Mapping[str, Any]
    tokenizer: str | None
    trained: Trained | None
    manifests: Mapping[str, Manifest]

    @classmethod
    def read(cls, name: Named | None) -> Self:
        """Returns what the model of that name says, see `model_path`.

        Raises:
          ModelDirectoryError: a network is missing or damaged, or a default is wrong; the message names the file.
        """
        directory = model_path(name)
        if isinstance(directory, Path):
            _refuse_missing_networks(directory)
        manifests = {network: model_directory.open_network(directory, network) for network in NETWORKS}
        index = model_directory.read_model_file(directory)
        defaults = index.get("defaults", {})
        try:
            _check_defaults(defaults, manifests)
            trained = Trained.from_json(index["trained"]) if "trained" in index else None
        except ValueError as error:
            raise ModelDirectoryError(f"{directory / model_directory.MODEL_FILE}: {error}") from error
        return cls(
            directory=directory,
            defaults=defaults,
            tokenizer=index.get("tokenizer"),
            trained=trained,
            manifests=manifests,
        )

    @property
    def model_id(self) -> str:
        """The folder's name and a digest of its manifests, which hold the checksum of every parameter; of no format.

        A model has the same in a folder and at an address.
        """
        digest = hashlib.sha256()
        for network in NETWORKS:
            digest.update(self.manifests[network].values_text().encode())
        directory = absolute(self.directory)
        return f"{POCKET_NAME if directory == POCKET.resolve() else directory.name} {digest.hexdigest()[:16]}"

    @property
    def tokenizer_path(self) -> Location:
        """The file of the tokenizer.

        Raises:
          FileNotFoundError: there is none.
          OSError: a server does not say.
        """
        return tokenizer_path(self.directory, self.tokenizer)

    def resolve(self, options: Mapping[str, Any]) -> Settings:
        """Returns complete settings from options (see `Options`), with a size that this model can make.

        Raises:
          ValueError: an option is wrong; see `Settings.resolve`.
          FileNotFoundError: there is no such file of a plan or a recipe.
        """
        forced = bool(options.get("force_recipe"))
        options, recipe, called = self._with_recipe({name: value for name, value in options.items() if value is not None})
        plan = options.get("plan")
        if isinstance(plan, str | os.PathLike):
            options = {**options, "plan": PlanFile.read(plan).for_model(self.model_id, plan)}
        settings = Settings.resolve(self.defaults, options)
        _check_size(self.manifests, settings.height, settings.width)
        if recipe is not None and not forced:
            recipe.check(self.model_id, settings, called)
        if options.get("preset") == RECOMMENDED and not options.keys() & set(RECIPE_OPTIONS):
            best = self.recipe(RECOMMENDED_EVALUATIONS)
            if best is not None and not best.differences(self.model_id, settings):
                return Settings.resolve(self.defaults, {**best.said(), **_without(options, "preset")})
        return settings

    def recipe(self, evaluations: int) -> Recipe | None:
        """Returns the recipe that the model brings for so many evaluations, in its folder ``recipes``; None without one.

        Raises:
          ValueError: the file is something else.
          OSError: it cannot be read.
        """
        name = f"{RECIPES}/recipe-{evaluations}.json"
        try:
            text = place_of(self.directory).data(name, manifest_file.MAX_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Recipe.parse(text, self.directory / name)

    def presets(self) -> list[str]:
        """Returns the names of the presets that this model can be sampled by."""
        return [name for name in PRESETS if (count := tuned_evaluations(name)) is None or self.recipe(count) is not None]

    def _with_recipe(self, options: Mapping[str, Any]) -> tuple[Mapping[str, Any], Recipe | None, str]:
        """Returns the options with those of the recipe that they name behind them, the recipe, and what it is called.

        Raises:
          ValueError: recipe and preset are both given, or the recipe that is forced or asked for is not there.
          FileNotFoundError: there is no such file.
        """
        path, preset = options.get("recipe"), options.get("preset")
        count = tuned_evaluations(preset)
        rest = _without(options, "recipe", "force_recipe", *(["preset"] if count else []))
        if path is not None and preset is not None:
            raise ValueError("recipe and preset both say how to sample; choose one.")
        if path is not None:
            recipe = Recipe.read(path)
            return {**recipe.said(), **rest}, recipe, os.fspath(path)
        if count is not None:
            found = self.recipe(count)
            if found is None:
                command = f"sora-jax tune {self.directory} --evaluations {count} --prompts FILE -o {self.directory / RECIPES}"
                raise ValueError(f"{self.directory} brings no recipe for the preset {preset}; make it with: {command}")
            return {**found.said(), **rest}, found, f"preset {preset}"
        if options.get("force_recipe"):
            raise ValueError("force_recipe says which recipes are used, but there is none; give recipe as well.")
        return rest, None, ""


def _without(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def tokenizer_path(directory: Location, name: str | None) -> Location:
    """Returns the tokenizer of a model directory; ``name`` is what its index says, if anything.

    Raises:
      FileNotFoundError: there is none.
    """
    candidates = [name] if name else _TOKENIZERS
    for candidate in candidates:
        if place_of(directory).has(candidate):
            return directory / candidate
    raise FileNotFoundError(f"{directory} has no tokenizer; put {' or '.join(candidates)} there.")


def _refuse_missing_networks(directory: Path) -> None:
    """Raises ModelDirectoryError with the commands that add the networks of which several, but not all, are missing."""
    missing = [network for network in NETWORKS if not (directory / network).exists()]
    if 1 < len(missing) < len(NETWORKS):
        commands = " and ".join(f"sora-jax convert {network} SOURCE {directory}" for network in missing)
        raise ModelDirectoryError(f"{directory} has no {' and no '.join(missing)}; add them with: {commands}")


def _check_size(manifests: Mapping[str, Manifest], height: int, width: int) -> None:
    frame_size.check_multiple(manifests["vae"].config, manifests["stdit3"].config.patch_size[1], height, width)


def _check_defaults(defaults: Mapping[str, Any], manifests: Mapping[str, Manifest]) -> None:
    """Refuses defaults that a caller could not ask for.

    Raises:
      ValueError: says which, and what is expected.
    """
    values = said(defaults, OPTIONS)
    for name in _NO_DEFAULTS & values.keys():
        raise ValueError(f"defaults hold {name}, which only a caller may ask for; leave it out.")
    for name, value in values.items():
        OPTIONS[name].check(value)
    size = [values[name] for name in frame_size.NUMBERS if name in values]
    if len(size) == 1:
        raise ValueError("defaults have a height or a width alone; expected both.")
    if size:
        _check_size(manifests, *size)


def _listed(words: Sequence[str], last: str) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
