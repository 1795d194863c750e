"""What is to be compiled, and for which hardware: plain data that travels to the process that compiles.

Invariant: a `Request` survives JSON; the model is named, not held, so the other process reads the same files.  JAX is not
imported.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

from sora_jax.config import ModelConfig, open_sora_1_2
from sora_jax.devices.axes import WEIGHTS, check_weights, parse_axes
from sora_jax.devices.compute_dtype import choose_dtype
from sora_jax.devices.names import check_attention
from sora_jax.pipeline import frame_size
from sora_jax.pipeline.model_file import ModelFile, model_path
from sora_jax.pipeline.settings import Settings
from sora_jax.planning.targets import Target, parse_target
from sora_jax.storage.directory import Manifest
from sora_jax.storage.location import absolute

PRESETS: Mapping[str, ModelConfig] = MappingProxyType({"open-sora-1.2": open_sora_1_2})
# What can be compiled, and what each program is.
PROGRAMS: Mapping[str, str] = MappingProxyType(
    {
        "text": "the text encoder on one caption",
        "evaluation": "one evaluation of the transformer, a scan over its pairs of blocks",
        "sampler": "the whole sampler, one loop over all steps with every pair of blocks written out",
        "decode": "the decoder on one chunk of frames",
    }
)
DEFAULT_PROGRAMS = ("text", "evaluation", "decode")
OPTIMISATIONS = ("fast", "full")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Programs of a generation, and the hardware to compile them for.

    Attributes:
      model: model directory, ``pocket``, or a name of `PRESETS`: the architecture without files.
      target: name of the hardware, see `targets.parse_target`.
      options: of the clip, as `Pipeline` takes them; dtype ``auto`` is bfloat16.
      attention: a name of `devices.names`.
      programs: some of `PROGRAMS`.
      optimisation: the compiler's effort on a TPU: ``fast`` takes about a quarter of the time of ``full`` and overestimates
        temporaries by up to a half; another platform knows no such difference.
      mesh: axes as `Pipeline` takes them, over all devices of the target; None: one device.
      weights: of the transformer on a mesh, as `Pipeline` takes them.
    """

    model: str
    target: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attention: str = "auto"
    programs: Sequence[str] = DEFAULT_PROGRAMS
    optimisation: str = "fast"
    mesh: str | None = None
    weights: str = WEIGHTS[0]

    def __post_init__(self) -> None:
        target = parse_target(self.target)
        if self.mesh is not None and (asked := math.prod(parse_axes(self.mesh).values())) != target.num_devices:
            raise ValueError(
                f"mesh {self.mesh!r} has {asked} devices, but {target.text} has {target.num_devices}; expected axes whose "
                f"product is {target.num_devices}."
            )
        check_weights(self.weights, self.mesh)
        unknown = [name for name in self.programs if name not in PROGRAMS]
        if unknown or not self.programs:
            got = repr(unknown[0]) if unknown else "none"
            raise ValueError(f"programs hold {got}; expected some of {', '.join(PROGRAMS)}.")
        check_attention(self.attention)
        if self.optimisation not in OPTIMISATIONS:
            raise ValueError(f"optimisation is {self.optimisation!r}; expected {' or '.join(OPTIMISATIONS)}.")

    @property
    def hardware(self) -> Target:
        """The hardware that is named."""
        return dataclasses.replace(parse_target(self.target), mesh=self.mesh)

    def to_json(self) -> str:
        """Returns one line of JSON; the model's path is absolute in it."""
        model = self.model if self.model in PRESETS else str(absolute(model_path(self.model)))
        return json.dumps({**dataclasses.asdict(self), "model": model, "programs": list(self.programs)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Returns what `to_json` wrote."""
        return cls(**json.loads(text))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The architecture of a model and the dtypes of its files.

    Attributes:
      config: of the three networks.
      settings: of the clip.
      manifests: of the files by network; None: there are none, and weights are stored in the dtype that is computed in.
    """

    config: ModelConfig
    settings: Settings
    manifests: Mapping[str, Manifest] | None

    @classmethod
    def read(cls, name: str | os.PathLike[str], options: Mapping[str, Any]) -> Self:
        """Returns the model of a name, and the clip that the options mean for it.

        Raises:
          ModelDirectoryError: a network is missing or damaged.
          ValueError: an option is wrong, or the model cannot make the size.
        """
        if str(name) in PRESETS:
            config, settings = PRESETS[str(name)], _on_accelerators(Settings.resolve({}, options))
            frame_size.check_multiple(config.vae, config.stdit3.patch_size[1], settings.height, settings.width)
            return cls(config=config, settings=settings, manifests=None)
        file = ModelFile.read(name)
        config = ModelConfig(**{network: manifest.config for network, manifest in file.manifests.items()})
        return cls(config=config, settings=_on_accelerators(file.resolve(options)), manifests=file.manifests)


def _on_accelerators(settings: Settings) -> Settings:
    """Returns the settings with the dtype that ``auto`` is on a GPU or a TPU."""
    return dataclasses.replace(settings, dtype=choose_dtype(settings.dtype, platform="tpu"))
